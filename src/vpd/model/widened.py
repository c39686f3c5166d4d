"""The weights of a model in more bits for a moment, so that a comparison sees mistakes and no rounding."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
SHARE = 0.8  # of the free memory that may be taken


@contextlib.contextmanager
def widened(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Parameters and buffers of fewer bits hold their numbers as ``dtype`` inside; then they are as before."""
    narrower = [(tensor, tensor.data) for tensor in _narrower(model, dtype)]
    try:
        for tensor, data in narrower:
            tensor.data = data.to(dtype)
        yield
    finally:
        for tensor, data in narrower:
            tensor.data = data


def wider_type(model: Any) -> torch.dtype | None:
    """float32 for a model with numbers of 16 bits, float64 for another; None without memory for it, or need."""
    dtype = torch.float32 if any(tensor.dtype in NARROW for tensor in _tensors(model)) else torch.float64
    needed: dict[torch.device, int] = {}
    for tensor in _narrower(model, dtype):
        needed[tensor.device] = needed.get(tensor.device, 0) + dtype.itemsize * tensor.numel()
    return dtype if needed and all(size < SHARE * _free(device) for device, size in needed.items()) else None


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _narrower(model: Any, dtype: torch.dtype) -> list[Tensor]:
    floats = [tensor for tensor in _tensors(model) if tensor.dtype in (*NARROW, torch.float32)]
    return [tensor for tensor in floats if tensor.dtype.itemsize < dtype.itemsize]


def _free(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
