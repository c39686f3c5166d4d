"""A model's modules without its weights: from its configuration, or from what is known of a published model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vpd.errors import ModelError
from vpd.estimate.known_models import KNOWN_MODELS

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A configuration of transformers, and where it came from (for the reader)."""

    config: Any
    origin: str

    def build(self, dtype: str) -> Any:
        """The model on the device meta: shapes without data, for evaluation."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, dtype))
        return model.eval()

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return self._text("num_hidden_layers") or 0

    def with_periods(self, count: int) -> "Architecture | None":
        """The same with ``count`` times 2 layers, or 4 where kinds of layers alternate.

        None where the model has hardly more, or where its layers are not those, repeated.
        """
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        kinds = text.to_dict().get("layer_types") or []
        period = 4 if len(set(kinds)) > 1 else 2
        if self.layers <= 3 * period or any(kind != kinds[place % period] for place, kind in enumerate(kinds)):
            return None
        text.num_hidden_layers = count * period
        if kinds:
            text.layer_types = kinds[: count * period]
        return Architecture(config=config, origin=self.origin)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers, in 16 bits."""
        heads = self._text("num_key_value_heads") or self._text("num_attention_heads") or 0
        return 2 * 2 * self.layers * heads * self.head_size

    @property
    def head_size(self) -> int:
        """Width of one head of attention."""
        heads = self._text("num_attention_heads") or 1
        return self._text("head_dim") or (self._text("hidden_size") or 0) // heads

    @property
    def attended(self) -> int:
        """Operations of attention for each pair of tokens, all layers together: scores and values, 2 each a number."""
        heads = (self._text("num_attention_heads") or 0) * self.head_size
        return 4 * heads * self.layers

    @property
    def active_experts(self) -> float:
        """The share of a mixture's experts that one token passes; 1 without experts."""
        every = self._text("num_experts") or self._text("num_local_experts")
        return (self._text("num_experts_per_tok") or 1) / every if every else 1.0

    def _text(self, name: str) -> int | None:
        value = self.config.get_text_config().to_dict().get(name)
        return value if isinstance(value, int) else None


def find_architecture(name: str, *, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a folder with a ``config.json``, of a published model that is known here, or of the Hub's
    cache.

    Nothing is downloaded.  Raises ModelError: it is none of these.
    """
    folder = Path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if (folder / CONFIG).is_file():
        return Architecture(config=_read(folder, options), origin=f"{folder / CONFIG}")
    facts = KNOWN_MODELS.get(name.rpartition("/")[2].lower())
    if facts is not None:
        return Architecture(config=_of_facts(facts), origin="the table of published models")
    try:
        return Architecture(config=AutoConfig.from_pretrained(name, **options), origin="the Hub's cache")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the dry run does not know the shape of {name!r}",
            expected=f"a folder with a {CONFIG}, a model in the Hub's cache, or one of {', '.join(KNOWN_MODELS)}",
            do=f"Put the model's {CONFIG} into a folder; weights are not needed.",
        ) from error


def _read(folder: Path, options: Mapping[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {folder / CONFIG}", got=" ".join(str(error).split())[:160]) from error


def _of_facts(facts: Mapping[str, Any]) -> Any:
    kind = {key: value for key, value in facts.items() if key != "model_type"}
    return AutoConfig.for_model(facts["model_type"], **kind)


def head_weight(model: Any) -> nn.Parameter:
    """The head [V,H]."""
    weight: nn.Parameter = model.get_output_embeddings().weight
    return weight


def multiplied(model: Any, active_experts: float) -> int:
    """Weights that every token is multiplied with, head and embedding left out."""
    outside = {id(head_weight(model)), id(model.get_input_embeddings().weight)}
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in outside:
            total += parameter.numel() * (active_experts if ".experts." in name else 1.0)
    return int(total)


def layer_sizes(model: Any, *, trained: bool = False) -> tuple[int, int]:
    """Weights of the largest layer, and of all that stands outside of the layers; ``trained``: those alone."""
    layers: dict[str, int] = {}
    outside = 0
    for name, parameter in model.named_parameters():
        if trained and not parameter.requires_grad:
            continue
        words = name.split(".")
        number = next((place for place, word in enumerate(words) if word.isdigit()), None)
        if number is None:
            outside += parameter.numel()
        else:
            key = ".".join(words[: number + 1])
            layers[key] = layers.get(key, 0) + parameter.numel()
    return max(layers.values(), default=0), outside
