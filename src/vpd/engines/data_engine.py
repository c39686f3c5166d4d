"""Answers that the data gives in place of a model's: the supervised share of GKD's prompts."""

from collections.abc import Callable, Sequence
from typing import Any

from vpd.engines import limits_of, unsampled
from vpd.policy import Policy
from vpd.types import Completion, SampleKey, Tokens


class DataEngine:
    """Every attempt at a task is the data's answer to it, cut where it is longer than what may be sampled.

    ``answer(key)`` is its text, ``encode`` makes tokens of it, the end of the turn included.
    """

    def __init__(self, answer: Callable[[SampleKey], str], encode: Callable[[str], Tokens]):
        self._answer = answer
        self._encode = encode

    def load(self, policy: Policy) -> None:
        """Nothing: no weights answer."""

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        keys: Sequence[SampleKey],
        seed: int,
        max_tokens: int | Sequence[int],
        **sampling: Any,
    ) -> list[Completion]:
        limits = limits_of(max_tokens, len(prompts))
        return [self._complete(key, limit) for key, limit in zip(keys, limits, strict=True)]

    def _complete(self, key: SampleKey, limit: int) -> Completion:
        text = self._answer(key)
        return unsampled(text, self._encode(text), limit, by_data=True)
