"""Where each row's tokens stand in the model's input; rows that share a prefix compute it once.

The G completions of a task have one prompt, and their teacher's prompts begin with the same task.  A *pack* holds the
shared prefix once, and after it one segment for each row, which sees the prefix and itself:

    prefix | rest of prompt 1, completion 1 | rest of prompt 2, completion 2 | ...

Every segment's positions continue those of the prefix, so each row is computed as if it stood alone.  All packs of a
micro-batch stand in one row of tokens (:mod:`vpd.model.attention` keeps them apart), so nothing is padded.

The hidden state that predicts a completion token is that of the token before it.  This is the only module that shifts.

Dimension legend: K rows of the model's input, L their length, N completion tokens of the batch where the mask is True
(row-major order).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vpd.model.attention import GroupedSegments, PackedSegments, packed_segments
from vpd.types import Tokens


@dataclass(frozen=True)
class Pack:
    """Rows of one pack (their indices in the batch) and how many tokens of their prompts they share."""

    rows: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class Layout:
    """A model's inputs, and where in [K,L] stands the hidden state that predicts each of the N tokens.

    ``padding`` counts how many of the K x L tokens are padding.
    """

    inputs: dict[str, Any]
    row_N: Tensor
    place_N: Tensor
    padding: int


def lay_out(
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    mask: Sequence[Sequence[bool]],
    *,
    hidden_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Layout:
    """Model inputs for prompt + completion of every row.

    ``hidden_size`` is the model's, for :func:`plan`; None: every row is computed alone, padded right.
    """
    if hidden_size is None:
        return _padded(prompts, completions, mask, device)
    packed = _PackedRow()
    for pack in plan(prompts, completions, hidden_size):
        packed.add(pack, prompts, completions)
    places = [
        packed.first[row] + t - 1 if t else packed.before_first[row]
        for row, counts in enumerate(mask)
        for t, count in enumerate(counts)
        if count
    ]
    place_N = torch.tensor(places, dtype=torch.long, device=device)
    return Layout(
        inputs={
            "input_ids": torch.tensor([packed.ids], device=device),
            "position_ids": torch.tensor([packed.positions], device=device),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=dtype, device=device),  # four dimensions: taken as it is
            "segments": packed_segments(packed.sizes, packed.prefixes, device=device, dtype=dtype),
        },
        row_N=torch.zeros_like(place_N),
        place_N=place_N,
        padding=0,
    )


def in_groups(layout: Layout) -> Layout:
    """The same layout with the segments in groups, as a GPU computes them, wherever they are."""
    segments, mask = layout.inputs.get("segments"), layout.inputs["attention_mask"]
    if not isinstance(segments, PackedSegments):
        return layout
    grouped = GroupedSegments.of(segments.sizes, segments.prefixes, device=mask.device, dtype=mask.dtype)
    return replace(layout, inputs=layout.inputs | {"segments": grouped})


@dataclass
class _PackedRow:
    """One row of tokens that grows pack by pack.

    ``first`` is the place of each row's first completion token, ``before_first`` that of the token before it, which may
    lie in the shared prefix.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    prefixes: list[int | None] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    before_first: dict[int, int] = field(default_factory=dict)

    def add(self, pack: Pack, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> None:
        prefix = len(self.sizes) if pack.shared else None
        self._add_segment(prompts[pack.rows[0]][: pack.shared], 0, None)
        end_of_prefix = len(self.ids) - 1
        for row in pack.rows:
            rest = prompts[row][pack.shared :]
            self.first[row] = len(self.ids) + len(rest)
            self.before_first[row] = self.first[row] - 1 if rest else end_of_prefix
            self._add_segment(rest + completions[row], pack.shared, prefix)

    def _add_segment(self, tokens: Tokens, first_position: int, prefix: int | None) -> None:
        if tokens:
            self.ids.extend(tokens)
            self.positions.extend(range(first_position, first_position + len(tokens)))
            self.sizes.append(len(tokens))
            self.prefixes.append(prefix)


def _padded(
    prompts: Sequence[Tokens], completions: Sequence[Tokens], mask: Sequence[Sequence[bool]], device: torch.device
) -> Layout:
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows))

    def padded(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (length - len(row))] for row in values], device=device)

    index = [
        (row, len(prompts[row]) + t - 1) for row, counts in enumerate(mask) for t, count in enumerate(counts) if count
    ]
    row_N, place_N = torch.tensor(index, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    return Layout(
        inputs={
            "input_ids": padded(rows),
            "position_ids": padded([list(range(len(row))) for row in rows]),
            "attention_mask": padded([[1] * len(row) for row in rows]),
        },
        row_N=row_N,
        place_N=place_N,
        padding=len(rows) * length - sum(map(len, rows)),
    )


def tokens_of(prompts: Sequence[Tokens], completions: Sequence[Tokens], hidden_size: int | None) -> int:
    """How many tokens a model computes for :func:`lay_out` with the same arguments, padding included."""
    if hidden_size is None:
        return len(prompts) * max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    return sum(
        pack.shared + sum(len(prompts[row]) - pack.shared + len(completions[row]) for row in pack.rows)
        for pack in plan(prompts, completions, hidden_size)
    )


def plan(prompts: Sequence[Tokens], completions: Sequence[Tokens], hidden_size: int) -> list[Pack]:
    """The rows in packs, in order: a row joins the pack before it if that lowers the estimated cost.

    A layer costs about 24 h^2 operations a token and 4 h for each pair of tokens where one attends to the other.  So in
    units of 4 h, a segment of L tokens costs 6 h L, plus L^2 / 2 on its own or L (S + L) after a prefix of S tokens.
    """

    def alone(length: int) -> int:
        return 6 * hidden_size * length + length * length // 2

    def cost(pack: Pack) -> int:
        lengths = [len(prompts[row]) - pack.shared + len(completions[row]) for row in pack.rows]
        if not pack.shared:
            return sum(map(alone, lengths))
        return alone(pack.shared) + sum(6 * hidden_size * n + n * (pack.shared + n) for n in lengths)

    packs: list[Pack] = []
    for row, prompt in enumerate(prompts):
        single = Pack((row,), 0)
        if packs:
            last = packs[-1]
            shared = min(last.shared or len(prompt), _common_prefix(prompts[last.rows[0]], prompt))
            together = Pack((*last.rows, row), shared)
            if shared and cost(together) < cost(last) + cost(single):
                packs[-1] = together
                continue
        packs.append(single)
    return packs


def _common_prefix(left: Tokens, right: Tokens) -> int:
    """Length of the longest common prefix."""
    if left == right:
        return len(left)
    for place, (mine, theirs) in enumerate(zip(left, right, strict=False)):
        if mine != theirs:
            return place
    return min(len(left), len(right))
