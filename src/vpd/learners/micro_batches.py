"""Which rows are computed together: a plan made from lengths and weights alone, before any tensor exists.

Rows of one micro-batch have weight in the same terms of the loss and the same kind of teacher.  Where prefixes are
shared, rows of one prompt are neighbours; else rows of similar length do.  Every rank gets the same number of
micro-batches of each kind: ranks with fewer get zero-weight padding batches, so that collectives match.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vpd.model.batch import TeacherForm, teacher_form
from vpd.model.packing import tokens_of
from vpd.types import Example

Kind: TypeAlias = tuple[tuple[str, ...], TeacherForm]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one micro-batch holds: ``rows``, and ``tokens`` a forward pass computes (None: any number).

    ``hidden_size`` of the model, by which the cost of sharing prefixes is estimated; None: rows are not shared.
    """

    rows: int
    tokens: int | None = None
    hidden_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Indices of its rows in the list of examples, and the terms in which they have weight.

    ``padding``: a zero-weight batch, computed so that collectives match; its row enters no loss and no metric.
    """

    rows: tuple[int, ...]
    terms: tuple[str, ...]
    padding: bool = False


def plan(
    examples: Sequence[Example], rows: Iterable[int], limits: Limits, *, rank: int = 0, world: int = 1
) -> list[MicroBatch]:
    """The micro-batches of one rank over the given rows of ``examples``."""
    kinds: dict[Kind, list[int]] = {}
    for row in rows:
        kinds.setdefault(_kind(examples[row]), []).append(row)
    planned: list[MicroBatch] = []
    for kind in sorted(kinds, reverse=True):
        ordered = sorted(kinds[kind], key=lambda row: _neighbours(examples[row], row, limits))
        size = -(-len(ordered) // world)
        shares = [_split(examples, ordered[start : start + size], limits) for start in range(0, size * world, size)]
        planned += [MicroBatch(rows=tuple(part), terms=kind[0]) for part in shares[rank]]
        missing = max(map(len, shares)) - len(shares[rank])
        planned += [MicroBatch(rows=(ordered[0],), terms=kind[0], padding=True)] * missing
    return planned


def _kind(example: Example) -> Kind:
    terms = tuple(sorted(term for term, weight in example.loss_weights.items() if weight))
    return terms, teacher_form(example)


def _neighbours(example: Example, row: int, limits: Limits) -> tuple[Any, ...]:
    """The sort key that makes rows of one prompt, or of similar length, neighbours."""
    if limits.hidden_size is not None:
        return len(example.prompt), example.prompt, len(example.completion), row
    return len(example.teacher_prompt or example.prompt) + len(example.completion), len(example.prompt), row


def _split(examples: Sequence[Example], rows: Sequence[int], limits: Limits) -> list[list[int]]:
    """Rows as micro-batches within the limits; those of one prompt stay together where they fit into one."""
    shared = limits.hidden_size is not None
    prompt_of: Callable[[int], Any] = (lambda row: examples[row].prompt) if shared else (lambda row: row)
    parts: list[list[int]] = []
    for _, group in itertools.groupby(rows, key=prompt_of):
        block = list(group)
        if parts and _fits(examples, [*parts[-1], *block], limits):
            parts[-1] += block
            continue
        parts += _cut(examples, block, limits)
    return parts


def _cut(examples: Sequence[Example], rows: Sequence[int], limits: Limits) -> Iterator[list[int]]:
    """Rows in order, as many at a time as fit."""
    part: list[int] = []
    for row in rows:
        if part and not _fits(examples, [*part, row], limits):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _fits(examples: Sequence[Example], rows: Sequence[int], limits: Limits) -> bool:
    if len(rows) > limits.rows or limits.tokens is None:
        return len(rows) <= limits.rows
    chosen = [examples[row] for row in rows]
    completions = [example.completion for example in chosen]
    prompts = [[example.prompt for example in chosen]]
    prompts.append([example.teacher_prompt or example.prompt for example in chosen])
    return all(tokens_of(prompt, completions, limits.hidden_size) <= limits.tokens for prompt in prompts)
