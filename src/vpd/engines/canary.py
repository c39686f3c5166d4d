"""The canary: whether a server computes what the learner computes, seen on one fixed text.

Dimension legend: T tokens of the text, V vocabulary.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vpd.errors import EngineError, ModelError
from vpd.types import Floats, Tokens

LONGEST = 128  # tokens
TEXT = """\
The ferry to Lisbon leaves at 7:45, so Maria and her two brothers packed 3 loaves of bread, some olives and a map. "If
the wind turns," she said, "we shall need another 20 minutes." They did: by noon, 12 miles out, the sea was grey.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)  # raises ZeroDivisionError for []

If x + 4 = 11, then x = 7, and x * x is 49. Water boils at 100 degrees; gold, whose symbol is Au, melts at 1,064.
"""


def canary_tokens(tokenizer: Any, room: int = LONGEST) -> Tokens:
    """The text's first tokens [T], at most ``room``.  Raises ModelError: fewer than two."""
    tokens = tuple(tokenizer.encode(TEXT))[: min(LONGEST, room)]
    if len(tokens) < 2:
        raise ModelError("the tokenizer makes no tokens of English text", got=f"{len(tokens)} tokens")
    return tokens


def learner_logprobs(model: Any, tokens: Tokens) -> Floats:
    """log p of every token but the first [T-1] under a model of transformers; for ``Policy.call``."""
    import torch

    from vpd.model.forward import hidden_states, logits_of

    device = next(model.parameters()).device
    ids_1T = torch.tensor([tokens], device=device)
    positions_1T = torch.arange(len(tokens), device=device)[None]
    with torch.no_grad():
        states_1TH = hidden_states(
            model, input_ids=ids_1T, position_ids=positions_1T, attention_mask=torch.ones_like(ids_1T)
        )
        logits_TV = logits_of(model, states_1TH[0, :-1])
        logp_TV = torch.log_softmax(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), -1)
        return tuple(logp_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist())


@dataclass(frozen=True)
class Difference:
    """How far two answers to the canary are from each other, in nats."""

    largest: float
    mean: float

    @classmethod
    def between(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Difference":
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        return cls(max(gaps), statistics.fmean(gaps))

    def within(self, tolerance: float) -> bool:
        """No token differs by more than the tolerance, nor all by more than a tenth of it on average."""
        return self.largest <= tolerance and self.mean <= tolerance / 10

    def __str__(self) -> str:
        return f"{self.mean:.3g} on average, {self.largest:.3g} at most"


@dataclass(frozen=True)
class Canary:
    """The log-probs [T-1] of the text's tokens: the ``learner``'s, and what the ``server`` answered after the sync."""

    learner: Floats
    server: Floats

    @property
    def difference(self) -> Difference:
        """Between the two."""
        return Difference.between(self.learner, self.server)


def check_synced(now: Canary, before: Canary | None, version: int, tolerance: float) -> None:
    """Raise EngineError unless a server's answer shows the weights that it was sent.

    ``before`` is what was there before the sync: where the learner's answer has moved and the server's is the same to
    the last bit, the server has not taken the weights, however small the step was.
    """
    if not now.difference.within(tolerance):
        raise EngineError(
            f"the server does not serve the weights of version {version} that it was sent",
            got=f"log-probs that differ from the learner's by {now.difference} nats",
            expected=f"at most {tolerance / 10:g} on average, {tolerance:g} at most",
            do="Is engine.model this model, and engine.dtype the server's? vpd serve starts a server that fits;"
            " nothing was sampled with these weights.",
        )
    if before is None:
        return
    moved = Difference.between(now.learner, before.learner).largest
    if moved > tolerance / 1000 and now.server == before.server:
        raise EngineError(
            f"the server still serves the weights from before version {version}",
            got=f"the same answer to the last bit, where the learner's moved by {moved:.3g} nats",
            do="Restart the server; nothing was sampled with these weights.",
        )


def check_unchanged(synced: Canary, now: Floats, version: int, tolerance: float) -> None:
    """Raise EngineError if a server's answer is no longer what it was after the sync: somebody changed its weights."""
    moved = Difference.between(synced.server, now)
    if not moved.within(tolerance):
        raise EngineError(
            f"the server no longer serves the weights of version {version}",
            got=f"log-probs that moved by {moved} nats since they were sent",
            do="Was it restarted, or does another run use it? One server serves one run; no answer of this batch is"
            " used.",
        )
