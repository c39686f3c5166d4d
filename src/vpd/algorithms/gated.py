"""VPD with an evidence-gated policy gradient: listen to the teacher as far as it has been right.

    loss = trust * D(pi || sg q) - mean( A * log pi ),        A = GRPO's advantage

The policy gradient learns from outcomes alone; the distillation is scaled by the evidence that the teacher prefers
what succeeds (:mod:`vpd.algorithms.gate`).  Both are divided by all rows, so that their balance does not depend on how
many rows have a context.  The evidence of a batch counts before that batch is learned from.

Adam divides by the gradient's size, so a loss weight does not set the speed: as trust, or the share of rows with a
context, falls to 0, the learning rate moves from the distillation's to the policy gradient's.  The E-step is skipped
while trust is below ``min_trust``; with ``e_every: null`` this is SDPO with the same gate.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from vpd import losses
from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.examples import teacher_logprobs, to_examples, token_counts, with_loss_weights
from vpd.algorithms.gate import Evidence, Gate, shared_context, weigh
from vpd.algorithms.grpo import group_advantages
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.learners import Learner, Terms
from vpd.model.scorer import Batch, Scorer
from vpd.prompts import Prompter
from vpd.types import Example, Group, Metrics


@dataclass(frozen=True, kw_only=True)
class GatedSettings(VPDSettings):
    """Evidence-gated VPD: a policy gradient, and distillation weighed by how well the teacher has predicted success."""

    name: Literal["gated"] = "gated"  # type: ignore[assignment]
    policy_weight: Annotated[float, Ge(0), "weight of the policy gradient beside the distillation"] = 1.0
    policy_lr_scale: Annotated[
        float, Gt(0), "the policy gradient's learning rate, as a multiple of the distillation's"
    ] = 1.0
    scale_rewards: Annotated[Literal["group", "batch", "none"], "whose standard deviation divides the advantage"] = (
        "group"
    )
    gate_memory: Annotated[
        float, Interval(ge=0.0, lt=1.0), "share of the old evidence that stays each iteration with a mixed group"
    ] = 0.8
    pseudo_groups: Annotated[float, Ge(0), "prior evidence in the teacher's favour, in mixed groups"] = 1.0
    min_trust: Annotated[float, "below this trust the E-step is skipped"] = 0.1
    distillation_estimator: Annotated[Literal["exact"], "the gate compares whole distributions only"] = "exact"
    updates_per_batch: Annotated[Literal[1], "the gate is read once an iteration"] = 1

    @property
    def needs(self) -> Needs:
        return dataclasses.replace(super().needs, group=True)

    def build(self, prompter: Prompter) -> Algorithm:
        return GatedVPD(self, prompter)


class GatedVPD(VPD):
    """E-step when due and trusted, then one update on both terms."""

    settings: GatedSettings

    def __init__(self, settings: GatedSettings, prompter: Prompter):
        super().__init__(settings, prompter)
        self._gate = Gate(memory=settings.gate_memory, pseudo_groups=settings.pseudo_groups)

    def step(self, groups: Sequence[Group], learner: Learner) -> Metrics:
        evidence = self._evidence(groups, learner)
        self._gate.add(evidence)
        trust = self._gate.trust
        distrusted = trust < self.settings.min_trust
        scored, metrics = self._when_due(groups, learner, everyone=True, skip=distrusted)
        examples = to_examples(groups) if scored is None else scored
        metrics |= self._update(groups, examples, trust, learner)
        metrics |= {
            "gate/trust": trust,
            "gate/auc": evidence.auc,
            "gate/auc_mean": self._gate.auc,
            "gate/auc_se": self._gate.standard_error,
            "gate/gap": evidence.gap,
            "gate/groups": float(evidence.groups),
        }
        return metrics

    def state(self) -> dict[str, Any]:
        return super().state() | {"gate": self._gate.state()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._gate.restore(state["gate"])

    def _evidence(self, groups: Sequence[Group], learner: Learner) -> Evidence:
        """One pass without gradient over the mixed groups, each in one shared context, with the M-step's teacher."""
        contexts = shared_context(groups)
        chosen: list[tuple[int, Example]] = []
        start = 0
        examples = to_examples(groups)
        for number, group in enumerate(groups):
            own = examples[start : start + len(group.rollouts)]
            start += len(group.rollouts)
            if number in contexts:
                prompt, quoted = contexts[number]
                kept = (e for index, e in enumerate(own) if index not in quoted)
                chosen += [(number, dataclasses.replace(e, teacher_prompt=prompt)) for e in kept]
        if not chosen:
            return weigh([])
        scores = learner.score([e for _, e in chosen], teacher_logprobs, model="teacher")
        preferences: dict[int, list[tuple[float, bool]]] = {}
        for (number, example), score in zip(chosen, scores, strict=True):
            pairs = zip(score, example.behaviour, example.mask, strict=True)
            preference = sum(told - untold for told, untold, counts in pairs if counts)
            preferences.setdefault(number, []).append((preference, example.success))
        return weigh(list(preferences.values()))

    def _update(self, groups: Sequence[Group], examples: Sequence[Example], trust: float, learner: Learner) -> Metrics:
        settings = self.settings
        advantages = group_advantages(groups, settings.scale_rewards)
        examples = [dataclasses.replace(e, advantage=a) for e, a in zip(examples, advantages, strict=True)]
        if trust == 0.0:  # nobody is listened to: no row needs a teacher's pass
            examples = [dataclasses.replace(e, teacher_prompt=None) for e in examples]
        lengths = token_counts(examples)
        told = [e.teacher_prompt is not None for e in examples]
        distill = weighting.token_average(lengths, told, average=settings.average, denominator="all")
        policy = weighting.token_average(lengths, [True] * len(examples), average=settings.average)
        heard = trust * sum(weight * length for weight, length in zip(distill, lengths, strict=True))
        lr_scale = heard + (1.0 - heard) * settings.policy_lr_scale
        metrics = learner.update(
            "m_step",
            with_loss_weights(
                examples,
                distill=[trust * weight for weight in distill],
                policy=[
                    settings.policy_weight * w if e.advantage else 0.0 for w, e in zip(policy, examples, strict=True)
                ],
            ),
            self._objective,
            lr_scale=lr_scale,
        )
        return metrics | {"gate/lr_scale": lr_scale}

    def _objective(self, scorer: Scorer, batch: Batch) -> Terms:
        """Both terms; a micro-batch holds rows with a teacher's prompt or rows without, never both."""
        student_BT = scorer.logprobs("student")
        reference_BT = batch.reference_or(student_BT)
        ratio_BT = losses.importance_ratio(student_BT, reference_BT, clip=self.settings.importance_clip)
        surrogate_BT = -ratio_BT * batch.advantage_B[:, None] * student_BT
        policy_B = (surrogate_BT * batch.mask_BT).sum(-1)
        if not batch.has_teacher:
            return Terms(losses={"policy": policy_B, "distill": policy_B.new_zeros(policy_B.shape)})
        told = self.m_step.objective(scorer, batch)
        return Terms(losses={"policy": policy_B, **told.losses}, stats=told.stats)
