"""Rows as tensors, and what a row may know of its teacher: a prompt, a remote teacher's top-k log-probs, or nothing."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers import flat, random_groups, tiny_learner, tiny_model

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.examples import to_examples, with_loss_weights
from vpd.learners.teachers import TeacherSettings
from vpd.model.batch import collate, teacher_form
from vpd.types import Example, TopKLogprobs

CPU = torch.device("cpu")
KNOWN = TopKLogprobs(ids=((4, 7), (7, 2)), logprobs=((-0.1, -3.0), (-0.7, -0.8)))


def example(length: int, **changes: Any) -> Example:
    made = Example(prompt=(1,), completion=(2,) * length, mask=(True,) * length, behaviour=(-1.0,) * length)
    return dataclasses.replace(made, **changes)


def test_fields_are_padded_right() -> None:
    rows = [
        example(1, reference=(-0.5,), success=True, advantage=2.0, mask=(False,)),
        example(3),
    ]
    batch = collate(rows, device=CPU, dtype=torch.float64)
    assert batch.tokens_BT.tolist() == [[2, 0, 0], [2, 2, 2]]
    assert batch.mask_BT.tolist() == [[False] * 3, [True] * 3]
    assert batch.behaviour_BT.tolist() == [[-1.0, 0.0, 0.0], [-1.0] * 3]
    assert batch.success_B.tolist() == [True, False] and batch.advantage_B.tolist() == [2.0, 0.0]
    now = torch.full((2, 3), -9.0, dtype=torch.float64)
    assert batch.reference_or(now).tolist() == [[-0.5, 0.0, 0.0], [-9.0] * 3]  # without a reference: its own
    assert batch.teacher_top_k is None and not batch.has_teacher


def test_top_k_log_probs_are_padded_right() -> None:
    one = TopKLogprobs(ids=((5, 6),), logprobs=((-0.3, -2.0),))
    batch = collate([example(1, teacher=one), example(2, teacher=KNOWN)], device=CPU, dtype=torch.float64)
    assert batch.teacher_top_k is not None and batch.has_teacher
    assert batch.teacher_top_k.ids_BTK.tolist() == [[[5, 6], [0, 0]], [[4, 7], [7, 2]]]
    assert batch.teacher_top_k.logprobs_BTK.tolist() == [[[-0.3, -2.0], [0.0, 0.0]], [[-0.1, -3.0], [-0.7, -0.8]]]
    assert batch.teacher_top_k.logprobs_BTK.dtype == torch.float64
    three = TopKLogprobs(ids=((1, 2, 3),), logprobs=((-2.0, -2.0, -2.0),))
    with pytest.raises(ValueError, match=r"one K; got \[2, 3\]"):
        collate([example(1, teacher=one), example(1, teacher=three)], device=CPU, dtype=torch.float64)


def test_what_a_row_knows_of_its_teacher() -> None:
    rows = [example(2), example(2, teacher=(3, 1)), example(2, teacher=KNOWN)]
    assert [teacher_form(row) for row in rows] == ["none", "prompt", "top_k"]
    assert [row.teacher_prompt for row in rows] == [None, (3, 1), None] and KNOWN.k == 2
    with pytest.raises(ValueError, match="top-k log-probs of 2 tokens for a completion of 3"):
        example(3, teacher=KNOWN)


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        (((1, 2), (3,)), ((-1.0, -2.0), (-1.0,)), "length"),
        (((1, 2),), ((-1.0,),), "length"),
        (((1,), (2,)), ((-1.0,),), "2 and 1 rows"),
        ((), (), "0 and 0 rows"),
        (((1, 1),), ((-1.0, -1.0),), "twice"),
        (((1, 2),), ((0.6, 0.4),), "natural logarithms"),
        (((1, 2),), ((-1.0, -math.inf),), "finite"),
        (((1, 2),), ((-1.0, math.nan),), "finite"),
    ],
)
def test_top_k_log_probs_are_checked(ids: Any, logprobs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKLogprobs(ids=ids, logprobs=logprobs)


def test_a_row_knows_the_version_that_sampled_it() -> None:
    [group] = random_groups(0, groups=1, size=2)
    rollouts = [
        dataclasses.replace(r, completion=dataclasses.replace(r.completion, version=version))
        for r, version in zip(group.rollouts, (3, 7), strict=True)
    ]
    assert [e.version for e in to_examples([dataclasses.replace(group, rollouts=tuple(rollouts))])] == [3, 7]


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_an_update_with_remote_rows_equals_one_with_a_local_teacher(share_prefixes: bool) -> None:
    """Every other row carries all of the teacher's log-probs instead of its prompt; some rows have no teacher."""
    made = to_examples(random_groups(0))
    objective = Distill(SDPOSettings(teacher="frozen")).loss

    def with_top_k(row: Example) -> Example:
        assert row.teacher_prompt is not None
        with torch.no_grad():
            logits = tiny_model(7)(torch.tensor([row.teacher_prompt + row.completion])).logits[0]
        best = logits.log_softmax(-1)[len(row.teacher_prompt) - 1 : -1].topk(logits.shape[-1], -1)
        ids, logprobs = (tuple(map(tuple, table.tolist())) for table in best[::-1])
        return dataclasses.replace(row, teacher=TopKLogprobs(ids=ids, logprobs=logprobs))

    def trained(rows: list[Example]) -> torch.Tensor:
        learner = tiny_learner(
            tiny_model(),
            teacher=TeacherSettings(kind="external"),
            external=tiny_model(7),
            share_prefixes=share_prefixes,
        )
        weights = [0.1 * (number + 1) if row.teacher else 0.0 for number, row in enumerate(rows)]
        learner.update("m", with_loss_weights(rows, distill=weights), {"distill": objective})
        return flat(learner.model) - flat(tiny_model())

    local = trained(made)
    remote = trained([with_top_k(row) if row.teacher and number % 2 else row for number, row in enumerate(made)])
    assert sum(row.teacher is not None for row in made) > 4
    tolerance = 1e-5 if share_prefixes else 1e-10  # Llama's norms round to fp32
    assert local.norm() > 1e-3 and (local - remote).norm() < tolerance * local.norm()
