"""The weights of a model in 16 bits as float32 for a moment, so that a comparison sees mistakes and no rounding."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
SHARE = 0.8  # of the free memory that may be taken


@contextlib.contextmanager
def widened(model: Any) -> Iterator[None]:
    """Parameters and buffers of 16 bits hold their numbers as float32 inside; afterwards they are the very same."""
    narrow = [(tensor, tensor.data) for tensor in _narrow(model)]
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


def can_widen(model: Any) -> bool:
    """Whether there are 16-bit numbers, and memory for them as float32 besides."""
    needed: dict[torch.device, int] = {}
    for tensor in _narrow(model):
        needed[tensor.device] = needed.get(tensor.device, 0) + 4 * tensor.numel()
    return bool(needed) and all(size < SHARE * _free(device) for device, size in needed.items())


def _narrow(model: Any) -> list[Tensor]:
    return [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.dtype in NARROW]


def _free(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
