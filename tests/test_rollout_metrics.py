"""Every metric of the rollouts, by hand, on three groups of four."""

import dataclasses
import math
import resource
import sys

import pytest
import torch
from fakes import asking, letters
from helpers import keys

from vpd.report.rollout_metrics import peak_memory, rollout_metrics, rollout_metrics_for
from vpd.types import Completion, Grade, Group, Rollout, Section, TeacherPrompt


def rollout(
    reward: float,
    length: int = 2,
    *,
    finish: str = "stop",
    success: bool = False,
    sources: str = "",
    cut: int = 0,
    context: tuple[Section, ...] = (),
    **metrics: float,
) -> Rollout:
    limit = length - 1 if finish == "length" else length
    teacher = TeacherPrompt(tokens=(1, 2, 3), sources=tuple(sources.split("+")), cut=cut) if sources else None
    return Rollout(
        key=keys(1)[0],
        task=asking("q"),
        prompt=(1,),
        completion=letters("x" * length, limit=limit),
        grade=Grade(reward=reward, success=success, metrics=metrics),
        context=context,
        teacher_prompt=teacher,
    )


def section(source: str, tokens: int) -> Section:
    return Section(kind="feedback", source=source, text="why", tokens=tokens)


GROUPS = [
    Group(
        rollouts=(
            rollout(0.0, 5, sources="environment", cut=3, share=0.5),
            rollout(1.0, 1, success=True),
            rollout(1.0, 3, success=True, share=1.0),
            rollout(0.0, 7, finish="length", sources="sibling+environment", cut=4),
        )
    ),
    Group(
        rollouts=(
            rollout(0.25, context=(section("critic", 7), section("environment", 0)), sources="critic+environment"),
            rollout(0.25, context=(section("critic", 5), section("self_critique", 2)), sources="environment"),
            rollout(0.25, finish="length"),
            rollout(0.25, finish="length"),
        )
    ),
    Group(rollouts=(rollout(0.0), rollout(0.0), rollout(0.0, success=True), rollout(2.0, 4))),
]


def test_every_metric_by_hand() -> None:
    lengths = [5, 1, 3, 6, 2, 2, 1, 1, 2, 2, 2, 4]
    assert rollout_metrics(GROUPS) == pytest.approx(
        {
            "reward": (2 + 1 + 2) / 12,
            "reward_std": (0.5 + 0.0 + math.sqrt(0.75)) / 3,  # population's, in each group, then the mean over groups
            "success": 3 / 12,
            "frac_reward_zero_std": 1 / 3,
            "completions/mean_length": sum(lengths) / 12,
            "completions/max_length": 6.0,
            "completions/clipped_ratio": 3 / 12,
            "teacher/rows_with_context": 4.0,
            "teacher/tokens_cut": 7.0,
            "teacher/from_environment": 2 / 12,
            "teacher/from_sibling+environment": 1 / 12,
            "teacher/from_critic+environment": 1 / 12,
            "feedback/critic_tokens": 12.0,
            "feedback/self_critique_tokens": 2.0,
            **dict.fromkeys(("feedback/critic_empty", "feedback/critic_clipped"), 0.0),
            **dict.fromkeys(("feedback/self_critique_empty", "feedback/self_critique_clipped"), 0.0),
            "env/share": 0.75,  # over the rows that have it
        }
    )


def test_rows_with_a_context_and_without_a_teacher_are_counted() -> None:
    context = (section("environment", 0),)
    groups = [Group(rollouts=(rollout(0.0, context=context), rollout(0.0, context=context, sources="environment")))]
    assert rollout_metrics(groups)["teacher/rows_without_room"] == 1.0
    assert "teacher/rows_without_room" not in rollout_metrics(GROUPS)


def test_where_every_answer_is_full_a_cut_is_nothing_to_report() -> None:
    whole = rollout_metrics(GROUPS)
    del whole["completions/clipped_ratio"]
    assert rollout_metrics(GROUPS, fixed_length=True) == whole


def test_repetition_by_hand() -> None:
    def of(*tokens: int, replied: int = 0) -> Rollout:
        sampled = (True,) * (len(tokens) - replied) + (False,) * replied
        spoken = Completion(tokens=tokens, sampled=sampled, logprobs=(0.0,) * len(tokens), text="x", finish="stop")
        return dataclasses.replace(rollout(0.0), completion=spoken)

    stuck, alternating, fresh, short = of(*[7] * 9), of(*[1, 2] * 4), of(*range(8)), of(*[7] * 7)
    groups = [Group(rollouts=(stuck, alternating, fresh, short))]  # 6 runs, one kind; 5 runs, two kinds; 5 kinds
    assert rollout_metrics(groups)["completions/repetition"] == pytest.approx((5 / 6 + 3 / 5 + 0) / 3)
    assert "completions/repetition" not in rollout_metrics([Group(rollouts=(short, of(*[7] * 9, replied=2)))])


def test_turns_by_hand() -> None:
    spoken = Completion(
        tokens=(1, 2, 3, 4, 5), sampled=(True, False, False, True, True), logprobs=(0.0,) * 5, text="x", finish="stop",
        turns=2,
    )  # fmt: skip
    groups = [Group(rollouts=(dataclasses.replace(rollout(0.0), completion=spoken), rollout(1.0, 3)))]
    metrics = rollout_metrics(groups)
    assert metrics["completions/mean_turns"] == 1.5
    assert metrics["completions/env_token_share"] == pytest.approx(2 / 8)
    assert metrics["completions/mean_length"] == 4.0  # all turns, and what was said between them


def test_a_batch_without_a_context_says_so_and_names_no_source() -> None:
    metrics = rollout_metrics([Group(rollouts=(rollout(1.0), rollout(1.0)))])
    assert metrics["teacher/rows_with_context"] == metrics["teacher/tokens_cut"] == 0.0
    assert not [name for name in metrics if name.startswith(("teacher/from_", "feedback/", "env/"))]
    assert "completions/mean_turns" not in metrics  # single turns


@pytest.mark.parametrize("fixed_length", [True, False])
def test_a_run_reports_its_memory_beside_the_metrics_of_its_environment(fixed_length: bool) -> None:
    metrics = rollout_metrics_for(fixed_length=fixed_length)(GROUPS)
    assert {name: value for name, value in metrics.items() if not name.startswith("memory/")} == rollout_metrics(
        GROUPS, fixed_length=fixed_length
    )
    assert "memory/peak_rss_gib" in metrics


def test_peak_memory_is_in_gib() -> None:
    unit = {"linux": 2.0**-20, "darwin": 2.0**-30}[sys.platform]  # of what getrusage counts in
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = peak_memory()["memory/peak_rss_gib"]
    assert before * unit <= measured <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_peak_memory_of_an_accelerator_is_in_gib() -> None:
    kept = torch.ones(2**20, device="cuda")
    assert (
        peak_memory()["memory/peak_cuda_gib"] == torch.cuda.max_memory_allocated() * 2.0**-30 >= kept.numel() * 2.0**-28
    )
