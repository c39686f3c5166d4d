"""What student and teacher made of the tokens of a few rows, kept for a person to look at.

Before each update a few rows are scored, so that the record shows the weights that the update sees: those that the
E-step trains before it and after it, and the M-step's student and teacher with the teacher's likeliest tokens.  Nothing
is trained on these scores and no random number is drawn for them, so a run with a record is the run without.

A recorded row with a teacher costs two passes without gradient (one as the student, one as the teacher), and three more
in an iteration with an E-step; the metric ``time/record`` has the seconds.  A row without a teacher costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vpd.learners import Learner, Measure, ModelName
from vpd.types import Example, Floats, Group, Rollout, SampleKey, Tokens, attempts_and_retries

if TYPE_CHECKING:
    from torch import Tensor

    from vpd.learners.calls import Call
    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """How much is recorded of an iteration: so many ``rows``, and the teacher's ``top_k`` likeliest tokens in each."""

    rows: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """One row's tokens: natural logarithms [T], 0 where the environment wrote the token; empty where not scored.

    ``row`` counts the iteration's attempts and retries (:func:`vpd.types.attempts_and_retries`).  ``student`` and
    ``teacher`` are log pi(y|x) and log q(y|x,C) as the M-step sees them, ``top_ids``, ``top_teacher`` and
    ``top_student`` [T,K] the teacher's likeliest tokens with the log-probs of both.  ``student_before``,
    ``teacher_before`` and ``teacher_after`` are of the weights that the E-step trains, before and after it, with its
    context; a teacher that is a moving average follows them slowly.
    """

    row: int
    rollout: Rollout
    student: Floats = ()
    teacher: Floats = ()
    top_ids: tuple[Tokens, ...] = ()
    top_teacher: tuple[Floats, ...] = ()
    top_student: tuple[Floats, ...] = ()
    student_before: Floats = ()
    teacher_before: Floats = ()
    teacher_after: Floats = ()


class TokenRecorder:
    """Chooses rows of an iteration, and scores those with a teacher's prompt when updates reach them."""

    def __init__(self, groups: Sequence[Group], recording: Recording):
        self._top_k = recording.top_k
        self._chosen = choose(groups, recording.rows)
        self._found: dict[SampleKey, dict[str, Any]] = {rollout.key: {} for rollout in self._chosen.values()}
        self._e_rows: dict[SampleKey, Example] = {}  # as the E-step saw them

    def before(self, call: Call, learner: Learner) -> None:
        """Score the rows of a call of ``update`` that are chosen and not scored in its state yet."""
        rows = {
            e.key: e
            for e in reversed(call.examples)
            if e.key is not None and e.key in self._found and e.teacher_prompt is not None
        }
        if call.train == "teacher":
            new = {key: e for key, e in rows.items() if key not in self._e_rows}
            self._e_rows |= new
            self._keep(new, learner, ("student_before", "teacher_before"), both_logprobs)
            return
        after = {key: e for key, e in self._e_rows.items() if "teacher_after" not in self._found[key]}
        self._keep(after, learner, ("student", "teacher_after"), both_logprobs)
        new = {key: e for key, e in rows.items() if "teacher" not in self._found[key]}
        self._keep(new, learner, ("teacher", "top_ids", "top_teacher"), Likeliest(self._top_k), model="teacher")
        ids = {key: self._found[key]["top_ids"] for key in new}
        self._keep(new, learner, ("student", "top_student"), AtTokens(ids, self._top_k))

    def records(self) -> list[TokenRecord]:
        """The chosen rows, in order, with what is known of each."""
        return [
            TokenRecord(row=row, rollout=rollout, **self._found[rollout.key]) for row, rollout in self._chosen.items()
        ]

    def _keep(
        self,
        rows: Mapping[SampleKey, Example],
        learner: Learner,
        names: Sequence[str],
        measure: Measure,
        model: ModelName = "live",
    ) -> None:
        """Keep what ``measure`` gives of each row: one number for each token, and K for each name with ``top``."""
        if not rows:
            return
        widths = [self._top_k if name.startswith("top") else 1 for name in names]
        scores: Any = learner.score(list(rows.values()), measure, model=model)
        for key, values_TC in zip(rows, scores, strict=True):
            start = 0
            for name, width in zip(names, widths, strict=True):
                kind = int if name == "top_ids" else float
                parts = [tuple(map(kind, values[start : start + width])) for values in values_TC]
                self._found[key][name] = tuple(parts) if name.startswith("top") else tuple(part[0] for part in parts)
                start += width


def choose(groups: Sequence[Group], count: int) -> dict[int, Rollout]:
    """At most ``count`` rows of an iteration, by their place.

    In turn a failed attempt, a success and a retry with a teacher's prompt (retries that succeeded first: these are
    learned from); without such a success one to which an E-step may lend the context of a failure.  Others only where
    these run out.  Which of each kind depends on its sample key alone.
    """
    kinds: dict[tuple[int, int], list[tuple[int, Rollout]]] = {}
    for row, (number, role, rollout) in enumerate(attempts_and_retries(groups)):
        kinds.setdefault(_kind(role, rollout, groups[number]), []).append((row, rollout))

    def order(place: tuple[int, Rollout]) -> tuple[bool, int]:
        return not place[1].success, place[1].key.seed(0)

    queues = {kind: sorted(kinds[kind], key=order) for kind in sorted(kinds)}
    lent = queues.pop((1, 0), [])
    in_turn = [queue[turn] for turn in range(count) for kind, queue in queues.items() if not kind[0] and queue[turn:]]
    early = 0 if (0, 1) in queues else 1
    in_turn[1:1] = lent[:early]
    in_turn += lent[early:] + [place for kind, queue in queues.items() if kind[0] for place in queue]
    return dict(sorted(in_turn[:count], key=lambda place: place[0]))


def _kind(role: str, rollout: Rollout, group: Group) -> tuple[int, int]:
    """How late a row is chosen (0: in turn, 1: a success without a context beside failures with one, 2: at the end)."""
    if role == "teacher":
        return 0, 2
    if rollout.teacher_prompt is not None:
        return 0, int(rollout.success)
    beside = any(other.teacher_prompt is not None and not other.success for other in group.rollouts)
    return (1, 0) if rollout.success and beside else (2, int(rollout.success))


def both_logprobs(scorer: Scorer, batch: Batch) -> Tensor:
    """Measure: log-probs of each token as the student and as the teacher [B,T,2]."""
    import torch

    return torch.stack([scorer.logprobs("student"), scorer.logprobs("teacher")], -1)


@dataclass(frozen=True)
class Likeliest:
    """Measure [B,T,1+2K]: the teacher's log-prob of each token, its K likeliest tokens and their log-probs."""

    top_k: int

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        import torch

        def columns(logp_nV: Tensor, tokens_n: Tensor) -> Tensor:
            top = logp_nV.topk(min(self.top_k, logp_nV.shape[1]), dim=-1)
            missing = self.top_k - top.values.shape[1]  # of a vocabulary that is smaller than K
            ids_nK, values_nK = (torch.nn.functional.pad(of, (0, missing)) for of in (top.indices, top.values))
            return torch.cat([logp_nV.gather(1, tokens_n[:, None]), ids_nK.to(logp_nV), values_nK], 1)

        return scorer.of_tokens("teacher", columns)


@dataclass(frozen=True)
class AtTokens:
    """Measure [B,T,1+K]: the student's log-prob of each token, and of the K tokens ``ids`` [T,K] of its row."""

    ids: Mapping[SampleKey, tuple[Tokens, ...]]
    top_k: int

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        import torch

        ids_BTK = torch.zeros((*batch.mask_BT.shape, self.top_k), dtype=torch.long)
        for row, example in enumerate(batch.examples):
            if example.key is not None and self.top_k:
                ids_BTK[row, : len(example.completion)] = torch.tensor(self.ids[example.key])

        def columns(logp_nV: Tensor, tokens_n: Tensor, ids_nK: Tensor) -> Tensor:
            return logp_nV.gather(1, torch.cat([tokens_n[:, None], ids_nK], 1))

        return scorer.of_tokens("student", columns, ids_BTK.to(batch.tokens_BT.device))
