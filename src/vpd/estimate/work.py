"""Operations, bytes and seconds of an iteration, by phase.

A matrix of N numbers takes 2 N operations a token forward and 4 N backward; a layer's attention 4 A for each pair of
tokens where one attends to the other, A the width of all heads together.  Layers that are computed again in the
backward pass (``optim.gradient_checkpointing: full``) are counted again.  What the chunked head computes twice is too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vpd.estimate.architecture import head_weight, multiplied
from vpd.estimate.memory import Trained, completions_of, limits_of, prompts_of
from vpd.estimate.rehearsal import Call
from vpd.estimate.settings import DryRunSettings
from vpd.learners.micro_batches import MicroBatch, plan
from vpd.model.packing import plan as plan_packs
from vpd.types import Example


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What operations are counted from: weights that every token is multiplied with, the head's, and attention."""

    layers: int
    head: int
    attended: int
    hidden_size: int | None
    kv_bytes: int
    weights_bytes: int
    narrow: bool

    @classmethod
    def of(cls, trained: Trained, *, packed: bool, sampled: str | None = None) -> "Sizes":
        """The sizes of a model; ``sampled``: the number type of the weights that sample (None: the learner's own)."""
        sampled = sampled or trained.as_gathered().model.dtype
        model = trained.architecture.build(trained.model.dtype)
        vocabulary, hidden = head_weight(model).shape
        return cls(
            layers=multiplied(model, trained.architecture.active_experts),
            head=vocabulary * hidden,
            attended=trained.architecture.attended,
            hidden_size=hidden if packed else None,
            kv_bytes=kv_bytes(trained),
            weights_bytes=sum(p.numel() for p in model.parameters()) * getattr(torch, sampled).itemsize,
            narrow=trained.narrow,
        )


def kv_bytes(trained: Trained) -> int:
    """Bytes of the keys and values of one token, in the number type that passes compute in."""
    return trained.architecture.kv_bytes * (1 if trained.narrow else 2)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one phase of an iteration takes of all GPUs together: operations, tokens, and seconds."""

    name: str
    operations: float
    tokens: int
    seconds: float


def work_of(call: Call, trained: Trained, sizes: Sizes, machine: DryRunSettings) -> Work:
    """One call of ``score`` or ``update``."""
    planned = plan(call.examples, range(len(call.examples)), limits_of(trained, sizes.hidden_size), world=machine.gpus)
    operations, tokens = 0.0, 0
    again = trained.optim.gradient_checkpointing == "full"
    for micro in _all_micro_batches(call, trained, sizes, machine.gpus):
        rows = [call.examples[row] for row in micro.rows]
        for role in sorted(call.use.read):
            passes, heads = _passes(call, role, again)
            if call.use.measured and len(planned) * machine.gpus > 1 and role == call.train:
                passes, heads = passes + 1, heads + 1
            computed, pairs = _tokens_and_pairs(rows, role, sizes.hidden_size)
            layers = 2.0 * sizes.layers * computed + sizes.attended * pairs
            operations += passes * layers + heads * 2.0 * sizes.head * sum(len(row.completion) for row in rows)
            tokens += computed
    seconds = operations / machine.gpus / _rate(sizes, machine)
    if trained.sharded and machine.gpus > 1:
        wire = 10.0 if call.train else 2.0  # bytes a weight: gathered for each pass, gradients reduced in fp32
        seconds = max(seconds, len(planned) * wire * (sizes.layers + sizes.head) / (machine.link_gb_per_s * 1e9))
    return Work(name=call.name, operations=operations, tokens=tokens, seconds=seconds)


def _passes(call: Call, role: str, again: bool) -> tuple[int, int]:
    """How often a role's layers and head are computed, in forward passes."""
    if role != call.train:
        return 1, 1
    return (4 if again else 3), (3 if call.use.divergence is not None else 4)


def _all_micro_batches(call: Call, trained: Trained, sizes: Sizes, world: int) -> list[MicroBatch]:
    limits = limits_of(trained, sizes.hidden_size)
    rows = range(len(call.examples))
    every = [micro for rank in range(world) for micro in plan(call.examples, rows, limits, rank=rank, world=world)]
    return [micro for micro in every if not micro.padding]


def _tokens_and_pairs(rows: Sequence[Example], role: str, hidden_size: int | None) -> tuple[int, float]:
    """Tokens that are computed, shared ones once, and pairs where one attends to the other."""
    prompts, completions = prompts_of(rows, role), completions_of(rows)
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    if hidden_size is None:
        return len(rows) * max(lengths), sum(length * length / 2 for length in lengths)
    tokens, pairs = 0, 0.0
    for pack in plan_packs(prompts, completions, hidden_size):
        tokens += pack.shared
        pairs += pack.shared**2 / 2
        for row in pack.rows:
            own = lengths[row] - pack.shared
            tokens += own
            pairs += own * (pack.shared + own / 2)
    return tokens, pairs


def _rate(sizes: Sizes, machine: DryRunSettings) -> float:
    """Operations a second of one GPU."""
    return (machine.tflops if sizes.narrow else machine.tflops_fp32) * 1e12 * machine.utilisation


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Answers to be sampled: how many, their prompts' and their own mean length, and how many decode at once.

    ``longest`` is the length that the last of them may have: a batch waits for it.
    """

    rows: int
    prompt: float
    answer: float
    longest: int
    at_once: int


def decoding_work(name: str, asked: Decoding, sizes: Sizes, machine: DryRunSettings) -> Work:
    """Sampling: for each token of a batch the weights and all keys and values are read once."""
    gpus = machine.server_gpus or machine.gpus
    rows = -(-asked.rows // gpus)
    batches = -(-rows // asked.at_once)
    at_once = min(rows, asked.at_once)
    context = asked.prompt + asked.answer / 2
    read = sizes.weights_bytes + at_once * context * sizes.kv_bytes
    operations = 2.0 * (sizes.layers + sizes.head) * (asked.prompt + asked.answer) + sizes.attended * context**2 / 2
    step = max(
        read / (machine.gb_per_s * 1e9 * machine.bandwidth_used),
        at_once * 2.0 * (sizes.layers + sizes.head) / _rate(sizes, machine),
        machine.step_ms / 1e3,
    )
    prefill = rows * asked.prompt * 2.0 * sizes.layers / _rate(sizes, machine)
    # with a server, rows take the places of those that have ended; else a batch waits for its longest row
    steps = asked.answer * max(rows / at_once, 1.0) if machine.server_gpus else batches * asked.longest
    tokens = round(asked.rows * (asked.prompt + asked.answer))
    return Work(name=name, operations=operations * asked.rows, tokens=tokens, seconds=prefill + steps * step)
