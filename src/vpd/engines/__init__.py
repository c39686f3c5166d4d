"""Engines turn prompts into completions.  The default samples on the learner's own model."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from vpd.errors import EngineError
from vpd.policy import Policy
from vpd.types import Completion, Metrics, SampleKey, Tokens


def require_completions(made: Any, count: int, engine: str) -> list[Completion]:
    """What an engine made, if it is a completion for each prompt.  Raises EngineError."""
    if not isinstance(made, Sequence) or len(made) != count or not all(isinstance(one, Completion) for one in made):
        got = f"{len(made)} of {type(made[0]).__name__}" if isinstance(made, Sequence) and made else type(made).__name__
        raise EngineError(f"{engine}.generate returned something else", got=got, expected=f"{count} of Completion")
    return list(made)


class Engine(Protocol):
    """Samples completions with the weights that were loaded last."""

    def load(self, policy: Policy) -> None:
        """Take new weights; ``policy.version`` is stamped on what they sample."""
        ...

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        keys: Sequence[SampleKey],
        seed: int,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order.

        ``keys[i]`` and the run's ``seed`` alone fix the randomness of row i: ``keys[i].seed(seed)``.  ``max_tokens`` is
        one bound for all rows or one for each.
        """
        ...


@runtime_checkable
class MeasuredEngine(Protocol):
    """An engine with numbers about how it was loaded; they are among the metrics of the steps that it samples for."""

    def metrics(self) -> Metrics:
        """By their names in ``metrics.jsonl``."""
        ...


@runtime_checkable
class Abandonable(Protocol):
    """Work in another thread that can be given up from this one.

    An engine that has this samples on weights of its own, so that it may generate in a thread while the learner trains
    (``rollout.overlap``).
    """

    def abandon(self) -> None:
        """End what is being done, which then raises a VPDError, as does whatever is asked for later."""
        ...


def limits_of(max_tokens: int | Sequence[int], rows: int) -> list[int]:
    """``max_tokens`` as one bound for each row."""
    return [max_tokens] * rows if isinstance(max_tokens, int) else list(max_tokens)


def unsampled(text: str, tokens: Tokens, limit: int, **fields: Any) -> Completion:
    """An answer that no model sampled, cut at ``limit`` tokens, with log-prob 0 everywhere."""
    cut = tokens[:limit]
    return Completion(
        tokens=cut,
        sampled=(True,) * len(cut),
        logprobs=(0.0,) * len(cut),
        text=text,
        finish="stop" if len(tokens) <= limit else "length",
        **fields,
    )


class ScriptedEngine:
    """A fake for tests and dry runs: ``answer(prompt, key)`` is the text, with log-prob 0 everywhere.

    ``tokenizer`` needs only ``encode``; ``version`` and ``asked`` (prompts and keys so far) are there to look at.
    """

    def __init__(self, tokenizer: Any, answer: Callable[[Tokens, SampleKey], str]):
        self.tokenizer = tokenizer
        self.answer = answer
        self.version = -1
        self.asked: list[tuple[Tokens, SampleKey]] = []
        self._abandoned = False

    def load(self, policy: Policy) -> None:
        self.version = policy.version

    def abandon(self) -> None:
        self._abandoned = True

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        keys: Sequence[SampleKey],
        seed: int,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        if self._abandoned:
            raise EngineError("the answers were given up")
        limits = limits_of(max_tokens, len(prompts))
        self.asked += zip(prompts, keys, strict=True)
        return [self._complete(*row) for row in zip(prompts, keys, limits, strict=True)]

    def _complete(self, prompt: Tokens, key: SampleKey, limit: int) -> Completion:
        text = self.answer(prompt, key)
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return unsampled(text, tokens, limit, version=self.version)
