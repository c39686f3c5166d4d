"""GRPO (arXiv 2402.03300): group-relative advantages and PPO's clipped policy gradient, no KL term.

Only the outcome counts: feedback, if there is any, is not read.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge

from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.examples import (
    ReferenceSetting,
    UpdatesSetting,
    choose_rows,
    mismatch,
    split_by_group,
    to_examples,
    token_counts,
    with_loss_weights,
    with_reference,
)
from vpd.learners import Learner, TokenLoss, Update, combine
from vpd.prompts import Prompter
from vpd.settings import Settings
from vpd.types import Group

if TYPE_CHECKING:
    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer


Scale: TypeAlias = Literal["group", "batch", "none"]
ScaleSetting: TypeAlias = Annotated[Scale, "whose standard deviation divides the advantage"]
ClipLowSetting: TypeAlias = Annotated[
    float,
    Ge(0),
    "clip of the importance ratio below, 1 - this; no effect at one update per batch, unless importance_reference is"
    " sampler",
]
ClipHighSetting: TypeAlias = Annotated[float, Ge(0), "clip of the importance ratio above, 1 + this"]


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(Settings, section="algorithm"):
    """GRPO with the clip of DAPO (0.2 / 0.28)."""

    name: Literal["grpo"] = "grpo"
    scale_rewards: ScaleSetting = "group"
    clip_low: ClipLowSetting = 0.2
    clip_high: ClipHighSetting = 0.28
    average: weighting.AverageSetting = "token_mean"
    importance_reference: ReferenceSetting = "own"
    updates_per_batch: UpdatesSetting = 1

    @property
    def needs(self) -> Needs:
        return Needs(group=True)

    def build(self, prompter: Prompter) -> Algorithm:
        return GRPO(self)


class GRPO:
    """Policy gradient on group-relative advantages, ``update("policy")``."""

    def __init__(self, settings: GRPOSettings):
        self.settings = settings

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: ``updates_per_batch`` updates; rows of groups with equal rewards add nothing."""
        settings = self.settings
        advantages = group_advantages(groups, settings.scale_rewards)
        examples = to_examples(groups, settings.importance_reference)
        examples = [  # feedback is not read
            dataclasses.replace(e, advantage=a, teacher=None) for e, a in zip(examples, advantages, strict=True)
        ]
        if settings.updates_per_batch > 1:
            examples = with_reference(examples, learner)
        updates = [Update({"policy/groups_without_signal": _share_of_equal_groups(groups)})]
        for part in split_by_group(choose_rows(examples, advantage=True), settings.updates_per_batch):
            adds = [not e.left_out for e in part]  # the others are in the mean, too
            weights = weighting.token_average(token_counts(part), adds, average=settings.average, denominator="all")
            updates.append(learner.update("policy", with_loss_weights(part, policy=weights), {"policy": self._loss}))
        return combine(updates)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def _loss(self, scorer: Scorer, batch: Batch) -> TokenLoss:
        """PPO's clipped surrogate of each token [B,T]."""
        from vpd.losses import clipped_policy_gradient

        logprobs_BT = scorer.logprobs("student")
        reference_BT = batch.reference_or(logprobs_BT)
        ratio_BT = (logprobs_BT.detach() - reference_BT).exp()
        outside_BT = (ratio_BT < 1 - self.settings.clip_low) | (ratio_BT > 1 + self.settings.clip_high)
        return TokenLoss(
            clipped_policy_gradient(
                logprobs_BT,
                reference_BT,
                batch.advantage_B,
                clip_low=self.settings.clip_low,
                clip_high=self.settings.clip_high,
            ),
            signals={
                "entropy": scorer.entropy("student"),
                "importance_ratio": ratio_BT,
                "clip_ratio": outside_BT.to(ratio_BT.dtype),
                "sampling_logp_difference": (reference_BT - batch.behaviour_BT).abs(),
                **mismatch(self.settings.importance_reference, logprobs_BT, batch),
            },
        )


def group_advantages(groups: Sequence[Group], scale: Scale = "group") -> list[float]:
    """A = (r - group mean) / (std + 1e-4) of every rollout, in order (GRPO, arXiv 2402.03300, section 4.1.2).

    ``scale``: std is the group's, the batch's (both Bessel-corrected), or 1 without the 1e-4 (``none``).  The
    advantages of a group sum to 0; a group of equal rewards gives zeros.  An attempt that nobody graded has advantage
    0 and counts nowhere.
    """
    all_rewards = [reward for group in groups for reward in _rewards(group)]
    advantages = []
    for group in groups:
        rewards = _rewards(group)
        if not rewards:
            advantages += [0.0] * len(group.rollouts)
            continue
        mean = statistics.fmean(rewards)
        scaled_by = {"group": rewards, "batch": all_rewards, "none": []}[scale]
        divisor = 1.0 if scale == "none" else (statistics.stdev(scaled_by) if len(scaled_by) > 1 else 0.0) + 1e-4
        equal = min(rewards) == max(rewards)
        advantages += [
            0.0 if equal or not r.grade.graded else (r.grade.reward - mean) / divisor for r in group.rollouts
        ]
    return advantages


def _rewards(group: Group) -> list[float]:
    return [rollout.grade.reward for rollout in group.rollouts if rollout.grade.graded]


def _share_of_equal_groups(groups: Sequence[Group]) -> float:
    """Share of groups whose rewards are all equal: their advantages are 0."""
    equal = sum(len(set(_rewards(group))) <= 1 for group in groups)
    return equal / len(groups)
