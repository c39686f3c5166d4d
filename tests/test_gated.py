"""The gate's arithmetic, and gated VPD at its ends: no trust is the policy gradient, full trust is VPD."""

import dataclasses

import pytest
import torch
from helpers import TokenPrompter, flat, random_groups, tiny_learner, tiny_model

from vpd.algorithms.gate import Evidence, Gate, shared_context, weigh
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.errors import ConfigError
from vpd.learners.teachers import TeacherSettings
from vpd.types import Group, Section, TeacherPrompt


def test_auc_by_hand() -> None:
    # successes 3 and 1, failures 1 and 0: 3>1, 3>0, 1=1 (half), 1>0 -> 3.5 of 4; means 2 and .5
    evidence = weigh([[(3.0, True), (1.0, True), (1.0, False), (0.0, False)]])
    assert evidence == Evidence(auc=3.5 / 4, gap=1.5, groups=1)
    # a second group, 1 of 1 pair lost: pooled over pairs 3.5 / 5, the gaps averaged over groups
    both = weigh([[(3.0, True), (1.0, True), (1.0, False), (0.0, False)], [(0.0, True), (9.0, False)]])
    assert both == Evidence(auc=0.7, gap=(1.5 - 9.0) / 2, groups=2)
    assert weigh([[(1.0, True)], [(2.0, False)]]) == Evidence(auc=0.5, gap=0.0, groups=0)
    # pairs never cross groups: a success of a poor group and a failure of a good one are not compared
    assert weigh([[(-9.0, True), (-10.0, False)], [(10.0, True), (9.0, False)]]).auc == 1.0


def test_trust_by_hand() -> None:
    gate = Gate(memory=0.5, pseudo_groups=1.0)
    assert gate.trust == 1.0  # before any evidence: the prior alone
    gate.add(Evidence(auc=0.5, gap=0.0, groups=2))  # (1 + 1) / (1 + 2)
    assert gate.trust == pytest.approx(2 * 2 / 3 - 1)
    gate.add(Evidence(auc=0.0, gap=0.0, groups=2))  # (1 + .5) / (1 + 3)
    assert gate.trust == 0.0
    kept = gate.state()
    gate.add(Evidence(auc=0.5, gap=0.0, groups=0))  # nothing was said: nothing fades
    assert gate.state() == kept
    other = Gate(memory=0.5, pseudo_groups=1.0)
    other.restore(kept)
    other.add(Evidence(auc=1.0, gap=0.0, groups=8))
    assert other.trust == pytest.approx(2 * (1 + 0.25 + 8) / (1 + 1.5 + 8) - 1)
    assert Gate(memory=0.5, pseudo_groups=0.0).trust == 0.0  # without a prior nothing is believed at first


def test_all_rows_are_scored_in_one_context_and_quoted_rows_are_left_out() -> None:
    mixed = random_groups(0, groups=1)[0].rollouts
    first_failure = next(i for i, r in enumerate(mixed) if not r.success)
    told = dataclasses.replace(
        mixed[first_failure],
        context=(Section(kind="demonstration", source="sibling", text="1", quotes=0),),
        teacher=TeacherPrompt(tokens=(1, 2, 3), sources=("sibling",)),
    )
    rollouts = tuple(told if i == first_failure else r for i, r in enumerate(mixed))
    assert shared_context([Group(rollouts=rollouts)]) == {0: ((1, 2, 3), (0,))}
    all_failed = tuple(
        dataclasses.replace(r, grade=dataclasses.replace(r.grade, success=False)) for r in random_groups(0)[0].rollouts
    )
    bare = tuple(dataclasses.replace(r, context=(), teacher=None) for r in mixed)
    assert shared_context([Group(rollouts=all_failed), Group(rollouts=bare)]) == {}


def trained(algorithm: object, kind: str = "ema") -> torch.Tensor:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind=kind), micro_batch_size=3)  # type: ignore[arg-type]
    for seed in range(2):
        algorithm.step(random_groups(seed), learner)  # type: ignore[attr-defined]
        learner.end_iteration()
    return flat(learner.weights())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / (b - flat(tiny_model())).norm())


def gated(**changes: object) -> GatedVPD:
    return GatedVPD(GatedSettings(**changes), TokenPrompter())  # type: ignore[arg-type]


def test_without_trust_it_is_the_policy_gradient() -> None:
    deaf = gated(pseudo_groups=0.0, min_trust=2.0, e_every=None, gate_memory=0.0)
    deaf._gate.add = lambda evidence: None  # type: ignore[method-assign]
    assert distance(trained(deaf), trained(GRPO(GRPOSettings(average="seq_mean")), "live")) < 1e-10


def test_with_full_trust_and_no_policy_weight_it_is_vpd() -> None:
    believer = gated(policy_weight=0.0, pseudo_groups=1e15, e_every=2)
    vpd = VPD(VPDSettings(e_every=2, denominator="all"), TokenPrompter())  # type: ignore[arg-type]
    assert distance(trained(believer), trained(vpd)) < 1e-10
    sdpo_like = gated(policy_weight=0.0, pseudo_groups=1e15, e_every=None)
    vpd = VPD(VPDSettings(e_every=None, denominator="all"), TokenPrompter())  # type: ignore[arg-type]
    assert distance(trained(sdpo_like), trained(vpd)) < 1e-10


def test_distrust_skips_the_e_step_and_metrics_say_so() -> None:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings())
    sceptic = gated(pseudo_groups=0.0, e_every=1)
    metrics = sceptic.step(random_groups(0), learner)
    assert metrics["e_step/rows"] == 0 and 0 <= metrics["gate/auc"] <= 1 and metrics["gate/groups"] > 0
    assert metrics["gate/trust"] == sceptic._gate.trust and metrics["m_step/rows"] > 0
    open_minded = gated(e_every=1).step(random_groups(0), tiny_learner(tiny_model(), teacher=TeacherSettings()))
    assert open_minded["e_step/rows"] > 0


@pytest.mark.parametrize(
    "wrong", [{"gate_memory": 1.0}, {"pseudo_groups": -1.0}, {"updates_per_batch": 2}, {"policy_weight": -1.0}]
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.{next(iter(wrong))} is out of range"):
        GatedSettings(**wrong)  # type: ignore[arg-type]
