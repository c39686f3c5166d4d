"""fp32 masters of 16-bit weights, which the optimiser trains.

bfloat16 keeps 8 significant bits.  A step of AdamW at a usual rate is smaller than half the distance to the next number
for most weights, so it would round to nothing, and so would the second moments.  The optimiser therefore trains an fp32
copy (Micikevicius et al., arXiv 1710.03740, section 3.1): gradients are added up over micro-batches and ranks in fp32,
clipped and applied there, and after the step the model's weights are the masters, rounded.

This takes 8 bytes a weight (a master and its gradient) besides the model's 2 and, with AdamW, the moments' 8.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vpd.errors import ConfigError, StorageError


class MasterWeights:
    """The masters of all trained 16-bit parameters of ``model``; of a model without any there are none.

    Raises ConfigError: weights in float16, whose gradients would need loss scaling, or 16-bit weights that are to be
    trained without masters (``wanted`` False).
    """

    def __init__(self, model: nn.Module, *, wanted: bool = True):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check({p.dtype for p in trained.values()}, wanted)
        self._weights = {name: p for name, p in trained.items() if p.dtype == torch.bfloat16}
        self._masters = {name: nn.Parameter(p.detach().float()) for name, p in self._weights.items()}
        self._of = {id(p): self._masters[name] for name, p in self._weights.items()}
        #: what the optimiser trains: the masters, and every other trained parameter itself
        self.parameters = [self.precise(p) for p in trained.values()]

    def __bool__(self) -> bool:
        return bool(self._masters)

    def precise(self, parameter: Any) -> Any:
        """The master of a parameter, or the parameter itself where it has none."""
        return self._of.get(id(parameter), parameter)

    def take_gradients(self) -> None:
        """Add the gradients of the 16-bit weights to the masters' and drop them."""
        for weight, master in self._pairs():
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def drop_gradients(self) -> None:
        """Forget all gradients of the 16-bit weights and of the masters."""
        for weight, master in self._pairs():
            weight.grad = master.grad = None

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace every master's gradient by ``reduce`` of it, a collective over the ranks."""
        for _, master in self._pairs():
            if master.grad is not None:
                master.grad = reduce(master.grad)

    @torch.no_grad()
    def round(self) -> None:
        """Set the model's 16-bit weights to the masters, rounded to nearest."""
        for weight, master in self._pairs():
            weight.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """The masters by the names of the model's parameters, not copied."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`state` gave into the masters and round.  Raises StorageError if names or shapes differ."""
        shapes = {name: value.shape for name, value in saved.items()}
        if shapes != {name: master.shape for name, master in self._masters.items()}:
            raise StorageError(
                "the checkpoint's master weights are not this model's",
                got=f"{len(saved)} tensors",
                expected=f"{len(self._masters)} tensors",
                do="Set model.dtype to what it was; a 16-bit run without masters cannot be continued, so start"
                " a new run from its weights.",
            )
        for name, master in self._masters.items():
            master.copy_(saved[name])
        self.round()

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(weight, self._masters[name]) for name, weight in self._weights.items()]


def _check(dtypes: set[torch.dtype], wanted: bool) -> None:
    if torch.float16 in dtypes:
        raise ConfigError(
            "weights in float16 cannot be trained: small gradients would be 0 without loss scaling",
            got="float16",
            expected="float32, bfloat16 or float64",
        )
    if torch.bfloat16 in dtypes and not wanted:
        raise ConfigError(
            "optim.master_weights false would train bfloat16 weights themselves, where most steps round to nothing",
            got="bfloat16 weights",
            do="Set it to true, or take model.lora (its adapters are float32) or model.dtype float32.",
        )
