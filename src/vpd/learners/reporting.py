"""Adds up what the micro-batches of one update report.  Nothing is read from the device before the update ends."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpd.learners import Update
from vpd.learners.micro_batches import MicroBatch
from vpd.model.batch import Batch
from vpd.model.scorer import Scorer
from vpd.types import Example, Metrics


class UpdateReport:
    """The sums of one update on this rank, and the tokens' own signals."""

    def __init__(self, name: str, examples: Sequence[Example], entering: Sequence[int]):
        self.name = name
        self.tokens: list[tuple[str, int, Tensor]] = []
        self._examples = examples
        self._rows = len(entering)
        self._tokens = sum(sum(examples[row].mask) for row in entering)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {"computed": 0.0, "padding": 0.0}

    def without_step(self) -> Update:
        """The report where no row has any weight."""
        return Update({f"{self.name}/rows": 0.0, f"{self.name}/tokens": 0.0, f"{self.name}/updates": 0.0})

    def add(
        self,
        micro: MicroBatch,
        batch: Batch,
        losses: Mapping[str, Tensor],
        signals: Mapping[str, Tensor],
        scorer: Scorer,
    ) -> Tensor:
        """Take in one micro-batch; returns its loss, to be differentiated."""
        loss = torch.stack(list(losses.values())).sum()
        self._add("loss", loss)
        for term, value in losses.items():
            self._add(f"{term}_loss", value)
        self._counts["computed"] += scorer.tokens
        self._counts["padding"] += scorer.padding
        counted = 0 if micro.padding else sum(sum(example.mask) for example in batch.examples)
        for name, signal_BT in signals.items():
            self._add(name, signal_BT.sum() * (0.0 if micro.padding else 1.0))
            self._counts[f"tokens {name}"] = self._counts.get(f"tokens {name}", 0.0) + counted
            if not micro.padding:
                self._keep(name, micro, batch, signal_BT)
        return loss

    def kept_tokens(self) -> list[tuple[str, int, Tensor]]:
        """This rank's signals of tokens, where they can travel to another process: one transfer for each signal."""
        found: list[tuple[str, int, Tensor]] = []
        for name in dict.fromkeys(name for name, _, _ in self.tokens):
            rows = [(row, signal_T) for kept, row, signal_T in self.tokens if kept == name]
            moved = torch.cat([signal_T for _, signal_T in rows]).cpu()
            parts = moved.split([len(signal_T) for _, signal_T in rows])
            found += [(name, row, signal_T) for (row, _), signal_T in zip(rows, parts, strict=True)]
        return found

    def sums(self) -> dict[str, float]:
        """This rank's sums and counts as numbers: the update's one transfer from the device."""
        values = torch.stack([value.double() for value in self._sums.values()]).tolist()
        return dict(zip(self._sums, values, strict=True)) | self._counts

    def finish(
        self,
        sums: Mapping[str, float],
        grad_norm: float,
        values: Mapping[str, Sequence[float | None]],
        tokens: Sequence[tuple[str, int, Tensor]],
    ) -> Update:
        """The report, from the sums over all ranks."""
        metrics: Metrics = {
            "rows": float(self._rows),
            "tokens": float(self._tokens),
            "updates": 1.0,
            "grad_norm": grad_norm,
            "padding": sums["padding"] / max(sums["computed"], 1.0),
        }
        terms = [name for name in self._sums if name.endswith("_loss")]
        for name in self._sums:
            if terms == [name]:
                continue  # of one term alone it is the loss
            metrics[name] = sums[name] / max(sums[f"tokens {name}"], 1.0) if f"tokens {name}" in sums else sums[name]
        kept: dict[str, list[Tensor | None]] = {}
        for name, row, signal_T in tokens:
            kept.setdefault(f"{self.name}/{name}", [None] * len(self._examples))[row] = signal_T
        return Update({f"{self.name}/{key}": value for key, value in metrics.items()}, values, kept)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _keep(self, name: str, micro: MicroBatch, batch: Batch, signal_BT: Tensor) -> None:
        for row, example, signal_T in zip(micro.rows, batch.examples, signal_BT.detach(), strict=True):
            self.tokens.append((name, row, signal_T[: len(example.completion)]))
