"""Calls reward functions that may raise, hang or return nonsense, and adds their rewards up.

A row that a function cannot grade has *failed*; errors and warnings name its number.  If more than ``max_failed`` of a
batch's rows fail, that is an EnvError.  Otherwise a failed row gets reward 0, feedback that no teacher reads, and the
metric ``grader_failed``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Protocol, TypeAlias

from annotated_types import Ge, Gt

from vpd.errors import EnvError
from vpd.settings import Settings, Share
from vpd.types import Grade, Task

LOG = logging.getLogger("vpd")
Result: TypeAlias = Grade | EnvError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a reward function gets besides the answer: the prompt as the data has it, and every other column."""

    prompt: Any
    columns: Mapping[str, Any]


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


class Caller(Protocol):
    """Calls a reward function in some place, within a time limit (:mod:`vpd.envs.adapters.callers`)."""

    @property
    def name(self) -> str: ...

    @property
    def batched(self) -> bool: ...

    def __call__(self, rows: Sequence[Row], texts: Sequence[str], first: int, seconds: float | None) -> list[Result]:
        """A result for each row, the first of which has the number ``first``.

        Raises EnvError if the call failed as a whole, WrongCount if it returned another number of results.
        """
        ...


class WrongCount(EnvError):
    """A reward function returned another number of rewards: no row can be told from another."""


class WeightedRewards:
    """Reward functions with weights.

    The reward of a row is the weighted sum over the functions that apply to it and judge it; a row that none judges is
    not graded.
    """

    def __init__(self, functions: Sequence[tuple[Caller, float]], policy: "GradedByFunctions"):
        self.functions, self.policy = tuple(functions), policy
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
                f"{len(failed)} of {len(rows)} rows could not be graded, first row {row} (task {tasks[row].id!r}): "
                f"{error.problem}",
                do="Mend the grader, or let such rows count as failures up to a share (env.max_failed, now "
                f"{self.policy.max_failed:g}); nothing was trained on this batch.",
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
        judged = [entry for entry in grades if entry[2].graded]
        metrics |= {} if single else {f"rewards/{name}": float(grade.reward) for name, _, grade in judged}
        successes = [grade.success for _, _, grade in judged if grade.success is not None]
        with_feedback = [grade for _, _, grade in grades if grade.feedback]
        return Grade(
            reward=sum((weight * grade.reward for _, weight, grade in judged), 0.0),
            success=all(successes) if successes else None if judged else False,
            feedback="\n".join(grade.feedback for grade in with_feedback if grade.feedback) or None,
            informative=not with_feedback or any(grade.informative for grade in with_feedback),
            metrics=metrics,
            graded=bool(judged),
        )

    def _call(self, function: Caller, rows: Sequence[Row], texts: Sequence[str]) -> list[Result]:
        """A function's result for each row.  If a batch fails as a whole, each row is graded alone to find which."""
        tries = 1 + self.policy.retries
        if function.batched and len(rows) > 1:
            seconds = None if self.policy.seconds is None else self.policy.seconds * len(rows)
            try:
                results = function(rows, texts, 0, seconds)
            except WrongCount:
                raise
            except EnvError as error:
                LOG.warning("%s; now each row is graded alone", error)
            else:
                return [
                    self._call_row(function, row, rows[row], texts[row], tries - 1, result)
                    if isinstance(result, EnvError)
                    else result
                    for row, result in enumerate(results)
                ]
        return [self._call_row(function, row, rows[row], texts[row], tries) for row in range(len(rows))]

    def _call_row(
        self, function: Caller, number: int, row: Row, text: str, tries: int, result: Result = None
    ) -> Result:
        """A function's result for one row, tried until it is no error; after no try it is ``result``."""
        for _ in range(tries):
            try:
                [result] = function([row], [text], number, self.policy.seconds)
            except WrongCount:
                raise
            except EnvError as error:
                result = error
            if not isinstance(result, EnvError):
                break
        return result


@dataclass(frozen=True, kw_only=True)
class GradedByFunctions(Settings, section="env"):
    """Settings and grading of an environment whose tasks have a :class:`Row` as payload, which functions grade."""

    seconds: Annotated[float | None, Gt(0), "seconds to grade one answer; null: no limit"] = None
    retries: Annotated[int, Ge(0), "how often an answer that could not be graded is graded again"] = 0
    max_failed: Annotated[float, Share, "share of a batch's answers that may fail to be graded; above it: an error"] = (
        0.0
    )

    def callers(self) -> Sequence[tuple[Caller, float]]:
        """The functions with their weights."""
        raise NotImplementedError

    @cached_property
    def rewards(self) -> WeightedRewards:
        return WeightedRewards(self.callers(), self)

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return self.rewards.grade(tasks, [task.payload for task in tasks], texts)


def _failed_grade() -> Grade:
    return Grade(
        reward=0.0,
        success=False,
        feedback="This answer could not be graded.",
        informative=False,
        metrics={"grader_failed": 1.0},
    )
