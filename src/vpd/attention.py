"""Attention over a tree of tokens: branches that each see the beginning they share, and themselves.

A model that runs on transformers' attention interface is switched to :func:`attend`, which is its scaled dot-product
attention unless a pass brings :class:`Branches`.  Then the one row of tokens is cut into pieces and each piece attends
for itself, so nothing is padded and no token meets one that it may not see.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vpd_branches"


@dataclass(frozen=True)
class Branches:
    """The pieces of a row in order: ``sizes`` in tokens, and for each the piece it begins with and its mask.

    The mask [1,1,size,size of the beginning + size] is added to the scores; a piece without a beginning is causal.
    """

    sizes: tuple[int, ...]
    beginnings: tuple[int | None, ...]
    masks: tuple[Tensor | None, ...]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    branches: Branches | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [1,heads,L,D] to [1,L,heads,D]."""
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    keys, values = key.split(branches.sizes, 2), value.split(branches.sizes, 2)
    outputs = []
    pieces = zip(query.split(branches.sizes, 2), keys, values, branches.beginnings, branches.masks, strict=True)
    for q, k, v, beginning, mask in pieces:
        if beginning is not None:
            k, v = torch.cat([keys[beginning], k], 2), torch.cat([values[beginning], v], 2)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1), None


def branch_mask(beginning: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask of a branch: all of its beginning, and its own tokens up to each."""
    seen = torch.ones(size, beginning + size, dtype=torch.bool, device=device).tril(beginning)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def install(model: Any) -> bool:
    """Let ``model`` take branches; False, and nothing changed, where it does not run on the attention interface."""
    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not type(model)._supports_attention_backend:
        return False
    model.set_attn_implementation(NAME)
    return True


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
