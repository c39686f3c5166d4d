"""What the benchmarks measure with.

Without a GPU, seconds are CPU seconds of this process (user + system), which with one thread are those of an idle
machine, whatever else runs beside it, and memory is the kernel's own count of this process's peak resident size
(``VmHWM``; Linux only), which it resets on request.  With one, seconds are those of the clock once the GPU has done
what it was given, and memory is what torch has allocated on it.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def elapsed() -> float:
    """Seconds so far."""
    if GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def resident() -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if GPU else _field("VmRSS")


def peak() -> int:
    """The most bytes in use at once since the start, or since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if GPU else _field("VmHWM")


def reset_peak() -> None:
    """Count the peak from here on."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def machine() -> str:
    """What it ran on."""
    return torch.cuda.get_device_properties(0).name if GPU else "CPU, one thread"


def _field(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None, f"{STATUS} has no {name}"
    return int(found[1]) * 1024


def fixed_bytes(model: Any, *, teacher_copy: bool) -> int:
    """Bytes that training holds whatever the batch: weights, gradients, AdamW's two moments, a teacher's copy."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights * (5 if teacher_copy else 4)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range: ``0.41 (0.39-0.44)``."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    if len(ordered) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({ordered[0]:.{digits}f}-{ordered[-1]:.{digits}f})"


def last_line(words: Sequence[str]) -> str:
    """The last line that a measuring process prints ("" for none): one thread, no hub; ends the run if it fails."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | one)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def commit() -> str:
    """The commit measured, with a + where the tree differs from it."""
    here = Path(__file__).resolve().parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def progress(*words: object) -> None:
    """A line for the reader, apart from the results on stdout."""
    print(*words, file=sys.stderr, flush=True)
