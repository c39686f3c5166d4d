"""Loads your own objects that settings name, ``path/to/file.py:name`` or ``package.module:name``; imports no torch."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from vpd.envs import Announcing, Env, wrap_user_errors
from vpd.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class CustomEnv:
    """An environment of your own: ``name`` is ``my_env.py:MyEnv``; ``options`` are passed to the class."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def make_env(spec: Any) -> Env:
    """The environment of a config's section ``env``: a :class:`CustomEnv` is loaded and made, others are environments.

    Raises ConfigError for a name or key that does not exist, EnvError if the file or the class raises.
    """
    if not isinstance(spec, CustomEnv):
        env: Env = spec
        return env
    kind, name = load_object(spec.name, "env.name"), spec.name.rpartition(":")[2]
    if not callable(kind):
        raise ConfigError(f"env.name: {name} is not a class", got=repr(kind)[:80], expected="an environment's class")
    parameters = inspect.signature(kind).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in spec.options:
        if key not in parameters and not takes_all:
            raise ConfigError(f"unknown key env.{key} for {name}", do=nearest(key, parameters))
    made: Env = wrap_user_errors(partial(kind, **spec.options), f"{name}(...)")
    return made


def announcements(env: Env) -> list[str]:
    """The lines that an environment wants printed when a run starts.  Raises EnvError if it raises."""
    if not isinstance(env, Announcing):
        return []
    return wrap_user_errors(lambda: [str(line) for line in env.announce()], "announce()")


def load_object(spec: str, setting: str) -> Any:
    """The object that ``spec`` names.  Raises ConfigError if there is none, EnvError if its file raises."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(
            f"{setting} names no object", got=repr(spec), expected="path/to/file.py:name or package.module:name"
        )
    module = _file(place, setting) if place.endswith(".py") else _module(place, setting)
    if not hasattr(module, name):  # not vars(module): a module may make its names when they are asked for
        own = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(f"{setting}: {place} has no {name}", do=nearest(name, own))
    return getattr(module, name)


def _file(path: str, setting: str) -> ModuleType:
    """A file as a module, run once; its name cannot shadow another module's."""
    source = Path(path).resolve()
    if not source.is_file():
        raise ConfigError(f"{setting}: no file {path}", do=f"Write {setting} as path/to/file.py:name.")
    name = f"{source.stem}_{hashlib.blake2b(str(source).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    wrap_user_errors(partial(spec.loader.exec_module, module), f"{path} (named by {setting})")
    return module


def _module(name: str, setting: str) -> ModuleType:
    if wrap_user_errors(partial(importlib.util.find_spec, name.partition(".")[0]), f"{setting}: {name!r}") is None:
        raise ConfigError(
            f"{setting}: no module {name!r}", do="Install its package, or give a file: path/to/file.py:name."
        )
    return wrap_user_errors(partial(importlib.import_module, name), f"{name} (named by {setting})")
