"""One call of a model's layers: hidden states in, hidden states out, whatever the model calls its arguments.

Dimension legend: B rows, T tokens of a row, H hidden size, V vocabulary, N tokens that logits are wanted of.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from vpd.errors import ModelError
from vpd.model import head, lora

#: Names of a cache in the models of transformers, newest first.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
#: What a model may leave out: it has no positions, or makes its own mask.
OPTIONAL = ("position_ids", "attention_mask", "use_cache")
#: What models raise when they are called in a way that they were not written for.
RAISED = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError, AssertionError,
    ModelError,
)  # fmt: skip


def hidden_states(model: Any, cache: Any = None, **inputs: Any) -> Tensor:
    """What the head reads [B,T,H] in a pass; ``cache`` is read and extended, None: a pass without one.

    These are the last hidden states, or what the model makes of them before the head (BERT, ModernBERT).
    Raises ModelError if the model has no cache, or does not return its last hidden states.
    """
    if cache is not None:
        inputs[cache_name(model)] = cache
    inputs = accepted(model, use_cache=cache is not None, **inputs)
    if _transforms_states(model):
        with _read_by_head(model) as read:
            model(**inputs)
        return read[0]
    states = _layers(model)(**inputs).get("last_hidden_state")
    if states is None:
        raise ModelError(f"{type(model).__name__} does not return its last hidden states")
    dtype = model.get_output_embeddings().weight.dtype
    return states.to(dtype) if states.dtype.itemsize > dtype.itemsize else states  # Mamba adds up in fp32


def logits_of(model: Any, hidden_NH: Tensor) -> Tensor:
    """The model's logits [N,V] of hidden states, in their own dtype."""
    return head.logit_function(model)(model.get_output_embeddings()(hidden_NH))


def accepted(model: Any, **inputs: Any) -> dict[str, Any]:
    """``inputs`` without those of :data:`OPTIONAL` that the model's layers have no argument for."""
    known = _known(model)
    return {name: value for name, value in inputs.items() if name in known or name not in OPTIONAL}


def cache_name(model: Any) -> str:
    """What the model calls its cache.  Raises ModelError if it has none."""
    known = _known(model)
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise ModelError(f"{type(model).__name__} has no cache")


#: Whether layers stand between a model's last hidden states and its head; decided by its parameters, once.
_TRANSFORMS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _transforms_states(model: Any) -> bool:
    whole = model.model if isinstance(model, lora.View) else model
    if whole not in _TRANSFORMS:
        known = {id(p) for part in (_layers(whole), whole.get_output_embeddings()) for p in part.parameters()}
        _TRANSFORMS[whole] = any(id(parameter) not in known for parameter in whole.parameters())
    return _TRANSFORMS[whole]


@contextlib.contextmanager
def _read_by_head(model: Any) -> Iterator[list[Tensor]]:
    """What the head is given by the passes made here; it passes that on and computes no logits."""
    own, read = model.get_output_embeddings(), []

    def keep(states_BTH: Tensor) -> Tensor:
        read.append(states_BTH)
        return states_BTH

    own.forward = keep
    try:
        yield read
    finally:
        del own.forward


def _layers(model: Any) -> Any:
    """What is called for hidden states.  Llama 4 has another name for its layers than it says."""
    return model.model if model.base_model is model and hasattr(model, "model") else model.base_model


def _known(model: Any) -> frozenset[str]:
    """The arguments of the model's layers; where these only pass them on, those of the whole model."""
    whole = model.model if isinstance(model, lora.View) else model
    return _parameters(type(_layers(whole)).forward) - {"args", "kwargs"} or _parameters(type(whole).forward)


def longest_input(model: Any) -> int | None:
    """The longest row that the configuration allows, in tokens; None where it sets no limit (Mamba, ALiBi, XLNet)."""
    config = model.config.get_text_config()
    longest = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
    return int(longest) if longest is not None and longest > 0 else None


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def rope_types(model: Any) -> set[str]:
    """The kinds of rotary position embedding in the configuration of ``model`` (``default``, ``longrope``, ...)."""

    def found(value: Any) -> set[str]:
        if not isinstance(value, dict):
            return set()
        return set().union(*(found(part) for part in value.values())) | (
            {value["rope_type"]} if isinstance(value.get("rope_type"), str) else set()
        )

    return found(model.config.get_text_config().to_dict())


def forget_lengths(model: Any) -> None:
    """Undo what dynamic RoPE remembers of the longest row it has seen; a short pass does not, in every transformers."""
    if "dynamic" not in rope_types(model):
        return
    for module in model.modules():
        for name, original in list(vars(module).items()) + list(module.named_buffers(recurse=False)):
            if not name.endswith("original_inv_freq"):
                continue
            prefix = name.removesuffix("original_inv_freq")  # of a kind of layer, where kinds have their own
            current = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
