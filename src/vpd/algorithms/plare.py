"""PLARE (arXiv 2507.23391): learn from a judge's preferences between attempts, without a reward model.

A judge (the feedback source ``judge``) says which of two attempts at a task is better.  The policy learns from it by
contrastive preference learning (arXiv 2310.13639): the advantage of an attempt is its own log-probability,

    A(y) = alpha sum_t log pi(y_t|x,y_<t)        L = - mean over pairs of log sigma(A(y+) - b A(y-))

Pairs that the judge does not decide are dropped.  The loss of a pair is no sum over rows, so the advantages of all rows
are measured first (:class:`vpd.learners.MeasuredLoss`); each row's loss is then linear in its own advantage, with the
derivative of the sum of its pairs' losses as coefficient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt

from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.examples import choose_rows, to_examples, with_loss_weights
from vpd.learners import Learner, Loss, TokenLoss, Update, combine
from vpd.prompts import Prompter
from vpd.settings import Settings, Share
from vpd.types import Example, Group, SampleKey

if TYPE_CHECKING:
    from torch import Tensor

    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class PLARESettings(Settings, section="algorithm"):
    """PLARE: a judge's preferences between attempts (feedback source judge), learned without a reward model."""

    name: Literal["plare"] = "plare"
    preference_alpha: Annotated[float, Gt(0), "alpha: an attempt's advantage is this times its log-probability"] = 0.1
    preference_bias: Annotated[
        float,
        Share,
        "b: share of the worse attempt's advantage that counts; below 1 making both unlikely is no way out",
    ] = 0.5

    @property
    def needs(self) -> Needs:
        return Needs(group=True, preferences=True)

    def build(self, prompter: Prompter) -> Algorithm:
        return PLARE(self)


@dataclass(frozen=True)
class Pair:
    """Two attempts, of which a judge prefers the first."""

    better: SampleKey
    worse: SampleKey


class PLARE:
    """``update("preference")`` on the pairs that the judge decided; no step where there is none."""

    def __init__(self, settings: PLARESettings):
        self.settings = settings

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: one update."""
        pairs = decided_pairs(groups)
        compared = {key for pair in pairs for key in (pair.better, pair.worse)}
        examples = [dataclasses.replace(e, teacher=None) for e in to_examples(groups)]  # feedback is not read
        rows = choose_rows(examples, compared=compared)
        weights = weighting.pair_mean([not e.left_out for e in rows], len(pairs)) if pairs else [0.0] * len(rows)
        objective = ContrastivePreference(self.settings, pairs)
        update = learner.update("preference", with_loss_weights(rows, preference=weights), {"preference": objective})
        advantages = {
            e.key: value
            for e, value in zip(rows, update.values.get("preference", ()), strict=False)
            if value is not None
        }
        return combine([update, Update(self._metrics(pairs, advantages))])

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def _metrics(self, pairs: Sequence[Pair], advantages: Mapping[SampleKey | None, float]) -> dict[str, float]:
        """How the policy before this update ranks the pairs; the pairs alone where there is none."""
        found = {"preference/pairs": float(len(pairs))}
        if pairs:
            both = [(advantages[pair.better], advantages[pair.worse]) for pair in pairs]
            found["preference/accuracy"] = sum(better > worse for better, worse in both) / len(both)
            margins = [better - self.settings.preference_bias * worse for better, worse in both]
            found["preference/margin"] = sum(margins) / len(both)
        return found


def decided_pairs(groups: Sequence[Group]) -> list[Pair]:
    """The pairs of attempts of which a judge prefers one; without those of which one has no token."""
    pairs = []
    for group in groups:
        for rollout in group.rollouts:
            for comparison in rollout.comparisons:
                other = group.rollouts[comparison.other]
                spoken = any(rollout.completion.sampled) and any(other.completion.sampled)
                if comparison.preferred is not None and spoken:
                    first, second = (rollout.key, other.key) if comparison.preferred else (other.key, rollout.key)
                    pairs.append(Pair(better=first, worse=second))
    return pairs


@dataclass(frozen=True)
class ContrastivePreference:
    """The loss of all pairs, as a loss of each row."""

    settings: PLARESettings
    pairs: Sequence[Pair]

    def measure(self, scorer: Scorer, batch: Batch) -> Tensor:
        """A of each row [B]."""
        return advantage(self.settings, scorer, batch)

    def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
        """The rows' losses, now that all advantages are known: they add up to the pairs', and so do their gradients."""
        import torch

        from vpd import losses

        row_of = {example.key: row for row, example in enumerate(examples)}
        better_P, worse_P = (
            torch.tensor([row_of[key] for key in keys])
            for keys in zip(*((pair.better, pair.worse) for pair in self.pairs), strict=True)
        )
        with torch.enable_grad():
            advantage_R = torch.tensor(values, dtype=torch.float64, requires_grad=True)
            loss_P = losses.contrastive_preference(
                advantage_R[better_P], advantage_R[worse_P], bias=self.settings.preference_bias
            )
            (slope_R,) = torch.autograd.grad(loss_P.sum(), advantage_R)
        loss_R = torch.zeros_like(slope_R)
        for rows_P in (better_P, worse_P):
            loss_R.index_add_(0, rows_P, loss_P.detach() / 2)
        known = zip(loss_R.tolist(), slope_R.tolist(), strict=True)
        return _Linear(self.settings, {example.key: one for example, one in zip(examples, known, strict=True)})


@dataclass(frozen=True)
class _Linear:
    """A loss of each row with a known value and a known derivative in its advantage."""

    settings: PLARESettings
    known: Mapping[SampleKey | None, tuple[float, float]]

    def __call__(self, scorer: Scorer, batch: Batch) -> TokenLoss:
        advantage_B = advantage(self.settings, scorer, batch)
        known = [self.known[example.key] for example in batch.examples]
        loss_B, slope_B = (advantage_B.new_tensor(column) for column in zip(*known, strict=True))
        value_B = loss_B + slope_B * (advantage_B - advantage_B.detach())
        return TokenLoss(value_B, signals={"entropy": scorer.entropy("student")})


def advantage(settings: PLARESettings, scorer: Scorer, batch: Batch) -> Tensor:
    """A = alpha sum_t log pi of each row's sampled tokens [B]."""
    logprobs_BT = scorer.logprobs("student")
    return settings.preference_alpha * logprobs_BT.masked_fill(~batch.mask_BT, 0.0).sum(-1)
