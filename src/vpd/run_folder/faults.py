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
from vpd.learners import TrainedLearner, Update
from vpd.learners.calls import Call, Fault, Result
from vpd.ranks import Ranks, on_first, together
from vpd.run_folder.files import ALONE, FileSystem
from vpd.run_folder.groups_file import group_of, tuples, without_payloads
from vpd.types import Example, SampleKey, TopKLogprobs

FILE = "fault.json"


def write(
    output: Path,
    fault: Fault,
    *,
    settings: Mapping[str, Any],
    learner: TrainedLearner,
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
            groups=list(map(group_of, data["groups"])),
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
    return dataclasses.replace(fault, groups=list(map(without_payloads, fault.groups)), results=[])


def _result(data: Any) -> Result:
    return data if isinstance(data, list) else Update(data["metrics"], data["values"])


def _call(data: Mapping[str, Any]) -> Call:
    return Call(**{**data, "examples": list(map(_example, data["examples"]))})


def _example(data: Mapping[str, Any]) -> Example:
    plain = {name: tuples(value) for name, value in data.items()}
    if isinstance(data["teacher"], Mapping):
        plain["teacher"] = TopKLogprobs(**{name: tuples(value) for name, value in data["teacher"].items()})
    if data["key"] is not None:
        plain["key"] = SampleKey(**data["key"])
    return Example(**plain)
