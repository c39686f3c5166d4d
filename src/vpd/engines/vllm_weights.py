"""Weights on their way to a server: folders that vLLM reads, with the head as a tensor of its own.

Where a model's head is its embedding, vLLM on a CPU keeps the head in a packed form of its own, and leaves it behind
when the embedding alone is loaded again.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpd.errors import EngineError, StorageError
from vpd.model import lora
from vpd.policy import Policy

HEAD = "head.safetensors"


def write(policy: Policy, folder: Path) -> bool:
    """Write the policy into a new folder; True: it is an adapter.  Raises StorageError."""
    shutil.rmtree(folder, ignore_errors=True)
    policy.save(folder)
    if (folder / lora.CONFIG_FILE).is_file():
        return True
    head = policy.call(_head)
    if head is not None and head[0] not in names_in(folder):
        try:
            _add_head(folder, *head)
        except OSError as error:
            raise StorageError(f"cannot write {folder / HEAD}", got=error.strerror) from error
    return False


def names_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a folder's safetensors files."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def check_whole(sent: dict[str, tuple[int, ...]], first: dict[str, tuple[int, ...]] | None, folder: Path) -> None:
    """Raise EngineError unless a folder holds what was sent first.

    Of a tensor that is missing vLLM keeps the old values, and says nothing.
    """
    if first is None or sent == first:
        return
    other = sorted(name for name in {*sent, *first} if sent.get(name) != first.get(name))
    raise EngineError(
        f"the weights in {folder} are not those that were sent before", got=f"{len(other)} others, such as {other[0]}"
    )


def _head(model: Any) -> tuple[str, Tensor] | None:
    """Name and weight of the head of a model whose head is its embedding; None for another."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return _name_of(model, head), head.weight.detach()


def _name_of(model: Any, module: Any) -> str:
    return next(f"{name}.weight" for name, one in model.named_modules() if one is module)


def _add_head(folder: Path, name: str, weight: Tensor) -> None:
    save_file({name: weight.cpu().contiguous().clone()}, folder / HEAD, metadata={"format": "pt"})
