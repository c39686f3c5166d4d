"""``vpd collect``: transcripts of a model in an environment, as the records that ``env.name: recorded`` reads."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpd.algorithms.sft import SFTSettings
from vpd.config import Config
from vpd.config.collect import CollectOptions
from vpd.envs import Env, Finite, all_train_tasks, draw_tasks
from vpd.errors import StorageError
from vpd.feedback import Feedback
from vpd.recipes.assemble import Parts, assemble
from vpd.run_folder.files import require_writable, storage_errors
from vpd.types import Group, Rollout, SampleKey

LOG = logging.getLogger("vpd")
USUAL_TASKS = 256


def collect(
    config: Config,
    path: Path,
    options: CollectOptions | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    env: Env | None = None,
    feedback: Sequence[Feedback] | None = None,
) -> Path:
    """Answer training tasks and write a record for each attempt, ``rollout.num_generations`` a task, to a new file.

    ``config.algorithm`` plays no part, so nothing is loaded for it.  Objects take the place of their sections.  Raises
    a VPDError as :func:`~vpd.recipes.train.train` does; what was sampled until then is in the file.
    """
    if path.exists():
        raise StorageError(f"{path} is already there", do="Choose another file, or remove it.")
    require_writable(path, "Give a file in a folder of yours.")
    config = dataclasses.replace(config, algorithm=SFTSettings())
    parts = assemble(config, model=model, tokenizer=tokenizer, env=env, feedback=feedback)
    options = options or CollectOptions()
    count = 0
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    try:
        for group in transcripts(parts, options):
            rows = [as_record(rollout, outcome=options.outcome) for rollout in group.rollouts]
            with storage_errors(path), path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            count += len(rows)
    finally:
        if not count:
            path.unlink(missing_ok=True)  # so that the same command can be tried again
    LOG.info("%s: %d attempts", path, count)
    return path


def transcripts(parts: Parts, options: CollectOptions) -> Iterator[Group]:
    """The groups of the training tasks, graded, ``rollout.prompts_per_step`` tasks at a time."""
    batch, rollout = parts.config.rollout.prompts_per_step, parts.config.rollout
    places = range(options.first, options.first + (options.tasks or usual_tasks(parts.env)))
    for start in range(0, len(places), batch):
        chosen = places[start : start + batch]
        keys = [SampleKey(phase="train", step=0, task=place, sample=0) for place in chosen]
        tasks = draw_tasks(parts.env, chosen, seed=parts.config.run.seed)
        yield from parts.source.generate_groups(keys, tasks, rollout.sampling, rollout.num_generations)


def usual_tasks(env: Env) -> int:
    """How many tasks are answered where no number is given."""
    return min(USUAL_TASKS, len(all_train_tasks(env))) if isinstance(env, Finite) else USUAL_TASKS


def as_record(rollout: Rollout, *, outcome: bool = True) -> dict[str, Any]:
    """One attempt as a record; without ``outcome`` no reward, no success, and no bare verdict."""
    grade, completion = rollout.grade, rollout.completion
    record: dict[str, Any] = {
        "id": rollout.task.id,
        "messages": list(rollout.task.messages),
        "completion": completion.text,
        "feedback": grade.feedback if outcome or grade.informative else None,
        "tokens": list(completion.tokens),
        "logprobs": list(completion.logprobs),
    }
    if rollout.task.tools:
        record["tools"] = list(rollout.task.tools)
    if completion.turns > 1:
        record["turns"] = completion.turns
    if outcome and grade.graded:
        record |= {"reward": grade.reward, "success": rollout.success, "informative": grade.informative}
    return record
