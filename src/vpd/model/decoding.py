"""Ways to read prompts and then one token at a time.

:class:`PaddedDecoder` gives every row its own copy of its prompt's keys and values.  :class:`SharedDecoder` keeps them
once for all rows of a prompt and reads them once a step (:mod:`vpd.model.attention`); those of a row's own tokens grow
in place.  :class:`RecomputingDecoder` keeps nothing and computes whole rows at every step, for models whose
cache is not what a forward pass computes; :class:`ByLengthDecoder` runs prompts of one length at a time.
:func:`vpd.model.probe.engine_path` finds the first way that gives the logits of a forward pass.

Dimension legend: B rows still running, U distinct prompts, P longest prompt, V vocabulary, C heads of keys and values,
T tokens of a row after its prompt, D size of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from vpd.model import attention, forward
from vpd.types import Tokens

#: How an engine decodes: from shared prompts, from padded rows with a cache, the same for prompts of one length at a
#: time, or without a cache.
EnginePath: TypeAlias = Literal["shared", "cached", "cached_by_length", "recomputed"]


class Decoder(Protocol):
    """Rows that have read their prompts; ``logits_BV`` are those of their first tokens."""

    logits_BV: Tensor

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (indices)."""
        ...


class PaddedDecoder:
    """Keys and values (or recurrent states) of every row on its own, prompts padded left."""

    def __init__(self, model: Any, prompts: Sequence[Tokens]):
        self._model = model
        logits_UV, self._cache, mask_UP, prompt_B = _prefill(model, prompts)
        self.logits_BV = logits_UV[prompt_B]
        self._mask_BP = mask_UP[prompt_B]
        self._padded = not bool(mask_UP.all())
        self._cache.reorder_cache(prompt_B)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        self._mask_BP = torch.cat([self._mask_BP, self._mask_BP.new_ones(len(tokens_B), 1)], 1)
        return _next_logits(
            self._model,
            self._cache,
            input_ids=tokens_B[:, None],
            attention_mask=self._mask_BP if self._padded else None,
            position_ids=self._mask_BP.sum(1, keepdim=True) - 1,
        )

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._cache.reorder_cache(rows)  # the only name for it that layers with recurrent states have
        self._mask_BP = self._mask_BP[rows]


class SharedDecoder:
    """Keys and values of a prompt once, however many rows continue it."""

    def __init__(self, model: Any, prompts: Sequence[Tokens]):
        self._model = model
        logits_UV, cache, mask_UP, self._prompt_B = _prefill(model, prompts)
        self.logits_BV = logits_UV[self._prompt_B]
        self._position_B1 = mask_UP.sum(1)[self._prompt_B][:, None]
        prefix_kv = attention.SharedPrefixKV.of([(layer.keys, layer.values) for layer in cache.layers], mask_UP)
        self._prefix_kv = prefix_kv.with_rows(self._prompt_B)
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=logits_UV.dtype, device=logits_UV.device)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        logits_BV = _next_logits(
            self._model,
            self._cache,
            input_ids=tokens_B[:, None],
            attention_mask=self._no_mask,
            position_ids=self._position_B1,
            prefix_kv=self._prefix_kv,
        )
        self._position_B1 = self._position_B1 + 1
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, and prompts that no row continues."""
        if self._cache.layers:
            self._cache.batch_select_indices(rows)
        self._position_B1 = self._position_B1[rows]
        alive_U, self._prompt_B = self._prompt_B[rows].unique(return_inverse=True)
        self._prefix_kv = self._prefix_kv.keep(alive_U).with_rows(self._prompt_B)


class GrowingLayer(DynamicLayer):
    """Keys and values that grow in place: a full buffer is doubled, so a step copies one token and not all."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = tuple(_room_for(states[:, :, :0], 32) for states in (key_states, value_states))
        length = self.get_seq_length()
        end = length + key_states.shape[2]
        if end > self._room[0].shape[2]:
            self._room = tuple(_room_for(room[:, :, :length], 2 * end) for room in self._room)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length, size = self.get_seq_length(), self._room[0].shape[2]
        self._room = tuple(_room_for(room[indices, :, :length], size) for room in self._room)
        self.keys, self.values = (room[:, :, :length] for room in self._room)


class RecomputingDecoder:
    """No cache: rows of prompts of one length, computed whole at every step, from their ids alone."""

    def __init__(self, model: Any, prompts: Sequence[Tokens]):
        self._model = model
        self._ids_BT = torch.tensor([list(p) for p in prompts], device=next(model.parameters()).device)
        self.logits_BV = self._last_logits()

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        self._ids_BT = torch.cat([self._ids_BT, tokens_B[:, None]], 1)
        return self._last_logits()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._ids_BT = self._ids_BT[rows]

    def _last_logits(self) -> Tensor:
        forward.forget_lengths(self._model)
        hidden_BTH = forward.hidden_states(self._model, input_ids=self._ids_BT)
        return forward.logits_of(self._model, hidden_BTH[:, -1])


class ByLengthDecoder:
    """A decoder of ``kind`` for the prompts of each length."""

    def __init__(self, model: Any, prompts: Sequence[Tokens], kind: Callable[[Any, Sequence[Tokens]], Decoder]):
        device = next(model.parameters()).device
        length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._rows = [(length_B == length).nonzero()[:, 0] for length in length_B.unique()]
        self._decoders = [kind(model, [prompts[row] for row in rows.tolist()]) for rows in self._rows]
        self.logits_BV = self._in_place([decoder.logits_BV for decoder in self._decoders])

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        own = zip(self._decoders, self._rows, strict=True)
        return self._in_place([decoder.step(tokens_B[rows]) for decoder, rows in own])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, and decoders that are left without a row."""
        kept = []
        for decoder, own in zip(self._decoders, self._rows, strict=True):
            place, where = (rows[:, None] == own[None, :]).nonzero().unbind(1)
            if len(place):
                decoder.keep(where)
                kept.append((decoder, place))
        self._decoders, self._rows = [decoder for decoder, _ in kept], [place for _, place in kept]

    def _in_place(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))[torch.cat(self._rows).argsort()]


def decoder_for(model: Any, prompts: Sequence[Tokens], path: EnginePath) -> Decoder:
    """A decoder that has read the prompts, along a path that :func:`vpd.model.probe.engine_path` found.

    A model whose attention was switched back since is not decoded from shared prompts but from padded rows.
    """
    if path == "shared" and attention.is_installed(model):
        return SharedDecoder(model, prompts)
    if path in ("shared", "cached"):
        return PaddedDecoder(model, prompts)
    return ByLengthDecoder(model, prompts, PaddedDecoder if path == "cached_by_length" else RecomputingDecoder)


def _prefill(model: Any, prompts: Sequence[Tokens]) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Logits after each distinct prompt [U,V], the cache, its attention mask [U,P], and each row's prompt [B]."""
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: index for index, prompt in enumerate(distinct)}
    longest = max(map(len, distinct))
    device = next(model.parameters()).device
    ids_UP = torch.tensor([[0] * (longest - len(p)) + list(p) for p in distinct], device=device)
    mask_UP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in distinct], device=device)
    positions_UP = (mask_UP.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits_UV = _next_logits(model, cache, input_ids=ids_UP, attention_mask=mask_UP, position_ids=positions_UP)
    return logits_UV, cache, mask_UP, torch.tensor([number[prompt] for prompt in prompts], device=device)


def _next_logits(model: Any, cache: Any, **inputs: Any) -> Tensor:
    return forward.logits_of(model, forward.hidden_states(model, cache, **inputs)[:, -1])


def _room_for(states: Tensor, size: int) -> Tensor:
    """A buffer for ``size`` tokens that begins with these states [B,C,T,D]."""
    rows, heads, length, width = states.shape
    room = states.new_empty(rows, heads, size, width)
    room[:, :, :length] = states
    return room
