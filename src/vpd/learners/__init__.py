"""Learners hold and train the weights.  An algorithm calls two of their methods:

* ``score``  measures examples, without gradient;
* ``update`` takes one optimiser step on a sum of objectives.

An objective computes a loss for each token or row, and nothing else.  The learner masks, sums, multiplies by
``Example.loss_weights[term]`` and differentiates, so an objective cannot get the normalisation wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from vpd.types import Example, Metrics

if TYPE_CHECKING:  # settings of algorithms are read without torch
    from torch import Tensor

    from vpd.model.batch import Batch
    from vpd.model.scorer import Role, Scorer
    from vpd.policy import Policy

ModelName: TypeAlias = Literal["live", "initial", "teacher"]


@dataclass(frozen=True)
class TokenLoss:
    """What an objective returns for a micro-batch.

    ``value``: a loss for each token [B,T] (masked tokens are left out by the learner), or for each row [B].
    ``signals``: quantities of each token [B,T] without gradient; the learner reports their means over tokens as
    metrics, and the tokens' own values in ``Update.tokens``.
    """

    value: Tensor
    signals: Mapping[str, Tensor] = field(default_factory=dict)


Loss: TypeAlias = "Callable[[Scorer, Batch], TokenLoss | Tensor]"
#: A quantity of each token [B,T], or several [B,T,C], for ``Learner.score``.
Measure: TypeAlias = "Callable[[Scorer, Batch], Tensor]"


@runtime_checkable
class MeasuredLoss(Protocol):
    """A loss that depends on all rows of the batch through one number for each, such as a shift or a pair's margin.

    The learner measures every row that has weight in the term before it asks for any loss: in the same pass where one
    micro-batch holds them all, else in a pass before.  So the result is exact for any micro-batch size and rank count.
    """

    def measure(self, scorer: Scorer, batch: Batch) -> Tensor:
        """One number for each row [B]."""
        ...

    def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
        """The loss, now that the numbers of all rows are known; both sequences are in the order of the examples."""
        ...


Objective: TypeAlias = "Loss | MeasuredLoss"


@dataclass(frozen=True)
class Update:
    """What one optimiser step reports.

    ``metrics`` are named ``name/...``; ``values`` holds for each measured term the number of each example (None: it had
    no weight in the term); ``tokens`` holds for each ``name/signal`` the values [T] of each example's tokens, masked
    ones included as 0 (None: it was not computed).
    """

    metrics: Metrics
    values: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[Tensor | None]] = field(default_factory=dict)


def combine(updates: Iterable[Update]) -> Update:
    """The report of several updates of one iteration.

    Rows and tokens add up; every other metric is the mean over the updates that report it, weighted by their tokens.
    ``name/updates`` counts the updates of that name.  Per-token signals are joined in order.
    """
    updates = list(updates)
    metrics: Metrics = {}
    weight: dict[str, float] = {}
    for update in updates:
        for name, value in update.metrics.items():
            prefix, _, rest = name.rpartition("/")
            if rest in ("rows", "tokens", "updates"):
                metrics[name] = metrics.get(name, 0.0) + value
                continue
            share = update.metrics.get(f"{prefix}/tokens", 1.0)
            weight[name] = weight.get(name, 0.0) + share
            old = metrics.get(name, value)
            metrics[name] = old + (value - old) * (share / weight[name] if weight[name] else 1.0)
    tokens: dict[str, list[Tensor | None]] = {}
    for update in updates:
        for name, signals in update.tokens.items():
            tokens.setdefault(name, []).extend(signals)
    return Update(metrics, tokens=tokens)


class Learner(Protocol):
    """What an algorithm is given: an object that measures and trains the weights."""

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        """A measure of every token of every example, in order, masked tokens included as 0; no gradient.

        A measure of C numbers for each token gives lists of C in the place of numbers.
        ``model`` plays both roles: the ``live`` weights, the ``initial`` ones, or the ``teacher``'s.
        """
        ...

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        """One optimiser step on the live weights in the role ``train``.

        The loss is the sum over terms and rows of ``loss_weights[term]`` times the term's objective.  Training the
        student, the configured teacher plays the teacher; training the teacher, the live weights do.  A row without a
        non-zero weight does not enter; without any row no step is taken.  Raises NonFiniteError for a loss, gradient or
        weight that is not finite, and takes no step.
        """
        ...

    @property
    def logprob_tolerance(self) -> float:
        """How far a token's log-prob may differ, in nats, between two ways to compute it in the learner's precision."""
        ...

    @property
    def version(self) -> int:
        """Iterations that have been trained; rows of another version were sampled by other weights."""
        ...


class TrainedLearner(Learner, Protocol):
    """What a run needs of a learner besides: the end of an iteration, a policy for the engine, and its files."""

    def end_iteration(self) -> None:
        """Called once per iteration by the loop: the schedule and an EMA teacher move here.

        Raises NonFiniteError for weights that are not finite.
        """
        ...

    @property
    def learning_rate(self) -> float:
        """The schedule's rate of the iteration at hand."""
        ...

    def policy(self, model: ModelName = "live") -> Policy:
        """What ``Engine.load`` takes: the live weights, or those of another role."""
        ...

    def state(self) -> dict[str, Any]:
        """All that training changes: weights, optimiser, schedule, teacher."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that :meth:`load` needs into a folder: the weights in a form others load, and ``state.pt``."""
        ...

    def load(self, folder: Path) -> None:
        """Restore everything that :meth:`save` wrote.  Raises StorageError for a folder of another kind of model."""
        ...

    def export(self, folder: Path) -> None:
        """Write the result: ``folder/model`` loads with ``from_pretrained``; with LoRA also ``folder/adapter``."""
        ...
