"""Evidence for or against the teacher: does it prefer the attempts that succeeded?

Tilting the student towards the teacher changes the reward at the rate Cov(r, log q/pi) =
p(1 - p)(E[log q/pi | success] - E[log q/pi | failure]).  The gate estimates the sign of that difference robustly, by
the AUC, the probability that a success of a group is preferred to one of its failures by log q/pi, ties one half.

``trust`` is Somers' D, 2 m - 1, clipped at 0, where m is a discounted, pooled Mann-Whitney estimate of the AUC.  Each
iteration adds the success-failure pairs of its mixed groups, scaled so that the mean group counts 1; old ones fade by
``memory``; a prior of ``pseudo_groups`` groups in favour of the teacher (AUC 1) lets feedback begin where nothing has
succeeded yet.  The standard error takes groups as clusters, so it holds the variance within and between groups.

Where the teacher retries what the student failed, there is a second kind of evidence: is a retry right where another
attempt of the student at the same task is wrong more often than the reverse (:func:`retry_evidence`)?  It begins before
the student's first success.  Derivations and biases: docs/gated.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vpd.types import Group, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Success-failure pairs of one batch in which the success is the one that the teacher prefers, or has made.

    ``wins`` (ties one half) and ``pairs`` count them in each group that has any; ``gap`` is the mean over these groups
    of E[log q/pi | success] - E[log q/pi | failure], 0 in evidence from retries.
    """

    wins: tuple[float, ...] = ()
    pairs: tuple[int, ...] = ()
    gap: float = 0.0

    @property
    def groups(self) -> int:
        """Number of mixed groups that were compared."""
        return len(self.pairs)

    @property
    def auc(self) -> float:
        """Pooled over all pairs; one half without any."""
        return sum(self.wins) / sum(self.pairs) if self.pairs else 0.5


class Gate:
    """Evidence of all batches so far, older batches discounted by ``memory`` each.

    Keeps the pairs won and all pairs, in units of a mean group's pairs, and their second moments for the standard
    error.
    """

    def __init__(self, *, memory: float, pseudo_groups: float):
        self._memory = memory
        self._pseudo = pseudo_groups
        self._won = self._all = 0.0
        self._won_won = self._won_all = self._all_all = 0.0

    @property
    def auc(self) -> float:
        """The estimate m, prior included; one half where there is neither evidence nor prior."""
        weight = self._pseudo + self._all
        return (self._pseudo + self._won) / weight if weight else 0.5

    @property
    def standard_error(self) -> float:
        """Of m, from the scatter of groups around it; 0 before any evidence, and while every group agrees with m."""
        m = self.auc
        scatter = self._won_won - 2.0 * m * self._won_all + m * m * self._all_all
        return math.sqrt(max(0.0, scatter)) / (self._pseudo + self._all) if self._all else 0.0

    @property
    def trust(self) -> float:
        """From 0 (no better than chance, or worse) to 1."""
        return max(0.0, 2.0 * self.auc - 1.0)

    def add(self, *kinds: Evidence) -> None:
        """Take in one batch, each kind of evidence in units of its own mean group.

        A batch without any pair is no evidence, and old evidence keeps its weight.
        """
        won: list[float] = []
        pairs: list[float] = []
        for evidence in kinds:
            if evidence.groups:
                unit = sum(evidence.pairs) / evidence.groups
                won += [w / unit for w in evidence.wins]
                pairs += [n / unit for n in evidence.pairs]
        if not pairs:
            return
        self._won = self._memory * self._won + sum(won)
        self._all = self._memory * self._all + sum(pairs)
        faded = self._memory**2
        self._won_won = faded * self._won_won + sum(w * w for w in won)
        self._won_all = faded * self._won_all + sum(w * n for w, n in zip(won, pairs, strict=True))
        self._all_all = faded * self._all_all + sum(n * n for n in pairs)

    def state(self) -> list[float]:
        return [self._won, self._all, self._won_won, self._won_all, self._all_all]

    def restore(self, state: Sequence[float]) -> None:
        self._won, self._all, self._won_won, self._won_all, self._all_all = state


def shared_context(groups: Sequence[Group]) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each mixed group that can be judged: the teacher's prompt of its first failure with one, and the
    rows whose text it quotes.

    Every row of the group is scored in this *one* context, so that C does not reveal the outcome; a row that is
    quoted would be preferred for that alone and is left out.
    """
    found = {}
    for number, group in enumerate(groups):
        failure = next((r for r in group.rollouts if is_failure(r) and r.teacher_prompt is not None), None)
        if failure is None or failure.teacher_prompt is None or not any(r.success for r in group.rollouts):
            continue
        quoted = tuple(s.quotes for s in failure.context if s.quotes is not None)
        found[number] = (failure.teacher_prompt.tokens, quoted)
    return found


def is_failure(rollout: Rollout) -> bool:
    """Whether somebody graded the attempt, and it failed."""
    return rollout.grade.graded and not rollout.success


def pair_evidence(preferences: Sequence[Sequence[tuple[float, bool]]]) -> Evidence:
    """Evidence from (log q/pi, success) of each group's rows; ties count one half, pairs never cross groups."""
    wins, pairs, gaps = [], [], []
    for group in preferences:
        successes = [log_ratio for log_ratio, success in group if success]
        failures = [log_ratio for log_ratio, success in group if not success]
        if not successes or not failures:
            continue
        pairs.append(len(successes) * len(failures))
        wins.append(sum((a > b) + 0.5 * (a == b) for a in successes for b in failures))
        gaps.append(sum(successes) / len(successes) - sum(failures) / len(failures))
    if not pairs:
        return Evidence()
    return Evidence(wins=tuple(wins), pairs=tuple(pairs), gap=sum(gaps) / len(gaps))


def retry_evidence(groups: Sequence[Group], counts: Callable[[Rollout, Rollout], bool]) -> Evidence:
    """Evidence from the teacher's retries: each is compared with the student's *other* attempts at the same task.

    A pair is one success and one failure, won where the retry is the success.  The attempt that the retry follows is
    left out, because it is known to have failed; then a context that says nothing wins half of the pairs, whatever the
    task's difficulty.  ``counts(attempt, retry)`` says which retries are compared.
    """
    wins, pairs = [], []
    for group in groups:
        outcomes = [
            retry.success
            for attempt in group.rollouts
            for retry in attempt.retries
            if counts(attempt, retry)
            for other in group.rollouts
            if other is not attempt and other.grade.graded and other.success != retry.success
        ]
        if outcomes:
            wins.append(float(sum(outcomes)))
            pairs.append(len(outcomes))
    return Evidence(wins=tuple(wins), pairs=tuple(pairs))
