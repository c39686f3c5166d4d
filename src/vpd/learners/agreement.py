"""Whether all ranks were given the same rows.

Each rank makes the list of rows by itself and computes its share of it, so lists that differ would train on garbage,
and lists of other lengths would make one rank wait for another without end.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from vpd.ranks import Digests, Ranks, agree
from vpd.types import Example, TopKLogprobs


def check_examples(ranks: Ranks, call: str, examples: Sequence[Example]) -> None:
    """Raise TrainingError, before any pass, where a rank's rows differ in a token or a number that a pass reads."""
    agree(ranks, f"the rows of {call}", lambda: digests(examples))


def digests(examples: Sequence[Example]) -> Digests:
    """Two digests of each row, of its tokens and of its numbers."""
    found = []
    for place, row in enumerate(examples):
        name = f"{row.name} (place {place})"
        found.append((f"the tokens of {name}", _digest(_tokens(row))))
        found.append((f"the numbers of {name}", _digest(_numbers(row))))
    return found


def _tokens(row: Example) -> Iterable[bytes]:
    teacher = row.teacher
    ids = [id for place in teacher.ids for id in place] if isinstance(teacher, TopKLogprobs) else teacher
    for tokens in (row.prompt, row.completion, row.mask, ids):
        yield b"none" if tokens is None else array("q", tokens).tobytes()


def _numbers(row: Example) -> Iterable[bytes]:
    yield array("d", [row.advantage, row.success, row.version]).tobytes()
    for values in (row.behaviour, row.reference):
        yield b"none" if values is None else array("d", values).tobytes()
    for term in sorted(row.loss_weights):
        yield term.encode()
        yield array("d", [row.loss_weights[term]]).tobytes()
    if isinstance(row.teacher, TopKLogprobs):
        yield array("d", [value for place in row.teacher.logprobs for value in place]).tobytes()


def _digest(parts: Iterable[bytes]) -> bytes:
    """A digest of parts of any length."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()
