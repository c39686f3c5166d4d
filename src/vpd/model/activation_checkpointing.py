"""Activation checkpointing (also called gradient checkpointing): layers keep less and compute it again in the backward
pass.

``full`` keeps each layer's input and repeats the whole layer (Chen et al., arXiv 1604.06174).  ``selective`` keeps the
results of matrix products and attention, which cost the time, and repeats what lies between them (norms, activations,
rotations, copies), which takes the memory.  Gradients are the same either way.
Of the operators of attention below only the CPU's was run here.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vpd.errors import ConfigError
from vpd.model.settings import Checkpointing

#: Whether this transformers says "activation" where older ones said "gradient" checkpointing.
RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")

_aten = torch.ops.aten
COSTLY = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def enable(model: Any, kind: Checkpointing) -> None:
    """Prepare ``model``, which checkpoints inside :func:`active` alone.  Raises ConfigError if it cannot."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, COSTLY)
    if model.supports_gradient_checkpointing:
        if RENAMED:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for layer in _layers(model):
        layer._gradient_checkpointing_func = functools.partial(
            _checkpoint_without_dropout, layer, layer._gradient_checkpointing_func
        )
    if not any(_layers(model)):
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing",
            got=kind,
            do="Set optim.gradient_checkpointing: none.",
        )


@contextlib.contextmanager
def active(model: Any) -> Iterator[None]:
    """Here layers checkpoint.

    Transformers asks each layer's ``training`` flag before it calls the layer; inside the call the flag is False again
    (:func:`_checkpoint_without_dropout`), so that a layer that applies dropout itself applies none.
    Sample outside of it: older transformers ignore the cache of a layer that checkpoints, even without gradients.
    """
    hooks = []
    for layer in _layers(model):
        layer.training = True
        hooks += [layer.register_forward_pre_hook(_without_gradients), layer.register_forward_hook(_ask_again)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in _layers(model):
            layer.training = False


def _without_gradients(layer: Any, inputs: Any) -> None:
    """A pass without gradients (the teacher's) is not checkpointed and needs no flag."""
    if not torch.is_grad_enabled():
        layer.training = False


def _ask_again(layer: Any, inputs: Any, output: Any) -> None:
    layer.training = True


def _checkpoint_without_dropout(layer: Any, checkpoint: Any, forward: Any, *inputs: Any) -> Any:
    """``checkpoint(forward, *inputs)`` with the layer's ``training`` flag off, also when it is computed again."""

    def evaluated(*inputs: Any) -> Any:
        asked, layer.training = layer.training, False
        try:
            return forward(*inputs)
        finally:
            layer.training = asked

    return checkpoint(evaluated, *inputs)


def _layers(model: Any) -> Iterator[Any]:
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return (layer for layer in layers if layer.gradient_checkpointing)
