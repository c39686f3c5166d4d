"""The library against the one-file implementation: float64, SGD, three iterations, 1e-10 of the distance trained."""

import copy
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, flat, oracle, random_groups, tiny_learner, tiny_model

from vpd.algorithms.contexts import e_step_contexts
from vpd.algorithms.distill import Distill, GKDSettings, SDPOSettings
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.learners.teachers import TeacherSettings
from vpd.types import Group

scratch = oracle()
RATE = 0.3
ITERATIONS = 3


class Bare:
    """Logits [1,L,V] of a transformers model, with its parameters in reach."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def parameters(self) -> Any:
        return self.model.parameters()


def rows_of(groups: list[Group]) -> list[Any]:
    matched = TokenPrompter().attach(e_step_contexts(groups, "matched"))
    pairs = [
        (number, own, other)
        for number, (group, twin) in enumerate(zip(groups, matched, strict=True))
        for own, other in zip(group.rollouts, twin.rollouts, strict=True)
    ]
    return [
        scratch.Row(
            prompt=list(own.prompt),
            completion=list(own.completion.tokens),
            teacher_prompt=list(own.teacher_prompt.tokens) if own.teacher_prompt else None,
            reward=own.grade.reward,
            success=own.success,
            group=number,
            e_teacher_prompt=list(other.teacher_prompt.tokens) if other.teacher_prompt else None,
        )
        for number, own, other in pairs
    ]


def agree(ours: Any, theirs: Any, start: torch.Tensor) -> None:
    trained = (theirs - start).norm()
    assert trained > 1e-3
    assert (ours - theirs).norm() / trained < 1e-10


def batches() -> list[list[Group]]:
    return [random_groups(seed) for seed in range(ITERATIONS)]


@pytest.mark.parametrize("teacher", ["ema", "live"])
@pytest.mark.parametrize("prior", ["dynamic", "fixed"])
@pytest.mark.parametrize("e_every", [1, 2, None])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_vpd_equals_the_oracle(teacher: Any, prior: Any, e_every: int | None, alpha: float) -> None:
    settings = VPDSettings(
        teacher=teacher, prior=prior, e_every=e_every, distillation_alpha=alpha, teacher_ema_rate=0.3
    )
    model = tiny_model()
    start = flat(model)
    learner = tiny_learner(model, teacher=settings.teacher_settings(), keep_initial=prior == "fixed")
    algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
    other = tiny_model()
    average = other if teacher == "live" else copy.deepcopy(other)
    initial = copy.deepcopy(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
    student = Bare(other)
    master = student if teacher == "live" else Bare(average)
    delta = None
    for k, groups in enumerate(batches()):
        algorithm.step(groups, learner)
        learner.end_iteration()
        delta = scratch.vpd_iteration(
            student,
            master,
            optimizer,
            rows_of(groups),
            k,
            delta,
            e_every=e_every,
            fixed_prior=Bare(initial) if prior == "fixed" else None,
            alpha=alpha,
            ema_rate=None if teacher == "live" else 0.3,
        )
    agree(flat(model), flat(other), start)
    if e_every is not None:
        assert algorithm.state()["shift"] == pytest.approx(delta, rel=1e-10)


@pytest.mark.parametrize("average", ["seq_mean", "token_mean"])
@pytest.mark.parametrize("denominator", ["active", "all"])
def test_sdpo_equals_the_oracle(average: Any, denominator: Any) -> None:
    settings = SDPOSettings(average=average, denominator=denominator, distillation_alpha=0.3)
    model, other = tiny_model(), tiny_model()
    start = flat(model)
    learner = tiny_learner(model, teacher=settings.teacher_settings())
    algorithm = Distill(settings)
    teacher = copy.deepcopy(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
    for groups in batches():
        algorithm.step(groups, learner)
        learner.end_iteration()
        rows = rows_of(groups)
        scratch.m_step(Bare(other), Bare(teacher), optimizer, rows, None, 0.3, 2.0, average, denominator=denominator)
        scratch.ema_update(Bare(teacher), Bare(other), 0.05)
    agree(flat(model), flat(other), start)


def test_grpo_equals_the_oracle() -> None:
    model, other = tiny_model(), tiny_model()
    start = flat(model)
    learner = tiny_learner(model, teacher=TeacherSettings(kind="live"))
    algorithm = GRPO(GRPOSettings())
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
    for groups in batches():
        algorithm.step(groups, learner)
        learner.end_iteration()
        scratch.grpo_step(Bare(other), optimizer, rows_of(groups))
    agree(flat(model), flat(other), start)


@pytest.mark.parametrize("teacher", ["ema", "live"])
@pytest.mark.parametrize("form", ["reshape", "reweight"])
def test_hybrids_equal_the_oracle(form: Any, teacher: Any) -> None:
    settings = HybridSettings(form=form, teacher=teacher, teacher_ema_rate=0.3, outcome_share=0.4, reweight_clip=0.5)
    model, other = tiny_model(), tiny_model()
    start = flat(model)
    learner = tiny_learner(model, teacher=settings.teacher_settings(), micro_batch_size=4)
    algorithm = Hybrid(settings)
    master = copy.deepcopy(other) if teacher == "ema" else other
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
    for groups in batches():
        algorithm.step(groups, learner)
        learner.end_iteration()
        rows = rows_of(groups)
        scratch.hybrid_step(Bare(other), Bare(master), optimizer, rows, form, outcome_share=0.4, reweight_clip=0.5)
        if teacher == "ema":
            scratch.ema_update(Bare(master), Bare(other), 0.3)
    agree(flat(model), flat(other), start)


def test_gkd_equals_the_oracle() -> None:
    model, other, teacher = tiny_model(), tiny_model(), tiny_model(seed=7)
    start = flat(model)
    settings = GKDSettings(teacher_model="given", distillation_alpha=0.5)
    learner = tiny_learner(model, teacher=settings.teacher_settings(), external=copy.deepcopy(teacher))
    algorithm = Distill(settings, own_prompt=True)
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
    for groups in batches():
        algorithm.step(groups, learner)
        learner.end_iteration()
        scratch.gkd_step(Bare(other), Bare(teacher), optimizer, rows_of(groups))
    agree(flat(model), flat(other), start)
