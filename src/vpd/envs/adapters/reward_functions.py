"""Calls reward functions that may raise, hang or return nonsense, and adds their rewards up.

A row that a function cannot grade has *failed*; errors and warnings name its number.  If more than ``max_failed`` of a
batch's rows fail, that is an EnvError.  Otherwise a failed row gets reward 0, feedback that no teacher reads, and the
metric ``grader_failed``.
"""

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeAlias

from annotated_types import Ge, Gt

from vpd.envs import wrap_user_errors
from vpd.errors import EnvError, VPDError
from vpd.settings import Settings, Share
from vpd.types import Grade, Task

LOG = logging.getLogger("vpd")
Result: TypeAlias = Grade | EnvError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a reward function gets besides the answer: the prompt as the data has it, and every other column."""

    prompt: Any
    columns: Mapping[str, Any]


#: Declared once for RetryPolicy and for the environments that have these settings.
GradingSeconds: TypeAlias = Annotated[float | None, Gt(0), "seconds to grade one answer; null: no limit"]
Retries: TypeAlias = Annotated[int, Ge(0), "how often an answer that could not be graded is graded again"]
MaxFailed: TypeAlias = Annotated[
    float, Share, "share of a batch's answers that may fail to be graded; above it: an error"
]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy(Settings, section="env"):
    """Time limit for each row, retries of a failed row, and the share of a batch's rows that may fail."""

    seconds: GradingSeconds = None
    retries: Retries = 0
    max_failed: MaxFailed = 0.0


class RewardFunction(Protocol):
    """Called with rows and texts; returns one raw answer for each row, or an awaitable of them.

    ``batched``: it takes many rows at once; otherwise it is called with one row at a time.
    """

    @property
    def name(self) -> str: ...

    @property
    def batched(self) -> bool: ...

    @property
    def is_async(self) -> bool: ...

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Any: ...


Reader: TypeAlias = Callable[[Any, str], Grade | None]


class WeightedRewards:
    """Reward functions with weights.  The reward of a row is the weighted sum over the functions that apply to it.

    ``read`` turns a raw answer into a grade, or None where the function does not apply to the row; it raises EnvError.
    """

    def __init__(self, functions: Sequence[tuple[RewardFunction, float]], read: Reader, policy: RetryPolicy):
        self.functions, self.read, self.policy = tuple(functions), read, policy
        names = [function.name for function, _ in functions]
        self._names = [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]

    def grade(self, tasks: Sequence[Task], rows: Sequence[Row], texts: Sequence[str]) -> list[Grade]:
        """One grade for each row.  Raises EnvError naming a row."""
        columns = [self._call(function, rows, texts) for function, _ in self.functions]
        results = [self._combine(results) for results in zip(*columns, strict=True)]
        failed = [(row, result) for row, result in enumerate(results) if isinstance(result, EnvError)]
        if len(failed) > self.policy.max_failed * len(rows):
            row, error = failed[0]
            raise EnvError(
                f"{len(failed)} of {len(rows)} rows could not be graded, first row {row} (task {tasks[row].id!r})",
                got=error,
                expected=f"at most a share of {self.policy.max_failed:g} (env.max_failed)",
                do="Fix the grader; nothing was trained on this batch.",
            ) from error
        for row, error in failed:
            LOG.warning("row %d (task %r) could not be graded and counts as a failure: %s", row, tasks[row].id, error)
        return [_failed_grade() if isinstance(result, EnvError) else result for result in results]

    def _combine(self, results: Sequence[Result]) -> Grade | EnvError:
        """One row's results of all functions as one grade; an error of any function is the row's."""
        for result in results:
            if isinstance(result, EnvError):
                return result
        grades = [
            (name, weight, result)
            for name, (_, weight), result in zip(self._names, self.functions, results, strict=True)
            if isinstance(result, Grade)
        ]
        if not grades:
            return EnvError(
                f"{' and '.join(self._names)} returned None", expected="a number from at least one reward function"
            )
        single = len(self.functions) == 1
        metrics = {"grader_failed": 0.0}
        for name, _, grade in grades:
            metrics |= {key if single else f"{name}/{key}": value for key, value in grade.metrics.items()}
            metrics |= {} if single else {f"rewards/{name}": float(grade.reward)}
        successes = [grade.success for _, _, grade in grades if grade.success is not None]
        with_feedback = [grade for _, _, grade in grades if grade.feedback]
        return Grade(
            reward=sum(weight * grade.reward for _, weight, grade in grades),
            success=all(successes) if successes else None,
            feedback="\n".join(grade.feedback for grade in with_feedback if grade.feedback) or None,
            informative=not with_feedback or any(grade.informative for grade in with_feedback),
            metrics=metrics,
        )

    def _call(self, function: RewardFunction, rows: Sequence[Row], texts: Sequence[str]) -> list[Result]:
        """A function's result for each row.  If a batch fails as a whole, each row is graded alone to find which."""
        tries = 1 + self.policy.retries
        if function.batched and len(rows) > 1:
            seconds = None if self.policy.seconds is None else self.policy.seconds * len(rows)
            what = f"{function.name} on a batch of {len(rows)} rows"
            try:
                answers = call_with_timeout(function, rows, texts, what, seconds)
            except EnvError as error:
                LOG.warning("%s; now each row is graded alone", error)
            else:
                listed = enumerate(_as_list(answers, len(rows), what))
                results = [self._read(answer, f"{function.name} on row {row}") for row, answer in listed]
                return [
                    self._call_row(function, row, rows[row], texts[row], tries - 1, result)
                    if isinstance(result, EnvError)
                    else result
                    for row, result in enumerate(results)
                ]
        return [self._call_row(function, row, rows[row], texts[row], tries) for row in range(len(rows))]

    def _call_row(
        self, function: RewardFunction, number: int, row: Row, text: str, tries: int, result: Result = None
    ) -> Result:
        """A function's result for one row, tried until it is no error; after no try it is ``result``."""
        what = f"{function.name} on row {number}"
        for _ in range(tries):
            try:
                answers = call_with_timeout(function, [row], [text], what, self.policy.seconds)
            except EnvError as error:
                result = error
                continue
            result = self._read(_as_list(answers, 1, what)[0], what)
            if not isinstance(result, EnvError):
                break
        return result

    def _read(self, answer: Any, what: str) -> Result:
        """A raw answer as a grade; one that cannot be read is an error of its row."""
        try:
            return self.read(answer, what)
        except EnvError as error:
            return error


def _failed_grade() -> Grade:
    return Grade(
        reward=0.0,
        success=False,
        feedback="This answer could not be graded.",
        informative=False,
        metrics={"grader_failed": 1.0},
    )


def _as_list(answers: Any, count: int, what: str) -> list[Any]:
    """Answers as a list of the right length.  Another length is an EnvError whatever ``max_failed`` allows."""
    if isinstance(answers, (str, Mapping)):
        raise EnvError(f"{what} returned no list", got=type(answers).__name__, expected=f"a list of {count}")
    listed: list[Any] = wrap_user_errors(lambda: list(answers), f"{what}: its answer, as a list,")
    if len(listed) != count:
        raise EnvError(f"{what} returned the wrong number of rewards", got=len(listed), expected=count)
    return listed


def call_with_timeout(
    function: RewardFunction, rows: Sequence[Row], texts: Sequence[str], what: str, seconds: float | None
) -> Any:
    """A reward function's raw answers.  Raises EnvError if it raises, or takes longer than ``seconds``.

    A coroutine is cancelled at the time limit.  With a limit, a function that is not async runs in its own thread;
    Python cannot stop a thread, so after the limit it runs on unobserved.  Without a limit it runs in this thread.
    """

    def call() -> Any:
        answers = function(rows, texts)
        return _await(answers, what, seconds) if inspect.isawaitable(answers) else answers

    if seconds is None or function.is_async:
        return wrap_user_errors(call, what, do=None)
    answers: list[Any] = []
    errors: list[VPDError] = []

    def run() -> None:
        try:
            answers.append(wrap_user_errors(call, what, do=None))
        except VPDError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"reward function {function.name}")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise _timeout(what, seconds) if thread.is_alive() else EnvError(f"{what} ended its thread without an answer")
    return answers[0]


def _await(answers: Awaitable[Any], what: str, seconds: float | None) -> Any:
    """An awaitable's value, from one event loop that all async functions share, so that their clients stay usable."""

    async def wait() -> Any:
        return await answers

    future = asyncio.run_coroutine_threadsafe(wait(), _loop())
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the function itself raised TimeoutError
            raise
        future.cancel()
        raise _timeout(what, seconds) from None


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async reward functions").start()
    return loop


def _timeout(what: str, seconds: float | None) -> EnvError:
    return EnvError(f"{what} took too long", expected=f"at most {seconds:g} s (env.seconds for each row)")
