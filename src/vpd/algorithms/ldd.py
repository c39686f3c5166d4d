"""Language dynamics distillation (LDD, arXiv 2210.00066): learn to predict what the environment says, without outcomes.

    L = - mean_t log p(o_t | x, y, o_<t)     o: the environment's text on the attempt y at the task x

Task and attempt are read and not learned, and so is the template's header of the text.  A bare verdict ("right") would
be an outcome and is left out.  Of an attempt with several turns the environment's replies count too.  Transcripts are
recorded (``vpd collect``, ``env.name: recorded``) or sampled as the run goes; reward and success are never looked at.

The paper's second stage, an auxiliary term that ties the policy to the model that came of this, is the section
``dynamics`` (:mod:`vpd.algorithms.dynamics`) of the run that starts from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.examples import (
    UpdatesSetting,
    cross_entropy,
    split_by_group,
    to_examples,
    token_counts,
    with_loss_weights,
)
from vpd.learners import Learner, Update, combine
from vpd.prompts import Prompter
from vpd.settings import Settings
from vpd.types import Example, Group, Rollout, Tokens


@dataclass(frozen=True, kw_only=True)
class LDDSettings(Settings, section="algorithm"):
    """LDD: the model learns to predict the environment's text on an attempt; no outcome is looked at."""

    name: Literal["ldd"] = "ldd"
    average: weighting.AverageSetting = "token_mean"
    updates_per_batch: UpdatesSetting = 1

    @property
    def needs(self) -> Needs:
        return Needs(on_policy=False, learns_answers=False)

    def build(self, prompter: Prompter) -> Algorithm:
        return LDD(self, prompter)


class LDD:
    """Maximum likelihood on the environment's text, ``update("ldd")``."""

    def __init__(self, settings: LDDSettings, prompter: Prompter):
        self.settings = settings
        self._prompter = prompter

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: ``updates_per_batch`` updates."""
        rows = environment_examples(groups, self._prompter)
        updates = []
        for part in split_by_group(rows, self.settings.updates_per_batch):
            kept = [not row.left_out for row in part]
            weights = weighting.token_average(token_counts(part), kept, average=self.settings.average)
            updates.append(learner.update("ldd", with_loss_weights(part, ldd=weights), {"ldd": cross_entropy}))
        return combine(updates)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def environment_examples(groups: Sequence[Group], prompter: Prompter) -> list[Example]:
    """Every rollout as a row of which the environment's text alone counts, without weights.

    Its prompt is the student's, its completion the attempt and the text behind it.  A row on which the environment said
    nothing that it could learn is left out for ``no_feedback``, one whose text finds no room in the window for
    ``no_room``.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return [_row(example, rollout, prompter) for example, rollout in zip(to_examples(groups), rollouts, strict=True)]


def _row(example: Example, rollout: Rollout, prompter: Prompter) -> Example:
    words: Tokens = ()
    counts: tuple[bool, ...] = ()
    text, left_out = rollout.grade.feedback, "no_feedback"
    if text and rollout.grade.informative:
        words, counts = prompter.environment_text(text, rollout.prompt + rollout.completion.tokens)
        left_out = "no_room"
    mask = (*(not own for own in rollout.completion.sampled), *counts)
    completion = (*rollout.completion.tokens, *words)
    return dataclasses.replace(
        example,
        completion=completion,
        mask=mask,
        behaviour=(0.0,) * len(completion),
        reference=None,
        teacher=None,
        of_environment=True,
        left_out="" if any(mask) else left_out,
    )
