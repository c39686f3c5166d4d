"""Groups of rollouts as JSON: ``groups.json`` of a checkpoint, and in the dumps of :mod:`vpd.run_folder.faults`.

What belongs to the environment alone (``Task.payload``) is left out.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd.errors import StorageError
from vpd.types import (
    Comparison,
    Completion,
    Grade,
    Group,
    Metrics,
    Rollout,
    SampleKey,
    Section,
    Task,
    TeacherPrompt,
    TopKLogprobs,
)

FILE = "groups.json"


def write(folder: Path, groups: Sequence[Group], metrics: Metrics) -> None:
    """Write the groups of a step, and the metrics of making them."""
    data = {"groups": [dataclasses.asdict(without_payloads(group)) for group in groups], "metrics": metrics}
    (folder / FILE).write_text(json.dumps(data, default=_plain))


def read(folder: Path) -> tuple[list[Group], Metrics] | None:
    """What :func:`write` wrote, None where it wrote nothing.  Raises StorageError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        return list(map(group_of, data["groups"])), dict(data["metrics"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path} holds no groups of rollouts",
            got=f"{type(error).__name__}: {error}",
            do="Remove that checkpoint to continue from an older one.",
        ) from error


def without_payloads(group: Group) -> Group:
    """The group without what belongs to the environment alone."""

    def bare(rollout: Rollout) -> Rollout:
        task = dataclasses.replace(rollout.task, payload=None)
        return dataclasses.replace(rollout, task=task, retries=tuple(map(bare, rollout.retries)))

    return Group(rollouts=tuple(map(bare, group.rollouts)))


def group_of(data: Mapping[str, Any]) -> Group:
    """A group from the JSON of ``dataclasses.asdict``."""
    return Group(rollouts=tuple(map(_rollout, data["rollouts"])))


def _rollout(data: Mapping[str, Any]) -> Rollout:
    task, teacher, top_k = data["task"], data["teacher_prompt"], data["teacher_logprobs"]
    return Rollout(
        key=SampleKey(**data["key"]),
        task=Task(id=task["id"], messages=tuple(task["messages"]), tools=tuple(task["tools"])),
        prompt=tuple(data["prompt"]),
        completion=Completion(**{name: tuples(value) for name, value in data["completion"].items()}),
        grade=Grade(**data["grade"]),
        context=tuple(Section(**section) for section in data["context"]),
        teacher_prompt=None if teacher is None else TeacherPrompt(**{n: tuples(v) for n, v in teacher.items()}),
        retries=tuple(map(_rollout, data["retries"])),
        comparisons=tuple(Comparison(**one) for one in data["comparisons"]),
        silent=tuple(data["silent"]),
        teacher_logprobs=None if top_k is None else TopKLogprobs(**{n: tuples(v) for n, v in top_k.items()}),
    )


def tuples(value: Any) -> Any:
    """A value of JSON with its lists as tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """What JSON has no form for: a scalar of NumPy or torch as Python's own, what a task's messages hold as text."""
    return value.item() if hasattr(value, "item") else str(value)
