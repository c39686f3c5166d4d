"""Writing files so that a kill or a full disk never costs what was there before.

A file or folder is written under a hidden name in the same folder, flushed to the disk, and renamed; a line is appended
and flushed.  Whatever fails is one :class:`~vpd.errors.StorageError`.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError

from vpd.errors import StorageError, VPDError
from vpd.ranks import OneProcess, Ranks, on_first, together

Fill: TypeAlias = Callable[[Path], None]

PARTIAL, OLD = ".vpd-partial", ".vpd-old"
ALONE = OneProcess()
CHOOSE = "Choose another run.output_dir."
MEND = "Free space, mend the permissions or choose another place; --run.resume true continues a run."


class FileSystem:
    """What a run does to the disk.

    The last five methods are the only ones that change anything; a fake overrides them to interrupt a run anywhere.
    """

    def write_atomically(self, path: Path, content: bytes | Fill) -> None:
        """Write a file: its bytes, or a function that writes to the path it is given.  Raises StorageError."""
        partial = _hidden(path, PARTIAL)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write(partial, content)
            self.sync(partial)
            self.rename(partial, path)
            self.sync(path.parent)

    def write_folder(self, path: Path, fill: Fill, ranks: Ranks = ALONE) -> None:
        """Write a folder with all that ``fill`` puts into the one it is given.  Raises StorageError.

        Several ``ranks`` call this together.  ``fill`` is called on each with the same folder; the first does the rest.
        """
        partial = self._filled(path, fill, ranks)
        on_first(ranks, "folder in its place", lambda: self.move_folder(partial, path))

    def write_folders(self, parent: Path, fill: Fill, ranks: Ranks = ALONE) -> None:
        """Write into ``parent`` every folder that ``fill`` makes in the one it is given, as :meth:`write_folder`."""
        partial = self._filled(parent / "new", fill, ranks)

        def move() -> None:
            for folder in sorted(partial.iterdir()):
                self.move_folder(folder, parent / folder.name)
            with storage_errors(parent):
                self.delete(partial)

        on_first(ranks, "folders in their places", move)

    def move_folder(self, source: Path, target: Path) -> None:
        """Put a folder in the place of another, which stays, hidden, until the new one is there."""
        old = _hidden(target, OLD)
        with storage_errors(target):
            if os.path.lexists(target):
                self.delete(old)
                self.rename(target, old)
            self.rename(source, target)
            self.sync(target.parent)
            self.delete(old)

    def append_line(self, path: Path, line: str) -> None:
        """Append a line, on the disk when this returns; where it does not fit, nothing is added (StorageError)."""
        with storage_errors(path):
            self.append(path, line.encode() + b"\n")

    def remove(self, path: Path) -> None:
        """Remove a file or folder; half of it is never left under its name.  Raises StorageError."""
        partial = _hidden(path, PARTIAL)
        with storage_errors(path):
            self.delete(partial)
            self.rename(path, partial)
            self.delete(partial)

    def repair(self, folder: Path) -> None:
        """After a kill: put back what was to be replaced and was not, and remove what was begun in ``folder``."""
        with storage_errors(folder):
            for old in folder.glob(f".*{OLD}"):
                target = old.with_name(old.name[1 : -len(OLD)])
                if os.path.lexists(target):
                    self.delete(old)
                else:
                    self.rename(old, target)
            for partial in folder.glob(f".*{PARTIAL}"):
                self.delete(partial)

    def _filled(self, path: Path, fill: Fill, ranks: Ranks) -> Path:
        """A new hidden folder next to ``path``, filled by ``fill`` and flushed; removed after an error."""
        partial = _hidden(path, PARTIAL)

        def begin() -> None:
            with storage_errors(path):
                self.delete(partial)
                partial.mkdir(parents=True)

        def write() -> None:
            with storage_errors(path):
                self.write(partial, fill)

        def sync() -> None:
            with storage_errors(path):
                self.sync(partial)

        try:
            on_first(ranks, "new folder", begin)
            together(ranks, "filling a folder", write)
            on_first(ranks, "folder on the disk", sync)
        except VPDError:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return partial

    def write(self, path: Path, content: bytes | Fill) -> None:
        """Write a new file, or fill a new folder, wherever it is."""
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)

    def append(self, path: Path, data: bytes) -> None:
        """Add bytes to the end of a file and flush them; after an OSError the file is what it was.

        A pipe in its place is an OSError too, where opening it would wait for a reader.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename; a file at ``target`` is replaced."""
        os.replace(source, target)

    def delete(self, path: Path) -> None:
        """Delete a file, a link or a folder with all in it; nothing happens where there is none."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def sync(self, path: Path) -> None:
        """Flush a file, or a folder with everything in it that a partial name marks as new."""
        if path.name.endswith(PARTIAL) and path.is_dir():
            for inner in path.rglob("*"):
                _sync(inner)
        _sync(path)


def write_text(path: Path, text: str, do: str | None = None) -> None:
    """Write a text that somebody asked for, its folder too.  Raises StorageError."""
    with storage_errors(path, do):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def rewind_lines(path: Path, step: int, files: FileSystem) -> None:
    """Keep a file's lines up to ``step`` (each is a JSON object with a ``step``).

    A line that cannot be read is dropped, with a warning unless a kill cut it off.

    Raises StorageError; the file is then what it was.
    """
    if not path.is_file():
        return
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    unreadable = sum(number is None for number, line in zip(steps, lines, strict=True) if line.endswith(b"\n"))
    if unreadable:
        logging.getLogger("vpd").warning("%s: dropped %d lines that cannot be read", path, unreadable)
    kept = [line for number, line in zip(steps, lines, strict=True) if number is not None and number <= step]
    after = b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept)
    if after != before:
        files.write_atomically(path, after)


def require_writable(path: Path, do: str = CHOOSE) -> None:
    """Prove that a file or folder can be made there, and leave nothing behind.  Raises StorageError."""
    try:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise StorageError(f"cannot write to {path}", got=error.strerror, do=do) from error


def prepare_folder(folder: Path, do: str = CHOOSE) -> None:
    """Make a folder and prove that it can be written.  Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 65536)
            os.fsync(probe.fileno())
    except OSError as error:
        raise StorageError(f"cannot write to {folder}", got=error.strerror, do=do) from error


@contextlib.contextmanager
def storage_errors(path: Path, do: str | None = MEND) -> Iterator[None]:
    """Turn what libraries raise where a disk is full or a folder not writable into one StorageError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(
            f"cannot write {path}",
            got=" ".join(reason.split())[:200],
            do=do,
        ) from error


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(line: bytes) -> int | None:
    """The step of a line, None if it has none."""
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = data.get("step") if isinstance(data, dict) else None
    return step if isinstance(step, int) else None
