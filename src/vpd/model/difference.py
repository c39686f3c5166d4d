"""How far the logits of two passes of a model are apart, and whether that may be rounding.

Dimension legend: N compared tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -1e30  # logits below it are those of tokens that a model never says (Chameleon)
SMALLEST = 1e-30  # size of logits that are all alike, so that what equals them is no further away
#: Largest distance of logits [V] at one token, relative to their norm around the mean.  In 16 bits single tokens may
#: be routed to other experts, so the median of each row counts there; else the largest.  Two right passes of a model of
#: 30 layers are .07 apart in bfloat16 (SmolLM2-135M), so that what a path computes is compared in float32 besides.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 3e-4, torch.bfloat16: 2e-1, torch.float16: 5e-2}
#: Up to this distance in float32 is it asked whether the logits agree in float64: what they differ by is then rounding,
#: which the model amplifies, and no fault.
AMPLIFIED = 1e-2


def are_numbers(logits: Tensor) -> bool:
    """Whether they are finite, or -inf as of tokens that are never said."""
    return bool((logits < math.inf).all())


@dataclass(frozen=True)
class Difference:
    """How far logits are apart: relative to their size, infinite where they have another shape or are no numbers."""

    distance: float
    text: str

    def __str__(self) -> str:
        return self.text

    def may_be_rounding(self, dtype: torch.dtype) -> bool:
        """Whether it may be what a model makes of the rounding of float32."""
        return dtype is torch.float32 and self.distance <= AMPLIFIED


def difference_of(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> Difference | None:
    """How far the logits of the rows are apart, None where they agree."""
    exact = dtype in (torch.float32, torch.float64)
    worst = 0.0
    for mine, own in zip(ours, theirs, strict=True):
        if mine.shape != own.shape:
            return Difference(math.inf, f"logits of shape {tuple(mine.shape)} instead of {tuple(own.shape)}")
        hidden = (mine < HIDDEN) & (own < HIDDEN)
        mine, own = mine.masked_fill(hidden, 0), own.masked_fill(hidden, 0)
        size_N = (own - own.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=SMALLEST)
        distance_N = ((mine - own).norm(dim=-1) / size_N).nan_to_num(math.inf, math.inf).sort().values
        worst = max(worst, float(distance_N[-1 if exact else len(distance_N) // 2]))
    if math.isinf(worst):
        return Difference(worst, "logits that are no numbers")
    return None if worst <= TOLERANCE[dtype] else Difference(worst, f"logits differ by {worst:.1e} of their size")
