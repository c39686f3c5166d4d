"""Bytes that a run holds, by item: what is there all the time, and the most that an update adds to it.

What is there all the time is counted on the run's real objects (masters, teacher's copies, adapters) without data.  An
update's share is counted by running its real passes, forward and backward, on tensors without data
(:mod:`vpd.estimate.tracing`).  Dimension legend: N completion tokens, n of a block, H hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vpd import losses
from vpd.estimate.architecture import Architecture, head_weight
from vpd.estimate.rehearsal import Call
from vpd.estimate.tracing import LiveBytes, without_data
from vpd.learners.master_weights import MasterWeights
from vpd.learners.micro_batches import Limits, MicroBatch, plan
from vpd.learners.settings import OptimSettings, TeacherSettings
from vpd.learners.teachers import TeacherWeights
from vpd.model import attention, head, lora
from vpd.model.activation_checkpointing import active, enable
from vpd.model.packing import in_groups, tokens_of
from vpd.model.passes import LearnerPath, last_hidden
from vpd.model.settings import ModelSettings
from vpd.types import Example, Tokens

LOGITS_OF_A_CHUNK = 1 << 24  # as the learner's (learners/accelerate_learner.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of the memory table."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained, and how: the parts of a configuration that decide a learner's memory.

    ``on_gpu`` says whether attention is that of a GPU, which copies packed rows into groups, or that of a CPU.
    """

    architecture: Architecture
    model: ModelSettings
    optim: OptimSettings
    teacher: TeacherSettings
    keep_initial: bool = False
    external: Architecture | None = None
    on_gpu: bool = True

    @property
    def narrow(self) -> bool:
        """Whether passes compute in 16 bits."""
        return self.model.dtype == "bfloat16" or self.optim.mixed_precision == "bf16"

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients, optimiser and copies are divided among the processes."""
        return self.optim.sharding != "none"

    def as_gathered(self) -> "Trained":
        """What a pass computes with: ``optim.mixed_precision`` gathers shards in 16 bits, without autocast."""
        if not self.sharded or not self.narrow:
            return self
        optim = dataclasses.replace(self.optim, mixed_precision="no")
        model = dataclasses.replace(self.model, dtype="bfloat16")
        teacher = dataclasses.replace(self.teacher, dtype=None)
        return dataclasses.replace(self, model=model, optim=optim, teacher=teacher)


class Weights:
    """A learner's modules without data, and the bytes of what it keeps beside them."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.model = trained.architecture.build(trained.model.dtype)
        external = None if trained.external is None else trained.external.build(trained.model.dtype)
        if external is not None:
            external.requires_grad_(False)
        self.base = _bytes(self.model)
        with torch.device("meta"):
            if trained.model.lora is not None:
                lora.attach(self.model, trained.model.lora, seed=0)
            self._masters = MasterWeights(self.model, wanted=trained.optim.master_weights)
            self._copies = TeacherWeights(
                trained.teacher,
                self.model,
                external=external,
                keep_initial=trained.keep_initial,
                precise=self._masters.precise,
            )
        enable(self.model, trained.optim.gradient_checkpointing)
        self.packs = trained.optim.share_prefixes and attention.install(self.model)

    @property
    def gradients_bytes(self) -> int:
        """Bytes of the gradients that the optimiser reads."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._masters.parameters)

    @property
    def masters_bytes(self) -> int:
        """Bytes of the fp32 masters of 16-bit weights."""
        return self.gradients_bytes if self._masters else 0

    def fixed(self) -> list[Item]:
        """What is there during an update, gradients included, whole on one device."""
        moments = {"adamw": 2, "sgd": 0}[self.trained.optim.optimizer]
        items = [
            Item(name="weights", bytes=self.base),
            Item(name="adapters", bytes=_bytes(self.model) - self.base),
            Item(name="fp32 masters", bytes=self.masters_bytes),
            Item(name="gradients", bytes=self.gradients_bytes),
            Item(name="optimiser", bytes=moments * self.gradients_bytes),
            Item(name="teacher's copies", bytes=sum(map(_bytes, self._copies.modules().values()))),
        ]
        return [item for item in items if item.bytes]

    def teacher_module(self) -> Any:
        """A module that plays the teacher: its own copy, or the live model."""
        (module, _), *_ = self._copies.mixture("teacher")
        return module if isinstance(module, torch.nn.Module) else self.model


def _bytes(module: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def limits_of(trained: Trained, hidden_size: int | None) -> Limits:
    """The limits of the learner's micro-batches."""
    optim = trained.optim
    return Limits(rows=optim.micro_batch_size, tokens=optim.max_tokens_per_microbatch, hidden_size=hidden_size)


def largest_micro_batch(call: Call, limits: Limits, *, world: int = 1) -> tuple[list[Example], int]:
    """The rows of a call's micro-batch with the most tokens in the roles that it reads, and how many batches it has."""
    planned = plan(call.examples, range(len(call.examples)), limits, world=world)
    chosen = max(planned, key=partial(_tokens, call, limits.hidden_size))
    return [call.examples[row] for row in chosen.rows], len(planned)


def _tokens(call: Call, hidden_size: int | None, micro: MicroBatch) -> int:
    rows = [call.examples[row] for row in micro.rows]
    read = {call.train} if call.train else call.use.read
    return max(tokens_of(prompts_of(rows, role), completions_of(rows), hidden_size) for role in read if role)


def prompts_of(rows: Sequence[Example], role: str) -> list[Tokens]:
    """What a role reads; a row without a teacher has the student's prompt in its place."""
    return [row.prompt if role == "student" else row.teacher_prompt or row.prompt for row in rows]


def completions_of(rows: Sequence[Example]) -> list[Tokens]:
    return [row.completion for row in rows]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that an update holds beyond the fixed items, and of how many tokens in how many micro-batches."""

    name: str
    bytes: int
    tokens: int
    micro_batches: int
    path: LearnerPath


def update_peak(trained: Trained, call: Call, *, world: int = 1) -> Peak:
    """The peak of a call of ``update``, by running its largest micro-batch without data.

    In shards a gradient is divided among the ranks as soon as it is there, so that none is whole.
    A deep model of equal layers is run with two numbers of them: the peak of each stage of a pass is linear in it.
    """
    trained = trained.as_gathered()
    whole = trained.architecture
    few, more = whole.with_periods(1), whole.with_periods(2)
    if few is None or more is None:
        return _peak_of([_trace(Weights(trained), call, world)], call)
    traces = [_trace(Weights(dataclasses.replace(trained, architecture=a)), call, world) for a in (few, more)]
    return _peak_of(traces, call, beyond=whole.layers / few.layers - 1)


@dataclass(frozen=True)
class _Trace:
    """What a micro-batch held at most in each stage, gradients included, and the gradients that the optimiser reads."""

    peaks: Sequence[int]
    gradients: int
    tokens: int
    micro_batches: int
    path: LearnerPath


def _peak_of(traces: Sequence[_Trace], call: Call, beyond: float = 0.0) -> Peak:
    """The peak of a trace, or on the line through two of them, ``beyond`` their distance from the first."""
    first, last = traces[0], traces[-1]

    def at(few: int, more: int) -> float:
        return few + beyond * (more - few)

    most = max(at(few, more) for few, more in zip(first.peaks, last.peaks, strict=True))
    extra = max(round(most - at(first.gradients, last.gradients)), 0)
    return Peak(name=call.name, bytes=extra, tokens=last.tokens, micro_batches=last.micro_batches, path=last.path)


def _trace(weights: Weights, call: Call, world: int) -> _Trace:
    """Run the largest micro-batch, along the fast path if the model's attention allows it."""
    try:
        return _traced(weights, call, world)
    except attention.FastPathError:
        attention.remove(weights.model)
        weights.packs = False
        return _traced(weights, call, world)


def _traced(weights: Weights, call: Call, world: int) -> _Trace:
    sharded = weights.trained.sharded
    hidden_size = head_weight(weights.model).shape[1] if weights.packs else None
    rows, count = largest_micro_batch(call, limits_of(weights.trained, hidden_size), world=world)
    by_masters = weights.masters_bytes > 0
    modules = (weights.model, weights.teacher_module())
    with without_data(*modules):
        live = LiveBytes(*modules)
        with live, torch.autocast("cpu", torch.bfloat16, enabled=weights.trained.optim.mixed_precision == "bf16"):
            for parameter in (p for p in weights.model.parameters() if p.requires_grad):
                if sharded:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
                elif count > 1 and not by_masters:  # earlier micro-batches have left their gradients
                    parameter.grad = torch.empty_like(parameter)
            tokens = _run(weights, dataclasses.replace(call, examples=rows), live)
    gradients = 0 if sharded else weights.gradients_bytes
    masters = gradients if count > 1 and by_masters else 0
    return _Trace(
        [peak + masters for peak in live.peaks],
        gradients,
        tokens,
        count,
        "packed" if weights.packs else "padded",
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _run(weights: Weights, call: Call, live: LiveBytes) -> int:
    """A micro-batch forward and backward, as the learner runs it; the tokens of the pass with gradient.

    Stages: forward, and backward through the head, the layers and the embedding.
    """
    rows, train = call.examples, call.train
    masks = [row.mask for row in rows]
    passed = partial(
        last_hidden,
        path="packed" if weights.packs else "padded",
        prepare=in_groups if weights.trained.on_gpu else None,
    )
    assert train is not None
    with active(weights.model):
        others: list[tuple[Any, Tensor]] = []
        for role in sorted(call.use.read - {train}):
            module = weights.teacher_module() if role == "teacher" else weights.model
            with torch.no_grad():
                done = passed(module, prompts_of(rows, role), completions_of(rows), masks)
            others.append((module, done.hidden_NH))
        hook = weights.model.get_input_embeddings().register_forward_hook(partial(_mark_gradient, live))
        done = passed(weights.model, prompts_of(rows, train), completions_of(rows), masks)
        hook.remove()
        done.hidden_NH.register_hook(live.mark)
        value_N = _value(weights, call, done.hidden_NH, others)
        live.mark()
        value_N.sum().backward()
    return done.tokens


def _mark_gradient(live: LiveBytes, module: Any, inputs: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(live.mark)


def _value(weights: Weights, call: Call, hidden_NH: Tensor, others: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """The loss by the chunked head: a comparison with the other role's logits, or log-probs."""
    weight_VH = head_weight(weights.model)
    chunk = weights.trained.optim.chunk_tokens or max(LOGITS_OF_A_CHUNK // len(weight_VH), 1)
    tokens_N = torch.empty(len(hidden_NH), dtype=torch.long)
    options = call.use.divergence

    def of_chunk(rows: slice) -> head.BlockFunction:
        other_nV = [_logits(module, states_NH[rows]) for module, states_NH in others if options is not None]

        def of_block(logits_nV: Tensor, place: slice, wanted: bool) -> head.BlockResult:
            if options is None:
                found = losses.logprobs_and_grad(logits_nV, tokens_N[rows][place])
            else:
                found = losses.divergence_and_grad(logits_nV, other_nV[0][place], tokens_N[rows][place], **options)
            weight_n = None if options is None else torch.empty(len(logits_nV))
            return head.BlockResult(found.value_N, found.gradient_NV if wanted else None, found.aux, weight_n)

        return of_block

    inputs = head.HeadInputs(hidden_NH, weight_VH, head.logit_function(weights.model), 1.0)
    return head.apply_in_chunks(inputs, of_chunk, chunk=chunk, weights_known=options is not None)[0]


@torch.no_grad()
def _logits(module: Any, hidden_nH: Tensor) -> Tensor:
    logits_nV: Tensor = module.get_output_embeddings()(hidden_nH)
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
