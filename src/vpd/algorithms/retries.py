"""What is learned from retries: the teacher's own attempts at tasks that the student failed (``rollout.retries``).

The E-step's expectation is under the teacher q, and the paper takes the student's rollouts in its place.  Where the
student never succeeds these are of one class; the teacher's own attempts are samples of q itself, often of both classes
under one context.  A retry y ~ q(.|x,C) that succeeded is learned from under the *student's* prompt x, by one of

    cross_entropy    - mean_t log pi(y_t|x,y_<t)                       maximum likelihood on what succeeded
    forward_kl       mean_t KL( sg q(.|x,C,y_<t) || pi(.|x,y_<t) )     the teacher's whole distribution on it
    policy_gradient  - mean_t min(pi/q, c) A log pi                    A: of the group, attempts and retries together

Each has the weight ``retry_weight`` beside L_M, which has ``distillation_weight``: with 0 there this is
revise-and-imitate.  An E-step learns from the retries too, failures included (``e_step_rows``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Ge

from vpd.algorithms import weighting
from vpd.algorithms.examples import forward_kl, policy_gradient, token_counts, with_loss_weights
from vpd.algorithms.grpo import group_advantages
from vpd.learners import Learner, Loss, Objective, TokenLoss, Update
from vpd.quoting import feedback_quoted
from vpd.settings import Settings
from vpd.types import Example, Group, Metrics, Rollout

if TYPE_CHECKING:
    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer

RetryLoss: TypeAlias = Literal["none", "cross_entropy", "forward_kl", "policy_gradient"]
QuoteSetting: TypeAlias = Annotated[
    int | None,
    Ge(1),
    "a retry that repeats more words of its feedback in a row, beyond the task's own, is not learned from; null: any"
    " is",
]
_Retry: TypeAlias = tuple[int, Rollout, Rollout]  # the group's place, the failed attempt, the retry


@dataclass(frozen=True, kw_only=True)
class RetrySettings(Settings, section="algorithm"):
    """How the M-step learns from retries; without any (``rollout.retries: 0``) nothing here has an effect."""

    retry_loss: Annotated[
        RetryLoss,
        "what the student learns from retries: none; cross_entropy or forward_kl on those that succeed;"
        " policy_gradient on all",
    ] = "cross_entropy"
    retry_weight: Annotated[float, Ge(0), "weight of that loss beside the distillation's"] = 1.0
    retry_attempts: Annotated[
        bool, "cross_entropy: the student's own successes of a group with retries are learned from, too"
    ] = True
    retry_max_quote: QuoteSetting = 8


def to_retry_examples(groups: Sequence[Group]) -> list[Example]:
    """Every retry as an example without weights: the student's prompt, and the teacher's that it was sampled from.

    ``behaviour`` are log q, the log-probs that the teacher sampled it with.
    """
    return [_retry_example(number, attempt, retry) for number, attempt, retry in _retries(groups)]


def may_teach(attempt: Rollout, retry: Rollout, most: int | None) -> bool:
    """Whether a retry repeats at most ``most`` words in a row of the feedback on its attempt (None: any number)."""
    return most is None or feedback_quoted(attempt, retry) <= most


class Imitation:
    """The M-step's loss on retries, ``retry_loss``, and the rows that it is of."""

    def __init__(self, settings: RetrySettings, importance_clip: float | None):
        self.settings = settings
        self._clip = importance_clip

    def needs_references(self, groups: Sequence[Group]) -> bool:
        """Whether every attempt needs log pi_0, one without a context too: its ratio stands beside the retries'."""
        settings = self.settings
        return settings.retry_loss == "policy_gradient" and settings.retry_weight > 0 and bool(_retries(groups))

    def examples(self, groups: Sequence[Group], attempts: Sequence[Example]) -> list[Example]:
        """The rows that the loss is of, without weights; none without retries.

        ``attempts`` are the examples of the groups' rollouts, in order; an attempt keeps its reference, log pi_0.
        """
        settings = self.settings
        if settings.retry_loss == "none" or not settings.retry_weight:
            return []
        chosen = [row for row in _retries(groups) if self.may_teach(*row[1:])]
        if settings.retry_loss == "policy_gradient":
            return _with_advantages(groups, attempts, chosen)
        rows = [_retry_example(*row) for row in chosen if row[2].success]
        if settings.retry_attempts and settings.retry_loss == "cross_entropy":
            groups_with_retries = {number for number, _, _ in _retries(groups)}
            rows += [e for e in attempts if e.success and e.group in groups_with_retries]
        return rows

    def update(
        self,
        learner: Learner,
        rows: Sequence[Example],
        objectives: Mapping[str, Objective],
        retries: Sequence[Example],
        *,
        lr_scale: float = 1.0,
    ) -> Update:
        """The M-step on ``rows``, which have their weights, and on ``retries``: the mean over tokens, then over rows.

        The per-token signals are those of ``rows`` alone.
        """
        if not retries:
            return learner.update("m_step", rows, objectives, lr_scale=lr_scale)
        weights = weighting.token_average(token_counts(retries), [True] * len(retries))
        weighted = with_loss_weights(retries, retry=[self.settings.retry_weight * weight for weight in weights])
        together = {**objectives, "retry": self.loss}
        update = learner.update("m_step", [*rows, *weighted], together, lr_scale=lr_scale)
        return dataclasses.replace(update, tokens={name: kept[: len(rows)] for name, kept in update.tokens.items()})

    def metrics(self, groups: Sequence[Group]) -> Metrics:
        """How many retries succeeded but quote their feedback, so that they teach nothing; empty without retries."""
        rows = _retries(groups)
        left_out = sum(row[2].success and not self.may_teach(*row[1:]) for row in rows)
        return {"retries/left_out": float(left_out)} if rows else {}

    def may_teach(self, attempt: Rollout, retry: Rollout) -> bool:
        """Whether a retry does not quote its feedback at a length beyond ``retry_max_quote``."""
        return may_teach(attempt, retry, self.settings.retry_max_quote)

    @property
    def loss(self) -> Loss:
        """The loss of each token [B,T]."""
        match self.settings.retry_loss:
            case "forward_kl":
                return forward_kl
            case "policy_gradient":
                return policy_gradient(self._clip)  # pi_0 is who sampled the row
            case _:
                return _cross_entropy


def _cross_entropy(scorer: Scorer, batch: Batch) -> TokenLoss:
    """-log pi of each token [B,T]."""
    return TokenLoss(-scorer.logprobs("student"))


def _retries(groups: Sequence[Group]) -> list[_Retry]:
    return [
        (number, attempt, retry)
        for number, group in enumerate(groups)
        for attempt in group.rollouts
        for retry in attempt.retries
    ]


def _retry_example(number: int, attempt: Rollout, retry: Rollout) -> Example:
    return Example(
        prompt=attempt.prompt,
        completion=retry.completion.tokens,
        mask=retry.completion.sampled,
        behaviour=retry.completion.logprobs,
        teacher=retry.prompt,
        version=retry.completion.version,
        success=retry.success,
        group=number,
        key=retry.key,
    )


def _with_advantages(
    groups: Sequence[Group], attempts: Sequence[Example], may_teach: Sequence[_Retry]
) -> list[Example]:
    """Attempts and retries of the groups that have retries, each with its advantage in their common group."""
    rows: list[Example] = []
    for number, group in enumerate(groups):
        own = [row for row in may_teach if row[0] == number]
        if not own:
            continue
        retries = [dataclasses.replace(e, reference=e.behaviour) for e in (_retry_example(*r) for r in own)]
        both = [e for e in attempts if e.group == number] + retries
        together = Group(rollouts=group.rollouts + tuple(retry for _, _, retry in own))
        advantages = group_advantages([together])
        rows += [dataclasses.replace(e, teacher=None, advantage=a) for e, a in zip(both, advantages, strict=True)]
    return rows
