"""A report of runs that go on: written again whenever a run has taken a step."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vpd.errors import ConfigError, StorageError
from vpd.report.console import Terminal
from vpd.report.html.page import Options, write_report
from vpd.run_folder import state
from vpd.run_folder.reading import METRICS, find_runs


def runs_in(paths: Sequence[Path]) -> list[Path]:
    """The run folders that these are or hold, each once.  Raises StorageError where one holds none."""
    found: list[Path] = []
    for path in paths:
        runs = find_runs(path)
        if not runs:
            raise StorageError(
                f"{path} holds no run",
                got="no run.json" if path.is_dir() else "no such folder",
                expected="the output_dir of vpd train, or a folder with such folders in it",
            )
        found += [run for run in runs if run not in found]
    return found


def watch(
    folders: Sequence[Path],
    output: Path,
    options: Options,
    *,
    every: int,
    console: Terminal,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write the report every so many seconds in which a run has gone on, until all are done or Ctrl-C is pressed.

    The page loads itself again until the last version, which does not.  Raises ConfigError and StorageError.
    """
    if every < 1:
        raise ConfigError("--every is too small", got=every, expected="at least 1 second")
    written: object = None
    try:
        while not all(_is_done(folder) for folder in folders):
            now = [_last_change(folder) for folder in folders]
            if now != written:
                write_report(folders, output, dataclasses.replace(options, reload=every))
                written = now
                console.print(f"{time.strftime('%H:%M:%S')}  {output}", highlight=False)
            wait(every)
    except KeyboardInterrupt:
        console.print("No longer watched.")
    write_report(folders, output, options)


def _is_done(folder: Path) -> bool:
    found = state.read(folder)
    return found is not None and found.phase == "done"


def _last_change(folder: Path) -> float:
    path = folder / METRICS
    return path.stat().st_mtime if path.is_file() else 0.0
