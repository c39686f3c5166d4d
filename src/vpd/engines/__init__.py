"""Engines turn prompts into completions.  The default samples on the learner's own model."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from vpd.types import Completion, Tokens


class Engine(Protocol):
    """Samples completions with the weights that were loaded last."""

    def load(self, weights: Any, version: int) -> None:
        """Take new weights (``Learner.weights()``); ``version`` is stamped on what they sample."""
        ...

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        seeds: Sequence[int],
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order.  ``seeds[i]`` alone fixes the randomness of row i.

        ``max_tokens`` is one bound for all rows or one for each.
        """
        ...


def stream_seed(*parts: int | str) -> int:
    """A 64-bit seed that is a pure function of its parts, e.g. ``stream_seed(seed, "train", step, row)``."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def limits_of(max_tokens: int | Sequence[int], rows: int) -> list[int]:
    """``max_tokens`` as one bound for each row."""
    return [max_tokens] * rows if isinstance(max_tokens, int) else list(max_tokens)


class ScriptedEngine:
    """A fake for tests and dry runs: answers from a list of texts, in turn, with log-prob 0 everywhere.

    ``tokenizer`` needs only ``encode``; ``version`` and ``asked`` (prompts so far) are there to look at.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.version = -1
        self.asked: list[Tokens] = []

    def load(self, weights: Any, version: int) -> None:
        self.version = version

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        seeds: Sequence[int],
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        completions = []
        for prompt, limit in zip(prompts, limits_of(max_tokens, len(prompts)), strict=True):
            text = self.texts[len(self.asked) % len(self.texts)]
            self.asked.append(tuple(prompt))
            tokens = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            completions.append(
                Completion(
                    tokens=tokens[:limit],
                    sampled=(True,) * len(tokens[:limit]),
                    logprobs=(0.0,) * len(tokens[:limit]),
                    text=text,
                    finish="stop" if len(tokens) <= limit else "length",
                    version=self.version,
                )
            )
        return completions
