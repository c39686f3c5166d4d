"""Damages to a file, as a disk, a copy or a user's hand makes them."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path


def flip(path: Path, draw: random.Random) -> None:
    """One bit is another."""
    _change(path, draw, lambda byte: byte ^ (1 << draw.randrange(8)))


def high(path: Path, draw: random.Random) -> None:
    """A byte that no ASCII text has: in a text this never makes another valid value."""
    _change(path, draw, lambda byte: byte | 0x80 if byte < 0x80 else 0xFF)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(max(path.stat().st_size, 1)))


def empty(path: Path, draw: random.Random) -> None:
    os.truncate(path, 0)


def zeros(path: Path, draw: random.Random) -> None:
    """A stretch of the file reads as zeros, as after a crash of a file system."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(max(len(data), 1))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def garbage(path: Path, draw: random.Random) -> None:
    """Bytes that are no text at the end."""
    with path.open("ab") as file:
        file.write(bytes([0xFF, 0xFE, *draw.randbytes(64)]))


def removed(path: Path, draw: random.Random) -> None:
    path.unlink()


def folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path, draw: random.Random) -> None:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)


Damage = Callable[[Path, random.Random], None]
#: of files whose content is checked by a hash, or is not to be changed by a bit
ANY: tuple[Damage, ...] = (flip, flip, flip, high, cut, empty, zeros, garbage, removed, folder, fifo, loop)
#: of texts where one bit may make another valid value that nobody can know to be wrong
TEXT: tuple[Damage, ...] = (high, cut, empty, zeros, garbage, removed, folder, fifo, loop)


def restore(path: Path, backup: Path) -> None:
    """Put a file back as it was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    shutil.copy2(backup, path)


def _change(path: Path, draw: random.Random, change: Callable[[int], int]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        place = draw.randrange(len(data))
        data[place] = change(data[place])
        path.write_bytes(data)
