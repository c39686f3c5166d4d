"""From hidden states to log-probs, entropies and divergences; the only place that divides by the temperature.

Dimension legend: B rows, T longest completion, V vocabulary, H hidden size, K likeliest tokens of a remote teacher,
N completion tokens of the batch where the mask is True (in row-major order), n tokens of a chunk or block.

Only the N hidden states that predict those tokens reach the head (:mod:`vpd.model.packing` says where they stand), in
chunks (:mod:`vpd.model.head`), so that no [B,T,V] tensor is ever whole.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vpd import losses
from vpd.model import head
from vpd.model.batch import Batch
from vpd.model.passes import LearnerPath
from vpd.model.roles import LogitMixture, ModelPasses, Role

__all__ = ["Divergence", "LogitMixture", "Role", "Scorer"]

Columns: TypeAlias = tuple[Tensor, ...]


class Divergence(NamedTuple):
    """A divergence and what the same pass yields besides, all [B,T], 0 where masked; only ``value`` has a gradient."""

    value: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


class Scorer:
    """All that an objective sees of the model: log-probs, entropies and divergences of the batch's own tokens.

    ``student`` and ``teacher`` say whose logits play each role.  Gradient flows through the role in ``train`` and
    through no other.  ``chunk_tokens`` bounds how many tokens reach the head at once (None: all).  ``analytic``
    gradients of the head (:mod:`vpd.model.head`) give the same numbers faster where it is one matrix; without them
    autograd recomputes each chunk.  ``path`` says which rows are computed together (:mod:`vpd.model.passes`).
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
        path: LearnerPath = "padded",
        analytic: bool = False,
    ):
        self._batch = batch
        self._train = train
        self._chunk_tokens = chunk_tokens
        self._analytic = analytic
        self._passes = ModelPasses(
            batch,
            {"student": student, "teacher": teacher},
            train=train,
            temperature=temperature,
            path=path,
        )
        self._scores: dict[Role, tuple[Tensor, Tensor]] = {}
        self._row_weight_B: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that models have computed for this batch so far, padding included, all passes together."""
        return self._passes.tokens

    @property
    def padding(self) -> int:
        """How many of :attr:`tokens` were padding."""
        return self._passes.padding

    def for_term(self, row_weight_B: Tensor) -> "Scorer":
        """This scorer for one term of the loss, whose weight of each row [B] is known.

        It shares everything that was computed.  A :meth:`divergence` of it forms its gradient in the forward pass.
        """
        scorer = copy.copy(self)
        scorer._row_weight_B = row_weight_B
        return scorer

    def logprobs(self, role: Role) -> Tensor:
        """log p of the batch's tokens [B,T] under a role, 0 where masked.

        Raises ValueError for the teacher of rows that carry no teacher's prompt.
        """
        return self._token_scores(role)[0]

    def entropy(self, role: Role) -> Tensor:
        """Entropy [B,T] in nats under a role, without gradient, 0 where masked.  Raises as :meth:`logprobs`."""
        return self._token_scores(role)[1]

    def of_tokens(self, role: Role, function: Callable[..., Tensor], *inputs_BTx: Tensor) -> Tensor:
        """``function(log-probs [n,V], tokens [n], *inputs [n,...])``, which is [n,C], of every token [B,T,C].

        It is 0 where masked.  Without gradient, a chunk of n tokens at a time.  Raises as :meth:`logprobs`.
        """
        mask_BT, tokens_N = self._batch.mask_BT, self._tokens()
        hidden = self._passes.hidden(role)
        columns = [*hidden, tokens_N, *(of_BTx[mask_BT] for of_BTx in inputs_BTx)]
        size = self._chunk_tokens or max(len(tokens_N), 1)
        parts: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, max(len(tokens_N), 1), size):
                of_chunk = [column[start : start + size] for column in columns]
                logits_nV = self._passes.logits(role, of_chunk[: len(hidden)])
                parts.append(function(torch.log_softmax(logits_nV, -1), *of_chunk[len(hidden) :]))
        values_NC = torch.cat(parts)
        values_BTC = values_NC.new_zeros((*mask_BT.shape, values_NC.shape[1]))
        values_BTC[mask_BT] = values_NC
        return values_BTC

    def divergence(
        self, *, alpha: float, top_k: int | None = None, tail: bool = True, importance_clip: float | None = None
    ) -> Divergence:
        """:func:`vpd.losses.divergence` between student and teacher [B,T].

        Where the rows carry a remote teacher's top-k log-probs, the two are compared on the teacher's K tokens
        (:func:`vpd.losses.divergence_from_top_k`); ``top_k`` is then None or that K.

        For one term (:meth:`for_term`) the gradient is formed in the forward pass, for a loss that multiplies each
        value by the row's weight and by the importance ratio clipped at ``importance_clip`` (None: not clipped).  The
        gradient of a loss that does otherwise, or without a term, is right too, but the logits are computed twice.
        """
        teacher = self._compared_teacher(alpha, top_k, tail)
        if self._analytic and self._train != "teacher" and self._passes.has_plain_head("student"):
            value, *aux = self._divergence_by_head(teacher, importance_clip)
        else:
            value, *aux = self._divergence_by_autograd(teacher)
        return Divergence(value, *(tensor.detach() for tensor in aux))

    def _compared_teacher(self, alpha: float, top_k: int | None, tail: bool) -> "_LocalTeacher | _TopKTeacher":
        known = self._batch.teacher_top_k
        if known is None:
            return _LocalTeacher(self._passes, {"alpha": alpha, "top_k": top_k, "tail": tail})
        columns = (known.ids_BTK[self._batch.mask_BT], known.logprobs_BTK[self._batch.mask_BT])
        if top_k not in (None, columns[0].shape[-1]):
            raise ValueError(
                f"top_k is {top_k}, but the remote teacher gave its {columns[0].shape[-1]} likeliest tokens"
            )
        return _TopKTeacher(columns, {"alpha": alpha, "tail": tail})

    def _divergence_by_head(
        self, teacher: "_LocalTeacher | _TopKTeacher", importance_clip: float | None
    ) -> tuple[Tensor, ...]:
        weight_of = None if self._row_weight_B is None else self._loss_weights(self._row_weight_B, importance_clip)
        tokens_N = self._tokens()

        def of_chunk(rows: slice) -> head.BlockFunction:
            compare = teacher.compare_with_grad(rows)

            def of_block(student_nV: Tensor, place: slice, wanted: bool) -> head.BlockResult:
                found = compare(student_nV, tokens_N[rows][place], place)
                weight_n = None if weight_of is None else weight_of(found.aux[0], rows, place)
                return head.BlockResult(found.value_N, found.gradient_NV if wanted else None, found.aux, weight_n)

            return of_block

        return self._by_head("student", of_chunk, weights_known=weight_of is not None)

    def _divergence_by_autograd(self, teacher: "_LocalTeacher | _TopKTeacher") -> tuple[Tensor, ...]:
        student = self._passes.hidden("student")

        def compare(tokens_n: Tensor, *columns_n: Tensor) -> Columns:
            student_nV = self._passes.logits("student", columns_n[: len(student)])
            value_n, *teacher_aux = teacher.compare(student_nV, tokens_n, columns_n[len(student) :])
            with torch.no_grad():
                student_aux = losses.token_logprobs(student_nV, tokens_n), losses.entropy(student_nV)
            return value_n, student_aux[0], teacher_aux[0], student_aux[1], teacher_aux[1]

        return self._in_chunks(compare, [*student, *teacher.columns])

    def _token_scores(self, role: Role) -> tuple[Tensor, Tensor]:
        if role not in self._scores:
            if self._analytic and self._passes.has_plain_head(role):
                logprobs_BT, entropy_BT = self._token_scores_by_head(role)
            else:
                logprobs_BT, entropy_BT = self._token_scores_by_autograd(role)
            self._scores[role] = (logprobs_BT, entropy_BT.detach())
        return self._scores[role]

    def _token_scores_by_head(self, role: Role) -> tuple[Tensor, ...]:
        tokens_N = self._tokens()

        def of_chunk(rows: slice) -> head.BlockFunction:
            def of_block(logits_nV: Tensor, place: slice, wanted: bool) -> head.BlockResult:
                found = losses.logprobs_and_grad(logits_nV, tokens_N[rows][place])
                return head.BlockResult(found.value_N, found.gradient_NV if wanted else None, found.aux)

            return of_block

        return self._by_head(role, of_chunk, weights_known=False)

    def _token_scores_by_autograd(self, role: Role) -> tuple[Tensor, ...]:
        def score(tokens_n: Tensor, *hidden_n: Tensor) -> Columns:
            logits_nV = self._passes.logits(role, hidden_n)
            with torch.no_grad():
                entropy_n = losses.entropy(logits_nV)
            return losses.token_logprobs(logits_nV, tokens_n), entropy_n

        return self._in_chunks(score, self._passes.hidden(role))

    def _by_head(self, role: Role, function: head.ChunkFunction, *, weights_known: bool) -> tuple[Tensor, ...]:
        """:func:`vpd.model.head.apply_in_chunks` on the one module that plays ``role``, results as [B,T]."""
        inputs = self._passes.head_of(role)
        chunk = self._chunk_tokens or max(len(inputs.hidden_NH), 1)
        results = head.apply_in_chunks(inputs, function, chunk=chunk, weights_known=weights_known)
        return tuple(self._to_BT(column_N) for column_N in results)

    def _loss_weights(self, row_weight_B: Tensor, clip: float | None) -> Callable[[Tensor, slice, slice], Tensor]:
        """What the loss multiplies the divergence of some tokens by, from their log-probs under the student."""
        batch = self._batch
        row_N = batch.mask_BT.nonzero()[:, 0]
        weight_N = row_weight_B.to(batch.reference_BT)[row_N]
        reference_N, has_reference_N = batch.reference_BT[batch.mask_BT], batch.has_reference_B[row_N]

        def weight_of(logprobs_n: Tensor, rows: slice, place: slice) -> Tensor:
            reference_n = torch.where(has_reference_N[rows][place], reference_N[rows][place], logprobs_n)
            return weight_N[rows][place] * losses.importance_ratio(logprobs_n, reference_n, clip=clip)

        return weight_of

    def _in_chunks(self, function: Callable[..., Columns], columns: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``function(tokens_n, *columns_n)`` of chunks of the N tokens, results as [B,T]; autograd recomputes each."""
        tokens_N = self._tokens()
        size = self._chunk_tokens or max(len(tokens_N), 1)
        recompute = torch.is_grad_enabled() and self._train is not None and len(tokens_N) > size
        parts: list[Columns] = []
        for start in range(0, max(len(tokens_N), 1), size):
            arguments = [column[start : start + size] for column in (tokens_N, *columns)]
            parts.append(checkpoint(function, *arguments, use_reentrant=False) if recompute else function(*arguments))
        return tuple(self._to_BT(torch.cat(column)) for column in zip(*parts, strict=True))

    def _tokens(self) -> Tensor:
        return self._batch.tokens_BT[self._batch.mask_BT]

    def _to_BT(self, flat_N: Tensor) -> Tensor:
        """Numbers of the N tokens in their places [B,T], 0 elsewhere."""
        mask_BT = self._batch.mask_BT
        return torch.zeros(mask_BT.shape, dtype=flat_N.dtype, device=flat_N.device).masked_scatter(mask_BT, flat_N)


class _LocalTeacher:
    """A teacher whose modules are here: ``columns`` are its hidden states [N,H], one for each module."""

    def __init__(self, passes: ModelPasses, options: dict[str, Any]):
        self._passes = passes
        self._options = options
        self.columns: Sequence[Tensor] = passes.hidden("teacher")

    def compare(self, student_nV: Tensor, tokens_n: Tensor, columns_n: Sequence[Tensor]) -> Columns:
        """The divergence, which autograd differentiates, and the teacher's log-probs and entropy, all [n]."""
        teacher_nV = self._passes.logits("teacher", columns_n)
        value_n = losses.divergence(student_nV, teacher_nV, **self._options)
        with torch.no_grad():
            return value_n, losses.token_logprobs(teacher_nV, tokens_n), losses.entropy(teacher_nV)

    def compare_with_grad(self, rows: slice) -> Callable[[Tensor, Tensor, slice], losses.ValueAndGrad]:
        """The divergence of a block of these tokens and its gradient; the teacher's logits are made once a chunk."""
        teacher_nV = self._passes.logits("teacher", [hidden_NH[rows] for hidden_NH in self.columns])
        return lambda student_nV, tokens_n, place: losses.divergence_and_grad(
            student_nV, teacher_nV[place], tokens_n, **self._options
        )


class _TopKTeacher:
    """A remote teacher: ``columns`` are its K likeliest tokens and their log-probs, both [N,K]."""

    def __init__(self, columns: tuple[Tensor, Tensor], options: dict[str, Any]):
        self._options = options
        self.columns: Sequence[Tensor] = columns

    def compare(self, student_nV: Tensor, tokens_n: Tensor, columns_n: Sequence[Tensor]) -> Columns:
        """As :meth:`_LocalTeacher.compare`."""
        ids_nK, logprobs_nK = columns_n
        value_n = losses.divergence_from_top_k(student_nV, ids_nK, logprobs_nK, **self._options)
        return value_n, *losses.top_k_statistics(ids_nK, logprobs_nK, tokens_n, student_nV.shape[-1])

    def compare_with_grad(self, rows: slice) -> Callable[[Tensor, Tensor, slice], losses.ValueAndGrad]:
        """As :meth:`_LocalTeacher.compare_with_grad`."""
        ids_nK, logprobs_nK = (column[rows] for column in self.columns)
        return lambda student_nV, tokens_n, place: losses.divergence_from_top_k_and_grad(
            student_nV, ids_nK[place], logprobs_nK[place], tokens_n, **self._options
        )
