"""What a method asks of the learner in an iteration, found by letting it run on a learner that computes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vpd.learners import Measure, MeasuredLoss, ModelName, Objective, Update
from vpd.model.batch import Batch, collate
from vpd.model.scorer import Divergence, Role
from vpd.types import Example

PREFERENCE = 0.01  # nats per token by which the rehearsal's teacher prefers a success


@dataclass(frozen=True, kw_only=True)
class Use:
    """What the losses of an update need of the model.

    ``read`` are the roles that are computed, ``divergence`` the options of a comparison of whole distributions (None:
    none), ``measured`` whether every row is measured before the loss is known.
    """

    read: frozenset[Role]
    divergence: Mapping[str, Any] | None = None
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of ``score`` or ``update``: the rows that it computes, the role that is trained, and what it needs."""

    kind: Literal["score", "update"]
    name: str
    examples: Sequence[Example]
    use: Use
    train: Role | None = None
    model: ModelName = "live"


@dataclass
class Rehearsal:
    """A learner without weights, which keeps what it is asked.  Losses are 0, and log-probs are the sampler's own.

    Only the teacher's are higher on successes: a method that does as much of its work as the teacher is worth then does
    all of it.  ``version`` is that of its weights; where it is not the rows' own, these are stale.
    """

    version: int = 0
    calls: list[Call] = field(default_factory=list)
    logprob_tolerance: float = 1.0

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        if not examples:
            return []
        use = Use(read=frozenset(_ask([measure], examples[0]).read))
        self.calls.append(Call(kind="score", name="score", examples=list(examples), use=use, model=model))
        teacher = "teacher" in use.read
        return [[logprob + PREFERENCE * (teacher and e.success) for logprob in e.behaviour] for e in examples]

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        entering = [example for example in examples if any(example.loss_weights.values())]
        measured = [term for term, objective in objectives.items() if isinstance(objective, MeasuredLoss)]
        values = {term: [0.0 if e.loss_weights.get(term) else None for e in examples] for term in measured}
        counts = {"rows": len(entering), "tokens": sum(sum(e.mask) for e in entering), "updates": 1 if entering else 0}
        if entering:
            use = _use_of(objectives, entering)
            self.calls.append(Call(kind="update", name=name, examples=entering, use=use, train=train))
        return Update({f"{name}/{key}": float(count) for key, count in counts.items()}, values)


class _Asked:
    """A scorer that answers with zeros [B,T] and keeps what it was asked."""

    def __init__(self, batch: Batch) -> None:
        self.read: set[Role] = set()
        self.divergences: list[dict[str, Any]] = []
        self._zeros_BT = torch.zeros_like(batch.behaviour_BT)

    def logprobs(self, role: Role) -> Tensor:
        self.read.add(role)
        return self._zeros_BT

    def entropy(self, role: Role) -> Tensor:
        return self.logprobs(role)

    def divergence(self, *, importance_clip: float | None = None, **options: Any) -> Divergence:
        self.divergences.append(options)
        return Divergence(*[self.logprobs(role) for role in ("student", "student", "teacher", "student", "teacher")])


def _ask(functions: Sequence[Any], example: Example) -> _Asked:
    """What these losses or measures ask of a scorer, for one row."""
    batch = collate([example], device=torch.device("cpu"), dtype=torch.float32)
    asked: Any = _Asked(batch)
    for function in functions:
        function(asked, batch)
    return asked


def _use_of(objectives: Mapping[str, Objective], entering: Sequence[Example]) -> Use:
    read: set[Role] = set()
    divergence, measured = None, False
    for term, objective in objectives.items():
        rows = [example for example in entering if example.loss_weights.get(term)]
        if not rows:
            continue
        loss: Any = objective
        if isinstance(objective, MeasuredLoss):
            measured = True
            loss = objective.prepare([0.0] * len(rows), rows)
        asked = _ask([loss], rows[0])
        read |= asked.read
        divergence = asked.divergences[-1] if asked.divergences else divergence
    return Use(read=frozenset(read), divergence=divergence, measured=measured)
