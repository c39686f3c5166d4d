"""A model's weights in a folder: whole in ``from_pretrained`` form, or with LoRA the adapter alone in peft's form."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpd.errors import StorageError
from vpd.model import lora

LOG = logging.getLogger("vpd")


def save(model: Any, folder: Path) -> None:
    """Write what is trained: the whole model, or the adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    if lora.is_attached(model):
        lora.save(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size="1000GB")


def export(model: Any, folder: Path) -> None:
    """Write ``folder/model``, a plain model, and with LoRA ``folder/adapter``, from which ``model`` was merged."""
    if lora.is_attached(model):
        save(model, folder / "adapter")
        model = lora.merged(model)
    save(model, folder / "model")


def read(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors that :func:`save` wrote, by the names of ``model``'s.  Raises StorageError: of the other kind."""
    adapted = (folder / lora.WEIGHTS_FILE).exists()
    if adapted != lora.is_attached(model):
        raise StorageError(
            f"{folder} was not saved with this model.lora",
            got="an adapter" if adapted else "a whole model",
            do="Set model.lora to what it was, or start a new run in another run.output_dir.",
        )
    if not adapted:
        kinds = {parameter.dtype for parameter in model.parameters()}
        widest = functools.reduce(torch.promote_types, kinds)  # a model may keep a few weights wider than the others
        # the class itself: it may be a model's own code
        saved = type(model).from_pretrained(folder, dtype=widest, use_safetensors=True)
        return dict(saved.state_dict())
    trained_on = json.loads((folder / lora.CONFIG_FILE).read_text())["base_model_name_or_path"]
    if trained_on != model.name_or_path:
        LOG.warning("the adapter of %s was trained on %r and goes on with %r", folder, trained_on, model.name_or_path)
    return lora.read(folder)
