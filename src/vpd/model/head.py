"""The head, a few tokens at a time: logits are made, measured, differentiated and forgotten.

A measure of one token depends on its own logits alone, so its gradient is known as soon as they are.  Where the caller
knows beforehand what the loss will multiply each token's value by, the gradients of hidden states and head are formed
in the forward pass and the backward pass costs nothing; where it does not, the backward pass makes the logits once
more.  Either way no more than ``chunk`` tokens have logits at one time, and nothing of size V is kept.

Dimension legend: N tokens, n tokens of a block, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

BLOCK = 1 << 20  # logits that are measured at once: few enough to stay in the cache of a processor


class Measured(NamedTuple):
    """What is known of n tokens: a value, its gradient in the logits (if it was asked for), and by-products [n].

    ``weight_n`` is what the loss will multiply the value by, None where that is not known yet.
    """

    value_n: Tensor
    gradient_nV: Tensor | None
    aux: tuple[Tensor, ...]
    weight_n: Tensor | None = None


#: (logits [n,V], which tokens of the chunk, whether the gradient is wanted) -> Measured
MeasureBlock: TypeAlias = Callable[[Tensor, slice, bool], Measured]
#: which of the N tokens -> how their logits are measured; called once for each chunk
MeasureChunk: TypeAlias = Callable[[slice], MeasureBlock]


def is_plain(head: Any) -> bool:
    """Whether a head is one matrix: the analytic gradient knows no other."""
    return type(head) is nn.Linear and head.bias is None


def measure(
    hidden_NH: Tensor, weight_VH: Tensor, function: MeasureChunk, *, chunk: int, scale: float, weights_known: bool
) -> tuple[Tensor, ...]:
    """``function`` over the logits ``scale * hidden @ weight.T``: the value [N], differentiable, and by-products [N].

    ``weights_known``: the function knows the weights.  If the loss turns out to weigh otherwise, the result is still
    right.
    """
    dtype = weight_VH.dtype
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
    results: tuple[Tensor, ...] = _Measure.apply(
        hidden_NH, weight_VH, _ChunkedHead(function, chunk=chunk, scale=scale, dtype=dtype), weights_known
    )
    return results


@dataclass(frozen=True)
class _ChunkedHead:
    function: MeasureChunk
    chunk: int
    scale: float
    dtype: torch.dtype

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor, rows: slice) -> Tensor:
        logits_nV = hidden_NH[rows].to(self.dtype) @ weight_VH.T
        logits_nV = logits_nV.to(torch.promote_types(self.dtype, torch.float32))
        return logits_nV if self.scale == 1.0 else logits_nV.mul_(self.scale)

    def run(
        self, hidden_NH: Tensor, weight_VH: Tensor, needs: Sequence[bool], weight_N: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None, list[Tensor | None]]:
        """Values and by-products [N]; with ``needs``, the weights [N] and the gradients in (hidden, head) under them.

        ``weight_N`` None: as the function foresees them.
        """
        tokens, vocabulary = len(hidden_NH), len(weight_VH)
        head_VH = weight_VH.to(self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        hidden_grad = torch.empty_like(hidden_NH) if needs[0] else None
        head_grad = torch.zeros_like(weight_VH, dtype=wide) if needs[1] else None
        kept_N: list[Tensor] = []  # values, by-products, weights: one tensor each, since what is kept between blocks
        # would pin the memory that blocks leave behind
        for start in range(0, max(tokens, 1), self.chunk):
            rows = slice(start, min(start + self.chunk, tokens))
            logits_nV = self.logits(hidden_NH, head_VH, rows)
            measure_block = self.function(rows)
            step = max(BLOCK // vocabulary, 1)
            for low in range(0, max(len(logits_nV), 1), step):
                block_nV = logits_nV[low : low + step]
                place = slice(low, low + len(block_nV))
                got = measure_block(block_nV, place, any(needs))
                columns_n = [got.value_n, *got.aux]
                if got.gradient_nV is not None:
                    weight_n = got.weight_n if weight_N is None else weight_N[rows][place]
                    assert weight_n is not None, "a measure that foresees its weights has none"
                    columns_n.append(weight_n)
                    torch.mul(got.gradient_nV, weight_n[:, None] * self.scale, out=block_nV)
                kept_N = kept_N or [column_n.new_empty(tokens) for column_n in columns_n]
                for column_N, column_n in zip(kept_N, columns_n, strict=True):
                    column_N[start + low : start + low + len(column_n)] = column_n
            slope_nV = logits_nV.to(self.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = (slope_nV @ head_VH).to(hidden_grad.dtype)
            if head_grad is not None:
                rows_nH = hidden_NH[rows].to(self.dtype)
                if self.dtype == wide:
                    head_grad.addmm_(slope_nV.T, rows_nH)
                else:
                    head_grad += slope_nV.T @ rows_nH
        weight_N = kept_N.pop() if any(needs) else None
        narrow = None if head_grad is None else head_grad.to(weight_VH.dtype)
        return tuple(kept_N), weight_N, [hidden_grad, narrow]


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, sweep: _ChunkedHead, weights_known: bool
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[:2] if weights_known else (False, False)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            results, weight_N, gradients = sweep.run(hidden_NH, weight_VH, needs)
        ctx.sweep, ctx.weight_N, ctx.gradients = sweep, weight_N, gradients
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *_: Any) -> tuple[Any, ...]:
        factor = None if ctx.weight_N is None else _multiple(grad_N, ctx.weight_N)
        if factor is None:
            hidden_NH, weight_VH = ctx.saved_tensors
            _, _, gradients = ctx.sweep.run(hidden_NH, weight_VH, ctx.needs_input_grad[:2], grad_N)
        else:
            gradients = [g if g is None or factor == 1.0 else g * factor for g in ctx.gradients]
        ctx.gradients = None
        return *gradients, None, None


def _multiple(grad_N: Tensor, weight_N: Tensor) -> float | None:
    """The factor c with grad = c * weight, None where there is none."""
    norm = float(weight_N.square().sum())
    if norm == 0.0:
        return None
    factor = float((grad_N * weight_N).sum()) / norm
    tolerance = 1e-4 if grad_N.dtype == torch.float32 else 1e-12
    error = float((grad_N - factor * weight_N).abs().max())
    if error > tolerance * abs(factor) * float(weight_N.abs().max()):
        return None
    return 1.0 if abs(factor - 1.0) <= tolerance else factor
