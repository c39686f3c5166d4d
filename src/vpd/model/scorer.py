"""From examples to tensors and from hidden states to log-probs: the only place that pads, shifts and divides by
the temperature.

Dimension legend: B rows, T longest completion, V vocabulary, H hidden size, N completion tokens
of the batch that count (the mask's ones, in row-major order).

The hidden state at the token before completion token ``t`` predicts it (:mod:`vpd.model.packing` says where that is).
Only those N states reach the head, in chunks (:mod:`vpd.model.head`), so that no [B,T,V] tensor is ever whole.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vpd import losses
from vpd.model import attention, head
from vpd.model.packing import Layout, lay_out
from vpd.types import Example

Role: TypeAlias = Literal["student", "teacher"]
#: Who plays a role: modules and the share of each in the logits.  One module with share 1, or a lerp of two.
LogitMixture: TypeAlias = tuple[tuple[Any, float], ...]


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

    @property
    def has_teacher(self) -> bool:
        """Whether its rows have a teacher's prompt; a learner never mixes rows that do with rows that do not."""
        return all(example.teacher is not None for example in self.examples)

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
    )


class Scorer:
    """All that an objective sees of the model: log-probs, entropies and divergences of the batch's own tokens.

    ``student`` and ``teacher`` are logit mixtures (see :data:`LogitMixture`).  Gradient flows through the role in
    ``train`` and through no other.  ``chunk_tokens`` bounds how many tokens reach the head at once (None: all).  Two
    options are faster and equal: ``analytic`` gradients of the head (:mod:`vpd.model.head`), and ``share_prefixes``,
    one pass over the tokens that rows begin with alike.  Without them autograd recomputes each chunk and each row is
    computed alone, which is the reference.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        student: LogitMixture,
        teacher: LogitMixture,
        train: Role | None,
        temperature: float,
        chunk_tokens: int | None,
        share_prefixes: bool = False,
        analytic: bool = False,
    ):
        self._batch = batch
        self._mixtures: dict[Role, LogitMixture] = {"student": student, "teacher": teacher}
        self._train = train
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._share_prefixes = share_prefixes
        self._analytic = analytic
        self.computed = {"tokens": 0, "padding": 0}  # that models have computed for this batch, all passes together
        self._row_weight_B: Tensor | None = None
        self._hidden: dict[Role, list[Tensor]] = {}
        self._scores: dict[Role, tuple[Tensor, Tensor]] = {}

    def for_term(self, row_weight_B: Tensor) -> "Scorer":
        """The same scorer, with all that it has computed, for a term that weighs rows by ``row_weight_B`` [B]."""
        view = copy.copy(self)
        view._row_weight_B = row_weight_B
        return view

    def logprobs(self, role: Role) -> Tensor:
        """log p of the batch's tokens [B,T] under a role, 0 where masked."""
        return self._token_scores(role)[0]

    def entropy(self, role: Role) -> Tensor:
        """Entropy [B,T] in nats under a role, without gradient, 0 where masked."""
        return self._token_scores(role)[1]

    def divergence(
        self,
        *,
        alpha: float,
        top_k: int | None = None,
        tail: bool = True,
        importance_clip: float | None = None,
    ) -> Divergence:
        """:func:`vpd.losses.divergence` between student and teacher [B,T], and what falls off on the way.

        Of a scorer made by :meth:`for_term` the gradient is formed in the forward pass: the loss is then expected to
        multiply the value by the row's weight and by the importance ratio clipped at ``importance_clip``.  A loss that
        weighs otherwise is right too, but its logits are made twice.
        """
        options: dict[str, Any] = {"alpha": alpha, "top_k": top_k, "tail": tail}
        hidden = [*self._states("student"), *self._states("teacher")]
        split = len(self._mixtures["student"])
        tokens_N = self._tokens()

        def compare(tokens_n: Tensor, *hidden_n: Tensor) -> tuple[Tensor, ...]:
            student_nV, teacher_nV = (
                self._logits("student", hidden_n[:split]),
                self._logits("teacher", hidden_n[split:]),
            )
            value_n = losses.divergence(student_nV, teacher_nV, **options)
            with torch.no_grad():
                aux = (
                    losses.token_logprobs(student_nV, tokens_n),
                    losses.token_logprobs(teacher_nV, tokens_n),
                    losses.entropy(student_nV),
                    losses.entropy(teacher_nV),
                )
            return (value_n, *aux)

        def open_chunk(rows: slice) -> head.MeasureBlock:
            teacher_nV = self._logits("teacher", [states[rows] for states in hidden[split:]])

            def measure(student_nV: Tensor, place: slice, wanted: bool) -> head.Measured:
                got = losses.divergence_and_grad(student_nV, teacher_nV[place], tokens_N[rows][place], **options)
                weight_n = None if announced is None else announced(got.aux[0], rows, place)
                return head.Measured(got.value_N, got.gradient_NV if wanted else None, got.aux, weight_n)

            return measure

        if self._analytic and self._train != "teacher":
            announced = None if self._row_weight_B is None else self._announced(self._row_weight_B, importance_clip)
            value, *aux = self._by_head("student", open_chunk, weights_known=announced is not None)
        else:
            value, *aux = self._in_chunks(compare, hidden)
        return Divergence(value, *(tensor.detach() for tensor in aux))

    def _token_scores(self, role: Role) -> tuple[Tensor, Tensor]:
        if role in self._scores:
            return self._scores[role]
        tokens_N = self._tokens()

        def score(tokens_n: Tensor, *hidden_n: Tensor) -> tuple[Tensor, ...]:
            logits_nV = self._logits(role, hidden_n)
            with torch.no_grad():
                entropy_n = losses.entropy(logits_nV)
            return losses.token_logprobs(logits_nV, tokens_n), entropy_n

        def open_chunk(rows: slice) -> head.MeasureBlock:
            def measure(logits_nV: Tensor, place: slice, wanted: bool) -> head.Measured:
                got = losses.logprobs_and_grad(logits_nV, tokens_N[rows][place])
                return head.Measured(got.value_N, got.gradient_NV if wanted else None, got.aux)

            return measure

        if self._analytic and len(self._mixtures[role]) == 1:
            logprobs_BT, entropy_BT = self._by_head(role, open_chunk, weights_known=False)
        else:
            logprobs_BT, entropy_BT = self._in_chunks(score, self._states(role))
        self._scores[role] = (logprobs_BT, entropy_BT.detach())
        return self._scores[role]

    def _by_head(self, role: Role, open_chunk: head.MeasureChunk, *, weights_known: bool) -> tuple[Tensor, ...]:
        """:func:`vpd.model.head.measure` on the one module that plays ``role``, results as [B,T]."""
        ((model, share),) = self._mixtures[role]
        (states_NH,) = self._states(role)
        weight_VH = model.get_output_embeddings().weight
        if not torch.is_grad_enabled() or role != self._train:
            states_NH, weight_VH = states_NH.detach(), weight_VH.detach()
        chunk, scale = self._chunk_tokens or max(len(states_NH), 1), share / self._temperature
        results = head.measure(states_NH, weight_VH, open_chunk, chunk=chunk, scale=scale, weights_known=weights_known)
        return tuple(self._spread(column_N) for column_N in results)

    def _announced(self, weight_B: Tensor, clip: float | None) -> Callable[[Tensor, slice, slice], Tensor]:
        """What the loss multiplies the divergence of some tokens by, from their log-probs under the student."""
        batch = self._batch
        row_N = batch.mask_BT.nonzero()[:, 0]
        weight_N = weight_B.to(batch.reference_BT)[row_N]
        reference_N, has_reference_N = batch.reference_BT[batch.mask_BT], batch.has_reference_B[row_N]

        def weigh(logprobs_n: Tensor, rows: slice, place: slice) -> Tensor:
            reference_n = torch.where(has_reference_N[rows][place], reference_N[rows][place], logprobs_n)
            return weight_N[rows][place] * losses.importance_ratio(logprobs_n, reference_n, clip=clip)

        return weigh

    def _states(self, role: Role) -> list[Tensor]:
        """The N hidden states that predict the batch's tokens, [N,H] for each module of the role."""
        if role not in self._hidden:
            states = []
            for model, _ in self._mixtures[role]:
                layout = self._layout(role, model)
                self.computed["tokens"] += layout.inputs["input_ids"].numel()
                self.computed["padding"] += layout.padding
                with torch.set_grad_enabled(torch.is_grad_enabled() and role == self._train):
                    hidden = model.base_model(**layout.inputs, use_cache=False).last_hidden_state
                    states.append(hidden[layout.row_N, layout.place_N])
            self._hidden[role] = states
        return self._hidden[role]

    def _layout(self, role: Role, model: Any) -> Layout:
        examples = self._batch.examples
        prompts = [example.prompt if role == "student" else example.teacher_prompt for example in examples]
        known = [prompt for prompt in prompts if prompt is not None]
        if len(known) != len(prompts):
            raise ValueError("a row without a teacher's prompt reached a teacher pass; leave it out of the update")
        weight = next(model.parameters())
        shares = self._share_prefixes and attention.is_installed(model)
        return lay_out(
            known,
            [example.completion for example in examples],
            [example.mask for example in examples],
            hidden_size=model.config.get_text_config().hidden_size if shares else None,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _logits(self, role: Role, hidden: Sequence[Tensor]) -> Tensor:
        """Logits [n,V] of one chunk in at least fp32, divided by the temperature."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and role == self._train):
            total: Tensor | None = None
            for (model, share), states_NH in zip(self._mixtures[role], hidden, strict=True):
                logits = model.get_output_embeddings()(states_NH)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * (share / self._temperature)
                total = logits if total is None else total + logits
        assert total is not None, "a role has no model"
        return total

    def _tokens(self) -> Tensor:
        """The N tokens that count."""
        return self._batch.tokens_BT[self._batch.mask_BT]

    def _in_chunks(self, function: Callable[..., tuple[Tensor, ...]], hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Apply ``function(tokens_n, *hidden_n)`` to chunks of the N tokens; results as [B,T]."""
        tokens_N = self._tokens()
        size = self._chunk_tokens or max(len(tokens_N), 1)
        keep = torch.is_grad_enabled() and self._train is not None
        parts = []
        for start in range(0, max(len(tokens_N), 1), size):
            arguments = [tokens_N[start : start + size], *(states[start : start + size] for states in hidden)]
            if keep and len(tokens_N) > size:
                parts.append(checkpoint(function, *arguments, use_reentrant=False))
            else:
                parts.append(function(*arguments))
        return tuple(self._spread(torch.cat(column)) for column in zip(*parts, strict=True))

    def _spread(self, flat_N: Tensor) -> Tensor:
        """Numbers of the N tokens back in their places [B,T], 0 elsewhere."""
        mask_BT = self._batch.mask_BT
        return torch.zeros(mask_BT.shape, dtype=flat_N.dtype, device=flat_N.device).masked_scatter(mask_BT, flat_N)
