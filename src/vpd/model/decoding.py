"""Two ways to hold what a batch has read while it decodes.

:class:`PaddedDecoder` takes any model: every row has its own copy of its prompt's keys and values.
:class:`SharedDecoder` keeps them once for all rows of a prompt and reads them once a step
(:mod:`vpd.model.attention`); what a row says itself grows in place.  Both give the same logits.

Dimension legend: B rows still running, U distinct prompts, P longest prompt, V vocabulary, C heads of keys and values,
D their size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from vpd.model import attention
from vpd.types import Tokens


class PaddedDecoder:
    """Keys and values of every row alone, padded left: the reference, and for models that take no segments."""

    def __init__(self, model: Any, prompts: Sequence[Tokens]):
        self._model = model
        logits_UV, self._cache, self._seen_BP, owner_B = _prefill(model, prompts)
        self.logits_BV = logits_UV[owner_B]
        self._seen_BP = self._seen_BP[owner_B]
        self._cache.batch_select_indices(owner_B)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        self._seen_BP = torch.cat([self._seen_BP, self._seen_BP.new_ones(len(tokens_B), 1)], 1)
        inputs = {"attention_mask": self._seen_BP, "position_ids": self._seen_BP.sum(1, keepdim=True) - 1}
        return _next_logits(self._model, input_ids=tokens_B[:, None], past_key_values=self._cache, **inputs)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self._cache.batch_select_indices(rows)
        self._seen_BP = self._seen_BP[rows]


class SharedDecoder:
    """A prompt's keys and values once, however many rows go on from it."""

    def __init__(self, model: Any, prompts: Sequence[Tokens]):
        self._model = model
        logits_UV, cache, seen_UP, self._owner_B = _prefill(model, prompts)
        self.logits_BV = logits_UV[self._owner_B]
        self._position_B1 = seen_UP.sum(1)[self._owner_B][:, None]
        prefix_kv = attention.SharedPrefixKV.of([(layer.keys, layer.values) for layer in cache.layers], seen_UP)
        self._stems = prefix_kv.owned_by(self._owner_B)
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=logits_UV.dtype, device=logits_UV.device)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        logits_BV = _next_logits(
            self._model,
            input_ids=tokens_B[:, None],
            attention_mask=self._no_mask,
            position_ids=self._position_B1,
            past_key_values=self._cache,
            prefix_kv=self._stems,
        )
        self._position_B1 = self._position_B1 + 1
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, and prompts that no row goes on from."""
        if self._cache.layers:
            self._cache.batch_select_indices(rows)
        self._position_B1 = self._position_B1[rows]
        alive_U, self._owner_B = self._owner_B[rows].unique(return_inverse=True)
        self._stems = self._stems.keep(alive_U).owned_by(self._owner_B)


class GrowingLayer(DynamicLayer):
    """Keys and values that grow in place: room doubles when it is full, so a step copies one token and not all."""

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
    """A decoder that has read the prompts; ``shared`` where :func:`can_share` has found that it may be."""
    return SharedDecoder(model, prompts) if shared and attention.is_installed(model) else PaddedDecoder(model, prompts)


def can_share(model: Any) -> bool:
    """Whether the model decodes from shared prompts as it does from padded rows; switches its attention if so."""
    if "sliding_attention" in model.config.get_text_config().to_dict().get("layer_types", ()):
        return False
    if not attention.install(model):
        return False
    prompts, device = [(1, 2, 0), (1, 2, 0), (2,)], next(model.parameters()).device
    outcomes = []
    for shared in (False, True):
        decoder = decoder_for(model, prompts, shared=shared)
        steps = [decoder.step(torch.tensor([1, 0, 2], device=device))]
        decoder.keep(torch.tensor([1, 2], device=device))
        steps.append(decoder.step(torch.tensor([2, 1], device=device)))
        outcomes.append(torch.cat(steps).float())
    return bool((outcomes[0] - outcomes[1]).norm() <= 1e-2 * outcomes[0].norm())


def _prefill(model: Any, prompts: Sequence[Tokens]) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Logits after each distinct prompt [U,V], the cache, where it holds tokens [U,P], and each row's prompt [B]."""
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: index for index, prompt in enumerate(distinct)}
    longest = max(map(len, distinct))
    device = next(model.parameters()).device
    ids_UP = torch.tensor([[0] * (longest - len(p)) + list(p) for p in distinct], device=device)
    seen_UP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in distinct], device=device)
    cache = DynamicCache(config=model.config)
    places_UP = (seen_UP.cumsum(1) - 1).clamp(min=0)
    logits_UV = _next_logits(
        model, input_ids=ids_UP, attention_mask=seen_UP, position_ids=places_UP, past_key_values=cache
    )
    return logits_UV, cache, seen_UP, torch.tensor([number[prompt] for prompt in prompts], device=device)


def _next_logits(model: Any, **inputs: Any) -> Tensor:
    hidden = model.base_model(use_cache=True, **inputs).last_hidden_state[:, -1]
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits


def _room_for(states: Tensor, size: int) -> Tensor:
    """Room for ``size`` tokens that begins with these states [B,C,T,D]."""
    rows, heads, length, width = states.shape
    room = states.new_empty(rows, heads, size, width)
    room[:, :, :length] = states
    return room
