"""Two engines for the training tasks: GKD's share of student-generated data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vpd.engines import Engine, limits_of
from vpd.policy import Policy
from vpd.types import Completion, SampleKey, Tokens


class MixedEngine:
    """Each task goes to ``first`` with probability ``first_fraction``, else to ``second``, with all answers and turns.

    The choice is a pure function of the task's key and the seed.  New weights go to ``first`` alone; the second's
    never change, so its answers carry the step that asked for them as their version and are never stale; they are
    marked as the teacher's, unless they are the data's.  It answers training tasks only: evaluation and feedback are
    about one model, and any other phase raises ValueError.
    """

    def __init__(self, first: Engine, second: Engine, *, first_fraction: float):
        self.first = first
        self.second = second
        self.first_fraction = first_fraction

    def load(self, policy: Policy) -> None:
        self.first.load(policy)

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        keys: Sequence[SampleKey],
        seed: int,
        max_tokens: int | Sequence[int],
        **sampling: Any,
    ) -> list[Completion]:
        others = {key.phase for key in keys} - {"train"}
        if others:
            raise ValueError(f"a mixture of engines answers training tasks only; got {', '.join(sorted(others))}")
        limits = limits_of(max_tokens, len(prompts))
        goes_first = [self._goes_first(key, seed) for key in keys]
        answers: dict[int, Completion] = {}
        for engine, chosen in ((self.first, True), (self.second, False)):
            rows = [row for row, first in enumerate(goes_first) if first is chosen]
            if not rows:
                continue
            made = engine.generate(
                [prompts[row] for row in rows],
                keys=[keys[row] for row in rows],
                seed=seed,
                max_tokens=[limits[row] for row in rows],
                **sampling,
            )
            if not chosen:
                steps = [keys[row].step for row in rows]
                made = [
                    dataclasses.replace(completion, version=step, by_teacher=not completion.by_data)
                    for completion, step in zip(made, steps, strict=True)
                ]
            answers |= dict(zip(rows, made, strict=True))
        return [answers[row] for row in range(len(prompts))]

    def _goes_first(self, key: SampleKey, seed: int) -> bool:
        task = dataclasses.replace(key, sample=0, turn=0)
        return bool(np.random.default_rng([task.seed(seed), 1]).random() < self.first_fraction)
