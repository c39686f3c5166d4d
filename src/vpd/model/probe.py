"""What a model can do, found by trying: which fast paths give its own numbers, and whether it is supported at all."""

from typing import Any

import torch

from vpd.errors import ModelError
from vpd.model import attention
from vpd.model.decoding import decoder_for
from vpd.model.packing import lay_out


@torch.no_grad()
def takes_packed_segments(model: Any, device: torch.device) -> bool:
    """Whether packed rows (:mod:`vpd.model.packing`) give the hidden states of rows that are computed alone.

    Switches the model's attention to :func:`vpd.model.attention.attend` where that is possible.
    """
    if _has_sliding_window(model) or not attention.install(model):
        return False
    rows = [(tuple(range(5)), (1, 2, 3)), ((*range(4), 2), (3, 1))]
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [tuple(token % vocabulary for token in prompt) for prompt, _ in rows]
    completions = [tuple(token % vocabulary for token in completion) for _, completion in rows]
    mask = [[True] * len(completion) for completion in completions]
    hidden = []
    for size in (None, 1 << 20):
        layout = lay_out(prompts, completions, mask, hidden_size=size, device=device, dtype=model.dtype)
        states = model.base_model(**layout.inputs, use_cache=False).last_hidden_state
        hidden.append(states[layout.row_N, layout.place_N])
    return bool((hidden[0] - hidden[1]).norm() <= 1e-2 * hidden[0].norm())


@torch.no_grad()
def decodes_from_shared_prefix(model: Any) -> bool:
    """Whether decoding from shared prompts gives the logits of padded rows (:mod:`vpd.model.decoding`).

    Switches the model's attention to :func:`vpd.model.attention.attend` where that is possible.
    """
    if _has_sliding_window(model) or not attention.install(model):
        return False
    prompts, device = [(1, 2, 0), (1, 2, 0), (2,)], next(model.parameters()).device
    outcomes = []
    for shared in (False, True):
        decoder = decoder_for(model, prompts, shared=shared)
        steps = [decoder.step(torch.tensor([1, 0, 2], device=device))]
        decoder.keep(torch.tensor([1, 2], device=device))
        steps.append(decoder.step(torch.tensor([2, 1], device=device)))
        outcomes.append(torch.cat(steps).float())
    return bool((outcomes[0] - outcomes[1]).norm() <= 1e-2 * outcomes[0].norm())


@torch.no_grad()
def check_head(model: Any, name: str, device: torch.device) -> None:
    """Raise ModelError unless the logits of ``model`` are head(hidden states), which is all that a scorer computes.

    ``name`` is the model's in the message.
    """
    ids = torch.arange(4, device=device)[None]
    whole = model(input_ids=ids, use_cache=False).logits
    ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if whole.shape != ours.shape or not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"the {name} ({type(model).__name__}) changes its logits after the head (soft-capping or scaling)",
            do="Such models are not supported yet; take one whose logits are head(hidden states).",
        )


def _has_sliding_window(model: Any) -> bool:
    return "sliding_attention" in model.config.get_text_config().to_dict().get("layer_types", ())
