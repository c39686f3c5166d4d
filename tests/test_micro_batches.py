"""The plan of micro-batches: bounds, kinds, and the same number on every rank."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest
from helpers import random_groups

from vpd.algorithms.examples import to_examples
from vpd.learners.micro_batches import Limits, MicroBatch, plan
from vpd.model.packing import tokens_of
from vpd.types import Example

SHARED = 16  # a hidden size: prefixes are shared


def examples(groups: int = 6) -> list[Example]:
    """Rows with weight in one term, in both, or in none, some with a teacher's prompt; prompts are long."""
    made = to_examples(random_groups(0, groups=groups))
    weights = itertools.cycle([{"distill": 1.0}, {"policy": 1.0}, {"distill": 1.0, "policy": 0.5}, {"policy": 0.0}])
    return [
        dataclasses.replace(
            e, prompt=e.prompt * 4, teacher=e.teacher and e.prompt * 4 + e.teacher, loss_weights=next(weights)
        )
        for e in made
    ]


def planned(examples: list[Example], **limits: Any) -> list[MicroBatch]:
    bounds = {"rows": 100, "hidden_size": SHARED} | limits
    return plan(examples, range(len(examples)), Limits(**bounds))


def kind(example: Example) -> tuple[Any, ...]:
    return tuple(sorted(t for t, w in example.loss_weights.items() if w)), example.teacher is None


@pytest.mark.parametrize("hidden_size", [None, SHARED])
@pytest.mark.parametrize("bounds", [{}, {"rows": 3}, {"tokens": 60}, {"rows": 1}])
def test_every_row_stands_in_one_micro_batch_of_its_own_kind(hidden_size: int | None, bounds: dict[str, int]) -> None:
    rows = examples()
    made = planned(rows, hidden_size=hidden_size, **bounds)
    assert sorted(row for micro in made for row in micro.rows) == list(range(len(rows)))
    for micro in made:
        assert len({kind(rows[row]) for row in micro.rows}) == 1
        assert micro.terms == kind(rows[micro.rows[0]])[0] and not micro.padding
        assert len(micro.rows) <= bounds.get("rows", 100)


def test_without_bounds_there_is_one_micro_batch_a_kind() -> None:
    rows = examples()
    assert sorted(len(micro.rows) for micro in planned(rows)) == sorted(Counter(map(kind, rows)).values())


@pytest.mark.parametrize("limit", [40, 80, 160])
@pytest.mark.parametrize("hidden_size", [None, SHARED])
def test_a_micro_batch_keeps_within_its_tokens_or_is_one_row(limit: int, hidden_size: int | None) -> None:
    rows = examples()
    made = planned(rows, tokens=limit, hidden_size=hidden_size)
    assert len(made) > 4
    for micro in made:
        chosen = [rows[row] for row in micro.rows]
        for prompts in ([e.prompt for e in chosen], [e.teacher_prompt or e.prompt for e in chosen]):
            assert len(chosen) == 1 or tokens_of(prompts, [e.completion for e in chosen], hidden_size) <= limit


def test_rows_of_one_prompt_stand_together_where_they_fit() -> None:
    rows = [dataclasses.replace(e, loss_weights={"x": 1.0}, teacher=e.prompt) for e in examples()]
    groups = [{rows[row].group for row in micro.rows} for micro in planned(rows, rows=5)]
    assert all(not a & b for a, b in itertools.pairwise(groups))  # four rows a group: none is torn


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("bounds", [{}, {"rows": 2}])
def test_ranks_share_the_rows_and_make_equally_many_passes_of_each_kind(world: int, bounds: dict[str, int]) -> None:
    rows = examples(groups=3)
    limits = Limits(**{"rows": 100, "hidden_size": SHARED} | bounds)
    ranks = [plan(rows, range(len(rows)), limits, rank=rank, world=world) for rank in range(world)]
    counted = [row for made in ranks for micro in made if not micro.padding for row in micro.rows]
    assert sorted(counted) == list(range(len(rows)))
    kinds = [[kind(rows[micro.rows[0]]) for micro in made] for made in ranks]
    assert all(made == kinds[0] for made in kinds)
    assert any(micro.padding for made in ranks for micro in made) or world == 2
