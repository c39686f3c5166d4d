"""Attention over packed segments, and over the shared keys and values of a prefix.

A model that runs on transformers' attention interface is switched to :func:`attend`, which is its scaled dot-product
attention unless a pass brings :func:`packed_segments` or :class:`SharedPrefixKV`.  In training one row of tokens is cut
into segments, each of which attends to itself and to the prefix it continues, so nothing is padded (on a GPU, inside
attention alone).  In decoding all rows of a prompt attend to one copy of the prompt's keys and values.

Both are exact causal attention and nothing else: a model that asks for more in a call (a window, a mask of its own, a
bias, sinks, a soft cap) gets :class:`FastPathError` and no approximation.

Callers describe segments by their lengths alone: how attention is computed from them is decided here.

Dimension legend: B rows, U distinct prompts, P longest prompt, T tokens of a row after its prompt, S most rows of one
prompt, L tokens of a packed row, N segments of a group, A heads of queries, C heads of keys and values, R = A / C,
D size of a head, X any; of a group, T queries and S keys of each of its N segments.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpd.errors import ModelError

NAME = "vpd_packed"
SCORES_OF_A_GROUP = 1 << 22  # most scores of one head that a call computes for several segments
ALIGNED = 8  # keys of a call with a mask: a multiple of it, so that torch need not copy the mask
#: What a call may ask for without a change of the numbers of causal attention.
KNOWN = {"dropout", "scaling", "is_causal"}
WITHOUT_EFFECT = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "deterministic", "num_items_in_batch",
}  # fmt: skip


class FastPathError(ModelError):
    """Attention over packed segments or a shared prefix was asked for something that it does not compute."""


@dataclass(frozen=True)
class PackedSegments:
    """The segments of a packed row, in order.

    ``sizes`` are their lengths in tokens; ``prefixes`` says which earlier segment each one continues (its index, None
    for none).  A segment is causal in itself and sees all of its prefix.  ``masks`` [1,1,size,prefix + size] are added
    to the scores; None where the segment has no prefix.
    """

    sizes: tuple[int, ...]
    prefixes: tuple[int | None, ...]
    masks: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls, sizes: Sequence[int], prefixes: Sequence[int | None], *, device: torch.device, dtype: torch.dtype
    ) -> "PackedSegments":
        """Segments of these lengths and prefixes, for a model of this device and dtype."""
        shapes = [
            None if prefix is None else (sizes[prefix], size) for size, prefix in zip(sizes, prefixes, strict=True)
        ]
        made = {shape: _segment_mask(*shape, device=device, dtype=dtype) for shape in shapes if shape is not None}
        masks = tuple(None if shape is None else made[shape] for shape in shapes)
        return cls(tuple(sizes), tuple(prefixes), masks)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Queries [1,A,L,D] of all segments, each to its prefix and itself: [1,L,A,D]."""
        keys, values = key.split(self.sizes, 2), value.split(self.sizes, 2)
        outputs = []
        for q, k, v, prefix, mask in zip(
            query.split(self.sizes, 2), keys, values, self.prefixes, self.masks, strict=True
        ):
            if prefix is not None:
                k, v = torch.cat([keys[prefix], k], 2), torch.cat([values[prefix], v], 2)
            outputs.append(_attention(module, q, k, v, mask, **options))
        return torch.cat(outputs, 1)


@dataclass(frozen=True)
class SegmentGroup:
    """Segments that one call computes, padded to T queries and S keys: the prefix's, then the segment's own.

    ``query_G`` and ``key_G`` say which tokens of the packed row these are, G = N x T and G = N x S; padding repeats a
    token.  ``mask`` [N,1,T,S] is added to the scores; None for one segment without a prefix.
    """

    count: int
    query_G: Tensor
    key_G: Tensor
    mask: Tensor | None

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Queries [1,A,L,D] of these segments to their prefixes and themselves: [N x T,A,D]."""
        q, k, v = (
            states[0].index_select(1, places).unflatten(1, (self.count, -1)).transpose(0, 1)
            for states, places in ((query, self.query_G), (key, self.key_G), (value, self.key_G))
        )
        return _attention(module, q, k, v, self.mask, **options).flatten(0, 1)


@dataclass(frozen=True)
class GroupedSegments:
    """The segments of a packed row, as :class:`PackedSegments`, in few calls: what a GPU wants, which starts kernels
    more slowly than it computes short segments.

    ``order_L`` finds each token of the row in the groups' outputs.
    """

    groups: tuple[SegmentGroup, ...]
    order_L: Tensor

    @classmethod
    def of(
        cls, sizes: Sequence[int], prefixes: Sequence[int | None], *, device: torch.device, dtype: torch.dtype
    ) -> "GroupedSegments":
        """Segments of these lengths and prefixes, for a model of this device and dtype."""
        groups: list[SegmentGroup] = []
        shifts: dict[int, int] = {}  # of each segment, by its place in the row: how far its outputs are from there
        seen = 0
        for members in _grouped(_places(sizes, prefixes)):
            groups.append(_segment_group(members, device=device, dtype=dtype))
            width = max(len(own) for _, own in members)
            shifts |= {own.start: seen + row * width - own.start for row, (_, own) in enumerate(members)}
            seen += len(members) * width
        shift_N = torch.tensor([shifts[start] for start in sorted(shifts)], device=device)
        shift_L = shift_N.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))
        return cls(tuple(groups), torch.arange(sum(sizes), device=device) + shift_L)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Queries [1,A,L,D] of all segments, each to its prefix and itself: [1,L,A,D]."""
        outputs = [group.attend(module, query, key, value, **options) for group in self.groups]
        return torch.cat(outputs).index_select(0, self.order_L)[None]


def packed_segments(
    sizes: Sequence[int], prefixes: Sequence[int | None], *, device: torch.device, dtype: torch.dtype
) -> PackedSegments | GroupedSegments:
    """The segments of a packed row, in the form for this device."""
    form = GroupedSegments if computes_groups(device) else PackedSegments
    return form.of(sizes, prefixes, device=device, dtype=dtype)


def computes_groups(device: torch.device) -> bool:
    """Whether segments are computed in groups on this device.

    On a CPU each alone is faster, as measured; on a GPU groups are, which start far fewer kernels: a pass forward and
    backward took 118 to 194 ms on an H100, and 230 to 1367 with each segment alone.
    """
    return device.type != "cpu"


@dataclass(frozen=True)
class SharedPrefixKV:
    """Keys and values [U,C,P,D] of the prompts, one pair for each layer, and the mask [U,1,1,P] of their padding.

    Rows of one prompt lie side by side in a grid of U x S slots: ``slot_B`` is each row's, ``width`` is S.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask_U11P: Tensor
    slot_B: Tensor
    width: int = 0

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor]], attention_mask_UP: Tensor) -> "SharedPrefixKV":
        """The keys and values of prompts without any row yet; ``attention_mask_UP`` is 0 at padding."""
        dtype = layers[0][0].dtype
        mask_UP = torch.zeros(attention_mask_UP.shape, dtype=dtype, device=attention_mask_UP.device)
        mask_U11P = mask_UP.masked_fill(attention_mask_UP == 0, torch.finfo(dtype).min)[:, None, None]
        return cls(tuple(layers), mask_U11P, attention_mask_UP.new_zeros(0))

    def with_rows(self, prompt_B: Tensor) -> "SharedPrefixKV":
        """The same prompts for these rows: ``prompt_B`` is the index of each row's prompt."""
        order_B = prompt_B.argsort(stable=True)
        counts_U = prompt_B.bincount(minlength=len(self.mask_U11P))
        first_U = counts_U.cumsum(0) - counts_U
        rank_B = torch.empty_like(prompt_B)
        rank_B[order_B] = torch.arange(len(prompt_B), device=prompt_B.device) - first_U[prompt_B[order_B]]
        width = int(counts_U.max())
        return dataclasses.replace(self, slot_B=prompt_B * width + rank_B, width=width)

    def keep(self, alive_U: Tensor) -> "SharedPrefixKV":
        """These prompts only."""
        if len(alive_U) == len(self.mask_U11P):
            return self
        layers = tuple((keys[alive_U], values[alive_U]) for keys, values in self.layers)
        return dataclasses.replace(self, layers=layers, mask_U11P=self.mask_U11P[alive_U])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One new token of each row, query [B,A,1,D], to its prompt and to its own tokens [B,C,T,D]: [B,1,A,D]."""
        prefix_keys, prefix_values = self.layers[layer]
        heads, size = prefix_keys.shape[1], prefix_keys.shape[3]
        query_BCRD = query.reshape(len(query), heads, -1, size) * scaling
        scores_UCXP = self._to_slots(query_BCRD).flatten(2, 3) @ prefix_keys.mT + self.mask_U11P
        prefix_BCRP, own_BCRT = self._to_rows(scores_UCXP), query_BCRD @ key.mT
        wide = torch.promote_types(query.dtype, torch.float32)
        weights = torch.softmax(torch.cat([prefix_BCRP, own_BCRT], -1), -1, dtype=wide).to(query.dtype)
        prefix_BCRP, own_BCRT = weights.split([prefix_BCRP.shape[-1], own_BCRT.shape[-1]], -1)
        output_BCRD = self._to_rows(self._to_slots(prefix_BCRP).flatten(2, 3) @ prefix_values)
        return (output_BCRD + own_BCRT @ value).reshape(len(query), 1, -1, size)

    def _to_slots(self, rows_BCRX: Tensor) -> Tensor:
        """Rows in their slots [U,C,S,R,X]; empty slots are 0."""
        slots = rows_BCRX.new_zeros(len(self.mask_U11P) * self.width, *rows_BCRX.shape[1:])
        slots[self.slot_B] = rows_BCRX
        return slots.unflatten(0, (-1, self.width)).transpose(1, 2)

    def _to_rows(self, slots_UCXX: Tensor) -> Tensor:
        """The inverse of :meth:`_to_slots`, from [U,C,S x R,X] to rows [B,C,R,X]."""
        return slots_UCXX.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)[self.slot_B]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: PackedSegments | GroupedSegments | None = None,
    prefix_kv: SharedPrefixKV | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: queries [B,A,L,D] to [B,L,A,D].

    Raises FastPathError where segments or a prefix come with a mask or an option that would change their numbers.
    """
    if prefix_kv is None and segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    used = _options_of_causal_attention(module, attention_mask, options)
    if prefix_kv is not None:
        return prefix_kv.attend(module.layer_idx, query, key, value, used["scaling"]), None
    assert segments is not None
    return segments.attend(module, query, key, value, **used), None


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Attention [N,T,A,D] with a mask for the weights' dtype, which need not be the queries' (mixed precision)."""
    mask = None if mask is None else mask.to(query.dtype)
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return output


def without_cudnn() -> None:
    """Keep torch from cuDNN's attention, which newer GPUs get by default, in this process.

    It makes a plan for every new shape and keeps it in the host's memory, and answers have all lengths: on an H100 an
    iteration of a 135M model took about 25 s with it and 6 s without (docs/performance.md).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _options_of_causal_attention(
    module: Any, attention_mask: Tensor | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that the fast paths know.  A mask of one number is the placeholder that they are called with."""
    unknown = [name for name, value in options.items() if name not in KNOWN | WITHOUT_EFFECT and value is not None]
    if attention_mask is not None and attention_mask.numel() != 1:
        unknown.append("attention_mask")
    if options.get("dropout"):
        unknown.append("dropout")
    if options.get("is_causal") is False:
        unknown.append("is_causal")
    if options.get("scaling") is None:
        unknown.append("no scaling")
    if unknown:
        raise FastPathError(f"{type(module).__name__} asks for more than causal attention", got=", ".join(unknown))
    return {"scaling": options["scaling"], "dropout": 0.0}


def is_installed(model: Any) -> bool:
    """Whether ``model`` runs on :func:`attend` at this moment; any other attention would ignore segments and prefix."""
    return bool(model.config._attn_implementation == NAME)


def install(model: Any) -> bool:
    """Switch ``model`` to :func:`attend`; False, and nothing changed, if it does not run on the attention interface."""
    if is_installed(model):
        return True
    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return False
    model.set_attn_implementation(NAME)
    return is_installed(model)


def remove(model: Any) -> None:
    """Switch ``model`` back to the attention that it came with."""
    if is_installed(model):
        model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Here ``model`` runs on the attention that it came with."""
    installed = is_installed(model)
    remove(model)
    try:
        yield
    finally:
        if installed:
            model.set_attn_implementation(NAME)


def _segment_mask(prefix: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask [1,1,size,prefix + size] of a segment: all of its prefix, and its own tokens up to each."""
    seen = torch.ones(size, prefix + size, dtype=torch.bool, device=device).tril(prefix)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def _places(sizes: Sequence[int], prefixes: Sequence[int | None]) -> list[tuple[range, range]]:
    """Of each segment the places of its prefix and its own in the packed row."""
    ends = list(itertools.accumulate(sizes))
    own = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [(range(0) if prefix is None else own[prefix], own[index]) for index, prefix in enumerate(prefixes)]


def _grouped(segments: Sequence[tuple[range, range]]) -> Iterator[list[tuple[range, range]]]:
    """Segments of similar lengths together, as many as keep a group's scores below :data:`SCORES_OF_A_GROUP`."""
    group: list[tuple[range, range]] = []
    queries = keys = 0
    for prefix, own in sorted(segments, key=lambda segment: (len(segment[0]) + len(segment[1]), len(segment[1]))):
        queries, keys = max(queries, len(own)), max(keys, len(prefix) + len(own))
        if group and (len(group) + 1) * queries * keys > SCORES_OF_A_GROUP:
            yield group
            group, queries, keys = [], len(own), len(prefix) + len(own)
        group.append((prefix, own))
    yield group


def _segment_group(members: Sequence[tuple[range, range]], *, device: torch.device, dtype: torch.dtype) -> SegmentGroup:
    queries = max(len(own) for _, own in members)
    keys = max(len(prefix) + len(own) for prefix, own in members)
    masked = len(members) > 1 or bool(members[0][0])
    keys += -keys % ALIGNED if masked else 0
    begins = [(prefix.start, len(prefix), own.start, len(own)) for prefix, own in members]
    prefix_N1, shared_N1, own_N1, size_N1 = torch.tensor(begins, device=device).T[..., None]
    query_T, key_S = torch.arange(queries, device=device), torch.arange(keys, device=device)
    query_NT = own_N1 + query_T.minimum(size_N1 - 1)
    key_NS = key_S.minimum(shared_N1 + size_N1 - 1)
    key_NS = key_NS + torch.where(key_NS < shared_N1, prefix_N1, own_N1 - shared_N1)
    mask = None
    if masked:
        seen_NTS = key_S <= (shared_N1 + query_T)[..., None]
        mask = torch.zeros(seen_NTS.shape, dtype=dtype, device=device)
        mask = mask.masked_fill(~seen_NTS, torch.finfo(dtype).min)[:, None]
    return SegmentGroup(len(members), query_NT.flatten(), key_NS.flatten(), mask)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
