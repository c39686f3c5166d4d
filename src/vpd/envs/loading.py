"""Loads your own objects that settings name, ``path/to/file.py:name`` or ``package.module:name``; imports no torch."""

import hashlib
import importlib
import importlib.util
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from vpd.envs import wrap_user_errors
from vpd.errors import ConfigError, VPDError, nearest
from vpd.printable import shown
from vpd.settings import expand_path

STAMP = "__vpd_file__"  # in a module: the file it was made of, as it was then
RUNNING: set[Path] = set()  # files that are run at this moment, to load what they define
FOLDERS: set[str] = set()  # of files that were loaded, on sys.path


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
    """A file as a module, run once; its name cannot shadow another module's.

    It may import its neighbours, as ``python path`` may, and so may a process that it starts: its folder is searched
    after what is installed, and the module has the file's own name unless another module has that.
    """
    source = Path(expand_path(path, setting)).resolve()
    if not source.is_file():
        raise ConfigError(f"{setting}: no file {path}", do=f"Write {setting} as path/to/file.py:name.")
    what = f"{path} (named by {setting})"
    _make_importable(source.parent)
    name = _module_name(source, what)
    known = sys.modules.get(name)
    if known is not None and vars(known).get(STAMP) == _stamp(source):
        return known
    if source in RUNNING:
        raise ConfigError(
            f"{what} starts a run while it is itself loaded for one",
            do="Put what starts it under: if __name__ == '__main__'.",
        )
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    RUNNING.add(source)
    try:
        wrap_user_errors(partial(spec.loader.exec_module, module), what, do="Correct that file.", loading=True)
    except VPDError:
        del sys.modules[name]
        raise
    finally:
        RUNNING.discard(source)
    vars(module)[STAMP] = _stamp(source)
    return module


def _stamp(source: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    found = source.stat()
    return str(source), found.st_mtime_ns, found.st_size


def _module_name(source: Path, what: str) -> str:
    """The name under which this file is imported, so that a process it starts finds its functions: its own or, in a
    package, that of the package's module.  Where another module has that, a name that no other has."""
    importlib.invalidate_caches()
    parts, folder = [source.stem], source.parent
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        parts, folder = [folder.name, *parts], folder.parent
    if len(parts) > 1:
        _make_importable(folder)
    name = ".".join(parts)
    if all(map(str.isidentifier, parts)):
        loaded = sys.modules.get(name)
        find = partial(importlib.util.find_spec, name)
        spec = (
            loaded.__spec__
            if loaded is not None
            else wrap_user_errors(find, what, do="Correct that file.", loading=True)
        )
        if spec is not None and spec.origin == str(source):
            return name
    return f"{source.stem}_{hashlib.blake2b(str(source).encode(), digest_size=4).hexdigest()}"


def _make_importable(folder: Path) -> None:
    """Search ``folder`` after all that is installed, and before the folders of files that were loaded earlier, whose
    modules do not stand for modules of the same name in this one."""
    place = str(folder)
    if place not in FOLDERS and place in sys.path:  # the user put it there
        return
    for name in sorted(sys.modules, reverse=True):  # a module's parts before it
        top = name.partition(".")[0]
        taken = (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
        if taken and _home(sys.modules.get(top)) in FOLDERS - {place}:
            del sys.modules[name]
    first = min((sys.path.index(known) for known in FOLDERS if known in sys.path), default=len(sys.path))
    if place in sys.path:
        sys.path.remove(place)
    sys.path.insert(first, place)
    FOLDERS.add(place)


def _home(module: ModuleType | None) -> str | None:
    """The folder in which a module's file, or a package's folder, lies."""
    file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
    if not isinstance(file, str):
        return None
    source = Path(file)
    return str(source.parent.parent if source.name == "__init__.py" else source.parent)


def _module(name: str, setting: str) -> ModuleType:
    """An installed module, or one of the working directory, which is searched last."""
    top = name.partition(".")[0]

    def found() -> bool:
        spec = wrap_user_errors(partial(importlib.util.find_spec, top), f"{setting}: {name!r}", loading=True)
        return spec is not None

    is_name = re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) is not None
    if is_name and not found():
        _make_importable(Path.cwd())
        importlib.invalidate_caches()
    if not is_name or not found():
        raise ConfigError(
            f"{setting}: no module {name!r}", do="Install its package, or give a file: path/to/file.py:name."
        )
    return wrap_user_errors(partial(importlib.import_module, name), f"{name} (named by {setting})", loading=True)
