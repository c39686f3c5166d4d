"""Two engines for one stream of prompts: GKD's share of student-generated data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vpd.engines import Engine, limits_of
from vpd.types import Completion, Tokens


class MixedEngine:
    """Each distinct prompt goes to ``first`` with probability ``first_fraction``, else to ``second``.

    The choice is a pure function of the prompt's first seed.  New weights go to ``first`` alone.
    """

    def __init__(self, first: Engine, second: Engine, *, first_fraction: float):
        self.first = first
        self.second = second
        self.first_fraction = first_fraction

    def load(self, weights: Any, version: int) -> None:
        self.first.load(weights, version)

    def generate(
        self, prompts: Sequence[Tokens], *, seeds: Sequence[int], max_tokens: int | Sequence[int], **sampling: Any
    ) -> list[Completion]:
        limits = limits_of(max_tokens, len(prompts))
        owner: dict[Tokens, bool] = {}
        for prompt, seed in zip(prompts, seeds, strict=True):
            if prompt not in owner:
                owner[prompt] = bool(np.random.default_rng([seed, 1]).random() < self.first_fraction)
        answers: dict[int, Completion] = {}
        for engine, chosen in ((self.first, True), (self.second, False)):
            rows = [row for row, prompt in enumerate(prompts) if owner[prompt] is chosen]
            made = engine.generate(
                [prompts[row] for row in rows],
                seeds=[seeds[row] for row in rows],
                max_tokens=[limits[row] for row in rows],
                **sampling,
            )
            answers |= dict(zip(rows, made, strict=True))
        return [answers[row] for row in range(len(prompts))]
