"""All normalisation: one number for each row and term, decided from the whole global batch.

An objective returns sums over a row's tokens; these weights turn their weighted sum into the wanted mean.  n is the
number of rows that take part (``takes_part``), len_i the masked tokens of row i.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

Average: TypeAlias = Literal["seq_mean", "token_mean"]
Denominator: TypeAlias = Literal["active", "all"]


def token_average(
    lengths: Sequence[int],
    takes_part: Sequence[bool],
    *,
    average: Average = "seq_mean",
    denominator: Denominator = "active",
) -> list[float]:
    """Weights of token sums, 0 for rows that do not take part.

    ``seq_mean``: the mean over a row's tokens, then over rows, 1 / (n len_i).  ``token_mean``: the mean over all
    tokens, 1 / sum len.  ``denominator="all"`` counts every row in n and sum len, as SDPO's released code does.
    """
    counted = [
        bool(length) and (denominator == "all" or part) for length, part in zip(lengths, takes_part, strict=True)
    ]
    rows = sum(counted)
    tokens = sum(length for length, count in zip(lengths, counted, strict=True) if count)
    weights = []
    for length, part in zip(lengths, takes_part, strict=True):
        if not part or not length:
            weights.append(0.0)
        else:
            weights.append(1.0 / (rows * length) if average == "seq_mean" else 1.0 / tokens)
    return weights


def class_mean(successes: Sequence[bool]) -> list[float]:
    """Weights of per-row losses: 1 / n_success for successes, 1 / n_failure for failures."""
    wins = sum(successes)
    losses = len(successes) - wins
    return [1.0 / wins if success else 1.0 / losses for success in successes]
