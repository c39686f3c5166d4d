"""From examples to tensors and from hidden states to log-probs: the only place that pads, shifts and divides by
the temperature.

Dimension legend: B rows, T longest completion, V vocabulary, H hidden size, N completion tokens
of the batch that count (the mask's ones, in row-major order).

The hidden state at the token before completion token ``t`` predicts it (:mod:`vpd.packing` says where that is).  Only
those N states reach the head, in chunks, so that no [B,T,V] tensor is ever whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vpd import losses
from vpd.packing import Layout, lay_out
from vpd.types import Example

Role: TypeAlias = Literal["student", "teacher"]
#: Who plays a role: modules and the share of each in the logits.  One module with share 1, or a lerp of two.
Cast: TypeAlias = tuple[tuple[Any, float], ...]


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch.  ``_BT`` fields are padded right to T; ``examples`` are the rows as they came."""

    examples: Sequence[Example]
    tokens_BT: Tensor
    mask_BT: Tensor
    behaviour_BT: Tensor
    reference_BT: Tensor
    has_reference_B: Tensor
    advantage_B: Tensor
    success_B: Tensor
    group_B: Tensor

    @property
    def has_teacher(self) -> bool:
        """Whether its rows have a teacher's prompt; a learner never mixes rows that do with rows that do not."""
        return all(example.teacher_prompt is not None for example in self.examples)

    def reference_or(self, logprobs_BT: Tensor) -> Tensor:
        """The reference log-probs [B,T]; a row that carries none is its own reference (ratio exactly 1)."""
        return torch.where(self.has_reference_B[:, None], self.reference_BT, logprobs_BT.detach())


class Divergence(NamedTuple):
    """What one pass over both distributions yields, all [B,T]; only ``value`` carries a gradient."""

    value: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def collate(examples: Sequence[Example], *, device: torch.device, dtype: torch.dtype) -> Batch:
    """Examples as tensors; floating-point fields in ``dtype`` (at least fp32)."""
    width = max(len(example.completion) for example in examples)

    def pad(rows: Sequence[Sequence[Any]], fill: Any, kind: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=kind, device=device)

    def column(values: list[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    no_reference = [[0.0] * len(e.completion) for e in examples]
    return Batch(
        examples=examples,
        tokens_BT=pad([e.completion for e in examples], 0, torch.long),
        mask_BT=pad([e.mask for e in examples], False, torch.bool),
        behaviour_BT=pad([e.behaviour for e in examples], 0.0, dtype),
        reference_BT=pad([e.reference or n for e, n in zip(examples, no_reference, strict=True)], 0.0, dtype),
        has_reference_B=column([e.reference is not None for e in examples], torch.bool),
        advantage_B=column([e.advantage for e in examples], dtype),
        success_B=column([e.success for e in examples], torch.bool),
        group_B=column([e.group for e in examples], torch.long),
    )


class Scorer:
    """All that an objective sees of the model: log-probs, entropies and divergences of the batch's own tokens.

    ``student`` and ``teacher`` are casts (see :data:`Cast`).  Gradient flows through the role in ``train`` and
    through no other.  ``chunk_tokens`` bounds how many tokens reach the head at once (None: all); with a gradient
    each chunk is recomputed in the backward pass, so its logits are never kept.  With ``share_prefixes`` rows that
    begin alike share one pass over their beginning; without it each row is computed alone, which is the reference.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        student: Cast,
        teacher: Cast,
        train: Role | None,
        temperature: float,
        chunk_tokens: int | None,
        share_prefixes: bool = False,
    ):
        self._batch = batch
        self._cast: dict[Role, Cast] = {"student": student, "teacher": teacher}
        self._train = train
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._share_prefixes = share_prefixes
        self._hidden: dict[Role, list[Tensor]] = {}
        self._scores: dict[Role, tuple[Tensor, Tensor]] = {}

    def logprobs(self, role: Role) -> Tensor:
        """log p of the batch's tokens [B,T] under a role, 0 where masked."""
        return self._token_scores(role)[0]

    def entropy(self, role: Role) -> Tensor:
        """Entropy [B,T] in nats under a role, without gradient, 0 where masked."""
        return self._token_scores(role)[1]

    def divergence(self, *, alpha: float, top_k: int | None = None, tail: bool = True) -> Divergence:
        """:func:`vpd.losses.divergence` between student and teacher [B,T], and what falls off on the way."""

        def compare(tokens_N: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
            split = len(self._cast["student"])
            student_NV = self._logits("student", hidden[:split])
            teacher_NV = self._logits("teacher", hidden[split:])
            value_N = losses.divergence(student_NV, teacher_NV, alpha=alpha, top_k=top_k, tail=tail)
            with torch.no_grad():
                by_products = (
                    losses.token_logprobs(student_NV, tokens_N),
                    losses.token_logprobs(teacher_NV, tokens_N),
                    losses.entropy(student_NV),
                    losses.entropy(teacher_NV),
                )
            return (value_N, *by_products)

        hidden = [*self._states("student"), *self._states("teacher")]
        value, *by_products = self._in_chunks(compare, hidden)
        return Divergence(value, *(tensor.detach() for tensor in by_products))

    def _token_scores(self, role: Role) -> tuple[Tensor, Tensor]:
        if role not in self._scores:

            def score(tokens_N: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
                logits_NV = self._logits(role, hidden)
                with torch.no_grad():
                    entropy_N = losses.entropy(logits_NV)
                return losses.token_logprobs(logits_NV, tokens_N), entropy_N

            logprobs_BT, entropy_BT = self._in_chunks(score, self._states(role))
            self._scores[role] = (logprobs_BT, entropy_BT.detach())
        return self._scores[role]

    def _states(self, role: Role) -> list[Tensor]:
        """The N hidden states that predict the batch's tokens, [N,H] for each module of the role's cast."""
        if role not in self._hidden:
            states = []
            for model, _ in self._cast[role]:
                layout = self._layout(role, model)
                with torch.set_grad_enabled(torch.is_grad_enabled() and role == self._train):
                    hidden = model.base_model(**layout.inputs, use_cache=False).last_hidden_state
                    states.append(hidden[layout.pack_N, layout.place_N])
            self._hidden[role] = states
        return self._hidden[role]

    def _layout(self, role: Role, model: Any) -> Layout:
        examples = self._batch.examples
        prompts = [example.prompt if role == "student" else example.teacher_prompt for example in examples]
        known = [prompt for prompt in prompts if prompt is not None]
        if len(known) != len(prompts):
            raise ValueError("a row without a teacher's prompt reached a teacher pass; leave it out of the update")
        weight = next(model.parameters())
        return lay_out(
            known,
            [example.completion for example in examples],
            [example.mask for example in examples],
            hidden_size=model.config.get_text_config().hidden_size if self._share_prefixes else None,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _logits(self, role: Role, hidden: Sequence[Tensor]) -> Tensor:
        """Logits [n,V] of one chunk in at least fp32, divided by the temperature."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and role == self._train):
            total: Tensor | None = None
            for (model, share), states_NH in zip(self._cast[role], hidden, strict=True):
                logits = model.get_output_embeddings()(states_NH)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * (share / self._temperature)
                total = logits if total is None else total + logits
        assert total is not None, "a role has no model"
        return total

    def _in_chunks(self, function: Callable[..., tuple[Tensor, ...]], hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Apply ``function(tokens_n, *hidden_n)`` to chunks of the N tokens and put the results back as [B,T]."""
        tokens_N = self._batch.tokens_BT[self._batch.mask_BT]
        size = self._chunk_tokens or max(len(tokens_N), 1)
        keep = torch.is_grad_enabled() and self._train is not None
        parts = []
        for start in range(0, max(len(tokens_N), 1), size):
            arguments = [tokens_N[start : start + size], *(states[start : start + size] for states in hidden)]
            if keep and len(tokens_N) > size:
                parts.append(checkpoint(function, *arguments, use_reentrant=False))
            else:
                parts.append(function(*arguments))
        mask_BT = self._batch.mask_BT
        results = []
        for column in zip(*parts, strict=True):
            flat_N = torch.cat(column)
            results.append(
                torch.zeros(mask_BT.shape, dtype=flat_N.dtype, device=flat_N.device).masked_scatter(mask_BT, flat_N)
            )
        return tuple(results)
