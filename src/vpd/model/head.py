"""The chunked head: logits are made, used and dropped a few tokens at a time.

A value of one token depends on its own logits alone, so its gradient is known as soon as they are.  Where the caller
knows beforehand what the loss will multiply each token's value by, the gradients of hidden states and head are formed
in the forward pass and the backward pass costs nothing; where it does not, the backward pass recomputes the logits.
Either way no more than ``chunk`` tokens have logits at one time, and nothing of size V is kept.

A chunk bounds memory (one matrix product each); it is worked on in blocks, whose element-wise operations stay in the
processor's cache.

Dimension legend: N tokens, n tokens of a block, V vocabulary, H hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

BLOCK = 1 << 20  # logits of one block: few enough to stay in the cache of a processor


class BlockResult(NamedTuple):
    """What a :data:`BlockFunction` returns for its n tokens.

    ``value_n`` is differentiable by ``gradient_nV``, its gradient in the logits (None unless it was asked for); ``aux``
    are further results [n] without gradient.  ``weight_n`` is what the loss will multiply the value by, None where that
    is not known yet.
    """

    value_n: Tensor
    gradient_nV: Tensor | None
    aux: tuple[Tensor, ...]
    weight_n: Tensor | None = None


#: (logits [n,V], which tokens of the chunk, whether the gradient is wanted) -> BlockResult
BlockFunction: TypeAlias = Callable[[Tensor, slice, bool], BlockResult]
#: which of the N tokens -> the function of their logits; called once for each chunk
ChunkFunction: TypeAlias = Callable[[slice], BlockFunction]


@dataclass(frozen=True)
class LogitFunction:
    """What a family of models does to its logits after the head: multiply them, then cap them softly.

    ``cap`` bounds them: cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2; None: no bound).
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits_NV: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.cap is None else self.cap * torch.tanh(logits_NV / self.cap)

    def apply_(self, logits_NV: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        return logits_NV if self.cap is None else logits_NV.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, result_NV: Tensor) -> Tensor | float:
        """Its derivative where the result is ``result_NV``."""
        return self.scale if self.cap is None else (1 - (result_NV / self.cap) ** 2) * self.scale


#: Settings of models that multiply, divide and cap the logits.
MULTIPLIED = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED = ("logits_scaling",)
CAPPED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scale_before(model: Any) -> float:
    """What the model multiplies its last hidden states by before the head (Inkling, MiniCPM 3)."""
    config = vars(model.config.get_text_config())
    scale = 1.0 / float(config.get("logits_mup_width_multiplier") or 1.0)
    return (
        scale * float(config["dim_model_base"]) / float(config["hidden_size"]) if "dim_model_base" in config else scale
    )


def logit_function(model: Any) -> LogitFunction:
    """What the configuration of ``model`` says, with :func:`scale_before`, which a head without bias passes on.

    :func:`vpd.model.probe.check_head` compares it with the model.
    """
    config = model.config.get_text_config()
    found = {name: value for name, value in vars(config).items() if isinstance(value, int | float) and value}
    multiplies = (*MULTIPLIED, *DIVIDED) if config.model_type.startswith("hyperclovax") else MULTIPLIED
    scale = math.prod(float(found[name]) for name in multiplies if name in found)
    scale /= math.prod(float(found[name]) for name in DIVIDED if name in found and name not in multiplies)
    scale *= scale_before(model)
    return LogitFunction(scale, next((float(found[name]) for name in CAPPED if name in found), None))


def is_plain(head: Any) -> bool:
    """Whether a head is one matrix without bias, which the chunked head needs."""
    return type(head) is nn.Linear and head.bias is None


class HeadInputs(NamedTuple):
    """What logits are made of: hidden states [N,H], the head [V,H], the model's function, and what multiplies that."""

    hidden_NH: Tensor
    weight_VH: Tensor
    function: LogitFunction
    scale: float


def apply_in_chunks(
    inputs: HeadInputs, function: ChunkFunction, *, chunk: int, weights_known: bool
) -> tuple[Tensor, ...]:
    """``function`` of the logits ``scale * f(hidden @ weight.T)``: the value [N], which has a gradient, and aux [N].

    ``weights_known``: the function returns the weight that the loss will give each value.  A loss that uses other
    weights still gets the right gradient, from logits that are recomputed.
    """
    hidden_NH, weight_VH, after_head, scale = inputs
    dtype = weight_VH.dtype
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
    head = _ChunkedHead(function, chunk=chunk, after_head=after_head, scale=scale, dtype=dtype)
    results: tuple[Tensor, ...] = _Function.apply(hidden_NH, weight_VH, head, weights_known)
    return results


@dataclass
class _Results:
    """Columns [N] that are filled block by block.

    One tensor each for all blocks: many small ones would pin the memory that the blocks free.
    """

    tokens: int
    columns: list[Tensor] = field(default_factory=list)

    def put(self, start: int, columns_n: Sequence[Tensor]) -> None:
        self.columns = self.columns or [column_n.new_empty(self.tokens) for column_n in columns_n]
        for column_N, column_n in zip(self.columns, columns_n, strict=True):
            column_N[start : start + len(column_n)] = column_n


@dataclass(frozen=True)
class _ChunkedHead:
    function: ChunkFunction
    chunk: int
    after_head: LogitFunction
    scale: float
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """What logits and sums are kept in: at least fp32."""
        return torch.promote_types(self.dtype, torch.float32)

    def run(
        self, hidden_NH: Tensor, weight_VH: Tensor, needs: Sequence[bool], weight_N: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None, list[Tensor | None]]:
        """Value and aux [N]; with ``needs`` (hidden, head), the weights [N] and the two gradients under them.

        ``weight_N`` None: the weights that the function returns.
        """
        head_VH = weight_VH.to(self.dtype)
        hidden_grad = torch.empty_like(hidden_NH) if needs[0] else None
        head_grad = torch.zeros_like(weight_VH, dtype=self.wide) if needs[1] else None
        results = _Results(len(hidden_NH))
        for start in _starts(hidden_NH, self.chunk):
            rows = slice(start, min(start + self.chunk, len(hidden_NH)))
            own_weight_n = None if weight_N is None else weight_N[rows]
            logits_nV = self._run_chunk(hidden_NH, head_VH, rows, results, any(needs), own_weight_n)
            if any(needs):  # the logits have been overwritten by their gradient
                self._add_gradients(logits_nV.to(self.dtype), hidden_NH, head_VH, rows, hidden_grad, head_grad)
        used_N = results.columns.pop() if any(needs) else None
        narrow = None if head_grad is None else head_grad.to(weight_VH.dtype)
        return tuple(results.columns), used_N, [hidden_grad, narrow]

    def _run_chunk(
        self,
        hidden_NH: Tensor,
        head_VH: Tensor,
        rows: slice,
        results: _Results,
        wanted: bool,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Fill ``results`` for these tokens; their logits, or with ``wanted`` the weighted gradients in their place."""
        logits_nV = self.after_head.apply_((hidden_NH[rows].to(self.dtype) @ head_VH.T).to(self.wide))
        if self.scale != 1.0:
            logits_nV.mul_(self.scale)
        function, step = self.function(rows), max(BLOCK // len(head_VH), 1)
        for low in _starts(logits_nV, step):
            block_nV = logits_nV[low : low + step]
            place = slice(low, low + len(block_nV))
            slope = self._slope(block_nV) if wanted else 1.0  # before the function may overwrite the logits
            result = function(block_nV, place, wanted)
            columns_n = [result.value_n, *result.aux]
            if wanted:
                weight_n = result.weight_n if weight_N is None else weight_N[place]
                assert weight_n is not None and result.gradient_nV is not None
                columns_n.append(weight_n)
                torch.mul(result.gradient_nV, weight_n[:, None] * slope, out=block_nV)
            results.put(rows.start + low, columns_n)
        return logits_nV

    def _slope(self, logits_nV: Tensor) -> Tensor | float:
        """The derivative of these logits in what the matrix product gave."""
        return self.after_head.slope(logits_nV / self.scale) * self.scale

    def _add_gradients(
        self,
        grad_nV: Tensor,
        hidden_NH: Tensor,
        head_VH: Tensor,
        rows: slice,
        hidden_grad: Tensor | None,
        head_grad: Tensor | None,
    ) -> None:
        if hidden_grad is not None:
            hidden_grad[rows] = (grad_nV @ head_VH).to(hidden_grad.dtype)
        if head_grad is not None:
            rows_nH = hidden_NH[rows].to(self.dtype)
            if self.dtype == self.wide:
                head_grad.addmm_(grad_nV.T, rows_nH)
            else:
                head_grad += grad_nV.T @ rows_nH


def _starts(rows: Tensor, step: int) -> Sequence[int]:
    """Where each piece of ``step`` rows begins; of rows without data (a dry run) the first two pieces and the last.

    Those between would hold what the second holds.
    """
    starts = range(0, max(len(rows), 1), step)
    return (*starts[:2], starts[-1]) if len(starts) > 3 and isinstance(rows, FakeTensor) else starts


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, head: _ChunkedHead, weights_known: bool
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[:2] if weights_known else (False, False)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            results, weight_N, gradients = head.run(hidden_NH, weight_VH, needs)
        ctx.head, ctx.weight_N, ctx.gradients = head, weight_N, gradients
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *_: Any) -> tuple[Any, ...]:
        factor = None if ctx.weight_N is None else _common_factor(grad_N, ctx.weight_N)
        if factor is None:
            hidden_NH, weight_VH = ctx.saved_tensors
            with torch.autocast(hidden_NH.device.type, enabled=False):  # as in forward: sums over V stay wide
                _, _, gradients = ctx.head.run(hidden_NH, weight_VH, ctx.needs_input_grad[:2], grad_N)
        else:
            gradients = [g if g is None or factor == 1.0 else g * factor for g in ctx.gradients]
        ctx.gradients = None
        return *gradients, None, None


def _common_factor(grad_N: Tensor, weight_N: Tensor) -> float | None:
    """The factor c with grad = c * weight, None where there is none; 1 for tensors without data (a dry run)."""
    if isinstance(grad_N, FakeTensor):
        return 1.0
    norm = float(weight_N.square().sum())
    if norm == 0.0:
        return None
    factor = float((grad_N * weight_N).sum()) / norm
    tolerance = 1e-4 if grad_N.dtype == torch.float32 else 1e-12
    error = float((grad_N - factor * weight_N).abs().max())
    if error > tolerance * abs(factor) * float(weight_N.abs().max()):
        return None
    return 1.0 if abs(factor - 1.0) <= tolerance else factor
