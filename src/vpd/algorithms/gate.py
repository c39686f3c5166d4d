"""Evidence for or against the teacher: does what it prefers agree with what succeeded?

Tilting the student towards the teacher changes the reward at the rate Cov(r, log q/pi) =
p(1 - p)(E[log q/pi | success] - E[log q/pi | failure]).  The gate watches a robust stand-in for that difference's sign:
the AUC, the probability that a success of a group is preferred to one of its failures by log q/pi, ties one half.

``trust`` is 2 m - 1 clipped at 0, where m is the posterior mean of the AUC after discounted evidence.  Each iteration
adds one observation per mixed group, old ones fade by ``memory``, and a prior of ``pseudo_groups`` groups in favour of
the teacher (AUC 1) lets feedback begin where nothing has succeeded yet.  In steady state with g mixed groups an
iteration, the prior weighs pseudo_groups / (pseudo_groups + g / (1 - memory)), and the standard error of m is about
sd(AUC of one group) sqrt((1 - memory) / ((1 + memory) g)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vpd.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one batch says: the pooled AUC over success-failure pairs, the difference of means, and mixed groups."""

    auc: float
    gap: float
    groups: int


class Gate:
    """The discounted evidence; its two numbers are all it remembers."""

    def __init__(self, *, memory: float, pseudo_groups: float):
        self._memory = memory
        self._pseudo = pseudo_groups
        self._sum = 0.0
        self._count = 0.0

    @property
    def trust(self) -> float:
        """From 0 (no better than chance, or worse) to 1."""
        mean = (self._pseudo + self._sum) / (self._pseudo + self._count) if self._pseudo + self._count else 0.5
        return max(0.0, 2.0 * mean - 1.0)

    def add(self, evidence: Evidence) -> None:
        """Take in one batch; a batch without a mixed group says nothing and nothing fades."""
        if evidence.groups:
            self._sum = self._memory * self._sum + evidence.auc * evidence.groups
            self._count = self._memory * self._count + evidence.groups

    def state(self) -> list[float]:
        return [self._sum, self._count]

    def restore(self, state: Sequence[float]) -> None:
        self._sum, self._count = state


def shared_context(groups: Sequence[Group]) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each mixed group that can be judged: the teacher's prompt of its first failure with one, and who is quoted.

    Every row of the group is scored in this *one* context, so that no verdict leaks; a row whose own text stands in
    it would be preferred for that alone and leaves the comparison.
    """
    found = {}
    for number, group in enumerate(groups):
        told = next((r for r in group.rollouts if not r.success and r.teacher is not None), None)
        if told is None or told.teacher is None or not any(r.success for r in group.rollouts):
            continue
        quoted = tuple(s.quotes for s in told.context if s.quotes is not None)
        found[number] = (told.teacher.tokens, quoted)
    return found


def weigh(preferences: Sequence[Sequence[tuple[float, bool]]]) -> Evidence:
    """Evidence from (log q/pi, success) of each mixed group's rows; ties count one half, pairs never cross groups."""
    wins, pairs, gaps, judged = 0.0, 0, [], 0
    for rows in preferences:
        up = [value for value, success in rows if success]
        down = [value for value, success in rows if not success]
        if not up or not down:
            continue
        judged += 1
        pairs += len(up) * len(down)
        wins += sum((a > b) + 0.5 * (a == b) for a in up for b in down)
        gaps.append(sum(up) / len(up) - sum(down) / len(down))
    if not judged:
        return Evidence(auc=0.5, gap=0.0, groups=0)
    return Evidence(auc=wins / pairs, gap=sum(gaps) / judged, groups=judged)
