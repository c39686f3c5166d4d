"""Claims of the paper (arXiv 2605.15113) and our own, each decided by comparisons of runs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vpd.lab.reproduce.run import Job, Run, measure

Verdict: TypeAlias = Literal["holds", "does not hold", "undecided", "not run"]
Suite: TypeAlias = Literal["quick", "default", "all", "retries", "pretrained", "warmups"]
Runs: TypeAlias = Mapping[tuple[str, str], Mapping[int, Run]]  # (setting, method) -> seed -> run

OURS = "ours"  # the source of a claim that is not the paper's
SMALLEST = 0.02  # the smallest difference in accuracy that counts
NEGLIGIBLE = 0.03  # mean + 2 standard errors below this: no difference
WIDE = 0.1  # the smallest difference that counts with a single seed
NOT_WORSE = 0.05  # this far below the best still counts as not worse
RULE = f"""\
A comparison gives one difference per seed, either between two methods (same base, same tasks) or between a method and a
fixed bound. It **holds** if the mean difference is positive, at least {SMALLEST} and more than two standard errors, and
has the same sign in every seed. It **does not hold** if the same is true with the opposite sign, or if the mean plus
two standard errors is below {NEGLIGIBLE} (no relevant difference). Otherwise it is **undecided**. With a single seed
the difference must exceed {WIDE}; for comparisons that already allow a margin (*not worse*, the drift) its sign
decides. A claim with several comparisons holds if all of them hold, and does not hold if one of them does not. *Not
worse* means: at most {NOT_WORSE} below the best of the other methods, by the same rule; the table shows the difference
without that margin."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """``measure`` of ``left`` against another method's, a bound, or the best of several methods (``not worse``).

    ``least``: the smallest difference that counts.  ``sign`` -1: the claim expects ``left`` to be smaller.
    """

    measure: str
    left: str
    right: str | float | tuple[str, ...]
    less: str = ""  # a measure of the left side that is subtracted from it first, e.g. its start
    sign: int = 1
    least: float = SMALLEST

    @property
    def allowed(self) -> float:
        """How far below the other side ``left`` may be and still support the claim."""
        return NOT_WORSE if isinstance(self.right, tuple) else 0.0

    def methods(self) -> tuple[str, ...]:
        """All methods that the comparison needs runs of."""
        others = (self.right,) if isinstance(self.right, str) else self.right
        return (self.left, *(others if isinstance(others, tuple) else ()))

    def differences(self, runs: Mapping[str, Mapping[int, Run]]) -> list[float]:
        """One difference per seed that all methods have; above minus :attr:`allowed` it supports the claim."""
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


def above(
    left: str, right: str | float, measure: str = "final", *, less: str = "", least: float = SMALLEST
) -> Comparison:
    """``left`` ends above another method or a bound."""
    return Comparison(measure=measure, left=left, right=right, less=less, least=least)


def below(left: str, bound: float, measure: str, *, less: str = "", least: float = SMALLEST) -> Comparison:
    """``left`` ends below a bound."""
    return Comparison(measure=measure, left=left, right=bound, sign=-1, less=less, least=least)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, its source, and the comparisons that decide it in one setting.

    ``suite``: the smallest suite that tests it (retries, pretrained, warmups: that one alone).  ``main``: tested on all
    requested seeds; others on at most three.
    """

    name: str
    setting: str
    statement: str
    source: str
    comparisons: tuple[Comparison, ...]
    suite: Suite = "default"
    main: bool = False

    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for c in self.comparisons for name in c.methods()))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim's verdict and the numbers behind it."""

    claim: Claim
    numbers: tuple[Mapping[str, Any], ...]
    verdict: Verdict


def decide(differences: Sequence[float], least: float = SMALLEST) -> Verdict:
    """The verdict on one comparison, by :data:`RULE`."""
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
    """Standard error of the mean; 0 for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def difference_text(mean: float | None, error: float | None, n: int) -> str:
    """A difference with its standard error, without it for a single seed."""
    if mean is None:
        return "-"
    return f"{mean:+.3f}" if n < 2 else f"{mean:+.3f} ± {error:.3f}"


def by_method(made: Mapping[Job, Run]) -> Runs:
    """Runs by setting and method, and then by seed."""
    runs: dict[tuple[str, str], dict[int, Run]] = {}
    for job, run in sorted(made.items()):
        runs.setdefault((job.setting, job.method), {})[job.seed] = run
    return runs


def judge(claim: Claim, runs: Runs) -> Finding:
    """The verdict on a claim, with the numbers that lead to it."""
    here = {method: seeds for (setting, method), seeds in runs.items() if setting == claim.setting}
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
    """The verdict on a claim, given its comparisons' verdicts."""
    verdicts = list(verdicts)
    for verdict in ("not run", "does not hold", "undecided"):
        if verdict in verdicts:
            return verdict
    return "holds"
