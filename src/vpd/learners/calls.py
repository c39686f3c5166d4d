"""What an iteration asked of the learner, as data: the calls, what they gave, and the call that failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vpd.learners import Update
from vpd.model.scorer import Role
from vpd.types import Example, Group

#: What a call gave: log-probs of ``score``, or the report of ``update``.
Result: TypeAlias = list[list[float]] | Update


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of ``score`` (``name`` says which weights) or of ``update`` (``name`` of the update)."""

    kind: Literal["score", "update"]
    name: str
    examples: Sequence[Example]
    train: Role = "student"
    lr_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """All that it takes to run an iteration again that met a number that is not finite.

    ``algorithm`` is its state before the iteration, ``results`` what the calls gave that went well, ``call`` the one
    that did not (None: the weights are not finite at the end of the iteration).
    """

    step: int
    error: str
    groups: Sequence[Group]
    algorithm: Mapping[str, Any]
    results: Sequence[Result]
    call: Call | None
