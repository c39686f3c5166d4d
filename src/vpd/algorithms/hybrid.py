"""Hybrids of reward and feedback in one stage, without an E-step (arXiv 2605.15113, its baselines).

With o_t = sg(log q(y_t|x,C) - log pi(y_t|x)), the teacher's log-ratio of a token, and A, GRPO's advantage of the row:

    reshape   A_t = lambda A + (1 - lambda) o_t                                  AdvReshape, additive
    reweight  A_t = A clip(exp(sign(A) o_t), 1 - eps, 1 + eps)                   AdvReweight, multiplicative

Either is the advantage in PPO's clipped policy gradient.  A row without a context has o_t = 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.distill import SelfTeacher
from vpd.algorithms.examples import (
    ReferenceSetting,
    choose_rows,
    mismatch,
    to_examples,
    token_counts,
    with_loss_weights,
)
from vpd.algorithms.grpo import ClipHighSetting, ClipLowSetting, ScaleSetting, group_advantages
from vpd.learners import Learner, TokenLoss, Update
from vpd.prompts import Prompter
from vpd.settings import Share
from vpd.types import Group

if TYPE_CHECKING:
    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class HybridSettings(SelfTeacher):
    """A policy gradient whose advantage also depends on a teacher made of the student's own weights."""

    name: Literal["hybrid"] = "hybrid"
    form: Annotated[
        Literal["reshape", "reweight"], "how the teacher's log-ratio enters the advantage: added, or as a factor"
    ] = "reshape"
    outcome_share: Annotated[float, Share, "reshape: lambda, the share of GRPO's advantage"] = 0.5
    reweight_clip: Annotated[float, Share, "reweight: eps, the most that the teacher changes an advantage by"] = 0.2
    scale_rewards: ScaleSetting = "group"
    clip_low: ClipLowSetting = 0.2
    clip_high: ClipHighSetting = 0.28
    average: weighting.AverageSetting = "token_mean"
    importance_reference: ReferenceSetting = "own"

    @property
    def needs(self) -> Needs:
        return Needs(group=True, feedback=True, teacher=self.teacher_settings())

    def build(self, prompter: Prompter) -> Algorithm:
        return Hybrid(self)


class Hybrid:
    """Policy gradient with an advantage of each token, ``update("policy")``."""

    def __init__(self, settings: HybridSettings):
        self.settings = settings

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: one update."""
        settings = self.settings
        advantages = group_advantages(groups, settings.scale_rewards)
        examples = [
            dataclasses.replace(e, advantage=a)
            for e, a in zip(to_examples(groups, settings.importance_reference), advantages, strict=True)
        ]
        examples = choose_rows(examples, advantage=True, context=settings.form == "reshape")
        adds = [not e.left_out for e in examples]  # the others are in the mean, too
        weights = weighting.token_average(token_counts(examples), adds, average=settings.average, denominator="all")
        return learner.update("policy", with_loss_weights(examples, policy=weights), {"policy": self._loss})

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def _loss(self, scorer: Scorer, batch: Batch) -> TokenLoss:
        """PPO's clipped surrogate of each token [B,T], with the advantage of reward and teacher."""
        from vpd.losses import clipped_policy_gradient, mixed_advantage

        settings = self.settings
        logprobs_BT = scorer.logprobs("student")
        reference_BT = batch.reference_or(logprobs_BT)
        teacher_BT = scorer.logprobs("teacher") if batch.has_teacher else logprobs_BT
        log_ratio_BT = (teacher_BT - logprobs_BT).detach()
        advantage_BT = mixed_advantage(
            batch.advantage_B,
            log_ratio_BT,
            form=settings.form,
            outcome_share=settings.outcome_share,
            clip=settings.reweight_clip,
        )
        return TokenLoss(
            clipped_policy_gradient(
                logprobs_BT, reference_BT, advantage_BT, clip_low=settings.clip_low, clip_high=settings.clip_high
            ),
            signals={
                "importance_ratio": (logprobs_BT.detach() - reference_BT).exp(),
                "entropy": scorer.entropy("student"),
                "teacher_minus_student": log_ratio_BT,
                "sampling_logp_difference": (reference_BT - batch.behaviour_BT).abs(),
                **mismatch(self.settings.importance_reference, logprobs_BT, batch),
            },
        )
