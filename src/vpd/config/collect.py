"""What ``vpd collect`` is asked for."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from vpd.settings import Settings


@dataclass(frozen=True, kw_only=True)
class CollectOptions(Settings):
    """Which transcripts are written, and whether outcomes are."""

    tasks: Annotated[int | None, Ge(1), "training tasks; null: 256, or all of a data set with fewer"] = None
    first: Annotated[int, Ge(0), "the first one's place in the stream"] = 0
    outcome: Annotated[bool, "write reward and success"] = True
