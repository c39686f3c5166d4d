"""The embedded engine: samples on the learner's own model, so that its log-probs are the learner's.

Each distinct prompt is read once and, where the model allows it, kept once (:mod:`vpd.model.decoding`); finished rows
leave the batch; a token is drawn by inverse CDF from a uniform number that belongs to its row alone: what a row says
does not depend on which other rows are in the batch.

Dimension legend: B rows still running, V vocabulary, M blocks of the vocabulary, W tokens of a block.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd.engines import limits_of
from vpd.errors import NonFiniteError
from vpd.model import attention
from vpd.model.decoding import EnginePath, decoder_for
from vpd.model.probe import check_causal, check_head, engine_path
from vpd.policy import Policy
from vpd.types import Completion, SampleKey, Tokens

BLOCK = 128  # tokens of a block of the vocabulary
KEEP = 0.9  # finished rows leave as soon as no more than this share still runs


class Requests(NamedTuple):
    """Rows that decode at once, and how they are sampled."""

    prompts: Sequence[Tokens]
    seeds: Sequence[int]
    limits: Sequence[int]
    temperature: float
    top_p: float
    top_k: int | None


class TorchEngine:
    """Batched sampling with a KV cache.

    ``max_rows`` bounds the rows that decode at once; ``eos_ids`` end an answer and are part of it.  ``path`` is how the
    loaded model decodes (:func:`vpd.model.probe.engine_path`).
    """

    def __init__(self, tokenizer: Any, *, eos_ids: Sequence[int], max_rows: int = 64):
        attention.without_cudnn()
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.max_rows = max_rows
        self.version = -1
        self._policy: Policy | None = None
        self._probed: Any = None
        self.path: EnginePath = "cached"

    @torch.no_grad()
    def load(self, policy: Policy) -> None:
        policy.call(self._probe)
        self._policy = policy
        self.version = policy.version

    @torch.no_grad()
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
        if len(keys) != len(prompts):
            raise ValueError(f"one key for each prompt; got {len(keys)} keys for {len(prompts)} prompts")
        if self._policy is None:
            raise RuntimeError("the engine has no weights yet: call load() first")
        limits = limits_of(max_tokens, len(prompts))
        seeds = [key.seed(seed) for key in keys]
        completions: list[Completion] = []
        for start in range(0, len(prompts), self.max_rows):
            rows = slice(start, start + self.max_rows)
            requests = Requests(prompts[rows], seeds[rows], limits[rows], temperature, top_p, top_k)
            completions += self._policy.call(self._generate, requests)
        return completions

    def _probe(self, model: Any) -> None:
        if model is not self._probed:
            check_head(model, "model", next(model.parameters()).device)
            check_causal(model, "model")
            self.path = engine_path(model)
            self._probed = model

    def _generate(self, model: Any, asked: Requests) -> list[Completion]:
        device = next(model.parameters()).device
        decoder = decoder_for(model, asked.prompts, self.path)
        logits_BV = decoder.logits_BV
        width = max(asked.limits)
        uniform = torch.tensor(np.stack([uniforms(seed, width) for seed in asked.seeds]), device=device)
        eos = torch.tensor(self.eos_ids, dtype=torch.long, device=device)
        tokens = torch.zeros(len(asked.prompts), width, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(asked.prompts), width, dtype=torch.float64, device=device)
        length = torch.tensor(asked.limits, dtype=torch.long, device=device)
        rows = torch.arange(len(asked.prompts), device=device)
        running = torch.ones(len(asked.prompts), dtype=torch.bool, device=device)
        for step in range(width):
            logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / max(asked.temperature, 1e-6)
            logp_BV = torch.log_softmax(logits_BV, -1)
            if bool((logp_BV[:, 0].isnan() & running).any()):  # one logit that is none makes the whole row so
                raise NonFiniteError(
                    "the model's logits are not finite",
                    got=f"NaN or infinity in the logits of token {step} of an answer",
                    do="Numbers of float16 overflow (take model.dtype bfloat16 or float32), and so do weights that a "
                    "learning rate drives up.",
                )
            chosen_B = draw(
                truncate(logp_BV, asked.top_p, asked.top_k), uniform[rows, step], greedy=asked.temperature == 0.0
            )
            tokens[rows, step] = chosen_B.where(running, 0)
            logprobs[rows, step] = logp_BV.gather(1, chosen_B[:, None])[:, 0].double().where(running, 0.0)
            ended = running & torch.isin(chosen_B, eos)
            length[rows] = length[rows].where(~ended, step + 1)
            running = running & ~ended & (length[rows] > step + 1)
            still = int(running.sum())  # unless rows leave, the host waits for this and the check above alone
            if not still:
                break
            if still <= KEEP * len(running):
                keep = running.nonzero()[:, 0]
                decoder.keep(keep)
                rows, chosen_B, running = rows[keep], chosen_B[keep], running[keep]
            logits_BV = decoder.step(chosen_B)
        return self._completions(tokens, logprobs, length)

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
    """One token of each row [B] by inverse CDF: the first whose cumulative probability exceeds u.

    First the block of the vocabulary is found, then the token in it: only sums of blocks, and one block, are cumulated
    (in fp64), where cumulating all of V would take longer than the rest.
    """
    if greedy:
        return logp_BV.argmax(-1)
    rows, vocabulary = logp_BV.shape
    p_BMW = F.pad(logp_BV.exp(), (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    cumulative_BM = p_BMW.sum(-1).double().cumsum(-1)
    target_B1 = _below(uniform_B[:, None] * cumulative_BM[:, -1:], cumulative_BM[:, -1:])
    block_B1 = torch.searchsorted(cumulative_BM, target_B1, right=True)
    before_B1 = F.pad(cumulative_BM, (1, 0)).gather(1, block_B1)
    inside_BW = p_BMW.gather(1, block_B1[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    rest_B1 = _below(target_B1 - before_B1, inside_BW[:, -1:])
    return (block_B1 * BLOCK + torch.searchsorted(inside_BW, rest_B1, right=True))[:, 0]


def _below(target: Tensor, total: Tensor) -> Tensor:
    """The target, but less than the total: rounding must not lead past the last possible token."""
    return torch.minimum(target, total * (1 - 2**-52))


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
