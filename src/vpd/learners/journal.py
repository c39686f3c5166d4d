"""What an iteration asks of the learner: every row is accounted for, and the call that fails can be run again.

An algorithm is given a :class:`Journal` in the place of the learner: it passes every call on and keeps what came of
it.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpd.errors import NonFiniteError, TrainingError
from vpd.learners import Learner, Measure, ModelName, Objective, Update
from vpd.learners.around import LearnerAround
from vpd.learners.calls import Call, Result
from vpd.learners.token_records import TokenRecorder
from vpd.model.scorer import Role
from vpd.types import Example, Group, Metrics, Rollout, SampleKey


class Journal(LearnerAround):
    """A learner that keeps what it was asked; ``recorder`` scores the rows that a person may want to look at.

    Raises NonFiniteError for numbers of rows or scores that are not finite, and TrainingError where a row holds other
    tokens than its rollout.
    """

    def __init__(self, learner: Learner, groups: Sequence[Group], recorder: TokenRecorder | None = None):
        super().__init__(learner)
        self.results: list[Result] = []
        self.call: Call | None = None
        self.seconds_recording = 0.0
        self._recorder = recorder
        self._drawn = [rollout for group in groups for rollout in group.rollouts]
        self._rollouts = {rollout.key: rollout for rollout in self._drawn}
        self._trained: set[SampleKey] = set()
        self._left_out: dict[SampleKey, str] = {}

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        self._begin(Call(kind="score", name=model, examples=examples))
        scores = super().score(examples, measure, model=model)
        for example, values in zip(examples, scores, strict=True):
            bad = [value for value in _flat(values) if math.isnan(value) or value == math.inf]  # -inf: probability 0
            if bad:
                what = f"a log-prob of {example.name} under the {model} weights is not finite"
                raise NonFiniteError(what, got=max(bad, key=math.isnan), do=NO_STEP)
        self._end(scores)
        return scores

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        call = Call(kind="update", name=name, examples=examples, train=train, lr_scale=lr_scale)
        self._begin(call)
        self._record(call)
        update = super().update(name, examples, objectives, train=train, lr_scale=lr_scale)
        for example in examples:
            if example.key is not None and any(example.loss_weights.values()):
                self._trained.add(example.key)
            elif example.key is not None:
                self._left_out[example.key] = example.left_out or "no_weight"
        self._end(dataclasses.replace(update, tokens={}))
        return update

    def _record(self, call: Call) -> None:
        if self._recorder is not None:
            started = time.perf_counter()
            self._recorder.before(call, self._learner)
            self.seconds_recording += time.perf_counter() - started

    def account(self, drawn: int) -> Metrics:
        """``rows/drawn``, ``rows/trained``, and for each reason the rows that were left out for it.

        A row is trained if it had weight in an update; ``no_weight``: its weight was 0, and the method gives no other
        reason; ``unused``: the method passed it to no update.  Raises TrainingError unless they add up to ``drawn``,
        the rows that the source of rollouts set out to make.
        """
        fates = Counter(
            "trained" if rollout.key in self._trained else self._left_out.get(rollout.key, "unused")
            for rollout in self._drawn
        )
        if fates.total() != drawn:
            raise TrainingError(
                "rows were lost or doubled between drawing and training",
                got=f"{fates.total()} rows in the groups",
                expected=f"{drawn}, as many as were drawn",
                do="Look at the feedback sources: each must give back every rollout of every group.",
            )
        counts = {"drawn": drawn, "trained": fates.pop("trained", 0), **dict(sorted(fates.items()))}
        return {f"rows/{name}": float(count) for name, count in counts.items()}

    def _begin(self, call: Call) -> None:
        self.call = call
        for example in call.examples:
            _check_numbers(example)
            if example.key in self._rollouts and not example.of_environment:
                _check_tokens(example, self._rollouts[example.key])

    def _end(self, result: Result) -> None:
        self.results.append(result)
        self.call = None


def _flat(values: Sequence[Any]) -> Iterator[float]:
    """The numbers of a row's tokens: one each, or several."""
    for value in values:
        yield from value if isinstance(value, list) else (value,)


NO_STEP = "No step was taken on it."


def numbers_of(example: Example) -> dict[str, list[float]]:
    """The numbers of a row that an update reads, by name; of tokens only where the mask is True."""
    found = {"advantage": [example.advantage]}
    found |= {f"weight in {term}": [weight] for term, weight in example.loss_weights.items()}
    for name, values in (("sampler's log-prob", example.behaviour), ("reference log-prob", example.reference)):
        found[name] = [value for value, counts in zip(values or (), example.mask, strict=False) if counts]
    return found


def _check_numbers(example: Example) -> None:
    for name, values in numbers_of(example).items():
        if not all(map(math.isfinite, values)):
            bad = next(value for value in values if not math.isfinite(value))
            raise NonFiniteError(f"the {name} of {example.name} is not finite", got=bad, do=NO_STEP)


def _check_tokens(example: Example, rollout: Rollout) -> None:
    """A row's tokens are those that were sampled, and no token of an environment counts."""
    sampled = rollout.completion
    if example.completion is sampled.tokens and example.mask is sampled.sampled:
        return
    spoken = any(counts and not own for counts, own in zip(example.mask, sampled.sampled, strict=False))
    if example.completion != sampled.tokens or len(example.mask) != len(sampled.sampled) or spoken:
        raise TrainingError(
            f"{example.name} holds other tokens than its rollout",
            got=f"{len(example.completion)} tokens, {sum(example.mask)} of which count",
            expected=f"the {len(sampled.tokens)} tokens that were sampled, and no loss on the environment's",
            do="Make examples with vpd.algorithms.examples.to_examples.",
        )
