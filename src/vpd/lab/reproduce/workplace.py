"""Where one run is made.  A long one is saved as it goes, and continued where it was stopped."""

import contextlib
import glob
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpd.errors import StorageError
from vpd.lab.reproduce.versions import maker_version
from vpd.lab.runs import saved_loop
from vpd.loop import Loop, Observer
from vpd.recipes.assemble import Parts
from vpd.recipes.loops import make_loop
from vpd.run_folder.files import FileSystem, prepare_folder
from vpd.run_folder.lock import LockedError, is_locked, locked

UNFINISHED = ".unfinished"
DO = "Mend that, or choose another --output_dir; the same command goes on from what was saved."


@dataclass
class Workplace:
    """The folder of a run while it is made: what is computed before its first iteration, and its checkpoints.

    ``is_kept``: a long run, which is saved in it as it goes.
    ``seconds`` and ``cpu_seconds`` are the time that an earlier process took for what is taken over from it.
    """

    folder: Path
    is_kept: bool
    seconds: float = field(default=0.0, init=False)
    cpu_seconds: float = field(default=0.0, init=False)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gave, plain data, when the run was begun."""
        path = self.folder / f"{name}.json"
        try:
            if path.is_file():
                found = json.loads(path.read_text())
                self.seconds += found["seconds"]
                self.cpu_seconds += found["cpu_seconds"]
                return found["made"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(f"cannot read {path}", got=str(error), do=f"Remove {self.folder}.") from error
        began, began_cpu = time.perf_counter(), time.process_time()
        made = make()
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
        text = json.dumps({"made": made, **spent})
        FileSystem().write_atomically(path, text.encode())
        return json.loads(text)["made"]

    def loop(self, parts: Parts, observers: Sequence[Observer]) -> Loop:
        """The run's loop, set to its newest checkpoint.  Raises StorageError."""
        return saved_loop(parts, observers, self.folder) if self.is_kept else make_loop(parts, observers, output=None)


def folder_beside(file: Path) -> Path:
    """Where the run that will be ``file`` is made; each version of the code has its own."""
    return file.with_suffix(f".{maker_version()}{UNFINISHED}")


def clear(file: Path) -> None:
    """Remove the places in which ``file`` was being made, if it stands."""
    if file.is_file():
        for folder in file.parent.glob(f"{glob.escape(file.stem)}.*{UNFINISHED}"):
            if not is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def is_being_made(file: Path) -> bool:
    """Whether another process makes the run that will be ``file`` at this moment."""
    return is_locked(folder_beside(file))


def left_over(folder: Path, wanted: Collection[Path]) -> str:
    """A line about unfinished runs in ``folder`` that are not those of the files ``wanted``; empty without any.

    Those that another process is making at this moment are not counted.
    """
    ours = {folder_beside(file) for file in wanted}
    others = [path for path in folder.glob(f"*{UNFINISHED}") if path not in ours and not is_locked(path)]
    size = sum(file.stat().st_size for path in others for file in path.rglob("*") if file.is_file())
    return (
        f"Unfinished runs of other plans or of other versions of the code: {len(others)}, {size / 1e9:.1f} GB "
        f"({folder}/*{UNFINISHED})"
        if others
        else ""
    )


@contextlib.contextmanager
def workplace(file: Path, *, is_kept: bool) -> Iterator[Workplace]:
    """A folder for the run that will be ``file``, beside it until that is written; it stays only if it is kept.

    Raises LockedError: another process makes the same run; StorageError: the folder cannot be written.
    """
    folder = folder_beside(file)
    try:
        prepare_folder(folder)
        with locked(folder):
            try:
                yield Workplace(folder, is_kept)
            finally:
                if not is_kept:
                    shutil.rmtree(folder, ignore_errors=True)
    except LockedError:
        raise
    except StorageError as error:
        if isinstance(error.__cause__, OSError):
            raise StorageError(error.problem, do=DO) from error.__cause__
        raise
    clear(file)
