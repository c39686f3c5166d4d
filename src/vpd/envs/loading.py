"""Loads your own objects that settings name, ``path/to/file.py:name`` or ``package.module:name``; imports no torch."""

import hashlib
import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from vpd.envs import Announcing, Env, wrap_user_errors
from vpd.errors import ConfigError, nearest
from vpd.printable import shown


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
            f"{setting} names no object", got=shown(spec), expected="path/to/file.py:name or package.module:name"
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
