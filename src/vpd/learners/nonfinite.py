"""Numbers that are not finite: the check before a step is taken, and the search for where they begin.

Dimension legend: B rows, T longest completion.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpd.errors import NonFiniteError
from vpd.learners import Loss, MeasuredLoss, Objective, TokenLoss
from vpd.learners.journal import numbers_of
from vpd.learners.sharding import whole
from vpd.model.batch import Batch
from vpd.model.scorer import Scorer
from vpd.types import Example

LARGEST_RATE = 1e30  # AdamW divides the rate by a number that may be small
MOST = 12  # findings of one kind that are worth reading


def check_step(name: str, loss: float, norm: float) -> None:
    """Raise NonFiniteError unless an update's loss and gradient norm are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    hint = "Lower optim.learning_rate or look at the last rollouts."
    if loss == math.inf:
        hint = (
            "A teacher that gives probability 0 to what the student can say has an infinite divergence at"
            " algorithm.distillation_alpha 0 or 1: take one between, or distillation_topk. Otherwise lower"
            " optim.learning_rate."
        )
    raise NonFiniteError(
        f"the update {name!r} is not finite",
        got=f"loss {loss}, gradient norm {norm}",
        do=f"No step was taken. {hint}",
    )


def check_rate(name: str, rate: float) -> None:
    """Raise NonFiniteError for a rate that no step of fp32 weights can be taken with."""
    if not 0 <= rate <= LARGEST_RATE:
        raise NonFiniteError(
            f"the learning rate of the update {name!r} is out of range",
            got=f"{rate:g}",
            expected=f"from 0 to {LARGEST_RATE:g}",
            do="No step was taken. Lower optim.learning_rate, or a scale of it in the section algorithm.",
        )


def check_weights(model: nn.Module, when: str) -> None:
    """Raise NonFiniteError that names the trained weights unless all are finite; ``when`` says after what.

    A bias of -inf is allowed: it rules a token out.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained or math.isfinite(float(whole(torch.nn.utils.get_total_norm(trained, norm_type=math.inf)))):
        return
    if broken := weights_not_finite(model):
        raise NonFiniteError(
            f"the weights are not finite {when}",
            got="; ".join(broken[:3]),
            do="Nothing was saved since. Lower optim.learning_rate, or load a model that is whole.",
        )


def weights_not_finite(model: nn.Module) -> list[str]:
    """The weights of a model that hold a number that is not finite, each with how many, in the model's order."""
    weights = ((name, whole(weight.detach())) for name, weight in model.named_parameters())
    return [
        f"{name}: {_count(weight)}"
        for name, weight in weights
        if not _finite(weight.clamp(min=0) if weight.ndim == 1 else weight)
    ]


def numbers_not_finite(examples: Sequence[Example]) -> list[str]:
    """The numbers of rows that are not finite, each with its row."""
    return [
        f"{name} of {example.name}: {next(v for v in values if not math.isfinite(v))}"
        for example in examples
        for name, values in numbers_of(example).items()
        if not all(map(math.isfinite, values))
    ]


@dataclass
class Trace:
    """What was not finite while a model computed, in the order of time: ``found`` holds a line for each place."""

    found: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self, models: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch the outputs of all modules and the gradients of all trained weights."""
        handles: list[Any] = []
        for title, model in models.items():
            for name, module in model.named_modules():
                handles.append(
                    module.register_forward_hook(partial(self._output, f"output of {title} {name or '(all)'}"))
                )
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    handles.append(weight.register_hook(partial(self._note, f"gradient of {title} {name}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def objective(self, term: str, objective: Objective) -> Objective:
        """The same objective, watched."""
        return _Measured(self, term, objective) if isinstance(objective, MeasuredLoss) else self.loss(term, objective)

    def loss(self, term: str, loss: Loss) -> Loss:
        """The same loss, watched: its value and its signals of each token where the mask is True."""

        def watched(scorer: Scorer, batch: Batch) -> TokenLoss:
            returned = loss(scorer, batch)
            token_loss = returned if isinstance(returned, TokenLoss) else TokenLoss(returned)
            for name, signal_BT in token_loss.signals.items():
                self.rows(f"{name} in the term {term!r}", signal_BT, batch)
            self.rows(f"loss of the term {term!r}", token_loss.value, batch)
            return token_loss

        return watched

    def rows(self, what: str, values: Tensor, batch: Batch) -> None:
        """Note the rows, and of values [B,T] the tokens, that are not finite."""
        values = torch.where(batch.mask_BT, values, 0.0) if values.ndim == 2 else values
        for place in (~values.detach().isfinite()).nonzero().tolist()[:MOST]:
            token = f", token {place[1]}" if len(place) == 2 else ""
            self.found.append(f"{what}: {batch.examples[place[0]].name}{token}")

    def _output(self, what: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            self._note(what, tensor)

    def _note(self, what: str, tensor: Tensor) -> None:
        if not _finite(tensor):
            self.found.append(f"{what}: {_count(tensor)}")


class _Measured:
    """A measured loss, watched."""

    def __init__(self, trace: Trace, term: str, objective: MeasuredLoss):
        self._trace, self._term, self._objective = trace, term, objective

    def measure(self, scorer: Scorer, batch: Batch) -> Tensor:
        values_B = self._objective.measure(scorer, batch)
        self._trace.rows(f"measure of the term {self._term!r}", values_B, batch)
        return values_B

    def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
        return self._trace.loss(self._term, self._objective.prepare(values, examples))


def watched_measure(trace: Trace, measure: Callable[[Scorer, Batch], Tensor]) -> Callable[[Scorer, Batch], Tensor]:
    """The same measure of ``Learner.score``, watched."""

    def watched(scorer: Scorer, batch: Batch) -> Tensor:
        values_BT = measure(scorer, batch)
        trace.rows("log-prob", values_BT, batch)
        return values_BT

    return watched


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def _count(tensor: Tensor) -> str:
    return f"{int((~tensor.detach().isfinite()).sum())} of {tensor.numel()} numbers are not finite"
