"""The objectives of one update: those that measure first are prepared once, then each micro-batch gets its losses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpd.errors import TrainingError
from vpd.learners import Loss, MeasuredLoss, Objective, TokenLoss
from vpd.learners.micro_batches import MicroBatch
from vpd.model.batch import Batch
from vpd.model.scorer import LogitMixture, Scorer
from vpd.types import Example


class UpdateJob:
    """The examples and objectives of one update, the teacher's logits, and the values measured so far."""

    def __init__(self, examples: Sequence[Example], objectives: Mapping[str, Objective], *, teacher: LogitMixture):
        self.examples = examples
        self.teacher = teacher
        self.values: dict[str, list[float | None]] = {}
        self._objectives = objectives
        self._prepared: dict[str, Loss] = {}

    def measured(self) -> dict[str, MeasuredLoss]:
        """The objectives that need a number of each row before any loss."""
        return {term: o for term, o in self._objectives.items() if isinstance(o, MeasuredLoss)}

    def prepare(self, term: str, values: Mapping[int, float]) -> None:
        """Prepare a measured objective from the values of its rows, in the order of the examples."""
        rows = sorted(values)
        objective = self.measured()[term]
        self._prepared[term] = objective.prepare([values[row] for row in rows], [self.examples[row] for row in rows])
        self.values[term] = [values.get(row) for row in range(len(self.examples))]

    def losses(self, scorer: Scorer, batch: Batch, micro: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term's loss summed over the micro-batch with its weights, and all signals; runs inside the root."""
        losses: dict[str, Tensor] = {}
        signals: dict[str, Tensor] = {}
        for term in micro.terms:
            loss = self._loss_of(term, scorer, batch, micro)
            weight_B = self._weights(term, micro, batch)
            returned = loss(scorer.for_term(weight_B), batch)
            token_loss = returned if isinstance(returned, TokenLoss) else TokenLoss(returned)
            value = token_loss.value
            if value.shape not in (batch.mask_BT.shape, batch.mask_BT.shape[:1]):
                tokens, rows = list(batch.mask_BT.shape), list(batch.mask_BT.shape[:1])
                raise TrainingError(
                    f"the loss {term!r} is not one for each token or row",
                    got=f"the shape {list(value.shape)}",
                    expected=f"{tokens} or {rows}",
                )
            value_B = torch.where(batch.mask_BT, value, 0.0).sum(-1) if value.ndim == 2 else value
            losses[term] = (weight_B.to(value_B) * value_B).sum()
            signals |= {name: torch.where(batch.mask_BT, signal, 0) for name, signal in token_loss.signals.items()}
        return losses, signals

    def _loss_of(self, term: str, scorer: Scorer, batch: Batch, micro: MicroBatch) -> Loss:
        objective = self._objectives[term]
        if not isinstance(objective, MeasuredLoss):
            return objective
        if term not in self._prepared:  # this micro-batch holds all rows, so their values come from the same pass
            values_B = objective.measure(scorer, batch).detach()
            self.prepare(term, dict(zip(micro.rows, values_B.tolist(), strict=True)))
        return self._prepared[term]

    def _weights(self, term: str, micro: MicroBatch, batch: Batch) -> Tensor:
        weights = [0.0 if micro.padding else self.examples[row].loss_weights[term] for row in micro.rows]
        return torch.tensor(weights, dtype=batch.reference_BT.dtype, device=batch.reference_BT.device)


def check_terms(examples: Sequence[Example], objectives: Mapping[str, Objective]) -> None:
    """Raise ValueError if a row has weight in a term without an objective."""
    unknown = {term for example in examples for term in example.loss_weights} - set(objectives)
    if unknown:
        raise ValueError(f"rows have weight in terms without an objective: {sorted(unknown)}; got {sorted(objectives)}")
