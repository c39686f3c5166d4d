"""From groups to examples: how a rollout becomes a row of an update."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from annotated_types import Ge

from vpd.learners import Learner, Loss, TokenLoss
from vpd.ranks import share_of
from vpd.types import Example, Floats, Group, Metrics, SampleKey

if TYPE_CHECKING:
    from torch import Tensor

    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer

#: Whose log-probs are log pi_0 of the importance ratio pi / pi_0: the learner's before the update, or the sampler's.
ImportanceReference: TypeAlias = Literal["own", "sampler"]
ReferenceSetting: TypeAlias = Annotated[
    ImportanceReference,
    "log pi_0 of the importance ratio: the learner's own, or the sampler's; engine vllm or rollout.overlap: sampler"
    " unless set",
]
UpdatesSetting: TypeAlias = Annotated[int, Ge(1), "optimiser steps per iteration; the batch is split by whole groups"]

PROBE = 16  # at least one row in so many is scored to see whether the sampler's log-probs are the learner's


def to_examples(groups: Sequence[Group], reference: ImportanceReference = "own") -> list[Example]:
    """Every rollout as an example without weights, in order.

    With ``reference="sampler"`` the ratio's denominator is the sampler's log-probs, so that stale rows and an engine of
    another precision are corrected (truncated importance sampling).  With ``"own"`` a row carries no reference yet:
    unless it is scored before the first update, it is its own reference and its ratio is exactly 1.
    """
    return [
        Example(
            prompt=rollout.prompt,
            completion=rollout.completion.tokens,
            mask=rollout.completion.sampled,
            behaviour=rollout.completion.logprobs,
            reference=rollout.completion.logprobs if reference == "sampler" else None,
            teacher=rollout.teacher_logprobs or (rollout.teacher_prompt.tokens if rollout.teacher_prompt else None),
            version=rollout.completion.version,
            by_teacher=rollout.completion.by_teacher,
            by_data=rollout.completion.by_data,
            success=rollout.success,
            group=number,
            key=rollout.key,
            failed_grade=rollout.grade.metrics.get("grader_failed", 0.0) > 0,
            graded=rollout.grade.graded,
        )
        for number, group in enumerate(groups)
        for rollout in group.rollouts
    ]


def choose_rows(
    examples: Sequence[Example],
    *,
    context: bool = False,
    advantage: bool = False,
    answers: bool = False,
    compared: Set[SampleKey | None] | None = None,
) -> list[Example]:
    """The examples with the reason, if there is one, why they take no part in an update (``Example.left_out``).

    This is the one place that decides it.  A row takes part if the model sampled a token in it and, where the method
    learns from a ``context``, it has a teacher, or, where it learns from an ``advantage``, its own is not 0, or, where
    it learns ``answers``, it is a success or nobody has graded it, or, where it learns from preferences, it is one of
    the rows ``compared``.  Reasons: ``no_tokens``; ``failed_grade`` (its grader failed, and nothing can be learned from
    it); ``no_context``; ``failure``; ``no_group`` (the only attempt at its task, so that its advantage is 0);
    ``no_outcome`` (nobody has graded it); ``zero_advantage``; ``no_preference`` (no judge preferred it or another to
    it).
    """
    sizes = Counter(example.group for example in examples)

    def reason(example: Example) -> str:
        if not any(example.mask):
            return "no_tokens"
        if compared is not None:
            return "" if example.key in compared else "no_preference"
        if (context and example.teacher is not None) or (advantage and example.advantage):
            return ""
        if answers and (example.success or not example.graded):
            return ""
        if example.failed_grade:
            return "failed_grade"
        if answers:
            return "failure"
        if not advantage:
            return "no_context"
        if not example.graded:
            return "no_outcome"
        return "no_group" if sizes[example.group] == 1 else "zero_advantage"

    return [dataclasses.replace(example, left_out=reason(example)) for example in examples]


def token_counts(examples: Sequence[Example]) -> list[int]:
    """Number of sampled tokens of each example, those that losses see."""
    return [sum(example.mask) for example in examples]


def with_loss_weights(examples: Sequence[Example], **weights: Sequence[float]) -> list[Example]:
    """The examples with ``loss_weights`` of the named terms; each sequence holds one weight per example."""
    return [
        dataclasses.replace(example, loss_weights={term: values[row] for term, values in weights.items()})
        for row, example in enumerate(examples)
    ]


def with_reference(
    examples: Sequence[Example], learner: Learner, wanted: Callable[[Example], bool] = lambda example: True
) -> list[Example]:
    """The wanted examples with the learner's own log-probs at this moment where they carry no reference yet."""
    missing = [row for row, example in enumerate(examples) if example.reference is None and wanted(example)]
    if not missing:
        return list(examples)
    scores = learner.score([examples[row] for row in missing], student_logprobs)
    references = {row: tuple(score) for row, score in zip(missing, scores, strict=True)}
    return [
        dataclasses.replace(example, reference=references[row]) if row in references else example
        for row, example in enumerate(examples)
    ]


def own_logprobs(examples: Sequence[Example], learner: Learner) -> tuple[list[Floats], Metrics]:
    """log pi, the learner's log-probs of every example now, before any update on them, and what was measured for it.

    The sampler's own log-probs are taken where it shares the learner's weights and precision: no row is of another
    version than the learner's, the rows of :func:`probe_rows` are scored, and no token of theirs may differ by more
    than ``Learner.logprob_tolerance``, nor all tokens by a tenth of it on average.  Else all rows are scored.  Of no
    examples nothing is measured.
    """
    if not examples:
        return [], {}
    probe = probe_rows(examples)
    scores = dict(zip(probe, learner.score([examples[row] for row in probe], student_logprobs), strict=True))
    differences = [
        abs(score - sampled)
        for row in probe
        for score, sampled, in_mask in zip(scores[row], examples[row].behaviour, examples[row].mask, strict=True)
        if in_mask
    ]
    largest = max(differences, default=0.0)
    metrics = {"sampler_logp_difference": largest, "rows_scored": float(len(probe))}
    tolerance = learner.logprob_tolerance
    stale = any(example.version != learner.version for example in examples)
    if not stale and largest <= tolerance and sum(differences) <= tolerance / 10 * len(differences):
        return [e.behaviour for e in examples], metrics
    others = [row for row in range(len(examples)) if row not in scores]
    scores |= zip(others, learner.score([examples[row] for row in others], student_logprobs), strict=True)
    return [tuple(scores[row]) for row in range(len(examples))], metrics | {"rows_scored": float(len(examples))}


def probe_rows(examples: Sequence[Example]) -> list[int]:
    """The rows that are compared in place of all: the longest, one of every group, and one in ``PROBE``.

    Each rank samples whole groups, so no rank's sampler goes unseen; the longest row crosses every window and range of
    positions that any row crosses.
    """
    groups: dict[int, list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(example.group, []).append(row)
    chosen = {rows[number % len(rows)] for number, rows in enumerate(groups.values())}
    longest = max(range(len(examples)), key=lambda row: len(examples[row].prompt) + len(examples[row].completion))
    return sorted(chosen | {longest, *range(0, len(examples), PROBE)})


def split_by_group(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """The batch in ``count`` parts of whole groups (fewer if there are fewer groups), in order."""
    groups = list(dict.fromkeys(example.group for example in examples))
    count = min(count, len(groups))
    part_of = {groups[i]: part for part in range(count) for i in share_of(part, count, len(groups))}
    parts: list[list[Example]] = [[] for _ in range(count)]
    for example in examples:
        parts[part_of[example.group]].append(example)
    return parts


def mismatch(reference: ImportanceReference, own_BT: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The signal ``sampler_mismatch``, abs(log pi - log of the sampler), where pi_0 is the sampler itself; else none.

    It takes the place of ``sampling_logp_difference``, which compares the sampler with pi_0 and is then 0.
    """
    return {"sampler_mismatch": (own_BT.detach() - batch.behaviour_BT).abs()} if reference == "sampler" else {}


def cross_entropy(scorer: Scorer, batch: Batch) -> TokenLoss:
    """-log pi(y|x) of each token [B,T], and the signal ``entropy``."""
    return TokenLoss(-scorer.logprobs("student"), signals={"entropy": scorer.entropy("student")})


def forward_kl(scorer: Scorer, batch: Batch) -> TokenLoss:
    """KL(sg q || pi) of each token [B,T]; of a teacher known by its likeliest tokens on these, and the rest as one."""
    return TokenLoss(scorer.divergence(alpha=0.0, importance_clip=None).value)


def policy_gradient(clip: float | None) -> Loss:
    """-min(pi / pi_0, clip) A log pi of each token [B,T]; a row without a reference is its own pi_0."""

    def loss(scorer: Scorer, batch: Batch) -> TokenLoss:
        from vpd import losses

        student_BT = scorer.logprobs("student")
        ratio_BT = losses.importance_ratio(student_BT, batch.reference_or(student_BT), clip=clip)
        return TokenLoss(-ratio_BT * batch.advantage_B[:, None] * student_BT)

    return loss


def student_logprobs(scorer: Scorer, batch: Batch) -> Tensor:
    """Measure: log pi(y|x) of each token [B,T]."""
    return scorer.logprobs("student")


def teacher_logprobs(scorer: Scorer, batch: Batch) -> Tensor:
    """Measure: log q(y|x,C) of each token [B,T]."""
    return scorer.logprobs("teacher")
