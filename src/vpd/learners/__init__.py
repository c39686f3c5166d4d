"""Learners hold the weights.  An algorithm is a short program over their two verbs:

* ``score``  measures examples, without gradient;
* ``update`` takes one optimiser step on an objective.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from vpd.model.scorer import Batch, Role, Scorer
from vpd.types import Example, Metrics

ModelName: TypeAlias = Literal["live", "initial", "teacher"]


@dataclass(frozen=True)
class Terms:
    """What an objective returns, one number for each row.

    ``losses`` are masked token *sums* (or a row's own loss), multiplied by ``Example.weights[term]`` and added up:
    nobody divides afterwards.  ``stats`` are masked token sums without gradient, reported as means per token.
    """

    losses: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)


Objective: TypeAlias = Callable[[Scorer, Batch], Terms]
Measure: TypeAlias = Callable[[Scorer, Batch], Tensor]


class Learner(Protocol):
    """The seam between algorithms and whatever trains."""

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        """A per-token measure of every example, in order, masked tokens included as 0; no gradient.

        ``model`` plays both roles: the ``live`` ones, the ``initial`` ones, or the ``teacher``'s.
        """
        ...

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objective: Objective,
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Metrics:
        """One optimiser step on the live weights in the role ``train``; metrics are named ``name/...``.

        Training the student, the configured teacher plays the teacher; training the teacher, the live weights do.
        A row without a non-zero weight does not enter; without any row no step is taken.
        """
        ...

    def in_one_pass(self, examples: Sequence[Example]) -> bool:
        """Whether an update would hand all of these rows to its objective at once, as one batch."""
        ...

    def end_iteration(self) -> None:
        """Called once per iteration by the loop: the schedule and an EMA teacher move here."""
        ...

    @property
    def learning_rate(self) -> float:
        """The schedule's rate of the iteration at hand."""
        ...

    def weights(self) -> Any:
        """What ``Engine.load`` takes."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write all that :meth:`load` needs into a folder: the weights in a form others load, and ``state.pt``."""
        ...

    def load(self, folder: Path) -> None:
        """Restore everything that :meth:`save` wrote.  Raises StorageError for a folder of another kind of model."""
        ...

    def export(self, folder: Path) -> None:
        """Write the result: ``folder/model`` loads with ``from_pretrained``; with LoRA also ``folder/adapter``."""
        ...
