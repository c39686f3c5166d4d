"""The embedded engine: samples on the learner's own model, so that its log-probs are the learner's.

Each distinct prompt is prefilled once, finished rows leave the batch, and a token is drawn by inverse CDF from a
uniform number that belongs to its row alone: what a row says does not depend on which rows stand beside it.

Dimension legend: B rows still running, U distinct prompts, P longest prompt, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from vpd.engines import limits_of
from vpd.types import Completion, Tokens


class TorchEngine:
    """Batched sampling with a KV cache.

    ``max_rows`` bounds the rows that decode at once; ``eos_ids`` end an answer and are part of it; ``autocast`` is the
    learner's precision.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int = 64,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.max_rows = max_rows
        self._autocast = autocast
        self.version = -1
        self._model: Any = None

    def load(self, weights: Any, version: int) -> None:
        self._model = weights
        self.version = version

    @torch.no_grad()
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
        if len(seeds) != len(prompts):
            raise ValueError(f"one seed for each prompt; got {len(seeds)} seeds for {len(prompts)} prompts")
        if self._model is None:
            raise RuntimeError("the engine has no weights yet: call load() first")
        limits = limits_of(max_tokens, len(prompts))
        completions: list[Completion] = []
        for start in range(0, len(prompts), self.max_rows):
            rows = slice(start, start + self.max_rows)
            with self._autocast():
                completions += self._generate(prompts[rows], seeds[rows], limits[rows], temperature, top_p, top_k)
        return completions

    def _generate(
        self,
        prompts: Sequence[Tokens],
        seeds: Sequence[int],
        limits: Sequence[int],
        temperature: float,
        top_p: float,
        top_k: int | None,
    ) -> list[Completion]:
        device = next(self._model.parameters()).device
        logits_BV, cache, attention_BP = self._prefill(prompts, device)
        width = max(limits)
        uniform = torch.tensor(np.stack([uniforms(seed, width) for seed in seeds]), device=device)
        eos = torch.tensor(self.eos_ids, dtype=torch.long, device=device)
        tokens = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(prompts), width, dtype=torch.float64, device=device)
        length = torch.tensor(limits, dtype=torch.long, device=device)
        rows = torch.arange(len(prompts), device=device)
        running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        for step in range(width):
            logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / max(temperature, 1e-6)
            logp_BV = torch.log_softmax(logits_BV, -1)
            chosen_B = draw(truncate(logp_BV, top_p, top_k), uniform[rows, step], greedy=temperature == 0.0)
            tokens[rows[running], step] = chosen_B[running]
            logprobs[rows[running], step] = logp_BV.gather(1, chosen_B[:, None])[running, 0].double()
            ended = running & torch.isin(chosen_B, eos)
            length[rows[ended]] = step + 1
            running = running & ~ended & (length[rows] > step + 1)
            if not bool(running.any()):
                break
            if int(running.sum()) <= 0.8 * len(running):
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, chosen_B, attention_BP, running = rows[keep], chosen_B[keep], attention_BP[keep], running[keep]
            attention_BP = torch.cat([attention_BP, attention_BP.new_ones(len(rows), 1)], 1)
            logits_BV = self._decode(chosen_B, attention_BP, cache)
        return self._completions(tokens, logprobs, length)

    def _prefill(self, prompts: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Any, Tensor]:
        """Logits after each prompt [B,V], the cache and the attention mask [B,P]; equal prompts are computed once."""
        distinct = list(dict.fromkeys(prompts))
        position = {prompt: index for index, prompt in enumerate(distinct)}
        longest = max(map(len, distinct))
        ids_UP = torch.tensor([[0] * (longest - len(p)) + list(p) for p in distinct], device=device)
        seen_UP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in distinct], device=device)
        cache = DynamicCache(config=self._model.config)
        places_UP = (seen_UP.cumsum(1) - 1).clamp(min=0)
        hidden = self._model.base_model(
            input_ids=ids_UP, attention_mask=seen_UP, position_ids=places_UP, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits_UV = self._model.get_output_embeddings()(hidden)
        spread = torch.tensor([position[prompt] for prompt in prompts], device=device)
        cache.batch_select_indices(spread)
        return logits_UV[spread], cache, seen_UP[spread]

    def _decode(self, chosen_B: Tensor, attention_BP: Tensor, cache: Any) -> Tensor:
        """Logits [B,V] after one more token of each row."""
        hidden = self._model.base_model(
            input_ids=chosen_B[:, None],
            attention_mask=attention_BP,
            position_ids=attention_BP.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits

    def _completions(self, tokens: Tensor, logprobs: Tensor, length: Tensor) -> list[Completion]:
        completions = []
        for ids, values, size in zip(tokens.tolist(), logprobs.tolist(), length.tolist(), strict=True):
            ids = ids[:size]
            finish: Literal["stop", "length"] = "stop" if ids and ids[-1] in self.eos_ids else "length"
            completions.append(
                Completion(
                    tokens=tuple(ids),
                    sampled=(True,) * size,
                    logprobs=tuple(values[:size]),
                    text=self.tokenizer.decode(ids, skip_special_tokens=True),
                    finish=finish,
                    version=self.version,
                )
            )
        return completions


def uniforms(seed: int, count: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The uniform numbers [count] of one row, a pure function of its seed."""
    return np.random.Generator(np.random.Philox(seed)).random(count)


def draw(logp_BV: Tensor, uniform_B: Tensor, *, greedy: bool = False) -> Tensor:
    """One token of each row [B] by inverse CDF, in fp64: the first whose cumulative probability exceeds u."""
    if greedy:
        return logp_BV.argmax(-1)
    cumulative_BV = logp_BV.double().exp().cumsum(-1)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    index_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    return index_B.clamp(max=logp_BV.shape[1] - 1)


def truncate(logp_BV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Remove (to -inf) what top-k and nucleus sampling leave out; the log-probs of the rest stay as they are."""
    if top_k is not None and top_k < logp_BV.shape[1]:
        floor_B1 = logp_BV.topk(top_k, -1).values[:, -1:]
        logp_BV = logp_BV.masked_fill(logp_BV < floor_B1, -torch.inf)
    if top_p < 1.0:
        ordered_BV, order_BV = torch.softmax(logp_BV, -1).sort(-1, descending=True)
        outside_BV = ordered_BV.cumsum(-1) - ordered_BV >= top_p
        logp_BV = logp_BV.masked_fill(torch.zeros_like(outside_BV).scatter(1, order_BV, outside_BV), -torch.inf)
    return logp_BV
