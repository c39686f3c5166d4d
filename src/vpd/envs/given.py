"""Tasks and a grader that are Python objects: the environment of ``vpd.train(model, tasks, grader)``.

An entry of the tasks is a text (one user message), a list of messages, a mapping with ``prompt`` (either of the two) or
``messages`` and whatever else the grader reads, or a :class:`vpd.Task`.  A grader is a function ``(text, task)`` that
gets the answer and the entry as it was passed, or a reward function of TRL or verl
(:mod:`vpd.envs.adapters.trl_verl`), which gets the entry's columns.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vpd.envs import records, wrap_user_errors
from vpd.envs.adapters.callers import LocalCaller
from vpd.envs.adapters.reward_functions import Caller, GradedByFunctions, Row
from vpd.envs.adapters.trl_verl import (
    Reward,
    TRLFunction,
    VerlFunction,
    listed_answer,
    make_reward_function,
    parse_rewards,
    read_answer,
)
from vpd.envs.loading import load_object
from vpd.envs.record_tasks import EvalShare, Part, RecordTasks
from vpd.errors import ConfigError, DataError
from vpd.printable import shown
from vpd.types import Task

MOST_ENTRIES = 1_000_000  # of what can only be iterated over, which may never end
TRAIN, HELD_OUT = "tasks", "eval_tasks"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenRow(Row):
    """What graders get: the entry as it was passed, and for TRL's and verl's functions its prompt and columns."""

    entry: Any


@dataclass(frozen=True, slots=True)
class TextGrader:
    """``f(text, task) -> float, (float, text), Grade or a mapping``; ``task`` is the entry as it was passed."""

    name: str
    function: Callable[..., Any]
    is_async: bool
    batched: bool = False

    def check(self, rows: Sequence[Row]) -> None:
        """Nothing: it takes any entry."""

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Any:
        [row], [text] = rows, texts
        assert isinstance(row, GivenRow)
        answer = self.function(text, row.entry)
        return listed_answer(answer) if inspect.isawaitable(answer) else [answer]


@dataclass(frozen=True, kw_only=True)
class GivenTasks(GradedByFunctions, RecordTasks[Task]):
    """The environment.

    ``held_out`` None: ``eval_share`` of the tasks, chosen by a hash of their messages.  Raises ConfigError for a grader
    that takes other arguments, DataError for an entry that is no task.
    """

    name: str = "tasks"
    tasks: tuple[Any, ...]
    grader: Any
    held_out: tuple[Any, ...] | None = None
    eval_share: EvalShare = 0.1
    held_out_by_share: ClassVar[str] = "pass eval_tasks=0.1: that share of tasks is then held out"

    @property
    def recorded_as(self) -> str:
        """How ``config.yaml`` names it: number and hash of the tasks, and the graders."""
        digest = hashlib.blake2b(digest_size=4)
        for task in (*self.train_tasks(), *self.eval_tasks(None)):
            digest.update(f"{task.id}{self.split_key(task)}".encode(errors="replace"))
        graders = ", ".join(_place(reward.function) for reward, _ in self._functions)
        return f"{len(self.tasks)} tasks ({digest.hexdigest()}) graded by {graders}"

    @property
    def sources(self) -> tuple[str, str | None]:
        return TRAIN, None if self.held_out is None else HELD_OUT

    def read_items(self, source: str) -> list[Task]:
        entries = self.tasks if source == TRAIN else self.held_out or ()
        tasks = [as_task(entry, number, source) for number, entry in enumerate(entries)]
        for _, function in self._functions:
            function.check([task.payload for task in tasks])
        return tasks

    def make_task(self, part: Part, item: Task) -> Task:
        return dataclasses.replace(item, id=f"{part}/{item.id}")

    def split_key(self, item: Task) -> str:
        return json.dumps(item.messages, default=str)

    def solution(self, task: Task) -> str | None:
        """The entry's ``completion``, a right answer; None where it has none."""
        answer = task.payload.columns.get("completion")
        return answer if isinstance(answer, str) else None

    @cached_property
    def _functions(self) -> list[tuple[Reward, TextGrader | TRLFunction | VerlFunction]]:
        return [(reward, as_function(reward.function)) for reward in parse_rewards(self.grader)]

    def callers(self) -> list[tuple[Caller, float]]:
        return [(LocalCaller(function, read_answer), reward.weight) for reward, function in self._functions]


@dataclass(frozen=True, kw_only=True)
class AllHeldOut(GivenTasks):
    """Every task is held out: for an evaluation alone."""

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self.train_tasks()[:limit]

    @property
    def shares_questions(self) -> bool:
        """True: nothing is trained on them."""
        return True


def _place(function: str | Callable[..., Any]) -> str:
    if isinstance(function, str):
        return function
    named = function if inspect.isroutine(function) else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def as_function(grader: str | Callable[..., Any]) -> TextGrader | TRLFunction | VerlFunction:
    """A grader as what is called for each row, decided by its parameters.  Raises ConfigError."""
    found = load_object(grader, "grader") if isinstance(grader, str) else grader
    if not callable(found) or inspect.isclass(found):
        raise ConfigError("grader is no function", got=shown(found), expected="a function (text, task)")
    name = found.__name__ if inspect.isroutine(found) else type(found).__name__
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:  # a function in C without a signature
        return TextGrader(name, found, False)
    if "completions" in parameters or "solution_str" in parameters:
        return make_reward_function(grader)
    _check_parameters(name, found, list(parameters))
    called = vars(type(found)).get("__call__")
    return TextGrader(name, found, inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(called))


def _check_parameters(name: str, grader: Callable[..., Any], parameters: Sequence[str]) -> None:
    wrong = ConfigError(
        f"the grader {name} takes other arguments",
        got=f"({', '.join(parameters)})",
        expected="(text, task): the answer, and the entry of tasks; or those of a reward function of TRL or verl",
    )
    if parameters[:1] == ["task"]:
        raise wrong
    try:
        inspect.signature(grader).bind("", None)
    except TypeError:
        raise wrong from None


def read_entries(tasks: Any, what: str) -> tuple[Any, ...]:
    """The entries of a list, a generator, a ``datasets.Dataset``, a table, or a file of records.

    A run that is continued draws tasks by their number, so what can only be iterated over is read to its end first.
    Raises DataError: there are none, or more than a million; EnvError: iterating raises.
    """
    if isinstance(tasks, (str, Path)):
        return tuple(record for _, _, record in records.read(str(tasks), split="train"))
    kind = f"{type(tasks).__module__.partition('.')[0]}.{type(tasks).__name__}"
    if kind == "pandas.DataFrame":
        tasks = tasks.to_dict("records")
    elif kind == "pyarrow.Table":
        tasks = tasks.to_pylist()
    if isinstance(tasks, Mapping) or not hasattr(tasks, "__iter__"):
        raise DataError(
            f"{what} is no list of tasks", got=type(tasks).__name__, expected="a list, a generator or a Dataset"
        )
    iterable: Iterable[Any] = tasks
    entries = wrap_user_errors(
        lambda: tuple(itertools.islice(iterable, MOST_ENTRIES + 1)), f"iterating over {what}", do="Correct it."
    )
    if len(entries) > MOST_ENTRIES:
        raise DataError(
            f"{what} does not end",
            got=f"more than {MOST_ENTRIES} entries",
            expected="a finite number, which is read before the run so that it can be continued",
            do="Cut it with itertools.islice, or pass env= an object with task(index, seed=...).",
        )
    if not entries:
        raise DataError(f"{what} is empty", expected="at least one task")
    return entries


def as_task(entry: Any, number: int, what: str) -> Task:
    """An entry as a task; graders get the entry itself.  Raises DataError."""
    where = f"{what}[{number}]"
    if isinstance(entry, Task):
        row = GivenRow(prompt=list(entry.messages), columns={}, entry=entry)
        return dataclasses.replace(entry, payload=row)
    record = entry if isinstance(entry, Mapping) else {"prompt": entry}
    key = next((name for name in ("prompt", "messages") if name in record), None)
    if key is None:
        raise DataError(
            f"{where} has no prompt",
            got=f"the keys {', '.join(map(str, record))}"[:200],
            expected="'prompt' (a text or messages) or 'messages'",
            do="Rename the key that holds the question.",
        )
    if key == "prompt" and "messages" in record:
        raise DataError(
            f"{where} has both prompt and messages", expected="one of them", do="Remove or rename the other."
        )
    prompt = records.listed(record[key], f"{where}: {key!r}")
    if not isinstance(prompt, (str, list, tuple)):
        raise DataError(f"{where} is no task", got=shown(prompt), expected="a text, messages, a mapping or a vpd.Task")
    columns = {str(name): value for name, value in record.items() if name != key}
    return Task(
        id=records.name_of(record, number, "id"),
        messages=records.prompt(record, key, where),
        payload=GivenRow(prompt=prompt, columns=columns, entry=entry),
        tools=records.tools(record, where),
    )
