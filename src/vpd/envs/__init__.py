"""Environments: a task source and a grader in one object.  They read and write text and import no torch.

Write one in ten lines::

    class Capitals:
        def task(self, index, *, seed):
            country, city = PAIRS[index % len(PAIRS)]
            question = f"What is the capital of {country}?"
            return Task(id=country, messages=({"role": "user", "content": question},), payload=city)

        def eval_tasks(self, limit):
            return [self.task(i, seed=0) for i in HELD_OUT[:limit]]

        @per_row
        def grade(self, task, text):
            right = task.payload in text
            return Grade(reward=float(right), feedback=None if right else "That city is in another country.")

and run :func:`vpd.envs.check.check_env` on it.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from vpd.envs.user_code import FIX, defined_at, errors_named
from vpd.envs.user_code import wrap_user_errors as wrap_user_errors
from vpd.errors import DataError, EnvError
from vpd.printable import shown
from vpd.types import Grade, Message, RecordedAnswer, Task


class TaskSource(Protocol):
    """Where tasks come from.  Called through :func:`draw_tasks` and :func:`held_out_tasks`."""

    def task(self, index: int, *, seed: int) -> Task:
        """The training task at a position of an endless stream (same index and seed: same task)."""
        ...

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        """Held-out tasks in a fixed order, disjoint from training; at most ``limit`` of them (None: all)."""
        ...


class Grader(Protocol):
    """Judges answers.  Called through :func:`grade_texts`."""

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        """One grade for each (task, answer) pair, in order.  A bug of the grader raises."""
        ...


class Env(TaskSource, Grader, Protocol):
    """An environment: draws tasks and grades answers."""


@runtime_checkable
class FixedLength(Protocol):
    """An environment whose answers all fill ``max_completion_length``: a ``length`` finish is normal."""

    fixed_length: bool


@runtime_checkable
class AnswerLength(Protocol):
    """An environment that knows how many tokens an answer takes: the default of ``rollout.max_completion_length``."""

    @property
    def answer_length(self) -> int: ...


@runtime_checkable
class Finite(Protocol):
    """A task source over a finite data set: all its training tasks can be checked before a run."""

    def train_tasks(self) -> Sequence[Task]: ...


#: An environment's reply to an answer: None (the attempt is over), a user's message, or any message (e.g. a tool's).
Reply: TypeAlias = str | Message | None


@runtime_checkable
class Conversational(Protocol):
    """An environment that may reply to an answer and let the model continue: the attempt has several turns.

    Its replies are masked out of every loss; student and teacher read the same turns.
    """

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        """A reply to the last message of each conversation (the task's messages and all turns so far), or None."""
        ...


@runtime_checkable
class RecordedTasks(Protocol):
    """An environment whose training tasks, or some of them, come with answers that were given elsewhere: these are
    learned from in the place of samples."""

    def recorded(self, task: Task) -> Sequence[RecordedAnswer]:
        """The answers to a training task, which make its group; none: it is answered now."""
        ...


@runtime_checkable
class RecordedAs(Protocol):
    """An object that says by which words ``config.yaml`` names it."""

    @property
    def recorded_as(self) -> str: ...


@runtime_checkable
class BesideAnother(Protocol):
    """Settings of an environment that may name another one beside it: the section env of that, None for none."""

    @property
    def fresh(self) -> Mapping[str, Any] | None: ...

    def beside(self, env: Env) -> Env:
        """Both as one environment."""
        ...


@runtime_checkable
class Solvable(Protocol):
    """An environment that knows a correct answer to its tasks, or to some of them (None: not to this one).
    :func:`vpd.envs.check.check_env` grades it."""

    def solution(self, task: Task) -> str | None: ...


@runtime_checkable
class Restating(Protocol):
    """An environment that compares values, not texts, and can write one in several ways.
    :func:`vpd.envs.check.check_env` grades them, and so sees a right value that was misread."""

    def restated(self, task: Task) -> Sequence[str]:
        """Answers of the right value in other forms than ``solution(task)``; none where no other is known."""
        ...

    def altered(self, task: Task) -> Sequence[str]:
        """Answers in the same forms, of other values."""
        ...


@runtime_checkable
class Announcing(Protocol):
    """An environment with lines to print when a run starts, e.g. which sandbox runs the programs."""

    def announce(self) -> Sequence[str]: ...


@runtime_checkable
class Revealing(Protocol):
    """An environment that declares whether its feedback contains the reference answer.  Without the declaration it
    must not."""

    @property
    def reveals_answer(self) -> bool: ...


@runtime_checkable
class SharesQuestions(Protocol):
    """An environment that declares whether evaluation asks questions of training on purpose (graded by further tests).
    Without the declaration it must not."""

    @property
    def shares_questions(self) -> bool: ...


def per_row(
    grade_one: Callable[[Any, Task, str], Grade],
) -> Callable[[Any, Sequence[Task], Sequence[str]], list[Grade]]:
    """Turn a method ``(self, task, text) -> Grade`` into ``Env.grade``; an exception names its row."""

    @functools.wraps(grade_one)
    def grade(self: Any, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        grades = []
        for row, (task, text) in enumerate(zip(tasks, texts, strict=True)):
            with errors_named(f"the grader on row {row} (task {task.id!r})"):
                grades.append(grade_one(self, task, text))
        return grades

    return grade


def draw_tasks(env: TaskSource, indices: Iterable[int], *, seed: int) -> list[Task]:
    """``env.task`` at each index.  Raises EnvError if a call raises or returns no valid Task."""
    return [
        _valid_task(
            wrap_user_errors(functools.partial(env.task, index, seed=seed), f"task({index}, seed={seed})"),
            f"task({index}, seed={seed})",
        )
        for index in indices
    ]


def recorded_answers(env: TaskSource, task: Task) -> Sequence[RecordedAnswer]:
    """The recorded answers to a training task; none where it is to be answered now."""
    if not isinstance(env, RecordedTasks):
        return ()
    return wrap_user_errors(lambda: env.recorded(task), f"recorded, on task {task.id!r},")


def held_out_tasks(env: TaskSource, limit: int | None) -> list[Task]:
    """``env.eval_tasks(limit)``.  Raises EnvError if it raises or returns something that is no valid Task."""
    return _listed_tasks(functools.partial(env.eval_tasks, limit), f"eval_tasks({limit})")


def required_held_out_tasks(env: TaskSource, limit: int | None) -> list[Task]:
    """:func:`held_out_tasks`, of which there must be some.  Raises DataError."""
    tasks = held_out_tasks(env, limit)
    if not tasks:
        raise DataError(
            "the environment holds no task out, so nothing can be evaluated",
            do="Give env.eval_path, another env.eval_share or more data; run.eval_steps: 0 trains without evaluation.",
        )
    return tasks


def all_train_tasks(env: Finite) -> list[Task]:
    """``env.train_tasks()``.  Raises EnvError if it raises or returns something that is no valid Task."""
    return _listed_tasks(env.train_tasks, "train_tasks()")


def solution_of(env: Any, task: Task) -> str:
    """The right answer that the environment knows to a task.  Raises DataError where it knows none."""
    known = isinstance(env, Solvable)
    answer = wrap_user_errors(lambda: env.solution(task), f"solution, of task {task.id!r},") if known else None
    if answer is None:
        raise DataError(
            f"the data has no answer to task {task.id!r}",
            got="an environment without a method solution" if not known else "None from its method solution",
            expected="a text",
            do="With env dataset, set env.solution_column to the column that holds it; tasks from Python hold it as"
            " 'completion'.",
        )
    if not isinstance(answer, str):
        raise EnvError(f"solution of task {task.id!r} is no text", got=shown(answer), expected="str or None", do=FIX)
    return answer


def _listed_tasks(call: Callable[[], Iterable[Any]], what: str) -> list[Task]:
    def listed() -> Any:
        found: Any = call()
        return list(found) if hasattr(found, "__iter__") or hasattr(found, "__getitem__") else found

    tasks = wrap_user_errors(listed, what)
    if not isinstance(tasks, list):
        place = defined_at(call.func if isinstance(call, functools.partial) else call)
        raise EnvError(
            f"{what} returned no list of tasks" + (f", at {place}" if place else ""),
            got=shown(tasks),
            expected="a list of vpd.types.Task",
            do=FIX,
        )
    return [_valid_task(task, f"{what}, at position {place},") for place, task in enumerate(tasks)]


def _valid_task(task: Any, what: str) -> Task:
    if not isinstance(task, Task):
        raise EnvError(f"{what} returned no Task", got=shown(task), expected="a vpd.types.Task", do=FIX)
    if not isinstance(task.id, str) or not task.id:
        raise EnvError(f"{what} returned a task without an id", got=shown(task.id), expected="a non-empty str", do=FIX)
    messages = task.messages
    if not isinstance(messages, (list, tuple)) or not messages or not all(map(_is_message, messages)):
        raise EnvError(
            f"{what} returned a task with malformed messages",
            got=shown(messages),
            expected="at least one {'role': str, 'content': str}",
            do=FIX,
        )
    return task


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def grade_texts(env: Grader, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
    """``env.grade`` with its return value checked: one Grade for each row.

    Raises EnvError that names the row; an error never becomes reward 0.
    """
    given = own_copies(tasks)
    grades = wrap_user_errors(lambda: env.grade(given, texts), f"the grader on a batch of {len(tasks)} rows")
    if not isinstance(grades, list) or len(grades) != len(tasks):
        got = f"{len(grades)} grades" if isinstance(grades, list) else type(grades).__name__
        raise EnvError(
            "the grader returned the wrong number of grades", got=got, expected=f"a list of {len(tasks)} Grade objects"
        )
    for row, grade in enumerate(grades):
        if not isinstance(grade, Grade):
            raise EnvError(
                f"the grader returned no Grade for row {row} (task {tasks[row].id!r})",
                got=shown(grade),
                expected="vpd.types.Grade",
            )
    return [without_blank_feedback(grade) for grade in grades]


def own_copies(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with messages and tools of their own: what a grader writes into them, nobody else reads."""
    return [
        dataclasses.replace(task, messages=copy.deepcopy(task.messages), tools=copy.deepcopy(task.tools))
        for task in tasks
    ]


def without_blank_feedback(grade: Grade) -> Grade:
    """The grade; feedback that is only white space is none."""
    blank = grade.feedback is not None and not grade.feedback.strip()
    return dataclasses.replace(grade, feedback=None) if blank else grade


def replies_of(
    env: Conversational, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]
) -> list[Message | None]:
    """``env.respond`` with its return value checked; a text becomes a user's message.  Raises EnvError."""
    given = own_copies(tasks)
    replies = wrap_user_errors(lambda: env.respond(given, conversations), f"respond, on {len(tasks)} conversations,")
    if not isinstance(replies, list) or len(replies) != len(tasks):
        got = f"{len(replies)} replies" if isinstance(replies, list) else type(replies).__name__
        raise EnvError("respond returned the wrong number of replies", got=got, expected=f"a list of {len(tasks)}")
    messages: list[Message | None] = []
    for row, reply in enumerate(replies):
        if isinstance(reply, str):
            reply = {"role": "user", "content": reply}
        if reply is not None and not (isinstance(reply, dict) and {"role", "content"} <= set(reply)):
            raise EnvError(
                f"respond returned no message for row {row} (task {tasks[row].id!r})",
                got=shown(reply),
                expected="None, a text, or {'role': ..., 'content': ...}",
            )
        messages.append(reply)
    return messages
