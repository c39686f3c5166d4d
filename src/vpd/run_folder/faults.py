"""``nonfinite-step-N/``: an iteration that met a number that is not finite, with all that it takes to run it again.

``fault.json`` holds the settings, the rollouts, what the learner's calls gave before, and the call that failed with its
examples; beside it lie the learner's weights and optimiser at that moment, as in a checkpoint, and the tokenizer.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpd.errors import StorageError
from vpd.learners import Learner, Update
from vpd.learners.journal import Call, Fault, Result
from vpd.ranks import Ranks, on_first, together
from vpd.run_folder.files import ALONE, FileSystem
from vpd.types import (
    Comparison,
    Completion,
    Example,
    Grade,
    Group,
    Rollout,
    SampleKey,
    Section,
    Task,
    TeacherPrompt,
    TopKLogprobs,
)

FILE = "fault.json"


def write(
    output: Path,
    fault: Fault,
    *,
    settings: Mapping[str, Any],
    learner: Learner,
    save_tokenizer: Callable[[Path], None],
    files: FileSystem,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the dump into a run folder; an older one of the same step is replaced.  Raises StorageError.

    All ``ranks`` call it.
    """
    data = {"settings": settings, **dataclasses.asdict(_without_payloads(fault))}
    data["results"] = [r if isinstance(r, list) else {"metrics": r.metrics, "values": r.values} for r in fault.results]

    def finish(folder: Path) -> None:
        save_tokenizer(folder)
        (folder / FILE).write_text(json.dumps(data, default=str))

    def fill(folder: Path) -> None:
        together(ranks, "files of the learner", lambda: learner.save(folder))  # all have written
        on_first(ranks, "end of a dump", lambda: finish(folder))

    folder = output / f"nonfinite-step-{fault.step:06d}"
    files.write_folder(folder, fill, ranks)
    return folder


def read(folder: Path) -> tuple[Fault, dict[str, Any]]:
    """A dump and the settings of its run.  Raises StorageError for a folder that holds none."""
    try:
        data = json.loads((folder / FILE).read_text())
        fault = Fault(
            step=data["step"],
            error=data["error"],
            groups=[Group(rollouts=tuple(map(_rollout, group["rollouts"]))) for group in data["groups"]],
            algorithm=data["algorithm"],
            results=list(map(_result, data["results"])),
            call=None if data["call"] is None else _call(data["call"]),
        )
        return fault, dict(data["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{folder} holds no dump of an iteration",
            got=error.strerror if isinstance(error, OSError) else str(error),
            expected=f"a folder nonfinite-step-N of a run, with {FILE}",
        ) from error


def _without_payloads(fault: Fault) -> Fault:
    """The fault without what belongs to the environment alone."""

    def bare(rollout: Rollout) -> Rollout:
        task = dataclasses.replace(rollout.task, payload=None)
        return dataclasses.replace(rollout, task=task, retries=tuple(map(bare, rollout.retries)))

    groups = [Group(rollouts=tuple(map(bare, group.rollouts))) for group in fault.groups]
    return dataclasses.replace(fault, groups=groups, results=[])


def _result(data: Any) -> Result:
    return data if isinstance(data, list) else Update(data["metrics"], data["values"])


def _call(data: Mapping[str, Any]) -> Call:
    return Call(**{**data, "examples": list(map(_example, data["examples"]))})


def _example(data: Mapping[str, Any]) -> Example:
    plain = {name: _tuple(value) for name, value in data.items()}
    if isinstance(data["teacher"], Mapping):
        plain["teacher"] = TopKLogprobs(**{name: _tuple(value) for name, value in data["teacher"].items()})
    if data["key"] is not None:
        plain["key"] = SampleKey(**data["key"])
    return Example(**plain)


def _rollout(data: Mapping[str, Any]) -> Rollout:
    task, teacher, top_k = data["task"], data["teacher_prompt"], data.get("teacher_logprobs")
    return Rollout(
        key=SampleKey(**data["key"]),
        task=Task(id=task["id"], messages=tuple(task["messages"]), tools=tuple(task["tools"])),
        prompt=tuple(data["prompt"]),
        completion=Completion(**{name: _tuple(value) for name, value in data["completion"].items()}),
        grade=Grade(**data["grade"]),
        context=tuple(Section(**section) for section in data["context"]),
        teacher_prompt=None if teacher is None else TeacherPrompt(**{n: _tuple(v) for n, v in teacher.items()}),
        retries=tuple(map(_rollout, data["retries"])),
        comparisons=tuple(Comparison(**one) for one in data.get("comparisons", ())),
        teacher_logprobs=None if top_k is None else TopKLogprobs(**{n: _tuple(v) for n, v in top_k.items()}),
    )


def _tuple(value: Any) -> Any:
    """A value of JSON with its lists as tuples."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
