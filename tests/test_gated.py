"""The gate's arithmetic, and gated VPD at its ends: no trust is the policy gradient, full trust is VPD."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch
from helpers import TokenPrompter, flat, random_groups, tiny_learner, tiny_model

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.gate import Evidence, Gate, pair_evidence, retry_evidence, shared_context
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.errors import ConfigError
from vpd.learners.teachers import TeacherSettings
from vpd.types import Group, Rollout, Section, TeacherPrompt


def test_auc_by_hand() -> None:
    # successes 3 and 1, failures 1 and 0: 3>1, 3>0, 1=1 (half), 1>0 -> 3.5 of 4; means 2 and .5
    first = [(3.0, True), (1.0, True), (1.0, False), (0.0, False)]
    evidence = pair_evidence([first])
    assert evidence == Evidence(wins=(3.5,), pairs=(4,), gap=1.5)
    assert (evidence.auc, evidence.groups) == (3.5 / 4, 1)
    # a second group, 1 of 1 pair lost: pooled over pairs 3.5 / 5, the gaps averaged over groups
    both = pair_evidence([first, [(0.0, True), (9.0, False)]])
    assert both == Evidence(wins=(3.5, 0.0), pairs=(4, 1), gap=(1.5 - 9.0) / 2)
    assert (both.auc, both.groups) == (0.7, 2)
    silent = pair_evidence([[(1.0, True)], [(2.0, False)]])
    assert silent == Evidence() and (silent.auc, silent.groups) == (0.5, 0)
    # pairs never cross groups: a success of a poor group and a failure of a good one are not compared
    assert pair_evidence([[(-9.0, True), (-10.0, False)], [(10.0, True), (9.0, False)]]).auc == 1.0


def test_trust_by_hand() -> None:
    gate = Gate(memory=0.5, pseudo_groups=1.0)
    assert (gate.trust, gate.standard_error) == (1.0, 0.0)  # before any evidence: the prior alone
    gate.add(Evidence(wins=(0.0, 3.0), pairs=(3, 3)))  # two groups, .5 in all: (1 + 1) / (1 + 2)
    assert gate.auc == pytest.approx(2 / 3) and gate.trust == pytest.approx(1 / 3)
    # the groups lie 2/3 below and 1/3 above the mean: sqrt(4/9 + 1/9) / 3
    assert gate.standard_error == pytest.approx(math.sqrt(5) / 9)
    gate.add(Evidence(wins=(0.0, 0.0), pairs=(4, 2)))  # of weight 4/3 and 2/3, all lost: (1 + .5) / (1 + 1 + 2)
    assert gate.auc == pytest.approx(3 / 8) and gate.trust == 0.0
    old = 0.5**2 * ((3 / 8) ** 2 + (5 / 8) ** 2)
    new = (3 / 8) ** 2 * ((4 / 3) ** 2 + (2 / 3) ** 2)
    assert gate.standard_error == pytest.approx(math.sqrt(old + new) / 4)
    kept = gate.state()
    gate.add(Evidence())  # nothing was said: nothing fades
    assert gate.state() == kept
    other = Gate(memory=0.5, pseudo_groups=1.0)
    other.restore(kept)
    assert other.state() == kept and other.standard_error == gate.standard_error
    other.add(Evidence(wins=(1.0,) * 8, pairs=(1,) * 8))
    assert other.trust == pytest.approx(2 * (1 + 0.25 + 8) / (1 + 1.5 + 8) - 1)
    assert Gate(memory=0.5, pseudo_groups=0.0).trust == 0.0  # without a prior nothing is believed at first


def with_outcomes(attempts: list[bool], retries: dict[int, list[bool]]) -> Group:
    """A group with these outcomes of the student's attempts, and of the retries that follow some of them."""
    [group] = random_groups(0, groups=1, size=len(attempts))

    def graded(rollout: Rollout, success: bool) -> Rollout:
        return dataclasses.replace(rollout, grade=dataclasses.replace(rollout.grade, success=success), retries=())

    rows = []
    for place, (rollout, success) in enumerate(zip(group.rollouts, attempts, strict=True)):
        made = tuple(graded(rollout, outcome) for outcome in retries.get(place, []))
        rows.append(dataclasses.replace(graded(rollout, success), retries=made))
    return Group(rollouts=tuple(rows))


def all_count(attempt: Rollout, retry: Rollout) -> bool:
    return True


def test_evidence_from_retries_by_hand() -> None:
    # attempt 0 failed, its retries: right, wrong.  Others: right, wrong.  Right beats wrong; wrong loses to right.
    evidence = retry_evidence([with_outcomes([False, True, False], {0: [True, False]})], all_count)
    assert evidence == Evidence(wins=(1.0,), pairs=(2,))
    # nobody was right before: a retry that is right beats every other attempt, one that is wrong says nothing
    evidence = retry_evidence([with_outcomes([False] * 4, {0: [True], 1: [False]})], all_count)
    assert evidence == Evidence(wins=(3.0,), pairs=(3,))
    # the attempt that a retry follows is known to have failed, and is no opponent
    assert retry_evidence([with_outcomes([False], {0: [True]})], all_count) == Evidence()
    quoting = with_outcomes([False, False], {0: [True]})
    assert retry_evidence([quoting], lambda attempt, retry: False) == Evidence()


def test_retries_that_a_context_does_not_help_win_half_of_the_pairs() -> None:
    draw, gate = np.random.default_rng(0), Gate(memory=0.0, pseudo_groups=0.0)
    groups = []
    for rate in draw.beta(0.3, 0.7, size=1500):  # easy and hard tasks
        attempts = [bool(x) for x in draw.random(4) < rate]
        retries = {place: [bool(draw.random() < rate)] for place, right in enumerate(attempts) if not right}
        groups.append(with_outcomes(attempts, retries))
    gate.add(retry_evidence(groups, all_count))
    assert 0 < gate.standard_error < 0.03 and abs(gate.auc - 0.5) < 3 * gate.standard_error


def test_both_kinds_of_evidence_count_in_units_of_their_mean_group() -> None:
    gate = Gate(memory=0.5, pseudo_groups=0.0)
    gate.add(Evidence(wins=(0.0,), pairs=(4,)), Evidence(wins=(28.0, 28.0), pairs=(28, 28)))
    assert gate.auc == pytest.approx(2 / 3)  # one group lost, two won
    kept = gate.state()
    gate.add(Evidence(), Evidence())
    assert gate.state() == kept


def test_retries_speak_for_the_teacher_before_the_first_success() -> None:
    groups = [with_outcomes([False] * 4, {0: [True], 2: [False]}), with_outcomes([False] * 4, {1: [False]})]
    distrusted = gated(pseudo_groups=0.0, e_every=None)
    metrics = distrusted.step(groups, tiny_learner(tiny_model(), teacher=TeacherSettings())).metrics
    assert metrics["gate/groups"] == 0 and metrics["gate/auc"] == 0.5
    assert (metrics["gate/retry_groups"], metrics["gate/retry_auc"], metrics["gate/trust"]) == (1, 1.0, 1.0)
    metrics = gated().step(random_groups(0), tiny_learner(tiny_model(), teacher=TeacherSettings())).metrics
    assert "gate/retry_auc" not in metrics


def simulated_gate(draw: np.random.Generator, *, groups: int, shift: float, spread: float, rounds: int) -> Gate:
    """A gate fed with groups of 8: success rates uniform, preferences normal, raised by N(shift, spread) on success."""
    gate = Gate(memory=0.8, pseudo_groups=0.0)
    for _ in range(rounds):
        preferences = []
        for _ in range(groups):
            success = draw.random(8) < draw.random()
            values = draw.normal(size=8) + success * draw.normal(shift, spread)
            preferences.append(list(zip(values.tolist(), success.tolist(), strict=True)))
        gate.add(pair_evidence(preferences))
    return gate


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 0.0), (0.7, 0.0), (0.7, 1.0)])
def test_the_standard_error_is_the_scatter_of_the_estimate(shift: float, spread: float) -> None:
    draw = np.random.default_rng(0)
    gates = [simulated_gate(draw, groups=5, shift=shift, spread=spread, rounds=15) for _ in range(150)]
    scatter = statistics.stdev(gate.auc for gate in gates)
    stated = math.sqrt(statistics.fmean(gate.standard_error**2 for gate in gates))
    assert stated == pytest.approx(scatter, rel=0.2)  # 150 draws know a standard deviation to 6 %
    if not spread:  # P(success > failure) of two normals one shift apart
        truth = statistics.NormalDist().cdf(shift / math.sqrt(2))
        assert statistics.fmean(gate.auc for gate in gates) == pytest.approx(truth, abs=0.015)


def test_pooling_over_pairs_weighs_a_group_by_p_times_1_minus_p() -> None:
    """An easy task of AUC 1 and a hard one of AUC 0: leaving out groups that are not mixed shifts nothing."""
    draw, rates, size = np.random.default_rng(1), (0.9, 0.3), 4
    preferences = []
    for index in range(4000):
        success = draw.random(size) < rates[index % 2]
        sign = 1.0 if index % 2 == 0 else -1.0
        preferences.append([(sign * float(s), bool(s)) for s in success])
    expected = 0.9 * 0.1 / (0.9 * 0.1 + 0.3 * 0.7)
    assert pair_evidence(preferences).auc == pytest.approx(expected, abs=0.02)


def test_all_rows_are_scored_in_one_context_and_quoted_rows_are_left_out() -> None:
    mixed = random_groups(0, groups=1)[0].rollouts
    first_failure = next(i for i, r in enumerate(mixed) if not r.success)
    told = dataclasses.replace(
        mixed[first_failure],
        context=(Section(kind="demonstration", source="sibling", text="1", quotes=0),),
        teacher_prompt=TeacherPrompt(tokens=(1, 2, 3), sources=("sibling",)),
    )
    rollouts = tuple(told if i == first_failure else r for i, r in enumerate(mixed))
    assert shared_context([Group(rollouts=rollouts)]) == {0: ((1, 2, 3), (0,))}
    all_failed = tuple(
        dataclasses.replace(r, grade=dataclasses.replace(r.grade, success=False)) for r in random_groups(0)[0].rollouts
    )
    bare = tuple(dataclasses.replace(r, context=(), teacher_prompt=None) for r in mixed)
    assert shared_context([Group(rollouts=all_failed), Group(rollouts=bare)]) == {}


def trained(algorithm: object, kind: str = "ema", **optim: float) -> torch.Tensor:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind=kind), micro_batch_size=3, **optim)  # type: ignore[arg-type]
    for seed in range(2):
        algorithm.step(random_groups(seed), learner)  # type: ignore[attr-defined]
        learner.end_iteration()
    return flat(learner.model)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / (b - flat(tiny_model())).norm())


def gated(**changes: object) -> GatedVPD:
    return GatedVPD(GatedSettings(**changes), TokenPrompter())  # type: ignore[arg-type]


def test_without_trust_it_is_the_policy_gradient_at_its_own_rate() -> None:
    grpo = GRPO(GRPOSettings(average="seq_mean"))
    for scale in (1.0, 2.0):
        deaf = gated(pseudo_groups=0.0, e_every=None, policy_lr_scale=scale)
        deaf._gate.add = lambda *kinds: None  # type: ignore[method-assign]
        assert distance(trained(deaf), trained(grpo, "live", learning_rate=0.3 * scale)) < 1e-10


def test_the_learning_rate_follows_trust_and_the_share_of_told_rows() -> None:
    groups = random_groups(0)
    rows = [rollout for group in groups for rollout in group.rollouts]
    share = sum(r.teacher_prompt is not None for r in rows) / len(rows)
    metrics = gated(e_every=None, policy_lr_scale=3.0).step(groups, tiny_learner(tiny_model())).metrics
    heard = metrics["gate/trust"] * share
    assert 0.0 < heard < 1.0 and metrics["gate/lr_scale"] == pytest.approx(heard + 3.0 * (1.0 - heard))


def test_where_nobody_has_a_context_it_is_the_policy_gradient_whatever_the_trust() -> None:
    def bare(seed: int) -> list[Group]:
        return [
            Group(rollouts=tuple(dataclasses.replace(r, context=(), teacher_prompt=None) for r in group.rollouts))
            for group in random_groups(seed)
        ]

    learners = [tiny_learner(tiny_model(), learning_rate=rate) for rate in (0.2, 0.3)]
    metrics = gated(e_every=1, policy_lr_scale=1.5).step(bare(0), learners[0]).metrics
    GRPO(GRPOSettings(average="seq_mean")).step(bare(0), learners[1])
    assert metrics["gate/trust"] == 1.0 and metrics["gate/groups"] == 0
    assert distance(flat(learners[0].model), flat(learners[1].model)) < 1e-10


def test_with_full_trust_and_no_policy_weight_it_is_vpd() -> None:
    believer = gated(policy_weight=0.0, policy_lr_scale=1.0, pseudo_groups=1e15, e_every=2)
    vpd = VPD(VPDSettings(e_every=2, denominator="all"), TokenPrompter())  # type: ignore[arg-type]
    assert distance(trained(believer), trained(vpd)) < 1e-10
    sdpo_like = gated(policy_weight=0.0, policy_lr_scale=1.0, pseudo_groups=1e15, e_every=None)
    vpd = VPD(VPDSettings(e_every=None, denominator="all"), TokenPrompter())  # type: ignore[arg-type]
    assert distance(trained(sdpo_like), trained(vpd)) < 1e-10


def test_without_an_e_step_vpd_is_sdpo() -> None:
    """As docs/evidence.md says of its ablation."""
    vpd = trained(VPD(VPDSettings(e_every=None), TokenPrompter()))  # type: ignore[arg-type]
    assert distance(trained(Distill(SDPOSettings())), vpd) == 0.0
    assert distance(trained(VPD(VPDSettings(e_every=1), TokenPrompter())), vpd) > 1e-6  # type: ignore[arg-type]


def test_distrust_skips_the_e_step_and_metrics_say_so() -> None:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings())
    sceptic = gated(min_trust=1.0, e_every=1)
    metrics = sceptic.step(random_groups(0), learner).metrics
    assert metrics["e_step/rows"] == 0 and 0 <= metrics["gate/auc"] <= 1 and metrics["gate/groups"] > 0
    assert metrics["gate/trust"] == sceptic._gate.trust and metrics["m_step/rows"] > 0
    open_minded = gated(e_every=1).step(random_groups(0), tiny_learner(tiny_model(), teacher=TeacherSettings())).metrics
    assert open_minded["e_step/rows"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate_memory": 1.0},
        {"pseudo_groups": -1.0},
        {"updates_per_batch": 2},
        {"policy_weight": -1.0},
        {"policy_lr_scale": 0.0},
    ],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.{next(iter(wrong))} is out of range"):
        GatedSettings(**wrong)  # type: ignore[arg-type]
