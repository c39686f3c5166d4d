"""Rows that begin alike share one pass over their beginning.

The G completions of a task have one prompt, and their teacher's prompts begin with the same task.  A *pack* holds such
a beginning once and after it the rows' own rests as segments, each of which sees the beginning and itself:

    beginning | rest of prompt 1, completion 1 | rest of prompt 2, completion 2 | ...

Positions run on from the beginning in every branch, so each row is computed as if it stood alone.  All packs of a
micro-batch stand in one row of tokens (:mod:`vpd.model.attention` keeps them apart), so nothing is padded.

Dimension legend: K rows of the model's input, L their length, N completion tokens of the batch that count (row-major
order).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpd.model.attention import PackedSegments, branch_mask
from vpd.types import Tokens


@dataclass(frozen=True)
class Pack:
    """Rows (their places in the batch) and how many tokens of their prompts they share."""

    rows: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class Layout:
    """A model's inputs, where in [K,L] stands the hidden state that predicts each of the N tokens, and how many of the
    K x L tokens are padding."""

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
    """Model inputs for prompt + completion of every row; ``hidden_size`` None: rows stand alone and are padded."""
    if hidden_size is None:
        return _padded(prompts, completions, mask, device)
    ids: list[int] = []
    positions: list[int] = []
    sizes: list[int] = []
    beginnings: list[int | None] = []
    masks: list[Tensor | None] = []
    made: dict[tuple[int, int], Tensor] = {}
    where: dict[int, tuple[int, int]] = {}  # of a row's first completion token: its place, and that of the one before

    def add(tokens: Tokens, first: int, beginning: int | None, after: int) -> None:
        if not tokens:
            return
        ids.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
        sizes.append(len(tokens))
        beginnings.append(beginning)
        shape = (after, len(tokens))
        if beginning is not None and shape not in made:
            made[shape] = branch_mask(*shape, device=device, dtype=dtype)
        masks.append(None if beginning is None else made[shape])

    for pack in plan(prompts, completions, hidden_size):
        beginning, end = len(sizes) if pack.shared else None, len(ids) + pack.shared
        add(prompts[pack.rows[0]][: pack.shared], 0, None, 0)
        for row in pack.rows:
            rest = prompts[row][pack.shared :]
            place = len(ids) + len(rest)
            where[row] = place, place - 1 if rest else end - 1
            add(rest + completions[row], pack.shared, beginning, pack.shared)
    place_N = torch.tensor(
        [
            where[row][0] + t - 1 if t else where[row][1]
            for row, counts in enumerate(mask)
            for t, count in enumerate(counts)
            if count
        ],
        dtype=torch.long,
        device=device,
    )
    return Layout(
        inputs={
            "input_ids": torch.tensor([ids], device=device),
            "position_ids": torch.tensor([positions], device=device),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=dtype, device=device),  # its shape says: make no other
            "segments": PackedSegments(tuple(sizes), tuple(beginnings), tuple(masks)),
        },
        row_N=torch.zeros_like(place_N),
        place_N=place_N,
        padding=0,
    )


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
    """How many tokens :func:`lay_out` makes a model compute."""
    if hidden_size is None:
        return len(prompts) * max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    return sum(
        pack.shared + sum(len(prompts[row]) - pack.shared + len(completions[row]) for row in pack.rows)
        for pack in plan(prompts, completions, hidden_size)
    )


def plan(prompts: Sequence[Tokens], completions: Sequence[Tokens], hidden_size: int) -> list[Pack]:
    """Neighbouring rows in packs: a row joins the one before it where the estimated cost falls.

    A layer costs about 24 h^2 operations a token and 4 h a pair of tokens that meet, so in units of 4 h a piece of L
    tokens costs 6 h L, and L^2 / 2 alone or L (S + L) behind a beginning of S.
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
            shared = min(last.shared or len(prompt), _common(prompts[last.rows[0]], prompt))
            together = Pack((*last.rows, row), shared)
            if shared and cost(together) < cost(last) + cost(single):
                packs[-1] = together
                continue
        packs.append(single)
    return packs


def _common(left: Tokens, right: Tokens) -> int:
    """How many tokens two prompts begin with alike."""
    if left == right:
        return len(left)
    for place, (mine, theirs) in enumerate(zip(left, right, strict=False)):
        if mine != theirs:
            return place
    return min(len(left), len(right))
