"""Evidence-gated VPD: a policy gradient, and distillation in proportion to how well the teacher has predicted success.

    loss = trust * L_M - mean( A * log pi ),        L_M = sum_t D(pi, sg q), A = GRPO's advantage

and, with retries, their own term (:mod:`vpd.algorithms.retries`), which is graded by outcomes and needs no gate.

The policy gradient learns from outcomes alone; the distillation is scaled by the evidence that the teacher prefers
what succeeds, or repairs it in its retries (:mod:`vpd.algorithms.gate`).  Both are divided by all rows, so that their
balance does not depend on how many rows have a context.  The evidence of a batch counts before that batch is learned
from.

Adam divides by the gradient's size, so a loss weight does not set the speed: as trust, or the share of rows with a
context, falls to 0, the learning rate moves from the distillation's to the policy gradient's.  The E-step is skipped
while trust is below ``min_trust``; with ``e_every: null`` this is SDPO with the same gate.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.distill import Distill
from vpd.algorithms.e_step import EStep
from vpd.algorithms.examples import (
    choose_rows,
    own_logprobs,
    policy_gradient,
    teacher_logprobs,
    to_examples,
    token_counts,
    with_loss_weights,
)
from vpd.algorithms.gate import Evidence, Gate, pair_evidence, retry_evidence, shared_context
from vpd.algorithms.grpo import ScaleSetting, group_advantages
from vpd.algorithms.retries import Imitation
from vpd.algorithms.vpd import VPDSettings, drift_of
from vpd.learners import Learner, Update, combine
from vpd.prompts import Prompter
from vpd.types import Example, Group, Metrics


@dataclass(frozen=True, kw_only=True)
class GatedSettings(VPDSettings):
    """Evidence-gated VPD: a policy gradient, and distillation scaled by how well the teacher has predicted success."""

    name: Literal["gated"] = "gated"  # type: ignore[assignment]
    policy_weight: Annotated[float, Ge(0), "weight of the policy gradient; the distillation's is trust"] = 1.0
    policy_lr_scale: Annotated[
        float, Gt(0), "the policy gradient's learning rate, as a multiple of the distillation's"
    ] = 1.0
    scale_rewards: ScaleSetting = "group"
    gate_memory: Annotated[
        float, Interval(ge=0.0, lt=1.0), "share of the old evidence that is kept in each iteration with a mixed group"
    ] = 0.8
    pseudo_groups: Annotated[float, Ge(0), "prior evidence in the teacher's favour, in mixed groups"] = 1.0
    min_trust: Annotated[float, "below this trust the E-step is skipped"] = 0.1
    distillation_estimator: Annotated[Literal["exact"], "only whole distributions are compared"] = "exact"
    denominator: Annotated[Literal["all"], "rows that divide the loss: those of the policy gradient"] = "all"
    updates_per_batch: Annotated[Literal[1], "optimiser steps per iteration; trust is decided once in each"] = 1

    @property
    def needs(self) -> Needs:
        return dataclasses.replace(super().needs, group=True)

    def build(self, prompter: Prompter) -> Algorithm:
        return GatedVPD(self, prompter)


class GatedVPD:
    """Evidence, then the E-step when it is due and trust is high enough, then one update on both terms."""

    def __init__(self, settings: GatedSettings, prompter: Prompter):
        self.settings = settings
        self.e_step = EStep(settings, prompter)
        self.m_step = Distill(settings)
        self._imitation = Imitation(settings, settings.importance_clip)
        self._gate = Gate(memory=settings.gate_memory, pseudo_groups=settings.pseudo_groups)

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration; trust includes the evidence of these rollouts before anything is learned from them."""
        evidence, scored = self._evidence(groups, learner)
        from_retries = retry_evidence(groups, self._imitation.may_teach)
        self._gate.add(evidence, from_retries)
        trust = self._gate.trust
        examples = to_examples(groups, self.settings.importance_reference)
        if self.e_step.is_due() and trust >= self.settings.min_trust:
            examples, e_step = self.e_step.run(groups, examples, learner, score_all=True)
        else:
            e_step = self.e_step.skip()
        m_step = self._update(groups, examples, trust, learner)
        gate = {
            "gate/trust": trust,
            "gate/auc": evidence.auc,
            "gate/auc_mean": self._gate.auc,
            "gate/auc_se": self._gate.standard_error,
            "gate/gap": evidence.gap,
            "gate/groups": float(evidence.groups),
        }
        if any(rollout.retries for group in groups for rollout in group.rollouts):
            gate |= {"gate/retry_auc": from_retries.auc, "gate/retry_groups": float(from_retries.groups)}
        return combine(
            [e_step, m_step, drift_of(e_step, m_step, self.settings.importance_reference), Update(gate | scored)]
        )

    def state(self) -> dict[str, Any]:
        return self.e_step.state() | {"gate": self._gate.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.e_step.restore(state)
        self._gate.restore(state["gate"])

    def _evidence(self, groups: Sequence[Group], learner: Learner) -> tuple[Evidence, Metrics]:
        """One pass without gradient over the mixed groups, each in one shared context, with the M-step's teacher.

        log pi are the learner's log-probs, or the sampler's where these agree (:func:`own_logprobs`).
        """
        contexts = shared_context(groups)
        chosen: list[Example] = []
        for group, own in enumerate(_by_group(to_examples(groups))):
            if group in contexts:
                prompt, quoted = contexts[group]
                kept = (e for index, e in enumerate(own) if index not in quoted and e.graded)
                chosen += [dataclasses.replace(e, teacher=prompt) for e in kept]
        if not chosen:
            return Evidence(), {}
        log_pi, measured = own_logprobs(chosen, learner)
        log_q = learner.score(chosen, teacher_logprobs, model="teacher")
        preferences: dict[int, list[tuple[float, bool]]] = {}
        for example, teacher_T, student_T in zip(chosen, log_q, log_pi, strict=True):
            tokens = zip(teacher_T, student_T, example.mask, strict=True)
            log_ratio = sum(teacher - student for teacher, student, in_mask in tokens if in_mask)
            preferences.setdefault(example.group, []).append((log_ratio, example.success))
        return pair_evidence(list(preferences.values())), {f"gate/{name}": value for name, value in measured.items()}

    def _update(self, groups: Sequence[Group], examples: Sequence[Example], trust: float, learner: Learner) -> Update:
        """One update on the sum of both terms, at the learning rate of their mixture."""
        settings = self.settings
        retries = self._imitation.examples(groups, examples)
        advantages = group_advantages(groups, settings.scale_rewards)
        examples = [dataclasses.replace(e, advantage=a) for e, a in zip(examples, advantages, strict=True)]
        if trust == 0.0:  # no weight on the distillation: no row needs a teacher's pass
            examples = [dataclasses.replace(e, teacher=None) for e in examples]
        examples = choose_rows(examples, context=True, advantage=settings.policy_weight > 0)
        lengths = token_counts(examples)
        has_context = [e.teacher is not None for e in examples]
        distill = weighting.token_average(
            lengths, has_context, average=settings.average, denominator=settings.denominator
        )
        has_advantage = [bool(e.advantage) for e in examples]
        policy = weighting.token_average(lengths, has_advantage, average=settings.average, denominator="all")
        distill_share = trust * sum(weight * length for weight, length in zip(distill, lengths, strict=True))
        lr_scale = distill_share + (1.0 - distill_share) * settings.policy_lr_scale
        weighted = with_loss_weights(
            examples,
            distill=[trust * settings.distillation_weight * weight for weight in distill],
            policy=[settings.policy_weight * weight for weight in policy],
        )
        objectives = {"distill": self.m_step.loss, "policy": policy_gradient(settings.importance_clip)}
        update = self._imitation.update(learner, weighted, objectives, retries, lr_scale=lr_scale)
        return combine([update, Update({"gate/lr_scale": lr_scale} | self._imitation.metrics(groups))])


def _by_group(examples: Sequence[Example]) -> list[list[Example]]:
    return [list(own) for _, own in itertools.groupby(examples, key=lambda example: example.group)]
