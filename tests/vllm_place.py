"""A fake vLLM server, its address, and engines for it, on the tiny model."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from fake_vllm import FakeVLLM
from helpers import VOCABULARY, keys, tiny_model

from vpd.engines.settings import EngineParts, VLLMSettings
from vpd.engines.vllm_client import VLLMClient
from vpd.engines.vllm_engine import VLLMEngine
from vpd.policy import FixedPolicy
from vpd.ranks import OneProcess, Ranks

PROMPTS = [(1, 2, 3), (4,), (1, 2, 3), (5, 6, 7, 8, 9, 10)]
KEYS = keys(len(PROMPTS))
EOS = (0, 3)
ALONE = OneProcess()


class Letters:
    """A stand-in tokenizer for the tiny model."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, tokens))


@dataclasses.dataclass
class Place:
    """A fake server, its address, and engines for it."""

    server: FakeVLLM
    url: str
    folder: Path

    def engine(self, *, rows: int = 4, longest: int = 10, ranks: Ranks = ALONE, **changes: Any) -> VLLMEngine:
        settings = VLLMSettings(url=self.url, sync_dir=str(self.folder / "sync"), **changes)
        parts = EngineParts(tokenizer=Letters(), eos_ids=EOS, max_rows=rows, longest=lambda: longest, ranks=ranks)
        client = VLLMClient(self.url, api_key=settings.api_key(), timeout=settings.timeout, wait=0.0)
        return VLLMEngine(client, settings, parts)

    def loaded(self, version: int = 7, **changes: Any) -> VLLMEngine:
        engine = self.engine(**changes)
        engine.load(FixedPolicy(tiny_model(), version))
        return engine


def moved(model: Any, by: float = 1e-3) -> Any:
    """The model after a small step."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double() * by)
    return model


def sample(engine: VLLMEngine, limits: Any = 6, **sampling: Any) -> list[Any]:
    return engine.generate(PROMPTS, keys=KEYS, seed=3, max_tokens=limits, **sampling)
