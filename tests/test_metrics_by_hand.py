"""What an update reports, computed anew from whole logits: each row alone, no chunks, no shared prefixes, no scorer."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, random_groups, tiny_learner, tiny_model
from torch import Tensor

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.examples import probe_rows, to_examples
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.learners.teachers import TeacherSettings
from vpd.types import Group, Rollout


class Watched:
    """A learner that keeps a copy of the weights that each update started from."""

    def __init__(self, learner: Any):
        self._learner = learner
        self.before: dict[str, Any] = {}

    def update(self, name: str, *arguments: Any, **options: Any) -> Any:
        self.before[name] = copy.deepcopy(self._learner.model)
        return self._learner.update(name, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)


def algorithm_of(settings: Any) -> Any:
    prompter: Any = TokenPrompter()
    made = {
        "sdpo": lambda: Distill(settings),
        "vpd": lambda: VPD(settings, prompter),
        "grpo": lambda: GRPO(settings),
        "hybrid": lambda: Hybrid(settings),
        "gated": lambda: GatedVPD(settings, prompter),
    }
    return made[settings.name]()


def one_step(settings: Any, groups: Sequence[Group], **options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics of one step, and the weights that each of its updates started from.  The teacher is live."""
    learner = Watched(tiny_learner(tiny_model(), teacher=TeacherSettings(kind="live"), **options))
    return algorithm_of(settings).step(groups, learner).metrics, learner.before


def batch(seed: int = 3) -> list[Group]:
    """Random groups in which an environment spoke the second token of every longer row; sampler's log-probs vary."""
    groups = random_groups(seed, groups=3, size=4)
    return [Group(rollouts=tuple(_with_reply(r, i) for i, r in enumerate(group.rollouts))) for group in groups]


def _with_reply(rollout: Rollout, index: int) -> Rollout:
    count = len(rollout.completion.tokens)
    sampled = tuple(t != 1 or count < 3 for t in range(count))
    logprobs = tuple(-1.0 - 0.1 * index if mine else 0.0 for mine in sampled)
    return dataclasses.replace(
        rollout, completion=dataclasses.replace(rollout.completion, sampled=sampled, logprobs=logprobs)
    )


def rows(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def logp(model: Any, rollout: Rollout, *, teacher: bool = False) -> Tensor:
    """Log-probs of the whole vocabulary at each sampled token of a row [n,V]."""
    prompt = rollout.prompt
    if teacher:
        assert rollout.teacher_prompt is not None
        prompt = rollout.teacher_prompt.tokens
    tokens = rollout.completion.tokens
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    kept = [t for t, mine in enumerate(rollout.completion.sampled) if mine]
    return torch.log_softmax(logits[[len(prompt) - 1 + t for t in kept]], -1)


def chosen(logp_nV: Tensor, rollout: Rollout) -> Tensor:
    """Of those, the log-probs of the tokens themselves [n]."""
    kept = [token for token, mine in zip(rollout.completion.tokens, rollout.completion.sampled, strict=True) if mine]
    return logp_nV[torch.arange(len(kept)), torch.tensor(kept)]


def behaviour(rollout: Rollout) -> Tensor:
    completion = rollout.completion
    kept = [p for p, mine in zip(completion.logprobs, completion.sampled, strict=True) if mine]
    return torch.tensor(kept, dtype=torch.float64)


def entropy(logp_nV: Tensor) -> Tensor:
    return -(logp_nV.exp() * logp_nV).sum(-1)


def jensen_shannon(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    p, q = s_nV.exp(), t_nV.exp()
    m = (p + q) / 2
    return ((p * (s_nV - m.log())).sum(-1) + (q * (t_nV - m.log())).sum(-1)) / 2


def mean(columns: Sequence[Tensor]) -> float:
    return float(torch.cat(list(columns)).mean())


def grad_norm(model: Any, loss: Tensor) -> float:
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return math.sqrt(sum(float((g**2).sum()) for g in grads))


@dataclasses.dataclass(frozen=True)
class Distilled:
    """The M-step by hand: ``now`` is student and teacher, ``then`` the student before the E-step."""

    metrics: dict[str, float]

    @classmethod
    def of(cls, told: Sequence[Rollout], now: Any, then: Any) -> "Distilled":
        columns: dict[str, list[Tensor]] = {}
        loss = torch.zeros((), dtype=torch.float64)
        for rollout in told:
            student = logp(now, rollout)
            with torch.no_grad():
                teacher, before = logp(now, rollout, teacher=True), chosen(logp(then, rollout), rollout)
            own, its = chosen(student, rollout).detach(), chosen(teacher, rollout)
            ratio = (own - before).exp()
            value = jensen_shannon(student, teacher)
            loss = loss + (ratio.clamp(max=2.0) * value).mean() / len(told)
            for name, column in {
                "divergence": value.detach(),
                "importance_ratio": ratio.clamp(max=2.0),
                "teacher_minus_student": its - own,
                "student_drift_kl": ratio * ratio.log() - ratio + 1,
                "sampling_logp_difference": (before - behaviour(rollout)).abs(),
                "entropy": entropy(student).detach(),
                "teacher_entropy": entropy(teacher),
            }.items():
                columns.setdefault(name, []).append(column)
        metrics = {f"m_step/{name}": mean(column) for name, column in columns.items()}
        tokens = float(sum(sum(r.completion.sampled) for r in told))
        metrics |= {"m_step/rows": float(len(told)), "m_step/tokens": tokens}
        return cls(metrics | {"m_step/loss": float(loss.detach()), "m_step/grad_norm": grad_norm(now, loss)})


def reported(metrics: dict[str, float], name: str) -> dict[str, float]:
    """Without what is of the machine's layout, and after a look at the number of updates."""
    assert metrics[f"{name}/updates"] == 1.0
    layout = (f"{name}/padding", f"{name}/updates")
    return {k: v for k, v in metrics.items() if k.startswith(f"{name}/") and k not in layout}


def test_the_m_step_of_sdpo() -> None:
    groups = batch()
    told = [r for r in rows(groups) if r.teacher_prompt is not None]
    assert 0 < len(told) < len(rows(groups)) and not all(all(r.completion.sampled) for r in told)
    metrics, before = one_step(SDPOSettings(), groups)
    start = before["m_step"]
    assert reported(metrics, "m_step") == pytest.approx(Distilled.of(told, start, start).metrics, abs=1e-9)
    assert metrics["m_step/importance_ratio"] == 1.0 and metrics["m_step/student_drift_kl"] == 0.0
    assert metrics["m_step/teacher_minus_student"] != pytest.approx(-metrics["m_step/teacher_minus_student"], abs=0.01)


def test_both_steps_of_vpd() -> None:
    groups = batch()
    told = [r for r in rows(groups) if r.teacher_prompt is not None]
    settings = VPDSettings(success_context="own", teacher_beta=4.0, teacher="live", e_lr_scale=0.05)
    metrics, before = one_step(settings, groups)
    first, second = before["e_step"], before["m_step"]
    expected = Distilled.of(told, second, first).metrics
    assert expected["m_step/student_drift_kl"] > 1e-4 and expected["m_step/importance_ratio"] != 1.0
    assert reported(metrics, "m_step") == pytest.approx(expected, abs=1e-9)

    gaps = [chosen(logp(first, r, teacher=True), r) - chosen(logp(first, r), r).detach() for r in told]
    reward = torch.stack([4.0 * gap.sum() for gap in gaps])
    won = torch.tensor([r.success for r in told])
    shift = float((reward[won].mean() + reward[~won].mean()).detach() / 2)
    margin = torch.where(won, reward - shift, shift - reward)
    seen = reward.detach()
    loss = sum(torch.log1p(torch.exp(-margin[rows])).mean() for rows in (won, ~won))
    assert isinstance(loss, Tensor)
    behind = [(chosen(logp(first, r), r).detach() - behaviour(r)).abs().max() for r in rows(groups)]
    probed = probe_rows([e for e in to_examples(groups) if e.teacher_prompt])
    assert len(probed) < len(told)
    saturation = float((margin.abs() > 5).double().mean())
    assert 0 < saturation < 1
    assert reported(metrics, "e_step") == pytest.approx(
        {
            "e_step/rows": len(told),
            "e_step/tokens": sum(sum(r.completion.sampled) for r in told),
            "e_step/loss": float(loss.detach()),
            "e_step/grad_norm": grad_norm(first, loss),
            "e_step/shift": shift,
            "e_step/saturation": saturation,
            "e_step/accuracy": float((margin[won] > 0).double().mean() + (margin[~won] > 0).double().mean()) / 2,
            "e_step/implicit_reward_success": float(seen[won].mean()),
            "e_step/implicit_reward_failure": float(seen[~won].mean()),
            "e_step/rows_success": int(won.sum()),
            "e_step/rows_failure": int((~won).sum()),
            "e_step/kind_predicts_success": 0.5,
            "e_step/student_drift_kl": expected["m_step/student_drift_kl"],
            # the sampler was another: some rows are compared, then the other rows with a context are scored too
            "e_step/sampler_logp_difference": max(float(behind[rows(groups).index(told[row])]) for row in probed),
            "e_step/rows_scored": len(told),
        },
        abs=1e-9,
    )


def advantages(groups: Sequence[Group]) -> list[float]:
    found = []
    for group in groups:
        rewards = torch.tensor([r.grade.reward for r in group.rollouts], dtype=torch.float64)
        found += ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
    return found


def with_a_silent_group(groups: list[Group]) -> list[Group]:
    """The first group's rewards all equal."""
    first = tuple(dataclasses.replace(r, grade=dataclasses.replace(r.grade, reward=0.5)) for r in groups[0].rollouts)
    return [Group(rollouts=first), *groups[1:]]


def test_the_policy_update_of_grpo() -> None:
    groups = with_a_silent_group(batch())
    metrics, before = one_step(GRPOSettings(), groups)
    start = before["policy"]
    entering = [(r, a) for r, a in zip(rows(groups), advantages(groups), strict=True) if a]
    assert len(entering) == 8
    tokens = sum(sum(r.completion.sampled) for r in rows(groups))
    distributions = [logp(start, r) for r, _ in entering]
    # -min(rho A, ...) at rho = 1 has the value -A and the gradient -A grad log pi; all rows count in the mean
    value = -sum(a * sum(r.completion.sampled) for r, a in entering) / tokens
    surrogate = -sum(
        (a * chosen(d, r).sum() for (r, a), d in zip(entering, distributions, strict=True)),
        start=torch.zeros((), dtype=torch.float64),
    )
    assert reported(metrics, "policy") == pytest.approx(
        {
            "policy/groups_without_signal": 1 / 3,
            "policy/rows": 8,
            "policy/tokens": sum(sum(r.completion.sampled) for r, _ in entering),
            "policy/loss": value,
            "policy/grad_norm": grad_norm(start, surrogate / tokens),
            "policy/entropy": mean([entropy(d).detach() for d in distributions]),
            "policy/clip_ratio": 0.0,
            "policy/importance_ratio": 1.0,
            "policy/sampling_logp_difference": mean(
                [
                    (chosen(d, r).detach() - behaviour(r)).abs()
                    for (r, _), d in zip(entering, distributions, strict=True)
                ]
            ),
        },
        abs=1e-9,
    )


def test_the_policy_update_of_a_hybrid() -> None:
    groups = with_a_silent_group(batch())
    metrics, before = one_step(HybridSettings(teacher="live", form="reshape", outcome_share=0.7), groups)
    start = before["policy"]
    entering = [
        (r, a)
        for r, a in zip(rows(groups), advantages(groups), strict=True)
        if a or r.teacher_prompt is not None  # without a context the outcome alone speaks
    ]
    assert 8 < len(entering) < 12
    tokens = sum(sum(r.completion.sampled) for r in rows(groups))
    gaps, losses, columns = [], [], []
    for rollout, advantage in entering:
        student = chosen(logp(start, rollout), rollout).detach()
        gap = torch.zeros_like(student)
        if rollout.teacher_prompt is not None:
            gap = chosen(logp(start, rollout, teacher=True), rollout).detach() - student
        gaps.append(gap)
        losses.append(-(0.7 * advantage + 0.3 * gap).sum() / tokens)
        columns.append((student - behaviour(rollout)).abs())
    assert abs(mean(gaps)) > 0.01
    expected = {
        "policy/rows": len(entering),
        "policy/loss": float(sum(losses)),
        "policy/teacher_minus_student": mean(gaps),
        "policy/sampling_logp_difference": mean(columns),
        "policy/entropy": mean([entropy(logp(start, r)).detach() for r, _ in entering]),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)


GATED = GatedSettings(teacher="live", e_every=None, pseudo_groups=5.0)


def test_the_one_update_of_gated_vpd() -> None:
    groups = batch()
    metrics, before = one_step(GATED, groups)
    start, trust = before["m_step"], metrics["gate/trust"]
    value, entering = 0.0, rows(groups)
    for rollout, advantage in zip(entering, advantages(groups), strict=True):
        student = logp(start, rollout).detach()
        value -= advantage * float(chosen(student, rollout).mean()) / len(entering)
        if rollout.teacher_prompt is not None:
            divergence = jensen_shannon(student, logp(start, rollout, teacher=True).detach())
            value += trust * float(divergence.mean()) / len(entering)
    assert 0 < trust < 1
    assert metrics["m_step/rows"] == len(entering)
    assert metrics["m_step/tokens"] == sum(sum(r.completion.sampled) for r in entering)
    assert metrics["m_step/loss"] == pytest.approx(value, abs=1e-9)


def test_gated_vpd_reports_the_distillation_per_token_that_is_distilled() -> None:
    groups = batch()
    metrics, before = one_step(GATED, groups)
    start = before["m_step"]
    expected = Distilled.of([r for r in rows(groups) if r.teacher_prompt is not None], start, start).metrics
    for name in ("divergence", "teacher_minus_student", "teacher_entropy", "sampling_logp_difference"):
        assert metrics[f"m_step/{name}"] == pytest.approx(expected[f"m_step/{name}"], abs=1e-9), name


def test_no_number_depends_on_how_rows_are_put_into_micro_batches() -> None:
    for settings in (VPDSettings(teacher="live"), HybridSettings(teacher="live")):
        whole, _ = one_step(settings, batch())
        split, _ = one_step(settings, batch(), micro_batch_size=2)
        assert whole.keys() == split.keys()
        for name in whole.keys() - {k for k in whole if k.startswith("time/") or k.endswith("/padding")}:
            assert whole[name] == pytest.approx(split[name], abs=1e-9), name
