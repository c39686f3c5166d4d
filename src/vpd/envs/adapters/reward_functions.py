"""A panel of graders that may raise, hang or answer nonsense: what happens then is said here, once.

A row about which a grader does so has *failed*.  It is told by its number; if more than ``max_failed`` of a batch fail,
that is an EnvError, else they count as failures that no teacher reads, with the metric ``grader_failed``.
"""

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from vpd.envs import wrap_user_errors
from vpd.errors import ConfigError, EnvError, VPDError
from vpd.types import Grade, Task

LOG = logging.getLogger("vpd")
Judgement: TypeAlias = Grade | EnvError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a grader is told beside the answer: the prompt as the data has it, and every other column."""

    prompt: Any
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a grader may think about one row (None: for ever), how often a row that failed is asked again, and the
    share of a batch's rows that may fail without an error."""

    seconds: float | None = None
    retries: int = 0
    max_failed: float = 0.0

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError("env.seconds is too small", got=self.seconds, expected="more than 0, or null")
        if self.retries < 0:
            raise ConfigError("env.retries is too small", got=self.retries, expected="at least 0")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError("env.max_failed is out of range", got=self.max_failed, expected="a share, 0 to 1")


class Grader(Protocol):
    """Raw answers about rows, one for each, or an awaitable of them.  ``batched``: it is given many rows at once."""

    @property
    def name(self) -> str: ...

    @property
    def batched(self) -> bool: ...

    @property
    def is_async(self) -> bool: ...

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Any: ...


Reader: TypeAlias = Callable[[Any, str], Grade | None]


class RewardFunctions:
    """Graders with weights.  The grade of a row is the weighted sum over those that apply to it.

    ``read`` turns a raw answer into a grade, or None where the grader has nothing to say about a row.
    """

    def __init__(self, graders: Sequence[tuple[Grader, float]], read: Reader, patience: RetryPolicy):
        self.graders, self.read, self.patience = tuple(graders), read, patience
        names = [grader.name for grader, _ in graders]
        self._names = [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]

    def grade(self, tasks: Sequence[Task], rows: Sequence[Row], texts: Sequence[str]) -> list[Grade]:
        """One grade for each row.  Raises EnvError naming a row."""
        columns = [self._ask(grader, tasks, rows, texts) for grader, _ in self.graders]
        results = [self._combined(judgements) for judgements in zip(*columns, strict=True)]
        failed = [(row, result) for row, result in enumerate(results) if isinstance(result, EnvError)]
        if len(failed) > self.patience.max_failed * len(rows):
            row, fault = failed[0]
            raise EnvError(
                f"{len(failed)} of {len(rows)} rows could not be graded, first row {row} (task {tasks[row].id!r})",
                got=fault,
                expected=f"at most a share of {self.patience.max_failed:g} (env.max_failed)",
                do="Mend the grader; nothing was trained on this batch.",
            ) from fault
        for row, fault in failed:
            LOG.warning("row %d (task %r) could not be graded and counts as a failure: %s", row, tasks[row].id, fault)
        return [_failure() if isinstance(result, EnvError) else result for result in results]

    def _combined(self, judgements: Sequence[Judgement]) -> Grade | EnvError:
        for judgement in judgements:
            if isinstance(judgement, EnvError):
                return judgement
        grades = [
            (name, weight, judgement)
            for name, (_, weight), judgement in zip(self._names, self.graders, judgements, strict=True)
            if isinstance(judgement, Grade)
        ]
        if not grades:
            return EnvError(f"{' and '.join(self._names)} answered None", expected="a number from one grader at least")
        alone = len(self.graders) == 1
        metrics = {"grader_failed": 0.0}
        for name, _, grade in grades:
            metrics |= {key if alone else f"{name}/{key}": value for key, value in grade.metrics.items()}
            metrics |= {} if alone else {f"rewards/{name}": float(grade.reward)}
        decided = [grade.success for _, _, grade in grades if grade.success is not None]
        told = [grade for _, _, grade in grades if grade.feedback]
        return Grade(
            reward=sum(weight * grade.reward for _, weight, grade in grades),
            success=all(decided) if decided else None,
            feedback="\n".join(grade.feedback for grade in told if grade.feedback) or None,
            informative=not told or any(grade.informative for grade in told),
            metrics=metrics,
        )

    def _ask(self, grader: Grader, tasks: Sequence[Task], rows: Sequence[Row], texts: Sequence[str]) -> list[Judgement]:
        """A grader's judgement of each row.  A batch that fails as a whole is asked again row by row, to find which."""
        if grader.batched and len(rows) > 1:
            seconds = None if self.patience.seconds is None else self.patience.seconds * len(rows)
            what = f"{grader.name} on a batch of {len(rows)} rows"
            try:
                answers = called(grader, rows, texts, what, seconds)
            except EnvError as fault:
                LOG.warning("%s; now each row is asked alone", fault)
            else:
                pairs = enumerate(_counted(answers, len(rows), what))
                found = [self._judgement(answer, f"{grader.name} on row {row}") for row, answer in pairs]
                return [
                    self._ask_alone(grader, row, rows[row], texts[row], self.patience.retries, judgement)
                    if isinstance(judgement, EnvError)
                    else judgement
                    for row, judgement in enumerate(found)
                ]
        tries = 1 + self.patience.retries
        return [self._ask_alone(grader, row, rows[row], texts[row], tries) for row in range(len(rows))]

    def _ask_alone(
        self, grader: Grader, number: int, row: Row, text: str, tries: int, judgement: Judgement = None
    ) -> Judgement:
        """A grader's judgement of one row, which was ``judgement`` before; it is asked until it is none that failed."""
        what = f"{grader.name} on row {number}"
        for _ in range(tries):
            try:
                answers = called(grader, [row], [text], what, self.patience.seconds)
            except EnvError as fault:
                judgement = fault
                continue
            judgement = self._judgement(_counted(answers, 1, what)[0], what)
            if not isinstance(judgement, EnvError):
                break
        return judgement

    def _judgement(self, answer: Any, what: str) -> Judgement:
        """What a grader said about a row; what cannot be read is a fault of that row."""
        try:
            return self.read(answer, what)
        except EnvError as fault:
            return fault


def _failure() -> Grade:
    return Grade(
        reward=0.0,
        success=False,
        feedback="This answer could not be graded.",
        informative=False,
        metrics={"grader_failed": 1.0},
    )


def _counted(answers: Any, count: int, what: str) -> list[Any]:
    """Answers as a list of the right length; another length is a mistake that no row is to blame for."""
    if isinstance(answers, (str, Mapping)):
        raise EnvError(f"{what} returned no list", got=type(answers).__name__, expected=f"a list of {count}")
    listed: list[Any] = wrap_user_errors(lambda: list(answers), f"{what}: its answer, as a list,")
    if len(listed) != count:
        raise EnvError(f"{what} returned the wrong number of rewards", got=len(listed), expected=count)
    return listed


def called(grader: Grader, rows: Sequence[Row], texts: Sequence[str], what: str, seconds: float | None) -> Any:
    """A grader's raw answers.  Raises EnvError for whatever it raises, and if it takes longer than ``seconds``.

    A coroutine is cancelled when it is late.  Where there is a limit, a grader that is not async has a thread of its
    own; Python cannot stop a thread, so one that is late is left to itself.  Without a limit it runs in this thread.
    """

    def call() -> Any:
        answers = grader(rows, texts)
        return _awaited(answers, what, seconds) if inspect.isawaitable(answers) else answers

    if seconds is None or grader.is_async:
        return wrap_user_errors(call, what, do=None)
    answers: list[Any] = []
    faults: list[VPDError] = []

    def run() -> None:
        try:
            answers.append(wrap_user_errors(call, what, do=None))
        except VPDError as fault:
            faults.append(fault)

    thread = threading.Thread(target=run, daemon=True, name=f"grader {grader.name}")
    thread.start()
    thread.join(seconds)
    if faults:
        raise faults[0]
    if not answers:
        raise _late(what, seconds) if thread.is_alive() else EnvError(f"{what} ended its thread without an answer")
    return answers[0]


def _awaited(answers: Awaitable[Any], what: str, seconds: float | None) -> Any:
    """An awaitable's value, from the one loop that all async graders share, so that their clients may live on."""

    async def wait() -> Any:
        return await answers

    future = asyncio.run_coroutine_threadsafe(wait(), _loop())
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the grader's own
            raise
        future.cancel()
        raise _late(what, seconds) from None


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async graders").start()
    return loop


def _late(what: str, seconds: float | None) -> EnvError:
    return EnvError(f"{what} took too long", expected=f"at most {seconds:g} s (env.seconds for each row)")
