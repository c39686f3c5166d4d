"""``vpd.collect``: the command line's ``collect`` for objects of Python."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from vpd.api.arguments import GraderLike, ModelLike, More, Tasks, read_arguments, read_options
from vpd.config.collect import CollectOptions
from vpd.errors import ConfigError
from vpd.recipes import collect as collecting


def collect(
    path: str | PathLike[str],
    model: ModelLike = None,
    tasks: Tasks | None = None,
    grader: GraderLike | None = None,
    *,
    options: CollectOptions | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    **more: Unpack[More],
) -> Path:
    """Sample answers and write them with what the grader said, as records for ``env`` recorded; nothing is trained.

    ``path`` is a new file; the other arguments are those of :func:`vpd.train`.  ``options``: ``tasks`` (how many; by
    default 256, or all where there are fewer), ``first`` (the first one's place), ``outcome`` (False: no reward, no
    success and no bare verdict is written).

    >>> tasks = ["apply rule A to 1 2 3"]
    >>> short = {"num_generations": 1, "max_completion_length": 6}
    >>> collect("log.jsonl", "tiny", tasks, lambda text, task: 0.0, options={"tasks": 1}, rollout=short)
    PosixPath('log.jsonl')
    """
    if "eval_tasks" in more:
        raise ConfigError("vpd.collect answers tasks=", got="eval_tasks=", do="Pass them as tasks.")
    chosen = read_options(CollectOptions, options)
    arguments = read_arguments(model, tasks, grader, tokenizer=tokenizer, algorithm="sft", feedback=None, more=more)
    return collecting.collect(arguments.config, Path(path), chosen, **arguments.objects)
