"""Several runs side by side: method, the settings in which they differ, last and best value of a metric, state."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vpd.errors import StorageError
from vpd.run_folder.lock import is_locked
from vpd.run_folder.reading import RunRecord, find_runs, read_run
from vpd.settings import flat

State: TypeAlias = Literal["running", "stopped", "done", "damaged"]

#: the metric that runs are compared by where neither the reader nor the run names one, if it was measured
METRICS = ("eval/accuracy", "eval/reward", "reward")
#: settings that say where and for how long, and not what
NOT_COMPARED = ("run.output_dir", "run.resume", "run.report_to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A metric at a step."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """One run.

    ``differs``: its values of the settings that are not the same in all runs (of a method's or an environment's
    settings: in all runs of that method or environment); ``fault``: why it is damaged.
    """

    folder: Path
    state: State
    method: str = ""
    step: int = 0
    max_steps: int | None = None
    metric: str | None = None
    last: Value | None = None
    best: Value | None = None
    alarms: int = 0
    differs: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None


def overview(roots: Sequence[Path], metric: str | None = None) -> list[Overview]:
    """The runs at and below the folders, in the order of their names; ``metric`` None: each run's own.

    Raises StorageError for a folder that does not exist.
    """
    for root in roots:
        if not root.is_dir():
            raise StorageError(f"{root} is no folder", expected="a run folder, or a folder with runs in it")
    folders = dict.fromkeys(run for root in roots for run in find_runs(root))
    read = [(folder, _read(folder)) for folder in folders]
    flattened = {folder: flat(run.settings) for folder, run in read if isinstance(run, RunRecord)}
    return [
        Overview(folder=folder, state="damaged", fault=run)
        if isinstance(run, str)
        else _overview(run, metric, _differing(flattened[folder], list(flattened.values())))
        for folder, run in read
    ]


def _read(folder: Path) -> RunRecord | str:
    """A run, or why it cannot be read."""
    try:
        return read_run(folder)
    except StorageError as error:
        return str(error)


def _overview(run: RunRecord, metric: str | None, differs: Mapping[str, Any]) -> Overview:
    settings: Mapping[str, Any] = run.settings.get("run", {})
    wanted = [metric] if metric else [settings.get("metric_for_best_model"), *METRICS]
    name = next((name for name in wanted if name and run.series(name)), None)
    trained = [(step, value) for step, value in run.series(name or "") if step > 0]
    best = run.best(name or "")
    return Overview(
        folder=run.folder,
        state="done" if run.phase == "done" else "running" if is_locked(run.folder) else "stopped",
        method=run.method,
        step=int(run.metrics[-1]["step"]) if run.metrics else run.step,
        max_steps=settings.get("max_steps"),
        metric=name,
        last=Value(step=trained[-1][0], value=trained[-1][1]) if trained else None,
        best=Value(step=best[0], value=best[1]) if best else None,
        alarms=len(run.alarms),
        differs=differs,
    )


def _differing(own: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's settings that are not the same in all runs; those of a method or environment among runs of the same."""
    found = {}
    for key, value in own.items():
        part = f"{key.partition('.')[0]}.name"
        alike = [run for run in runs if key == part or run.get(part) == own.get(part)]
        if key not in (*NOT_COMPARED, "algorithm.name") and any(run.get(key) != value for run in alike):
            found[key] = value
    return found


def as_json(run: Overview) -> dict[str, Any]:
    """A run as plain JSON."""
    return {**dataclasses.asdict(run), "folder": str(run.folder)}
