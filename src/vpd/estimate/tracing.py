"""Passes over tensors that have a shape and no data, and the bytes that such a pass would hold at most.

The learner's own code runs on these tensors, forward and backward, so what it keeps for the backward pass, computes
again or copies is counted as it is, for any architecture and kind of activation checkpointing.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is active: those alive ``now``, and the most at once.

    ``peaks`` holds the most of each stage; :meth:`mark` begins the next one.  The weights of ``models`` were there
    before and are not counted.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.now = 0
        self.peaks = [0]
        kept = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in kept}

    def mark(self, *_: Any) -> None:
        """Begin the next stage."""
        self.peaks.append(self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peaks[-1] = max(self.peaks[-1], self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextlib.contextmanager
def without_data(*models: nn.Module) -> Iterator[None]:
    """Here every tensor has a shape and no data; ``models``, made on the device meta, are run as if on a CPU."""
    with FakeTensorMode():
        made: dict[int, tuple[Any, Any]] = {}  # what was there stays alive, so that no other takes its id
        for model in models:
            for module in model.modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            table[name] = made.setdefault(id(tensor), (tensor, _on_cpu(tensor)))[1]
        yield


def _on_cpu(tensor: torch.Tensor) -> Any:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
