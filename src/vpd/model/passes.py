"""The passes of a learner: the hidden states that predict the tokens of some rows, along one of three paths.

``packed``: rows that share a prefix compute it once and nothing is padded (:mod:`vpd.model.packing`).  ``padded``: each
row has its own tokens, padded right to the longest.  ``by_length``: rows of one length at a time, for models whose rows
depend on the longest one beside them (RoPE that is scaled by length).
:func:`vpd.model.probe.learner_path` finds the first of these that gives a model's own numbers.

Dimension legend: H hidden size, N completion tokens where the mask is True (row-major order).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vpd.model import attention, forward
from vpd.model.packing import Layout, lay_out
from vpd.types import Tokens

LearnerPath: TypeAlias = Literal["packed", "padded", "by_length"]


@dataclass(frozen=True)
class Pass:
    """Hidden states [N,H]; how many ``tokens`` the model computed for them, and how many of these were ``padding``."""

    hidden_NH: Tensor
    tokens: int
    padding: int


def last_hidden(
    model: Any,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    masks: Sequence[Sequence[bool]],
    *,
    path: LearnerPath,
    prepare: Callable[[Layout], Layout] | None = None,
) -> Pass:
    """The last hidden states that predict the completions' tokens.

    ``prepare`` sees every layout first (the probe counts calls of attention).
    """
    if path == "by_length":
        return _by_length(model, prompts, completions, masks)
    weight = next(model.parameters())
    packed = path == "packed" and attention.is_installed(model)
    layout = lay_out(
        prompts,
        completions,
        masks,
        hidden_size=model.get_output_embeddings().weight.shape[1] if packed else None,
        device=weight.device,
        dtype=weight.dtype,
    )
    layout = layout if prepare is None else prepare(layout)
    states_KLH = forward.hidden_states(model, **layout.inputs)
    hidden_NH = states_KLH[layout.row_N, layout.place_N]
    return Pass(hidden_NH, layout.inputs["input_ids"].numel(), layout.padding)


def _by_length(
    model: Any, prompts: Sequence[Tokens], completions: Sequence[Tokens], masks: Sequence[Sequence[bool]]
) -> Pass:
    """Rows of one length at a time, from their ids alone; their hidden states in the order of the rows."""

    def only_ids(layout: Layout) -> Layout:
        """Nothing is padded: the model's own positions and mask are right, which some number in another way."""
        return dataclasses.replace(layout, inputs={"input_ids": layout.inputs["input_ids"]})

    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    counts, tokens = [sum(mask) for mask in masks], 0
    parts: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        forward.forget_lengths(model)
        chosen = (_chosen(values, rows) for values in (prompts, completions, masks))
        done = last_hidden(model, *chosen, path="padded", prepare=only_ids)
        parts |= zip(rows, done.hidden_NH.split([counts[row] for row in rows]), strict=True)
        tokens += done.tokens
    return Pass(torch.cat([parts[row] for row in range(len(lengths))]), tokens, 0)


def _chosen(values: Sequence[Any], rows: Iterable[int]) -> list[Any]:
    return [values[row] for row in rows]
