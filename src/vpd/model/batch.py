"""From examples to the tensors of one micro-batch.

Dimension legend: B rows, T longest completion, K likeliest tokens of a remote teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vpd.types import Example, TopKLogprobs

#: What a row knows of its teacher: nothing, the prompt that it reads, or its top-k log-probs.
TeacherForm: TypeAlias = Literal["none", "prompt", "top_k"]


class TopK(NamedTuple):
    """A remote teacher's K likeliest tokens and their log-probs [B,T,K], padded right to T."""

    ids_BTK: Tensor
    logprobs_BTK: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch.  ``_BT`` fields are padded right to T; ``examples`` are the rows as they came.

    ``teacher_top_k`` is what remote teachers said, None unless every row has it; a learner never mixes rows that know
    their teacher in different forms (:func:`teacher_form`).
    """

    examples: Sequence[Example]
    tokens_BT: Tensor
    mask_BT: Tensor
    behaviour_BT: Tensor
    reference_BT: Tensor
    has_reference_B: Tensor
    advantage_B: Tensor
    success_B: Tensor
    by_teacher_B: Tensor
    by_data_B: Tensor
    teacher_top_k: TopK | None

    @property
    def has_teacher(self) -> bool:
        """Whether every row has a teacher's prompt or a teacher's log-probs."""
        return all(example.teacher is not None for example in self.examples)

    def reference_or(self, logprobs_BT: Tensor) -> Tensor:
        """The reference log-probs [B,T]; a row that carries none is its own reference (ratio exactly 1)."""
        return torch.where(self.has_reference_B[:, None], self.reference_BT, logprobs_BT.detach())


def teacher_form(example: Example) -> TeacherForm:
    """What this row knows of its teacher; rows of one batch must agree."""
    if example.teacher is None:
        return "none"
    return "top_k" if isinstance(example.teacher, TopKLogprobs) else "prompt"


def collate(examples: Sequence[Example], *, device: torch.device, dtype: torch.dtype) -> Batch:
    """Examples as tensors, floating-point fields in ``dtype``.  Raises ValueError: remote teachers of different K."""
    width = max(len(example.completion) for example in examples)

    def pad(rows: Sequence[Sequence[Any]], fill: Any, kind: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=kind, device=device)

    def column(values: list[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device)

    def top_k() -> TopK | None:
        answers = [e.teacher for e in examples if isinstance(e.teacher, TopKLogprobs)]
        if len(answers) < len(examples):
            return None
        if len({answer.k for answer in answers}) > 1:
            raise ValueError(f"rows of one batch need one K; got {sorted({answer.k for answer in answers})}")
        nothing = (0,) * answers[0].k
        ids_BTK = pad([answer.ids for answer in answers], nothing, torch.long)
        return TopK(ids_BTK, pad([answer.logprobs for answer in answers], nothing, dtype))

    return Batch(
        examples=examples,
        tokens_BT=pad([e.completion for e in examples], 0, torch.long),
        mask_BT=pad([e.mask for e in examples], False, torch.bool),
        behaviour_BT=pad([e.behaviour for e in examples], 0.0, dtype),
        reference_BT=pad([e.reference or (0.0,) * len(e.completion) for e in examples], 0.0, dtype),
        has_reference_B=column([e.reference is not None for e in examples], torch.bool),
        advantage_B=column([e.advantage for e in examples], dtype),
        success_B=column([e.success for e in examples], torch.bool),
        by_teacher_B=column([e.by_teacher for e in examples], torch.bool),
        by_data_B=column([e.by_data for e in examples], torch.bool),
        teacher_top_k=top_k(),
    )
