"""From groups to examples: the one place where a rollout becomes a row of an update."""

import dataclasses
import itertools
from collections.abc import Sequence

from torch import Tensor

from vpd.learners import Learner
from vpd.model.batch import Batch
from vpd.model.scorer import Scorer
from vpd.types import Example, Group, Metrics

PROBE = 16  # one row in so many is scored to see whether the sampler's log-probs are the learner's
AGREES = 1e-3  # largest difference, in nats, of any token of those rows at which they are


def to_examples(groups: Sequence[Group]) -> list[Example]:
    """Every rollout as an example without weights, in order."""
    return [
        Example(
            prompt=rollout.prompt,
            completion=rollout.completion.tokens,
            mask=rollout.completion.sampled,
            behaviour=rollout.completion.logprobs,
            teacher=None if rollout.teacher_prompt is None else rollout.teacher_prompt.tokens,
            success=rollout.success,
            group=number,
            version=rollout.completion.version,
        )
        for number, group in enumerate(groups)
        for rollout in group.rollouts
    ]


def token_counts(examples: Sequence[Example]) -> list[int]:
    """Masked tokens of each row."""
    return [sum(example.mask) for example in examples]


def with_loss_weights(examples: Sequence[Example], **weights: Sequence[float]) -> list[Example]:
    """The examples with one weight for each named term."""
    return [
        dataclasses.replace(example, loss_weights={term: values[i] for term, values in weights.items()})
        for i, example in enumerate(examples)
    ]


def with_reference(examples: Sequence[Example], learner: Learner) -> list[Example]:
    """The examples with logp_S0: the learner's own log-probs of their tokens at this moment, whoever sampled them."""
    scores = learner.score(examples, student_logprobs)
    return [dataclasses.replace(e, reference=tuple(s)) for e, s in zip(examples, scores, strict=True)]


def reference_logprobs(examples: Sequence[Example], learner: Learner) -> tuple[list[Sequence[float]], Metrics]:
    """logp_S0 of every example that one engine sampled, and how it was come by.

    The sampler's own log-probs are taken where it shares the learner's weights and precision, which a few rows that
    are scored for comparison tell; where one of their tokens differs, all rows are scored.
    """
    probe = examples[::PROBE]
    apart = max(
        (
            abs(score - sampled)
            for example, scores in zip(probe, learner.score(probe, student_logprobs), strict=True)
            for score, sampled, counts in zip(scores, example.behaviour, example.mask, strict=True)
            if counts
        ),
        default=0.0,
    )
    if apart <= AGREES:
        return [e.behaviour for e in examples], {"sampler_logp_difference": apart, "rows_scored": float(len(probe))}
    metrics = {"sampler_logp_difference": apart, "rows_scored": float(len(probe) + len(examples))}
    return list(learner.score(examples, student_logprobs)), metrics


def split_by_group(groups: Sequence[Group], count: int) -> list[Sequence[Group]]:
    """The batch in ``count`` parts of whole groups (fewer if there are fewer groups)."""
    count = min(count, len(groups))
    edges = [len(groups) * i // count for i in range(count + 1)]
    return [groups[low:high] for low, high in itertools.pairwise(edges)]


def student_logprobs(scorer: Scorer, batch: Batch) -> Tensor:
    """Measure: log pi(y|x) of each token [B,T]."""
    return scorer.logprobs("student")


def teacher_logprobs(scorer: Scorer, batch: Batch) -> Tensor:
    """Measure: log q(y|x,C) of each token [B,T]."""
    return scorer.logprobs("teacher")
