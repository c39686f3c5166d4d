"""Environments: where tasks come from and answers are judged.  They speak text and import no torch.

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

import functools
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from vpd.errors import EnvError, VPDError
from vpd.types import Grade, Message, Task

Result = TypeVar("Result")


class Env(Protocol):
    """Draws tasks and grades answers."""

    def task(self, index: int, *, seed: int) -> Task:
        """The training task at a position of an endless stream (same index and seed: same task)."""
        ...

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        """Held-out tasks in a fixed order, disjoint from training; at most ``limit`` of them."""
        ...

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        """One grade for each (task, answer) pair, in order.  A bug of the grader raises."""
        ...


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
    """An environment over a finite data set: all its training tasks can be checked before a run."""

    def train_tasks(self) -> Sequence[Task]: ...


#: What an environment says to an answer: nothing (the attempt is over), a user's message, or any message (a tool's).
Reply: TypeAlias = str | Message | None


@runtime_checkable
class Conversational(Protocol):
    """An environment that may reply to an answer and let the model go on: the attempt has several turns.

    What it says is never trained on, and student and teacher read the same turns.
    """

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        """A reply to the last message of each conversation (the task's messages and all turns so far), or None."""
        ...


@runtime_checkable
class Solvable(Protocol):
    """An environment that can answer its own tasks rightly, or some of them (None: not this one);
    :func:`vpd.envs.check.check_env` uses it."""

    def solution(self, task: Task) -> str | None: ...


@runtime_checkable
class Announcing(Protocol):
    """An environment that has something to say when a run starts, such as how it runs programs; a line each."""

    def announce(self) -> Sequence[str]: ...


@runtime_checkable
class Revealing(Protocol):
    """An environment that declares whether its feedback holds the reference answer; others promise that it does not."""

    @property
    def reveals_answer(self) -> bool: ...


def per_row(
    grade_one: Callable[[Any, Task, str], Grade],
) -> Callable[[Any, Sequence[Task], Sequence[str]], list[Grade]]:
    """Turn a method ``(self, task, text) -> Grade`` into ``Env.grade``; an exception names its row."""

    @functools.wraps(grade_one)
    def grade(self: Any, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        grades = []
        for row, (task, text) in enumerate(zip(tasks, texts, strict=True)):
            call = functools.partial(grade_one, self, task, text)
            grades.append(wrap_user_errors(call, f"the grader on row {row} (task {task.id!r})"))
        return grades

    return grade


def grade_texts(env: Env, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
    """``env.grade`` with its contract enforced: right length, right type, no swallowed exception.

    Raises :class:`EnvError` naming the row; never turns a fault into reward 0.
    """
    grades = wrap_user_errors(lambda: env.grade(tasks, texts), f"the grader on a batch of {len(tasks)} rows")
    if not isinstance(grades, list) or len(grades) != len(tasks):
        got = f"{len(grades)} grades" if isinstance(grades, list) else type(grades).__name__
        raise EnvError(
            "the grader returned the wrong number of grades", got=got, expected=f"a list of {len(tasks)} Grade objects"
        )
    for row, grade in enumerate(grades):
        if not isinstance(grade, Grade):
            raise EnvError(
                f"the grader returned no Grade for row {row} (task {tasks[row].id!r})",
                got=repr(grade)[:80],
                expected="vpd.types.Grade",
            )
    return grades


def replies_of(
    env: Conversational, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]
) -> list[Message | None]:
    """``env.respond`` with its contract enforced; a text becomes a user's message.  Raises EnvError."""
    replies = wrap_user_errors(lambda: env.respond(tasks, conversations), f"respond, on {len(tasks)} conversations,")
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
                got=repr(reply)[:80],
                expected="None, a text, or {'role': ..., 'content': ...}",
            )
        messages.append(reply)
    return messages


MEND = "Mend the environment; nothing was trained on this batch."


def wrap_user_errors(call: Callable[[], Result], what: str, *, do: str | None = MEND) -> Result:
    """The one way an environment's own exception is reported: its type, message, file and line, as an EnvError."""
    try:
        return call()
    except VPDError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise EnvError(
            f"{what} raised {type(error).__name__} at {frame.filename}:{frame.lineno}",
            got=" ".join(str(error).split())[:200] or "no message",
            do=do,
        ) from error
