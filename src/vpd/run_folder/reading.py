"""What a run folder holds, read afterwards or while the run goes on: settings, progress, metrics, alarms, rollouts.

Nothing here loads torch, and nothing writes.  A line or file that cannot be read (a run may be writing it, or it is
damaged) is left out with a warning.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpd.errors import StorageError
from vpd.run_folder import state
from vpd.run_folder.best import greater_is_better
from vpd.run_folder.state import Phase
from vpd.types import Metrics

log = logging.getLogger("vpd")

METRICS, ALARMS = "metrics.jsonl", "alarms.jsonl"
ROLLOUTS, TOKENS = "rollouts", "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run folder's small files.

    ``settings`` holds one mapping for each section (``feedback``: a list of them); ``phase`` and ``step`` are those of
    ``run.json``; ``metrics`` one mapping for each step, oldest first, with the step under ``"step"`` and numbers that
    were not finite as NaN; ``alarms`` have ``step``, ``rule``, ``saw`` and ``do``.
    """

    folder: Path
    settings: Mapping[str, Any]
    phase: Phase
    step: int
    metrics: tuple[Metrics, ...]
    alarms: tuple[Mapping[str, Any], ...] = ()

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric wherever it was measured and is finite, oldest first."""
        found = [(int(line["step"]), line[name]) for line in self.metrics if name in line]
        return [(step, value) for step, value in found if math.isfinite(value)]

    def names(self) -> list[str]:
        """The names of all metrics, in the order in which they first appear."""
        return list(dict.fromkeys(name for line in self.metrics for name in line if name != "step"))

    def last(self, name: str) -> float:
        """The newest finite value of a metric, NaN without one."""
        return next((value for _, value in reversed(self.series(name))), math.nan)

    def best(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the best step by a metric, the first of equal ones; None where it was not measured.

        The evaluation before the first step does not count.
        """
        run = self.settings.get("run", {})
        chosen = run.get("greater_is_better") if name == run.get("metric_for_best_model") else None
        sign = 1 if greater_is_better(name, chosen) else -1
        trained = [(step, value) for step, value in self.series(name) if step > 0]
        return max(trained, key=lambda point: sign * point[1], default=None)

    @property
    def method(self) -> str:
        """The method's name; of one that was passed as an object its class."""
        algorithm = self.settings.get("algorithm", {})
        return str(algorithm.get("name") or algorithm.get("object") or "?")


def read_run(folder: Path) -> RunRecord:
    """The settings, progress, metrics and alarms of a run.

    Raises StorageError: the folder holds no run, or its ``run.json`` is damaged.
    """
    found = state.read(folder)
    if found is None:
        raise StorageError(
            f"{folder} holds no run",
            got="no run.json" if folder.is_dir() else "no such folder",
            expected="the output_dir of vpd train",
        )
    metrics: dict[int, Metrics] = {}
    for line in map(_numbers, _lines(folder / METRICS)):  # two of a step whose evaluation was made later
        metrics.setdefault(int(line["step"]), {}).update(line)
    return RunRecord(
        folder=folder,
        settings=found.settings,
        phase=found.phase,
        step=found.step,
        metrics=tuple(metrics[step] for step in sorted(metrics)),
        alarms=tuple(_lines(folder / ALARMS)),
    )


def find_runs(root: Path) -> list[Path]:
    """Every run folder at or below ``root``, sorted; what lies inside of a run folder is not looked at."""
    if holds_run(root):
        return [root]
    inner = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()) if root.is_dir() else []
    return [run for path in inner if not path.name.startswith(".") for run in find_runs(path)]


def holds_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / state.FILE).is_file()


def rollout_steps(folder: Path) -> list[int]:
    """The steps whose rollouts are there, oldest first."""
    return _steps(folder / ROLLOUTS)


def read_rollouts(folder: Path, steps: Iterable[int] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The rollouts of some steps (None: all): one row for each attempt and, after it, each of its retries.

    ``columns`` None: all; one that no file has is left out.  Without any step the table is empty.
    """
    return _read(folder / ROLLOUTS, steps, columns)


def read_tokens(folder: Path, steps: Iterable[int] | None = None) -> pa.Table:
    """The recorded tokens of some steps (None: all): a sample of each step's rows, named by ``step`` and ``row``.

    ``row`` counts the rows of the step's rollouts from 0.  :mod:`vpd.run_folder.token_tables` has the columns.
    """
    return _read(folder / TOKENS, steps, None)


def recorded_tokens(folder: Path, step: int) -> dict[int, dict[str, Any]]:
    """The recorded tokens of a step by the row of its rollouts; empty where none were recorded."""
    if not step_file(folder / TOKENS, step).is_file():
        return {}
    return {row["row"]: row for row in read_tokens(folder, [step]).to_pylist()}


def step_file(folder: Path, step: int) -> Path:
    """The file of a step in ``rollouts/`` or ``tokens/``."""
    return folder / f"step-{step:06d}.parquet"


def _steps(folder: Path) -> list[int]:
    names = [path.stem.removeprefix("step-") for path in folder.glob("step-*.parquet")]
    return sorted(int(name) for name in names if name.isdecimal())


def _read(folder: Path, steps: Iterable[int] | None, columns: Sequence[str] | None) -> pa.Table:
    tables = []
    for step in _steps(folder) if steps is None else steps:
        path = step_file(folder, step)
        try:
            with pq.ParquetFile(path) as file:
                tables.append(file.read(columns=columns))
        except (OSError, pa.ArrowException) as error:
            log.warning("%s: left out, it cannot be read (%s)", path, " ".join(str(error).split())[:120])
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are JSON objects with a step."""
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise StorageError(f"cannot read {path}", got=error.strerror) from error
    found, unreadable = [], 0
    for line in lines:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and isinstance(data.get("step"), int):
            found.append(data)
        else:
            unreadable += line.endswith(b"\n")  # else: it is being written
    if unreadable:
        log.warning("%s: left out %d lines that cannot be read", path, unreadable)
    return found


def _numbers(line: Mapping[str, Any]) -> Metrics:
    """A line of metrics; null stands for a number that was not finite, and what is no number is left out."""
    values = {name: math.nan if value is None else value for name, value in line.items()}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
