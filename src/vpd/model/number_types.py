"""How fast this machine computes in a type of numbers."""

import functools
import time

import torch

#: rows of the matrices that are multiplied; a GPU is faster than its kernels start, if there are few
ROWS_ON_CPU, ROWS_ELSEWHERE = 512, 4096
FAST = 0.8  # times as long as in float32, up to where bfloat16 is worth a choice
SLOW = 1.5  # times as long as in float32, from where on bfloat16 is not worth it


def training_device() -> str:
    """The kind of device that a run on this machine trains on: ``cpu`` where there is nothing else."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if device is None else device.type


def device_name() -> str:
    """What a run on this machine trains on: the GPU's own name, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else training_device()


@functools.cache
def faster_type(device: str) -> str:
    """``bfloat16`` where products are clearly faster in it, else ``float32``; measured once in a process."""
    return "bfloat16" if bfloat16_ratio(device) < FAST else "float32"


def bfloat16_ratio(device: str) -> float:
    """How many times as long a product of matrices takes in bfloat16 as in float32, measured now (milliseconds)."""
    return _seconds_of_products(torch.bfloat16, device) / _seconds_of_products(torch.float32, device)


def _seconds_of_products(dtype: torch.dtype, device: str, count: int = 8) -> float:
    """The shortest of ``count`` measured times."""
    size = ROWS_ON_CPU if device == "cpu" else ROWS_ELSEWHERE
    left = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        float((left @ left).sum())  # to the CPU, so that a GPU has done it
        times.append(time.perf_counter() - started)
    return min(times)
