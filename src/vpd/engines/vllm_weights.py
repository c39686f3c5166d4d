"""Weights on their way to a server: folders that vLLM reads, with the head as a tensor of its own.

Where a model's head is its embedding, vLLM on a CPU keeps the head in a packed form of its own, and leaves it behind
when the embedding alone is loaded again.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpd.errors import EngineError, StorageError
from vpd.model import lora
from vpd.policy import Policy
from vpd.ranks import Ranks, on_first, together

HEAD = "head.safetensors"


def write(policy: Policy, folder: Path, ranks: Ranks) -> bool:
    """Write the policy into a folder that is not there yet; True: it is an adapter.

    All ranks call it, and the first writes.  Raises StorageError.
    """

    def save() -> None:
        with _storage_errors(folder):
            policy.save(folder)

    together(ranks, "weights for the server", save)
    if on_first(ranks, "the kind of these weights", (folder / lora.CONFIG_FILE).is_file):
        return True
    head = policy.call_together(_head, ranks.rank == 0)

    def add() -> None:
        with _storage_errors(folder):
            if head is not None and head[0] not in names_in(folder):
                save_file(dict([head]), folder / HEAD, metadata={"format": "pt"})

    on_first(ranks, "the head for the server", add)
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


def _head(model: Any, wanted: bool) -> tuple[str, Tensor] | None:
    """Name and weight of the head of a model whose head is its embedding; None for another, or where unwanted."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not wanted or head is None or head.weight is not embedding.weight:
        return None
    name = next(f"{name}.weight" for name, one in model.named_modules() if one is head)
    return name, head.weight.detach().to("cpu", copy=True).contiguous()


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turn what libraries raise where a disk is full or a folder not writable into a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(
            f"cannot write the weights for the server to {folder}",
            got=" ".join(reason.split())[:200],
            do="Free space, or choose another engine.sync_dir.",
        ) from error
