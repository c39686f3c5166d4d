"""FSDP2: weights, gradients and optimiser in shards over all processes (``optim.sharding: fsdp2``).

Each decoder layer of each model is a group that is whole while it computes; what is left of all models (embeddings,
norms, heads) is one group more, whole while the root module computes.  Weights are held in the model's number type and
computed in bfloat16 with ``optim.mixed_precision: bf16``, where gradients are added up over processes in float32.
With adapters (:mod:`vpd.model.lora`) the base lies in shards too, in any number type, and checkpoints hold them alone.
Torch's ``fully_shard`` does the work (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
"""

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vpd.errors import ConfigError, StorageError
from vpd.learners import weights
from vpd.learners.settings import OptimSettings
from vpd.model import lora
from vpd.ranks import backend

Result = TypeVar("Result")
FOLDER = "shards"
IN_A_TABLE = {
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def shard(root: nn.Module, models: Mapping[str, Any], settings: OptimSettings, device: torch.device) -> None:
    """Shard ``root`` in place; ``models`` are those in it, by what messages call them.

    Afterwards parameters are DTensors on ``device``, or on the CPU with ``optim.cpu_offload``.  Raises ConfigError for
    a model without layers that we know, or with weights of several number types, or of 16 bits, unless adapters alone
    are trained.
    """
    if not any(map(lora.is_attached, models.values())):
        kinds = {parameter.dtype for model in models.values() for parameter in model.parameters()}
        settings.check_types(str(kind).removeprefix("torch.") for kind in kinds)
    if not dist.is_initialized():
        dist.init_process_group(backend(), store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    narrow = settings.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if narrow else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.cpu_offload else OffloadPolicy()
    for name, model in models.items():
        for layer in _layers(name, model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload)


def reshard(root: Any) -> None:
    """Free what a pass without gradients leaves whole.

    Torch keeps the root's own group whole after a forward pass, for the backward pass.  Without one, what is then
    written to the shards (an average's move, a checkpoint) would be overwritten by nothing, and not be seen either.
    """
    if isinstance(root, FSDPModule):
        root.reshard()


def whole(tensor: Any) -> Tensor:
    """A tensor that may lie in shards, whole; a collective if it does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight and buffer of a model, whole, one by one; a collective.  Tied weights are one tensor."""
    names: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    last: dict[str, Tensor] = {}
    shared = _shared(model)
    for name, value in model.state_dict(keep_vars=True).items():
        own = names.get(id(value), name)
        tensor = last.get(own)
        tensor = whole(value.detach()) if tensor is None else tensor
        if own in shared:
            last[own] = tensor
        yield name, tensor


def save(root: Any, optimizer: Any, folder: Path) -> None:
    """Write weights and the optimiser's state into ``folder/shards``; a collective.  Raises StorageError."""
    with _storage_errors(f"cannot write {folder}"):
        save_shards(_state(root, optimizer), checkpoint_id=folder / FOLDER)


def load(root: Any, optimizer: Any, folder: Path) -> None:
    """Read what :func:`save` wrote, by any number of processes; a collective.  Raises StorageError."""
    state = _state(root, optimizer)
    with _storage_errors(f"cannot read the shards in {folder}"):
        load_shards(state, storage_reader=SafeReader(folder / FOLDER), planner=_SafePlanner())
    set_state_dict(
        root,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=not lora.is_attached(root.model)),
    )


def _state(root: Any, optimizer: Any) -> dict[str, Any]:
    """What training changes: the optimiser's state with all weights, or with the adapters."""
    model_state, optimizer_state = get_state_dict(root, optimizer)
    if lora.is_attached(root.model):
        model_state = {name: value for name, value in model_state.items() if lora.is_weight(name)}
    return {"model": model_state, "optimizer": optimizer_state}


def export(model: Any, folder: Path, *, first: bool) -> None:
    """Write ``folder/model``, and with adapters ``folder/adapter``; a collective, and the ``first`` process writes."""
    if not lora.is_attached(model):
        save_whole(model, folder / "model", first=first)
        return
    plain = _copied(model, _plain(model, torch.device("cpu")) if first else None)
    if plain is not None:
        weights.export(plain, folder)


def save_whole(model: Any, folder: Path, *, first: bool) -> None:
    """Write a model as ``from_pretrained`` reads it; a collective, and the ``first`` process writes."""
    tensors: dict[str, Tensor] = {}
    moved: dict[int, Tensor] = {}
    for name, tensor in whole_tensors(model):
        if first:  # one tensor at a time is whole elsewhere; tied ones stay one
            tensors[name] = moved.setdefault(id(tensor), tensor.cpu())
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=tensors, max_shard_size="1000GB")


@contextlib.contextmanager
def _storage_errors(what: str) -> Iterator[None]:
    """Turn the error that torch gives all processes where one of them failed into a StorageError."""
    try:
        yield
    except CheckpointException as error:
        rank, (fault, _) = next(iter(error.failures.items()))
        raise StorageError(
            what, got=f"{type(fault).__name__} on rank {rank}: {' '.join(str(fault).split())[:160]}"
        ) from error


class SafeReader(FileSystemReader):
    """Torch's reader, without the part that can execute what a file says: the table of shards is a pickle.

    Raises UnpicklingError for a table that names anything but what torch writes into one.
    """

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _TableReader(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and isinstance(vars(torch).get(name), (torch.dtype, type(torch.Size)))
        if not of_torch and (module, name) not in IN_A_TABLE:
            raise pickle.UnpicklingError(f"the table of shards names {module}.{name}, which torch does not write")
        return super().find_class(module, name)


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Numbers of the optimiser's settings; raises UnpicklingError for what would be executed."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class ShardedPolicy:
    """The policy of weights in shards.

    :meth:`call` runs on ``replica()``, a plain model with a copy of the weights, so that each rank samples at its own
    pace.  The first call of each policy copies them and is a collective; an engine makes it in ``load``.
    :meth:`call_together` is ``call(function, model, ...)`` on the shards.
    """

    def __init__(
        self,
        model: Any,
        version: int,
        *,
        replica: Callable[[], Any],
        call: Callable[..., Any],
        first: bool,
    ):
        self.version = version
        self._model = model
        self._replica = replica
        self._call = call
        self._first = first
        self._loaded: Any = None

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        if self._loaded is None:
            self._loaded = _copied(self._model, self._replica())
        return function(self._loaded, *arguments)

    def call_together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        result: Result = self._call(function, self._model, *arguments)
        return result

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if lora.is_attached(self._model):
            plain = _copied(self._model, _plain(self._model, torch.device("cpu")))
            yield from lora.merged(plain).state_dict().items()
        else:
            yield from whole_tensors(self._model)

    def save(self, folder: Path) -> None:
        if not lora.is_attached(self._model):
            save_whole(self._model, folder, first=self._first)
            return
        adapter = {name: whole(value) for name, value in lora.state(self._model).items()}
        if self._first:
            lora.save(self._model, folder, adapter)


class Replicas:
    """A plain model, whole on every process, for each model in shards that is sampled from; made at the first call."""

    def __init__(self, settings: OptimSettings, device: torch.device):
        self._dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else None
        self._device = device
        self._made: dict[int, Any] = {}

    def of(self, model: Any) -> Any:
        """A model of the same kind, in bfloat16 where the learner computes so."""
        if id(model) not in self._made:
            self._made[id(model)] = _plain(model, self._device, self._dtype)
        return self._made[id(model)]


def _plain(model: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model of the same kind with the same buffers, whose weights are anything yet.

    ``dtype`` is its weights' (None: each as it is).  Buffers keep theirs: the frequencies of rotary positions, rounded
    to 16 bits, would be others after some hundred tokens.
    """
    plain = type(model)(copy.deepcopy(model.config))
    if lora.is_attached(model):
        lora.attach_like(plain, model)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype or kinds[name])
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        own = buffer.detach().to(device, copy=True)
        plain.get_submodule(owner).register_buffer(last, own, persistent=name in kept)
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def _copied(model: Any, plain: Any) -> Any:
    """``plain``, where there is one, with the weights of ``model``; a collective."""
    own = {} if plain is None else plain.state_dict()
    for name, tensor in whole_tensors(model):
        if name in own:
            own[name].copy_(tensor)
    return plain


def _shared(model: Any) -> set[str]:
    """The first names of the parameters that have several."""
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {name for name, parameter in model.named_parameters() if seen[id(parameter)] > 1}


def _layers(name: str, model: Any) -> list[nn.Module]:
    kinds = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    if not found:
        raise ConfigError(
            f"optim.sharding fsdp2 does not know the layers of the {name} ({type(model).__name__})",
            got=f"_no_split_modules {sorted(kinds)}",
            do="Set optim.sharding: none.",
        )
    return found
