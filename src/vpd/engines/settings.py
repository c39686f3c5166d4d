"""The section ``engine``: which engine samples, and what it is built from."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vpd.engines import Engine
from vpd.settings import Settings


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What an engine may need of a run.

    ``eos_ids`` end an answer and are part of it; ``max_rows`` (``rollout.max_rows``) bounds the answers that decode at
    once.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    max_rows: int


class EngineSettings(Protocol):
    """A section ``engine``; a user's own is chosen with ``--engine.name my_engine.py:MySettings``."""

    def build(self, parts: EngineParts) -> Engine:
        """A new engine; ``load`` is called before ``generate``."""
        ...


@dataclass(frozen=True, kw_only=True)
class EmbeddedEngineSettings(Settings, section="engine"):
    """Samples in this process on the learner's own model."""

    name: Literal["embedded"] = "embedded"

    def build(self, parts: EngineParts) -> Engine:
        from vpd.engines.torch_engine import TorchEngine

        return TorchEngine(parts.tokenizer, eos_ids=parts.eos_ids, max_rows=parts.max_rows)
