"""Rows that begin alike share one pass over their beginning.

The G completions of a task have one prompt, and their teacher's prompts begin with the same task.  A *pack* is one
model input that holds such a beginning once and after it the rows' own rests as branches, each of which sees the
beginning and itself:

    prefix | rest of prompt 1, completion 1 | rest of prompt 2, completion 2 | ...

Positions run on from the prefix in every branch, so each row is computed as if it stood alone.  A row joins a pack only
where that is cheaper: shared tokens cost once, but attention is computed over the whole pack.

Dimension legend: K packs, L longest pack, N completion tokens of the batch that count (row-major order).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpd.types import Tokens


@dataclass(frozen=True)
class Pack:
    """Rows (their places in the batch) and how many tokens of their prompts they share."""

    rows: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class Layout:
    """A model's inputs, and where in [K,L] stands the hidden state that predicts each of the N tokens."""

    inputs: dict[str, Tensor]
    pack_N: Tensor
    place_N: Tensor
    padding: float


def lay_out(
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    mask: Sequence[Sequence[bool]],
    *,
    hidden_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Layout:
    """Model inputs for prompt + completion of every row; ``hidden_size`` None: no row shares anything."""
    packs = plan(prompts, completions, hidden_size)
    sequences, positions, blocks = [], [], []
    where: dict[int, tuple[int, int, int]] = {}
    for number, pack in enumerate(packs):
        shared = prompts[pack.rows[0]][: pack.shared]
        ids, places, spans = list(shared), list(range(len(shared))), []
        for row in pack.rows:
            branch = prompts[row][pack.shared :] + completions[row]
            where[row] = (number, len(ids), pack.shared)
            spans.append((len(ids), len(ids) + len(branch)))
            ids += branch
            places += range(pack.shared, pack.shared + len(branch))
        sequences.append(ids)
        positions.append(places)
        blocks.append(spans)
    length = max(map(len, sequences))

    def padded(rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)

    inputs = {"input_ids": padded(sequences), "position_ids": padded(positions)}
    if any(len(pack.rows) > 1 for pack in packs):
        inputs["attention_mask"] = _tree_mask([pack.shared for pack in packs], blocks, length, device, dtype)
    else:
        inputs["attention_mask"] = padded([[1] * len(ids) for ids in sequences])
    index = [
        (number, _predictor(t, start, shared, len(prompts[row])))
        for row, (number, start, shared) in sorted(where.items())
        for t, counts in enumerate(mask[row])
        if counts
    ]
    pack_N, place_N = torch.tensor(index, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    filled = sum(map(len, sequences)) / (len(sequences) * length)
    return Layout(inputs=inputs, pack_N=pack_N, place_N=place_N, padding=1 - filled)


def plan(prompts: Sequence[Tokens], completions: Sequence[Tokens], hidden_size: int | None) -> list[Pack]:
    """Neighbouring rows in packs: a row joins the one before it where the estimated cost falls.

    A layer costs about 24 h^2 operations a token and 4 h a pair of attended tokens, so L tokens cost 6 h L + L^2 in
    units of 4 h.
    """
    if hidden_size is None:
        return [Pack((row,), 0) for row in range(len(prompts))]

    def cost(length: int) -> int:
        return 6 * hidden_size * length + length * length

    packs: list[Pack] = []
    for row, prompt in enumerate(prompts):
        alone = len(prompt) + len(completions[row])
        if packs:
            last = packs[-1]
            shared = min(last.shared or len(prompt), _common(prompts[last.rows[0]], prompt))
            rows = (*last.rows, row)
            before = _length(last, prompts, completions)
            together = shared + sum(len(prompts[r]) - shared + len(completions[r]) for r in rows)
            if shared and cost(together) < cost(before) + cost(alone):
                packs[-1] = Pack(rows, shared)
                continue
        packs.append(Pack((row,), 0))
    return packs


def _length(pack: Pack, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> int:
    return pack.shared + sum(len(prompts[row]) - pack.shared + len(completions[row]) for row in pack.rows)


def _common(left: Tokens, right: Tokens) -> int:
    """How many tokens two prompts begin with alike."""
    if left == right:
        return len(left)
    for place, (mine, theirs) in enumerate(zip(left, right, strict=False)):
        if mine != theirs:
            return place
    return min(len(left), len(right))


def _predictor(t: int, start: int, shared: int, prompt_length: int) -> int:
    """The place of the token before completion token ``t`` of a row whose branch begins at ``start``."""
    place = start + prompt_length - shared + t - 1
    return shared - 1 if place < start else place


def _tree_mask(
    shared: Sequence[int],
    blocks: Sequence[Sequence[tuple[int, int]]],
    length: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask [K,1,L,L]: causal, every token sees the prefix and its own branch; padding sees itself."""
    branch_KL = torch.full((len(blocks), length), -1, device=device)
    for number, spans in enumerate(blocks):
        branch_KL[number, : shared[number]] = 0
        for index, (start, end) in enumerate(spans, 1):
            branch_KL[number, start:end] = index
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    same_KLL = branch_KL[:, :, None] == branch_KL[:, None, :]
    prefix_KLL = (branch_KL == 0)[:, None, :] & (branch_KL >= 0)[:, :, None]
    seen_KLL = causal_LL & (same_KLL | prefix_KLL)
    return torch.zeros(seen_KLL.shape, dtype=dtype, device=device).masked_fill(~seen_KLL, torch.finfo(dtype).min)[
        :, None
    ]
