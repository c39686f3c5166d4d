"""A learner around another one: it does what the other does, but for what a subclass changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd.learners import Learner, Measure, ModelName, Objective, Update
from vpd.types import Example

if TYPE_CHECKING:
    from vpd.model.scorer import Role
    from vpd.policy import Policy


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

    def end_iteration(self) -> None:
        self._learner.end_iteration()

    @property
    def learning_rate(self) -> float:
        return self._learner.learning_rate

    @property
    def logprob_tolerance(self) -> float:
        return self._learner.logprob_tolerance

    def policy(self, model: ModelName = "live") -> Policy:
        return self._learner.policy(model)

    def state(self) -> dict[str, Any]:
        return self._learner.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._learner.restore(state)

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder)
