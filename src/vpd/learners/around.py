"""A learner around another one: it does what the other does, but for what a subclass changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vpd.learners import Learner, Measure, ModelName, Objective, Update
from vpd.types import Example

if TYPE_CHECKING:
    from vpd.model.scorer import Role


class LearnerAround:
    """A :class:`~vpd.learners.Learner` that hands every call on to another."""

    def __init__(self, learner: Learner):
        self._learner = learner

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        return self._learner.score(examples, measure, model=model)

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        return self._learner.update(name, examples, objectives, train=train, lr_scale=lr_scale)

    @property
    def logprob_tolerance(self) -> float:
        return self._learner.logprob_tolerance

    @property
    def version(self) -> int:
        return self._learner.version
