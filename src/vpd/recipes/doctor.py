"""``vpd doctor``: whether this machine and this installation can train, and what to do where they cannot.

A *fault* keeps every run from working; a *warning* keeps some from it, or makes them slow; a *note* says what is not
there and need not be.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from packaging.requirements import Requirement

import vpd
from vpd.bundled import load_bundled
from vpd.errors import ConfigError, ModelError, SandboxError, VPDError
from vpd.model.loading import hub_answers
from vpd.model.number_types import SLOW, bfloat16_ratio, training_device
from vpd.sandbox import Limits, Program, strongest

Status: TypeAlias = Literal["ok", "note", "warning", "fault"]

DISTRIBUTION = "vpd-rl"
GIB = 1 << 30
LITTLE_MEMORY, LITTLE_DISK = 2 * GIB, 5 * GIB
SLOW_SMOKE_RUN = 60.0  # seconds, of a run that takes about ten where a core is free
SMOKE_RUN = (
    "train", "--model.name_or_path", "tiny", "--run.max_steps", "2", "--run.eval_steps", "2", "--run.eval_limit", "4",
    "--run.eval_samples", "2", "--rollout.prompts_per_step", "4", "--rollout.num_generations", "4",
)  # fmt: skip
WITHOUT = {  # what needs the packages of an extra
    "hub": "data sets on the Hub and folders of save_to_disk",
    "math": "env.name math, beyond values that agree as written",
    "reasoning-gym": "env.name reasoning_gym",
    "lora": "model.lora",
    "verifiers": "env.name verifiers",
    "gguf": "vpd model smollm2-135m and gemma3-270m",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of one part; ``do``: what to do about it, None where nothing needs doing."""

    part: str
    status: Status
    detail: str
    do: str | None = None


def doctor(
    folder: Path,
    *,
    network: bool = True,
    smoke_run: bool = True,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Examine installation, machine and ``folder`` (where runs are to lie); ``on_finding`` gets each as it is made."""
    findings: list[Finding] = []
    parts: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        _packages,
        _extras,
        _devices,
        _memory,
        _number_types,
        lambda: _disk(folder),
        _sandbox,
        *([_network] if network else []),
        *([_smoke_run] if smoke_run else []),
    ]
    for part in parts:
        for finding in part():
            findings.append(finding)
            on_finding(finding)
    return findings


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as plain JSON."""
    return [dataclasses.asdict(finding) for finding in findings]


def _versions() -> Iterator[Finding]:
    detail = f"vpd {vpd.__version__} in {Path(vpd.__file__).parent}, Python {platform.python_version()}"
    yield Finding(part="vpd", status="ok", detail=f"{detail} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """The packages that everything needs, in the versions that the project asks for."""
    required = [requirement for requirement in _requirements() if not requirement.marker]
    if not required:
        yield Finding(
            part="packages",
            status="warning",
            detail=f"{DISTRIBUTION} is not installed, so its requirements are unknown",
            do="pip install -e . in the repository.",
        )
        return
    faults = {requirement: fault for requirement in required if (fault := _fault_of(requirement)) is not None}
    if faults:
        names = " ".join(f"'{requirement}'" for requirement in faults)
        yield Finding(part="packages", status="fault", detail="; ".join(faults.values()), do=f"pip install {names}")
    else:
        shown = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate")]
        yield Finding(part="packages", status="ok", detail=f"{', '.join(shown)} and {len(required) - 3} more")


def _extras() -> Iterator[Finding]:
    """What the optional packages are for; missing ones are no fault."""
    for extra, use in WITHOUT.items():
        wanted = [r for r in _requirements() if r.marker and r.marker.evaluate({"extra": extra})]
        faults = [fault for requirement in wanted if (fault := _fault_of(requirement)) is not None]
        if faults:
            do = f"For {use}: pip install '{DISTRIBUTION}[{extra}]'"
            yield Finding(part=f"extra {extra}", status="note", detail="; ".join(faults), do=do)
        elif wanted:
            yield Finding(part=f"extra {extra}", status="ok", detail=use)


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _fault_of(requirement: Requirement) -> str | None:
    """Why a requirement does not hold, None if it does."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, needed {requirement.specifier}"


def _devices() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            detail = f"{properties.name}, {_gib(free)} of {_gib(total)} GiB free"
            yield Finding(part=f"GPU {index}", status="ok" if free > LITTLE_MEMORY else "warning", detail=detail,
                          do=None if free > LITTLE_MEMORY else "End what uses its memory (nvidia-smi).")  # fmt: skip
    elif list(Path("/dev").glob("nvidia[0-9]*")):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
        yield Finding(
            part="GPU",
            status="warning",
            detail=f"there is one, and torch {torch.__version__}, {built}, cannot use it",
            do="Install the torch that fits the driver (pytorch.org), or a newer driver.",
        )
    else:
        detail = "none that torch can use: training runs on the CPU"
        yield Finding(part="GPU", status="note", detail=detail, do="Small models alone are fast enough on a CPU.")


def _memory() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = os.sysconf("SC_PAGE_SIZE")
    total, free = size * os.sysconf("SC_PHYS_PAGES"), size * os.sysconf("SC_AVPHYS_PAGES")
    lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    available = re.search(r"MemAvailable:\s+(\d+) kB", lines)
    free = int(available[1]) * 1024 if available else free
    threads = torch.get_num_threads()
    detail = f"{_gib(free)} of {_gib(total)} GiB free, {cores} cores, torch takes {threads} thread{'s' * (threads > 1)}"
    enough = free > LITTLE_MEMORY
    do = None if enough else "End other programs, or take a smaller model and rollout.prompts_per_step."
    yield Finding(part="memory", status="ok" if enough else "warning", detail=detail, do=do)


def _number_types() -> Iterator[Finding]:
    """How long bfloat16 products take beside float32 ones, where the training runs."""
    device = training_device()
    ratio = bfloat16_ratio(device)
    detail = f"products take {ratio:.1f} times as long as in float32 on this {device.upper().replace('CUDA', 'GPU')}"
    slow = ratio > SLOW
    do = "Leave model.dtype float32 and optim.mixed_precision no." if slow else None
    yield Finding(part="bfloat16", status="note" if slow else "ok", detail=detail, do=do)


def _disk(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written where they are to lie."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 65536)
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        do = "Choose another run.output_dir, or make room."
        yield Finding(part="disk", status="fault", detail=f"{place} cannot be written ({error.strerror})", do=do)
        return
    enough = free > LITTLE_DISK
    room = "Make room, or lower run.save_total_limit: a checkpoint takes about three times the model."
    detail = f"{_gib(free)} GiB free in {place}"
    yield Finding(part="disk", status="ok" if enough else "warning", detail=detail, do=None if enough else room)


def _sandbox() -> Iterator[Finding]:
    try:
        sandbox = strongest(workers=1)
        [outcome] = sandbox.run([Program(source="print(6 * 7)", limits=Limits(seconds=30))])
    except (ConfigError, SandboxError) as error:
        do = "Only env.name code needs it; a service can run programs instead (docs/sandbox.md)."
        yield Finding(part="sandbox", status="warning", detail=str(error), do=do)
        return
    if outcome.stdout.strip() == "42":
        yield Finding(part="sandbox", status="ok", detail=sandbox.describe().removeprefix("sandbox: "))
    else:
        detail = f"a program ended with {outcome.status}: {outcome.stderr.strip()[-200:] or 'no output'}"
        yield Finding(part="sandbox", status="warning", detail=detail, do="Try again when the machine is less busy.")


def _network() -> Iterator[Finding]:
    if hub_answers():
        yield Finding(part="Hub", status="ok", detail="it answers")
    else:
        yield Finding(
            part="Hub",
            status="note",
            detail="it cannot be reached: models and data must be folders and files, or in its cache already",
            do="Set HTTPS_PROXY or HF_ENDPOINT if there is a way, or HF_HUB_OFFLINE=1 if there is none.",
        )


def _smoke_run() -> Iterator[Finding]:
    """Two iterations of the shipped base, in a process of their own."""
    try:
        load_bundled()
    except ModelError as error:
        yield Finding(part="smoke run", status="fault", detail=str(error))
        return
    started, spent = time.monotonic(), _seconds_of_children()
    with tempfile.TemporaryDirectory(prefix="vpd-doctor-") as folder:
        command = [sys.executable, "-m", "vpd", *SMOKE_RUN, "--run.output_dir", f"{folder}/run"]
        fault = _run(command)
    seconds, spent = time.monotonic() - started, _seconds_of_children() - spent
    if fault is not None:
        do = "Run it and see: vpd train --run.max_steps 2 --run.output_dir /tmp/smoke"
        yield Finding(part="smoke run", status="fault", detail=fault, do=do)
    else:
        detail = (
            f"two iterations of the shipped model in {seconds:.0f} s, start included; {spent:.0f} s of them computing"
        )
        slow = seconds > SLOW_SMOKE_RUN
        busy = "Most of it was waiting: other programs keep the cores or the disk busy."
        advice = busy if spent < seconds / 2 else "This machine is slow: expect the same of every run."
        yield Finding(part="smoke run", status="warning" if slow else "ok", detail=detail, do=advice if slow else None)


def _seconds_of_children() -> float:
    """CPU seconds of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(command: Sequence[str], timeout: float = 300.0) -> str | None:
    """Why a command failed, None if it did not."""
    source = str(Path(vpd.__file__).parent.parent)
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {timeout:.0f} s"
    except OSError as error:
        return f"it could not be started ({error.strerror})"
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return None if done.returncode == 0 else f"exit code {done.returncode}: {''.join(last)}"


def require_whole(findings: Sequence[Finding]) -> None:
    """Raise VPDError if there is a fault."""
    faults = [finding for finding in findings if finding.status == "fault"]
    if faults:
        first = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise VPDError(f"{first.part} is broken{more}", got=first.detail, do=first.do)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"
