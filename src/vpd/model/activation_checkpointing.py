"""Gradient checkpointing: layers that forget what they computed and compute it again in the backward pass.

``full`` keeps each layer's input and repeats the whole layer (Chen et al., arXiv 1604.06174).  ``selective`` keeps the
results of matrix products and attention, which cost the time, and repeats what lies between them (norms, activations,
rotations, copies), which takes the memory.  Gradients are the same either way.
Of the operators of attention below only the CPU's was run here.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from vpd.errors import ConfigError

Checkpointing: TypeAlias = Literal["none", "selective", "full"]

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
    """Prepare ``model``; nothing is forgotten but inside :func:`active`.  Raises ConfigError if it cannot."""
    if kind == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, COSTLY)
    if model.supports_gradient_checkpointing:
        with warnings.catch_warnings():  # its new name came in a later transformers than the oldest that is allowed
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if not any(_layers(model)):
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing",
            got=kind,
            do="Set optim.gradient_checkpointing: none.",
        )


@contextlib.contextmanager
def active(model: Any) -> Iterator[None]:
    """Here layers forget.  Transformers asks each layer's ``training``; what is inside a layer stays as it was, so that
    dropout stays off."""
    for layer in _layers(model):
        layer.training = True
    try:
        yield
    finally:
        for layer in _layers(model):
            layer.training = False


def _layers(model: Any) -> Iterator[Any]:
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return (layer for layer in layers if layer.gradient_checkpointing)
