"""Recorded answers whose rows, or whose fresh tasks, are objects of Python: the section ``env`` named recorded."""

import dataclasses
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from vpd.config.sections import build, make_env, named
from vpd.envs import Env
from vpd.envs.given import read_entries
from vpd.envs.recorded import AnswerTasks, GivenAnswers, RecordedAnswers, beside
from vpd.errors import ConfigError


def recorded(section: Mapping[str, Any], fresh: Env | None = None) -> Env | dict[str, Any]:
    """The section as it is where a file can say it, else the environment.

    ``path`` may be a run, records (a list, a ``datasets.Dataset``, a table), and ``fresh`` an environment;
    the argument of that name are tasks and a grader that were passed.  Raises ConfigError, DataError.
    """
    named_one, path = section.get("fresh"), section.get("path")
    if fresh is not None and named_one is not None:
        raise ConfigError("what is answered now is not clear", got="env.fresh, and tasks and grader", expected="one")
    is_file = path is None or isinstance(path, (str, PathLike))
    if is_file:
        section = {**section, "path": fspath(path)} if path is not None else section
        if fresh is None and (named_one is None or isinstance(named_one, Mapping)):
            return dict(section)
    fresh = fresh if named_one is None else _environment(named_one)
    plain = {**section, "fresh": None if fresh is None else {}}
    checked = build(RecordedAnswers, plain if is_file else {**plain, "path": "data"}, "env")
    log: AnswerTasks = checked
    if not is_file:
        same = {field.name: vars(checked)[field.name] for field in dataclasses.fields(AnswerTasks)}
        log = GivenAnswers(**same, entries=read_entries(path, "env.path"))
    else:
        log = dataclasses.replace(checked, fresh=None, fresh_share=0.0)
    return log if fresh is None else beside(log, fresh, checked.fresh_share)


def _environment(fresh: Any) -> Env:
    env: Env = make_env(named("env", fresh, "env.fresh")) if isinstance(fresh, Mapping) else fresh
    return env
