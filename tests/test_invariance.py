"""The same result for any micro-batch size, order and chunk; rows without a context cost and change nothing."""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import ALGORITHMS, TokenPrompter, flat, random_groups, tiny_learner, tiny_model
from torch import Tensor

from vpd.algorithms import weighting
from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.e_step import ShiftedBCO
from vpd.algorithms.examples import student_logprobs, teacher_logprobs, to_examples, with_loss_weights, with_reference
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.errors import TrainingError
from vpd.learners.teachers import TeacherSettings, TeacherWeights
from vpd.model.batch import Batch
from vpd.model.scorer import Scorer
from vpd.types import Example, Group

METHODS = ALGORITHMS


def learner_of(name: str, **changes: Any) -> Any:
    external = {"external": tiny_model(seed=7)} if name == "gkd" else {}
    return tiny_learner(tiny_model(), teacher=METHODS[name][1], **external, **changes)


def run(name: str, batches: list[list[Group]], **changes: Any) -> torch.Tensor:
    learner, algorithm = learner_of(name, **changes), METHODS[name][0]()
    for groups in batches:
        algorithm.step(groups, learner)
        learner.end_iteration()
    return flat(learner.model)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() / (b - flat(tiny_model())).norm() < 1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_chunks_and_order_change_nothing(name: str) -> None:
    batches = [random_groups(seed, groups=4) for seed in range(3)]
    whole = run(name, batches, micro_batch_size=100)
    for size in (1, 3):
        assert same(run(name, batches, micro_batch_size=size), whole)
    for chunk in (1, 7):
        assert same(run(name, batches, micro_batch_size=100, chunk_tokens=chunk), whole)
    if name not in ("sdpo", "grpo"):  # with several updates per batch the order of groups decides the parts
        shuffled = [random.Random(1).sample(groups, len(groups)) for groups in batches]
        assert same(run(name, shuffled, micro_batch_size=5), whole)


@pytest.mark.parametrize("name", METHODS)
def test_restore_continues_bit_for_bit(name: str) -> None:
    batches = [random_groups(seed) for seed in range(4)]
    whole = run(name, batches, optimizer="adamw", learning_rate=1e-2)
    first, algorithm = learner_of(name, optimizer="adamw", learning_rate=1e-2), METHODS[name][0]()
    for groups in batches[:2]:
        algorithm.step(groups, first)
        first.end_iteration()
    second, resumed = learner_of(name, optimizer="adamw", learning_rate=1e-2), METHODS[name][0]()
    second.restore(first.state())
    resumed.restore(algorithm.state())
    for groups in batches[2:]:
        resumed.step(groups, second)
        second.end_iteration()
    assert torch.equal(flat(second.model), whole)


@pytest.mark.parametrize("name", ["vpd", "sdpo"])
def test_rows_without_context_change_nothing_and_make_no_pass(name: str) -> None:
    bare = [
        dataclasses.replace(r, context=(), teacher_prompt=None, grade=dataclasses.replace(r.grade, success=False))
        for r in random_groups(9, groups=1)[0].rollouts
    ]
    groups = random_groups(0, groups=2)
    more = [*groups, Group(rollouts=tuple(bare))]
    settings = SDPOSettings() if name == "sdpo" else None
    make = (lambda: Distill(settings)) if settings else METHODS["vpd"][0]

    def trained(batch: list[Group]) -> tuple[torch.Tensor, int]:
        learner = learner_of(name)
        seen = 0

        def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal seen
            seen += len(kwargs["input_ids"])

        learner.model.base_model.register_forward_hook(count, with_kwargs=True)
        make().step(batch, learner)
        return flat(learner.model), seen

    (with_bare, rows_with), (without, rows_without) = trained(more), trained(groups)
    assert torch.equal(with_bare, without) and rows_with == rows_without


def test_an_iteration_without_any_context_trains_nothing() -> None:
    groups = [
        Group(rollouts=tuple(dataclasses.replace(r, context=(), teacher_prompt=None) for r in group.rollouts))
        for group in random_groups(0)
    ]
    learner, algorithm = learner_of("vpd"), METHODS["vpd"][0]()
    metrics = algorithm.step(groups, learner).metrics
    assert metrics["e_step/rows"] == metrics["m_step/rows"] == 0 and metrics["e_step/skipped"] == 1
    assert torch.equal(flat(learner.model), flat(tiny_model()))
    assert (
        algorithm.step(random_groups(1), learner).metrics["e_step/rows"] == 0
    )  # a skipped E-step does not move the schedule
    assert algorithm.step(random_groups(2), learner).metrics["e_step/rows"] > 0


def test_no_gradient_reaches_the_teacher_in_an_m_step_nor_the_student_in_an_e_step() -> None:
    examples = [
        dataclasses.replace(e, loss_weights={"x": 1.0}, reference=(0.0,) * len(e.completion))
        for e in to_examples(random_groups(0))
        if e.teacher_prompt
    ]
    learner = learner_of("sdpo")

    def both(scorer: Scorer, batch: Batch) -> Tensor:
        student, teacher = scorer.logprobs("student"), scorer.logprobs("teacher")
        assert student.requires_grad != teacher.requires_grad
        assert teacher.requires_grad == (train == "teacher")
        value = scorer.divergence(alpha=0.5).value
        return value

    for train in ("student", "teacher"):
        learner.update("x", examples, {"x": both}, train=train)
    assert all(p.grad is None for p in learner.teacher.mixture("teacher")[0][0].parameters())


def test_teacher_with_the_students_prompt_is_the_student() -> None:
    examples = [dataclasses.replace(e, teacher=e.prompt) for e in to_examples(random_groups(0))]
    learner = tiny_learner(tiny_model(dtype=torch.float32), micro_batch_size=5)
    student, teacher = (learner.score(examples, m) for m in (student_logprobs, teacher_logprobs))
    assert student == teacher  # equal shapes: bit for bit
    alone = tiny_learner(tiny_model(dtype=torch.float32), micro_batch_size=1).score(examples, student_logprobs)
    for padded, unpadded in zip(student, alone, strict=True):
        assert padded == pytest.approx(unpadded, abs=1e-5)


def test_scores_equal_an_unpadded_forward_at_the_temperature() -> None:
    model = tiny_model()
    examples = to_examples(random_groups(3))
    scores = tiny_learner(model, temperature=0.7).score(examples, student_logprobs)
    for example, score in zip(examples, scores, strict=True):
        logits = model(torch.tensor([example.prompt + example.completion])).logits[0] / 0.7
        logp = torch.log_softmax(logits, -1)[len(example.prompt) - 1 : -1]
        assert score == pytest.approx([logp[t, token].item() for t, token in enumerate(example.completion)], abs=1e-10)


def test_ema_rate_1_copies_and_0_is_frozen_and_a_trust_region_mixes() -> None:
    live = tiny_model()
    teachers = {rate: TeacherWeights(TeacherSettings(ema_rate=rate), live) for rate in (0.0, 0.25, 1.0)}
    start = flat(live)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(1.0)
    for rate, teacher in teachers.items():
        teacher.end_iteration()
        assert torch.allclose(flat(teacher.mixture("teacher")[0][0]), start + rate)
    mixed = TeacherWeights(TeacherSettings(kind="trust_region", trust_region_mix=0.25), live).mixture("teacher")
    assert [share for _, share in mixed] == [0.75, 0.25]


def test_an_unknown_weight_and_a_row_without_a_teacher_are_refused() -> None:
    example = Example(prompt=(1,), completion=(2,), mask=(True,), behaviour=(0.0,), loss_weights={"other": 1.0})
    learner = learner_of("sdpo")
    with pytest.raises(ValueError, match="other"):
        learner.update("x", [example], {"x": lambda scorer, batch: scorer.logprobs("student")})
    with pytest.raises(ValueError, match="without a teacher"):
        learner.score([example], teacher_logprobs)


def e_examples(seed: int) -> list[Example]:
    made = [e for e in to_examples(random_groups(seed, groups=4)) if e.teacher_prompt]
    weights = weighting.class_mean([e.success for e in made])
    return with_loss_weights(with_reference(made, tiny_learner(tiny_model())), bco=weights)


def test_one_small_step_lowers_the_e_step_loss_at_a_fixed_shift() -> None:
    examples, loss = e_examples(0), ShiftedBCO(VPDSettings(), 0.05)
    learner = tiny_learner(tiny_model(), learning_rate=0.01)
    first, second = (learner.update("e", examples, {"bco": loss}, train="teacher").metrics["e/loss"] for _ in range(2))
    assert second < first


def test_a_teacher_with_the_students_prompt_starts_the_e_step_at_two_log_two() -> None:
    examples = [dataclasses.replace(e, teacher=e.prompt) for e in e_examples(0)]
    assert {e.success for e in examples} == {True, False}
    loss = ShiftedBCO(VPDSettings(), 0.0)
    update = tiny_learner(tiny_model()).update("e", examples, {"bco": loss}, train="teacher")
    assert update.metrics["e/loss"] == pytest.approx(2 * math.log(2), abs=1e-12)


def test_fixed_and_dynamic_prior_agree_at_first_and_part_later() -> None:
    def trained(prior: Any, steps: int) -> torch.Tensor:
        settings = VPDSettings(e_every=1, prior=prior)
        learner = tiny_learner(tiny_model(), teacher=settings.teacher_settings(), keep_initial=prior == "fixed")
        algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
        for seed in range(steps):
            algorithm.step(random_groups(seed), learner)
            learner.end_iteration()
        return flat(learner.model)

    assert torch.equal(trained("fixed", 1), trained("dynamic", 1))
    assert not torch.equal(trained("fixed", 2), trained("dynamic", 2))


def test_the_samplers_logprobs_stand_in_only_where_they_are_the_learners() -> None:
    settings = VPDSettings(e_every=1)

    def step(sampled: Callable[[Example, Sequence[float]], Sequence[float]]) -> tuple[torch.Tensor, dict[str, float]]:
        learner = tiny_learner(tiny_model(), teacher=settings.teacher_settings())
        groups = random_groups(0, groups=6)
        own = to_examples(groups)
        scores = iter(zip(own, learner.score(own, student_logprobs), strict=True))

        def told(rollout: Any) -> Any:
            completion = dataclasses.replace(rollout.completion, logprobs=tuple(sampled(*next(scores))))
            return dataclasses.replace(rollout, completion=completion)

        groups = [Group(rollouts=tuple(told(r) for r in group.rollouts)) for group in groups]
        metrics = VPD(settings, TokenPrompter()).step(groups, learner).metrics  # type: ignore[arg-type]
        return flat(learner.model), metrics

    scored, far = step(lambda example, scores: [s + 0.01 for s in scores])
    taken, near = step(lambda example, scores: scores)
    assert same(taken, scored)
    assert near["e_step/sampler_logp_difference"] < 1e-12 and far["e_step/sampler_logp_difference"] > 0.009
    assert near["e_step/rows_scored"] < 0.5 * far["e_step/rows_scored"]


def test_e_steps_fall_on_multiples_of_f_and_the_ratio_is_one_elsewhere() -> None:
    settings = VPDSettings(e_every=3)
    learner = tiny_learner(tiny_model(), teacher=settings.teacher_settings())
    algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
    for k in range(7):
        metrics = algorithm.step(random_groups(k), learner).metrics
        learner.end_iteration()
        assert (metrics["e_step/rows"] > 0) == (k % 3 == 0)
        assert (metrics["m_step/importance_ratio"] == 1.0) == (k % 3 != 0)
        assert metrics["m_step/importance_ratio"] <= 2.0 and metrics["m_step/student_drift_kl"] >= 0.0


def test_grpo_learns_nothing_from_a_group_of_equal_rewards() -> None:
    groups = [
        Group(
            rollouts=tuple(dataclasses.replace(r, grade=dataclasses.replace(r.grade, reward=0.5)) for r in g.rollouts)
        )
        for g in random_groups(0)
    ]
    learner = learner_of("grpo")
    metrics = GRPO(GRPOSettings()).step(groups, learner).metrics
    assert metrics["policy/rows"] == 0 and torch.equal(flat(learner.model), flat(tiny_model()))


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    learner = tiny_learner(tiny_model())
    examples = e_examples(0)
    with pytest.raises(TrainingError, match="not finite"):
        learner.update("x", examples, {"bco": lambda scorer, batch: scorer.logprobs("student") * math.inf})
    assert torch.equal(flat(learner.model), flat(tiny_model()))


def test_a_reference_is_scored_whoever_sampled_the_row() -> None:
    """GKD's rows come from two engines: no log-prob of a sampler may pass for the learner's."""
    learner = tiny_learner(tiny_model())
    examples = to_examples(random_groups(3, groups=2, size=3))
    scored = learner.score(examples, student_logprobs)
    own = dataclasses.replace(examples[0], behaviour=tuple(scored[0]))
    foreign = [dataclasses.replace(e, behaviour=tuple(-9.0 for _ in e.behaviour)) for e in examples[1:]]
    found = with_reference([own, *foreign], learner)
    assert [list(e.reference or ()) for e in found] == scored
