"""Two ways to keep keys and values while a batch decodes.

:class:`PaddedDecoder` takes any model: every row has its own copy of its prompt's keys and values.
:class:`SharedDecoder` keeps them once for all rows of a prompt and reads them once a step
(:mod:`vpd.model.attention`); the keys and values of a row's own tokens grow in place.  Both give the same logits.

Dimension legend: B rows still running, U distinct prompts, P longest prompt, V vocabulary, C heads of keys and values,
T tokens of a row after its prompt, D size of a head.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from vpd.model import attention
from vpd.types import Tokens


class PaddedDecoder:
    """Keys and values of every row on its own, prompts padded left: the reference, for any model."""

    def __init__(self, model: Any, prompts: Sequence[Tokens]):
        self._model = model
        logits_UV, self._cache, mask_UP, prompt_B = _prefill(model, prompts)
        self.logits_BV = logits_UV[prompt_B]
        self._mask_BP = mask_UP[prompt_B]
        self._cache.batch_select_indices(prompt_B)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        self._mask_BP = torch.cat([self._mask_BP, self._mask_BP.new_ones(len(tokens_B), 1)], 1)
        return _next_logits(
            self._model,
            self._cache,
            input_ids=tokens_B[:, None],
            attention_mask=self._mask_BP,
            position_ids=self._mask_BP.sum(1, keepdim=True) - 1,
        )

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._cache.batch_select_indices(rows)
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


def decoder_for(model: Any, prompts: Sequence[Tokens], *, shared: bool) -> PaddedDecoder | SharedDecoder:
    """A decoder that has read the prompts.

    ``shared`` where :func:`vpd.model.probe.decodes_from_shared_prefix` holds; a model whose attention was switched back
    since is decoded from padded rows.
    """
    return SharedDecoder(model, prompts) if shared and attention.is_installed(model) else PaddedDecoder(model, prompts)


def _prefill(model: Any, prompts: Sequence[Tokens]) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Logits after each distinct prompt [U,V], the cache, its attention mask [U,P], and each row's prompt [B]."""
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: index for index, prompt in enumerate(distinct)}
    longest = max(map(len, distinct))
    device = next(model.parameters()).device
    ids_UP = torch.tensor([[0] * (longest - len(p)) + list(p) for p in distinct], device=device)
    mask_UP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in distinct], device=device)
    cache = DynamicCache(config=model.config)
    positions_UP = (mask_UP.cumsum(1) - 1).clamp(min=0)
    logits_UV = _next_logits(model, cache, input_ids=ids_UP, attention_mask=mask_UP, position_ids=positions_UP)
    return logits_UV, cache, mask_UP, torch.tensor([number[prompt] for prompt in prompts], device=device)


def _next_logits(model: Any, cache: Any, **inputs: Any) -> Tensor:
    inputs[_cache_argument(type(model.base_model).forward)] = cache
    hidden = model.base_model(use_cache=True, **inputs).last_hidden_state[:, -1]
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """What this ``forward`` calls its cache: newer transformers renamed ``past_key_values`` to ``cache``."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _room_for(states: Tensor, size: int) -> Tensor:
    """A buffer for ``size`` tokens that begins with these states [B,C,T,D]."""
    rows, heads, length, width = states.shape
    room = states.new_empty(rows, heads, size, width)
    room[:, :, :length] = states
    return room
