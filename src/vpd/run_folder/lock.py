"""A lock on a run folder: one process trains in it, and the lock ends with that process, however it ends.

``flock`` on ``.lock``.  On NFS, Linux turns it into a lock of the server, which holds between machines.  One that is
mounted with ``nolock`` or ``local_lock=flock`` cannot keep a process of another machine out.
"""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vpd.errors import StorageError
from vpd.run_folder.files import storage_errors

FILE = ".lock"
TRIES, PAUSE = 6, 0.05  # a look of another process (is_locked) may hold the lock for a moment
_held: set[int] = set()


class LockedError(StorageError):
    """Another process holds the folder at this moment."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process.  Raises LockedError if another run holds it.

    Where the file system has no locks there is a warning, and nothing is held.
    """
    with storage_errors(folder / FILE):
        descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        if descriptor in _held:  # a forked child has closed it already
            _held.discard(descriptor)
            with contextlib.suppress(OSError):  # at once, even if a child that was just forked off has not let go yet
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder at this moment, as far as the file system can tell."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)  # which gives a lock back at once
    return False


def _lock(descriptor: int, folder: Path) -> None:
    try:
        _take(descriptor)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise LockedError(
            f"another process is training in {folder}",
            got=holder or None,
            do="Wait for its end, or choose another run.output_dir.",
        ) from error
    except OSError as error:
        logging.getLogger("vpd").warning(
            "%s is on a file system without locks (%s): nothing keeps a second process out of it",
            folder,
            error.strerror,
        )
        return
    with storage_errors(folder / FILE):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _take(descriptor: int) -> None:
    """Take the lock.  Raises BlockingIOError if another process keeps it."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(PAUSE)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release_in_child() -> None:
    """A process that was forked off, and may outlive its parent, does not hold the parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
