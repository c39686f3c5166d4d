"""Supervised fine-tuning on answers that succeeded, and on demonstrations: maximum likelihood, and nothing else.

    L = - mean_t log pi(y_t|x,y_<t)     over the rows that are right, or that nobody has graded (demonstrations)

On recorded answers (``env.name: recorded``) this is ``vpd sft``, a warm-up for any other method.  On fresh rollouts it
is rejection sampling: the student learns its own successes.  A retry that succeeded counts as one, under the student's
prompt x, unless it quotes its feedback.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.examples import (
    UpdatesSetting,
    choose_rows,
    cross_entropy,
    split_by_group,
    to_examples,
    token_counts,
    with_loss_weights,
)
from vpd.algorithms.retries import QuoteSetting, may_teach, to_retry_examples
from vpd.learners import Learner, Update, combine
from vpd.prompts import Prompter
from vpd.settings import Settings
from vpd.types import Example, Group


@dataclass(frozen=True, kw_only=True)
class SFTSettings(Settings, section="algorithm"):
    """Supervised fine-tuning: on demonstrations, or on the attempts and retries that succeeded (rejection sampling)."""

    name: Literal["sft"] = "sft"
    average: weighting.AverageSetting = "token_mean"
    updates_per_batch: UpdatesSetting = 1
    retry_max_quote: QuoteSetting = 8

    @property
    def needs(self) -> Needs:
        return Needs(learns_from_retries=True, on_policy=False)

    def build(self, prompter: Prompter) -> Algorithm:
        return SFT(self)


class SFT:
    """Maximum likelihood on answers, ``update("sft")``."""

    def __init__(self, settings: SFTSettings):
        self.settings = settings

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: ``updates_per_batch`` updates."""
        settings = self.settings
        rows = [dataclasses.replace(e, teacher=None) for e in to_examples(groups)]
        rows = choose_rows(rows, answers=True)
        retries = self._retries(groups)
        updates = []
        for part in split_by_group(rows, settings.updates_per_batch):
            own = {row.group for row in part}
            batch = [*part, *(row for row in retries if row.group in own)]
            weights = weighting.token_average(
                token_counts(batch), [not row.left_out for row in batch], average=settings.average
            )
            updates.append(learner.update("sft", with_loss_weights(batch, sft=weights), {"sft": cross_entropy}))
        return combine(updates)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def _retries(self, groups: Sequence[Group]) -> list[Example]:
        """The retries that succeeded, under the student's prompt, without those that quote their feedback."""
        most = self.settings.retry_max_quote
        teaches = [
            retry.success and may_teach(attempt, retry, most)
            for group in groups
            for attempt in group.rollouts
            for retry in attempt.retries
        ]
        rows = zip(to_retry_examples(groups), teaches, strict=True)
        return [dataclasses.replace(row, teacher=None) for row, kept in rows if kept]
