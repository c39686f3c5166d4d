"""What the paper claims (arXiv 2605.15113), and what we add, each with a comparison of runs that can decide it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vpd.lab.reproduce.run import Run, measure

Verdict: TypeAlias = Literal["holds", "does not hold", "undecided", "not run"]
Suite: TypeAlias = Literal["quick", "default", "all"]
Runs: TypeAlias = Mapping[tuple[str, str], Mapping[int, Run]]  # (regime, method) -> seed -> run

SMALLEST = 0.02  # the least difference in accuracy that counts as one
NEGLIGIBLE = 0.03  # a difference that is surely smaller than this is none
WIDE = 0.1  # what a difference must reach where there is one seed
NOT_WORSE = 0.05  # how far below the best still counts as not worse
RULE = f"""\
A comparison is a list of differences, one for each seed: two methods from the same base on the same tasks, or a method
and a bound. It **holds** if the mean is positive, larger than two standard errors and than {SMALLEST}, and every seed
agrees in sign; it **does not hold** if the same is true of the negative mean, or if mean plus two standard errors is
below {NEGLIGIBLE} (there is no difference to speak of); else it is **undecided**. With one seed a difference must reach
{WIDE}; where the bound itself allows a margin (*not worse*, the drift) the sign decides. A claim of several comparisons
holds if all of them do, and does not if one does not. *Not worse* means: not more than {NOT_WORSE} below the best of
the others, by the same rule; the difference is shown without that margin."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``measure`` of ``left`` against another method's, a bound, or the best of several methods (``not worse``).

    ``least``: the smallest difference that counts.  ``sign`` -1: the difference is to be negative.
    """

    measure: str
    left: str
    right: str | float | tuple[str, ...]
    less: str = ""  # a measure of the left side that is taken off it first, e.g. what it started with
    sign: int = 1
    least: float = SMALLEST

    @property
    def allowed(self) -> float:
        """How far below the other side still supports the claim."""
        return NOT_WORSE if isinstance(self.right, tuple) else 0.0

    def methods(self) -> tuple[str, ...]:
        """Everyone who must have run."""
        others = (self.right,) if isinstance(self.right, str) else self.right
        return (self.left, *(others if isinstance(others, tuple) else ()))

    def differences(self, runs: Mapping[str, Mapping[int, Run]]) -> list[float]:
        """One number for each seed that all sides have; the sign is such that positive, or above minus
        :attr:`allowed`, supports the claim."""
        sides = [runs.get(name, {}) for name in self.methods()]
        seeds = sorted(set.intersection(*(set(side) for side in sides)))
        if isinstance(self.right, tuple):
            rivals = [name for name in self.right if seeds]
            best = max(rivals, key=lambda n: statistics.fmean(self._value(runs[n][s]) for s in seeds), default="")
            return [self._value(runs[self.left][s]) - self._value(runs[best][s]) for s in seeds]
        found = []
        for seed in seeds:
            value = self._value(runs[self.left][seed])
            other = self.right if isinstance(self.right, float) else self._value(runs[self.right][seed])
            found.append(self.sign * (value - other))
        return found

    def _value(self, run: Run) -> float:
        value = measure(run, self.measure)
        start = measure(run, self.less) if self.less else 0.0
        if value is None or start is None:
            raise ValueError(f"a run of {run['job']['method']} has no {self.measure}")
        return value - start

    def text(self) -> str:
        """In words."""
        if isinstance(self.right, tuple):
            return f"{self.measure} of {self.left} not worse than the best of {', '.join(self.right)}"
        what = f"{self.measure} less {self.less}" if self.less else self.measure
        relation = "above" if self.sign > 0 else "below"
        return f"{what} of {self.left} {relation} {self.right if isinstance(self.right, str) else f'{self.right:g}'}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, where it comes from, and the comparisons that decide it in one regime.

    ``suite``: the smallest suite that tests it.  ``main``: gets all the seeds asked for, others at most three.
    """

    name: str
    regime: str
    statement: str
    source: str
    comparisons: tuple[Comparison, ...]
    suite: Suite = "default"
    main: bool = False

    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for c in self.comparisons for name in c.methods()))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the numbers say about a claim."""

    claim: Claim
    numbers: tuple[Mapping[str, Any], ...]
    verdict: Verdict


def decide(differences: Sequence[float], least: float = SMALLEST) -> Verdict:
    """The rule (:data:`RULE`) on one comparison."""
    if not differences:
        return "not run"
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        wide = WIDE if least else 0.0
        return "undecided" if abs(mean) <= wide else "holds" if mean > 0 else "does not hold"
    error = standard_error(differences)
    agree = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    if agree and abs(mean) > 2 * error and abs(mean) >= least:
        return "holds" if mean > 0 else "does not hold"
    if least and mean + 2 * error < NEGLIGIBLE:
        return "does not hold"
    return "undecided"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def difference_text(mean: float | None, error: float | None, n: int) -> str:
    """A difference as people read it; one seed has no standard error."""
    if mean is None:
        return "-"
    return f"{mean:+.3f}" if n < 2 else f"{mean:+.3f} ± {error:.3f}"


def judge(claim: Claim, runs: Runs) -> Finding:
    """The verdict on a claim, with the numbers that lead to it."""
    here = {who: seeds for (where, who), seeds in runs.items() if where == claim.regime}
    numbers, verdicts = [], []
    for comparison in claim.comparisons:
        differences = comparison.differences(here)
        verdicts.append(decide([d + comparison.allowed for d in differences], comparison.least))
        numbers.append(
            {
                "comparison": comparison.text(),
                "mean": statistics.fmean(differences) if differences else None,
                "standard_error": standard_error(differences) if differences else None,
                "n": len(differences),
                "differences": [round(d, 4) for d in differences],
                "verdict": verdicts[-1],
            }
        )
    return Finding(claim=claim, numbers=tuple(numbers), verdict=together(verdicts))


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """All must hold; one that does not decides."""
    verdicts = list(verdicts)
    for verdict in ("not run", "does not hold", "undecided"):
        if verdict in verdicts:
            return verdict
    return "holds"
