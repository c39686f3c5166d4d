"""Attention over packed segments and over a shared prefix's keys and values.

A model that runs on transformers' attention interface is switched to :func:`attend`, which is its scaled dot-product
attention unless a pass brings :class:`PackedSegments` or :class:`SharedPrefixKV`.  In training the one row of tokens is
cut into segments, each of which attends to itself and to the prefix it continues, so nothing is padded.  In decoding
all rows of a prompt attend to one copy of its keys and values.

Dimension legend: B rows, U prompts, P longest prompt, T tokens of a row after its prompt, A heads of queries, C heads
of keys and values, R = A / C, S most rows of one prompt, L tokens of a row of pieces, D size of a head.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vpd_branches"


@dataclass(frozen=True)
class PackedSegments:
    """The pieces of a row in order: ``sizes`` in tokens, and for each the piece it begins with and its mask.

    The mask [1,1,size,size of the beginning + size] is added to the scores; a piece without a beginning is causal.
    """

    sizes: tuple[int, ...]
    beginnings: tuple[int | None, ...]
    masks: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class SharedPrefixKV:
    """Keys and values [U,C,P,D] of prompts, one pair for each layer, and the mask [U,1,1,P] of their padding.

    ``slot_B`` says which of the U x S places each row takes; ``width`` is S.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask_U11P: Tensor
    slot_B: Tensor
    width: int = 0

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor]], seen_UP: Tensor) -> "SharedPrefixKV":
        """SharedPrefixKV that no row owns yet; ``seen_UP`` is 0 at padding."""
        low = torch.finfo(layers[0][0].dtype).min
        mask_UP = torch.zeros(seen_UP.shape, dtype=layers[0][0].dtype, device=seen_UP.device)
        mask_U11P = mask_UP.masked_fill(seen_UP == 0, low)[:, None, None]
        return cls(tuple(layers), mask_U11P, seen_UP.new_zeros(0))

    def owned_by(self, owner_B: Tensor) -> "SharedPrefixKV":
        """The same stems with the rows' places: those of one prompt stand side by side."""
        order_B = owner_B.argsort(stable=True)
        counts_U = owner_B.bincount(minlength=len(self.mask_U11P))
        first_U = counts_U.cumsum(0) - counts_U
        rank_B = torch.empty_like(owner_B)
        rank_B[order_B] = torch.arange(len(owner_B), device=owner_B.device) - first_U[owner_B[order_B]]
        width = int(counts_U.max())
        return dataclasses.replace(self, slot_B=owner_B * width + rank_B, width=width)

    def keep(self, alive_U: Tensor) -> "SharedPrefixKV":
        """The stems of some prompts."""
        if len(alive_U) == len(self.mask_U11P):
            return self
        layers = tuple((keys[alive_U], values[alive_U]) for keys, values in self.layers)
        return dataclasses.replace(self, layers=layers, mask_U11P=self.mask_U11P[alive_U])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token of each row, query [B,A,1,D], to its stem and to its own tokens [B,C,T,D]: [B,1,A,D]."""
        stem_keys, stem_values = self.layers[layer]
        heads, size = stem_keys.shape[1], stem_keys.shape[3]
        query_BCRD = query.reshape(len(query), heads, -1, size) * scaling
        stem_UCSRP = (self._to_slots(query_BCRD).flatten(2, 3) @ stem_keys.mT + self.mask_U11P).unflatten(
            2, (self.width, -1)
        )
        stem_BCRP = stem_UCSRP.transpose(1, 2).flatten(0, 1)[self.slot_B]
        own_BCRT = query_BCRD @ key.mT
        weight = torch.softmax(torch.cat([stem_BCRP, own_BCRT], -1), -1, dtype=_wide(query.dtype)).to(query.dtype)
        stem_BCRP, own_BCRT = weight.split([stem_BCRP.shape[-1], own_BCRT.shape[-1]], -1)
        told_UCSRD = (self._to_slots(stem_BCRP).flatten(2, 3) @ stem_values).unflatten(2, (self.width, -1))
        told_BCRD = told_UCSRD.transpose(1, 2).flatten(0, 1)[self.slot_B]
        return (told_BCRD + own_BCRT @ value).reshape(len(query), 1, -1, size)

    def _to_slots(self, rows_BCRX: Tensor) -> Tensor:
        """Rows in their places [U,C,S,R,X]; empty ones are 0."""
        slots = rows_BCRX.new_zeros(len(self.mask_U11P) * self.width, *rows_BCRX.shape[1:])
        slots[self.slot_B] = rows_BCRX
        return slots.unflatten(0, (-1, self.width)).transpose(1, 2)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: PackedSegments | None = None,
    prefix_kv: SharedPrefixKV | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: queries [B,A,L,D] to [B,L,A,D]."""
    if prefix_kv is not None:
        return prefix_kv.attend(module.layer_idx, query, key, value, options["scaling"]), None
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    keys, values = key.split(segments.sizes, 2), value.split(segments.sizes, 2)
    outputs = []
    pieces = zip(query.split(segments.sizes, 2), keys, values, segments.beginnings, segments.masks, strict=True)
    for q, k, v, beginning, mask in pieces:
        if beginning is not None:
            k, v = torch.cat([keys[beginning], k], 2), torch.cat([values[beginning], v], 2)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1), None


def branch_mask(beginning: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask of a branch: all of its beginning, and its own tokens up to each."""
    seen = torch.ones(size, beginning + size, dtype=torch.bool, device=device).tril(beginning)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def is_installed(model: Any) -> bool:
    """Whether ``model`` takes branches and stems at this moment: another attention would pass over them."""
    return bool(model.config._attn_implementation == NAME)


def install(model: Any) -> bool:
    """Let ``model`` take them; False, and nothing changed, where it does not run on the attention interface."""
    if is_installed(model):
        return True
    if model.config._attn_implementation != "sdpa" or not type(model)._supports_attention_backend:
        return False
    model.set_attn_implementation(NAME)
    return True


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
