"""All normalisation: one number for each row and term, decided from the whole global batch.

The learner sums an objective over each row's sampled tokens; these weights make the weighted sum over rows a mean.
n is the number of rows that take part (``takes_part``), len_i the number of sampled tokens of row i.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

Average: TypeAlias = Literal["seq_mean", "token_mean"]
AverageSetting: TypeAlias = Annotated[Average, "mean over tokens, or mean of sequence means"]
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

    >>> token_average([2, 4, 4], [True, True, False])
    [0.25, 0.125, 0.0]
    >>> token_average([2, 4, 4], [True, True, False], denominator="all", average="token_mean")
    [0.1, 0.1, 0.0]
    """
    counted = [
        bool(length) and (denominator == "all" or part) for length, part in zip(lengths, takes_part, strict=True)
    ]
    row_count = sum(counted)
    token_count = sum(length for length, count in zip(lengths, counted, strict=True) if count)
    weights = []
    for length, part in zip(lengths, takes_part, strict=True):
        if not part or not length:
            weights.append(0.0)
        else:
            weights.append(1.0 / (row_count * length) if average == "seq_mean" else 1.0 / token_count)
    return weights


def class_mean(successes: Sequence[bool]) -> list[float]:
    """Weights of per-row losses: 1 / n_success for successes, 1 / n_failure for failures (L_E's class means).

    >>> class_mean([True, False, False])
    [1.0, 0.5, 0.5]
    """
    success_count = sum(successes)
    failure_count = len(successes) - success_count
    return [1.0 / success_count if success else 1.0 / failure_count for success in successes]


def pair_mean(in_pair: Sequence[bool], pairs: int) -> list[float]:
    """Weights of rows whose losses add up to those of ``pairs`` pairs: 1 / pairs, 0 for rows that are in none.

    >>> pair_mean([True, True, False], 4)
    [0.25, 0.25, 0.0]
    """
    return [1.0 / pairs if compared else 0.0 for compared in in_pair]
