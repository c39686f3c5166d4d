"""Hybrids: the advantage by hand, its gradient, and their ends, where each is GRPO."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers import flat, random_groups, tiny_learner, tiny_model

from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.errors import ConfigError
from vpd.learners.teachers import TeacherSettings
from vpd.losses import clipped_policy_gradient, mixed_advantage
from vpd.types import Group


def test_mixed_advantage_by_hand() -> None:
    outcome = torch.tensor([2.0, -1.0, 0.0])
    opinion = torch.tensor([[math.log(1.1), -3.0], [math.log(1.1), -3.0], [1.0, -1.0]])
    reshaped = mixed_advantage(outcome, opinion, form="reshape", outcome_share=0.25, clip=0.2)
    assert torch.allclose(
        reshaped,
        torch.tensor(
            [
                [0.5 + 0.75 * math.log(1.1), 0.5 - 2.25],
                [-0.25 + 0.75 * math.log(1.1), -0.25 - 2.25],
                [0.75, -0.75],
            ]
        ),
    )
    # a liked token of a success counts more, of a failure less; beyond the clip it is 0.8 or 1.2
    reweighted = mixed_advantage(outcome, opinion, form="reweight", outcome_share=0.25, clip=0.2)
    assert torch.allclose(reweighted, torch.tensor([[2.2, 1.6], [-1.0 / 1.1, -1.2], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="form must be"):
        mixed_advantage(outcome, opinion, form="other", outcome_share=0.5, clip=0.2)


def test_the_gradient_is_minus_the_tokens_own_advantage() -> None:
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[0.7, -0.3]], dtype=torch.float64)
    loss = clipped_policy_gradient(logp, logp.detach(), advantage, clip_low=0.2, clip_high=0.28)
    loss.sum().backward()
    assert logp.grad is not None and torch.equal(logp.grad, -advantage)


def trained(algorithm: Any, teacher: TeacherSettings | None = None) -> torch.Tensor:
    learner = tiny_learner(tiny_model(), teacher=teacher or TeacherSettings())
    for seed in range(2):
        algorithm.step(random_groups(seed), learner)
        learner.end_iteration()
    return flat(learner.model)


@pytest.mark.parametrize("end", [{"form": "reshape", "outcome_share": 1.0}, {"form": "reweight", "reweight_clip": 0.0}])
def test_at_their_ends_hybrids_are_grpo(end: dict[str, Any]) -> None:
    ours, grpo = trained(Hybrid(HybridSettings(**end))), trained(GRPO(GRPOSettings()), TeacherSettings(kind="live"))
    assert (ours - grpo).norm() / (grpo - flat(tiny_model())).norm() < 1e-10
    assert not torch.equal(trained(Hybrid(HybridSettings(form=end["form"]))), grpo)


def test_reshape_learns_from_text_where_all_rewards_are_equal_and_reweight_does_not() -> None:
    failed = [
        Group(
            rollouts=tuple(
                dataclasses.replace(r, grade=dataclasses.replace(r.grade, reward=0.0, success=False))
                for r in group.rollouts
            )
        )
        for group in random_groups(0)
    ]
    told = sum(r.teacher_prompt is not None for group in failed for r in group.rollouts)
    for form, rows in (("reshape", told), ("reweight", 0)):
        learner = tiny_learner(tiny_model(), teacher=TeacherSettings())
        assert Hybrid(HybridSettings(form=form)).step(failed, learner).metrics["policy/rows"] == rows  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"outcome_share": 1.5}, {"reweight_clip": -0.1}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.{next(iter(wrong))} is out of range"):
        HybridSettings(**wrong)  # type: ignore[arg-type]
