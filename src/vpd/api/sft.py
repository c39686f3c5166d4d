"""``vpd.sft``: the command line's ``sft`` for objects of Python."""

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any, Unpack

from vpd.api.arguments import Arguments, ModelLike, More, Tasks, read_arguments
from vpd.api.callbacks import as_observers
from vpd.api.runs import Run
from vpd.config.sft import on_answers
from vpd.errors import ConfigError
from vpd.recipes import train as training


def sft(
    model: ModelLike = None,
    data: Tasks | None = None,
    *,
    tokenizer: Any = None,
    algorithm: Mapping[str, Any] | None = None,
    callbacks: Any = (),
    **more: Unpack[More],
) -> Run:
    """Fine-tune a model on recorded answers, a warm-up for :func:`vpd.train`, and return the run.

    ``data``: a file of records, owner/name on the Hub, a list of mappings or a ``datasets.Dataset`` (each ``messages``
    that end with the answer, or ``prompt`` and ``completion``); or a run, of which the attempts and retries that
    succeeded are learned (rejection sampling).  A record whose ``reward`` or ``success`` says failure is left out.

    ``model``, ``tokenizer``, ``callbacks`` and ``more`` are as :func:`vpd.train` takes them; of a run its model is the
    default.  ``env`` is evaluated on (``run={"eval_steps": 10}``); of a run its environment is the default.
    ``algorithm`` holds settings of ``sft``.  Raises as :func:`vpd.train` does.

    >>> import contextlib, io
    >>> rows = [{"prompt": "apply rule A to 1 2 3", "completion": "0 3 2"}]
    >>> small = {"prompts_per_step": 1}
    >>> with contextlib.redirect_stdout(io.StringIO()):  # a line of a table for each step
    ...     run = sft("tiny", rows, rollout=small, run={"max_steps": 1, "output_dir": "out"})
    >>> run
    Run('out': done, step 1)
    """
    if data is None:
        raise ConfigError("vpd.sft needs data", expected="a file, records, or a run")
    arguments = _arguments(model, data, tokenizer, {**(algorithm or {}), "name": "sft"}, dict(more))
    observers = as_observers(callbacks, arguments.config.run)
    return Run(training.train(arguments.config, **arguments.objects, observers=observers))


def _arguments(
    model: ModelLike, data: Any, tokenizer: Any, algorithm: Mapping[str, Any], more: dict[str, Any]
) -> Arguments:
    env = more.pop("env", None)
    if env is None and more.get("config") is not None:
        env = more["config"].as_dict()["env"]
    if isinstance(env, str):
        env = {"name": env}
    section: dict[str, Any] = {"name": "recorded", "path": data, "only": "success", "fresh": env}
    if isinstance(data, (str, PathLike)):
        is_object = env is not None and not isinstance(env, Mapping)
        sections = on_answers({} if is_object or env is None else {"env": env}, fspath(data))
        if model is None and more.get("config") is None:
            model = sections.get("model")
        more.setdefault("prompts", sections.get("prompts"))
        section = sections["env"] if not is_object else {**sections["env"], "fresh": env}
    more["env"] = section
    return read_arguments(model, None, None, tokenizer=tokenizer, algorithm=algorithm, feedback=None, more=more)
