"""Recorded answers under a method that learns from the student's own samples: log-probs for the ratio, and how far off.

    w_t = min(pi(y_t|x,y_<t) / pi_0(y_t|x,y_<t), c)     pi_0: the log-probs at the time, else the initial weights'

The method multiplies by w_t itself (``importance_reference: sampler``, ``importance_clip`` c).  Here every recorded row
gets log pi_0, and before the method learns anything the batch is measured:

* ``recorded/staleness``: the mean over tokens of abs(log pi - log pi_0), in nats;
* ``recorded/effective_tokens`` and ``recorded/effective_answers``: the effective sample size of the untruncated ratios
  of tokens and of whole answers, as a share of their number (1: all count alike).

Rows that nobody graded have no part in an E-step, in evidence and in advantages: the M-step alone learns from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vpd.algorithms import Algorithm
from vpd.algorithms.examples import student_logprobs, to_examples
from vpd.learners import Learner, Update, combine
from vpd.types import Example, Floats, Group, Metrics, Rollout, SampleKey


class OffPolicy:
    """A method, with what recorded rows need; without any such row it is the method alone."""

    def __init__(self, method: Algorithm):
        self._method = method

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration of the method on groups whose rows all have log-probs."""
        recorded = _recorded(groups)
        rows = [row for row in to_examples(groups) if row.key in recorded]
        if not rows:
            return self._method.step(groups, learner)
        before = _logprobs_then(rows, learner)
        metrics = staleness(rows, before, learner.score(rows, student_logprobs))
        known = {row.key: logprobs for row, logprobs in zip(rows, before, strict=True) if row.key is not None}
        return combine([self._method.step(_with_logprobs(groups, known), learner), Update(metrics)])

    def state(self) -> dict[str, Any]:
        return self._method.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._method.restore(state)


def staleness(rows: Sequence[Example], before: Sequence[Floats], now: Sequence[Sequence[float]]) -> Metrics:
    """How far the student has moved from the log-probs ``before`` of each row's tokens, given those of ``now``."""
    import torch

    from vpd.losses import effective_share

    ratios = [
        [new - old for new, old, counts in zip(new_T, old_T, row.mask, strict=True) if counts]
        for row, old_T, new_T in zip(rows, before, now, strict=True)
    ]
    tokens = torch.tensor([ratio for row in ratios for ratio in row], dtype=torch.float64)
    if not len(tokens):
        return {}
    answers = torch.tensor([sum(row) for row in ratios if row], dtype=torch.float64)
    return {
        "recorded/staleness": float(tokens.abs().mean()),
        "recorded/effective_tokens": float(effective_share(tokens)),
        "recorded/effective_answers": float(effective_share(answers)),
    }


def _recorded(groups: Sequence[Group]) -> set[SampleKey | None]:
    return {rollout.key for group in groups for rollout in group.rollouts if rollout.completion.recorded}


def _logprobs_then(rows: Sequence[Example], learner: Learner) -> list[Floats]:
    """log pi_0 of each row: as recorded, or the initial weights'."""
    unknown = [row for row in rows if not row.behaviour and row.completion]
    scores = iter(learner.score(unknown, student_logprobs, model="initial") if unknown else [])
    return [row.behaviour if row.behaviour or not row.completion else tuple(next(scores)) for row in rows]


def _with_logprobs(groups: Sequence[Group], known: Mapping[SampleKey, Floats]) -> list[Group]:
    def filled(rollout: Rollout) -> Rollout:
        if rollout.key not in known:
            return rollout
        completion = dataclasses.replace(rollout.completion, logprobs=known[rollout.key])
        return dataclasses.replace(rollout, completion=completion)

    return [Group(rollouts=tuple(map(filled, group.rollouts))) for group in groups]
