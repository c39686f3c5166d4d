"""Where one run is made.  A long one is saved as it goes, and continued where it was stopped."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.errors import StorageError
from vpd.loop import Loop, Observer
from vpd.recipes.assemble import Parts
from vpd.recipes.train import make_loop, prepare_folder, saved_loop
from vpd.run_folder.files import FileSystem
from vpd.run_folder.lock import locked

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Workplace:
    """The folder of a run while it is made: what is computed before its first iteration, and its checkpoints."""

    folder: Path
    is_kept: bool

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gave, plain data, when the run was begun."""
        path = self.folder / f"{name}.json"
        try:
            if path.is_file():
                return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {path}", got=str(error), do=f"Remove {self.folder}.") from error
        made = make()
        FileSystem().write_atomically(path, json.dumps(made).encode())
        return json.loads(json.dumps(made))

    def loop(self, parts: Parts, observers: Sequence[Observer]) -> Loop:
        """The run's loop, set to its newest checkpoint.  Raises StorageError."""
        return saved_loop(parts, observers, self.folder) if self.is_kept else make_loop(parts, observers, output=None)


def folder_beside(file: Path) -> Path:
    """Where the run that will be ``file`` is made, if it is a long one."""
    return file.with_suffix(UNFINISHED)


def clear(file: Path) -> None:
    """Remove what a process left that was killed when it had just written ``file``."""
    if file.is_file():
        shutil.rmtree(folder_beside(file), ignore_errors=True)


def left_over(folder: Path, wanted: Collection[Path]) -> str:
    """A line about unfinished runs in ``folder`` that are not those of the files ``wanted``; empty without any."""
    ours = {folder_beside(file) for file in wanted}
    others = [path for path in folder.glob(f"*{UNFINISHED}") if path not in ours]
    size = sum(file.stat().st_size for path in others for file in path.rglob("*") if file.is_file())
    return (
        f"Unfinished runs of other plans or of other versions of the code: {len(others)}, {size / 1e9:.1f} GB "
        f"({folder}/*{UNFINISHED})"
        if others
        else ""
    )


@contextlib.contextmanager
def workplace(file: Path, *, is_kept: bool) -> Iterator[Workplace]:
    """A folder for the run that will be ``file``: beside it until that is written, or a temporary one.

    Raises StorageError: it cannot be written, or another process makes the same run.
    """
    if not is_kept:
        with tempfile.TemporaryDirectory(prefix="vpd-run-") as temporary:
            yield Workplace(Path(temporary), is_kept)
        return
    folder = folder_beside(file)
    prepare_folder(folder)
    with locked(folder):
        yield Workplace(folder, is_kept)
    clear(file)
