"""How many threads torch computes with on the CPU."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

LOG = logging.getLogger("vpd")
SMALL = 1_000_000  # parameters; below, a second thread brings nothing, and much is lost where cores are busy


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread in this process for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """One thread for the length of a block where ``model`` has less than ``SMALL`` parameters on the CPU.

    Threads of tiny models mostly wait for each other; where other programs use the cores too, for long.
    ``OMP_NUM_THREADS`` in the environment decides instead.
    """
    weights = list(model.parameters())
    small = sum(weight.numel() for weight in weights) < SMALL and all(weight.device.type == "cpu" for weight in weights)
    if not small or "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        yield
        return
    LOG.info("one thread of torch in the place of %d, for a model this small", torch.get_num_threads())
    with one_thread():
        yield
