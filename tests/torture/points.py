"""Points of a run at which a fault can strike: calls of functions, by name, and changes of the disk, by path.

Nothing of this is in the product.  Functions are wrapped in the process that is tortured; changes of the disk are what
Python's audit events say about the run folder, so no name of ours is needed to find each of them.  A run without a
fault lists the points that it passes (its trace); as runs are deterministic, the number of a point in this list finds
it again in the next run.
"""

import ctypes
import errno
import functools
import importlib
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: label before the call, label after it (None: no point there), and the place
PLACES: tuple[tuple[str | None, str | None, str], ...] = (
    ("sampling", "sampling", "vpd.engines.torch_engine:TorchEngine.generate"),
    ("grading", "grading", "vpd.rollout:grade_texts"),
    ("E-step", "between E and M", "vpd.algorithms.e_step:EStep.run"),
    ("between E and M", None, "vpd.algorithms.distill:Distill.distil"),
    ("optimiser step", "optimiser step", "torch.optim:AdamW.step"),
    ("end of an iteration", "end of an iteration", "vpd.learners.accelerate_learner:AccelerateLearner.end_iteration"),
    ("evaluation", "evaluation", "vpd.recipes.loops:evaluation_metrics"),
    ("checkpoint written", "checkpoint written", "vpd.learners.accelerate_learner:AccelerateLearner.save"),
    ("checkpoint written", None, "torch:save"),
    ("checkpoint loaded", "checkpoint loaded", "vpd.learners.accelerate_learner:AccelerateLearner.load"),
    ("folder rewound", "folder rewound", "vpd.run_folder.tables:RunFolder.rewind"),
    ("model/ exported", "model/ exported", "vpd.learners.accelerate_learner:AccelerateLearner.export"),
)
Action = Callable[["Watch"], None]


@dataclass(frozen=True)
class Point:
    """``label`` is the kind of moment; ``detail`` the function or the path."""

    label: str
    detail: str


class Watch:
    """Counts the points that this process passes, and acts at one of them.  Only its main thread counts."""

    def __init__(self, run: Path, at: int | None = None, action: Action | None = None):
        self.run = run
        self.at = at
        self.action = action
        self.passed: list[Point] = []
        self._pid = os.getpid()
        self._busy = False

    def point(self, label: str, detail: str, first: Callable[[], Any] | None = None) -> None:
        """One point; ``first`` is done before the action strikes, if it strikes here."""
        if self._busy or os.getpid() != self._pid or threading.current_thread() is not threading.main_thread():
            return
        self.passed.append(Point(label, detail))
        if self.at == len(self.passed) - 1 and self.action is not None:
            self._busy = True
            try:
                if first is not None and self.action is kill:
                    first()
                self.action(self)
            finally:
                self._busy = False

    def install(self) -> None:
        for before, after, place in PLACES:
            owner, name = located(place)
            setattr(owner, name, self._wrapped(getattr(owner, name), before, after, place.partition(":")[2]))
        sys.addaudithook(self._audit)
        self._wrap_write()

    def _wrapped(self, function: Any, before: str | None, after: str | None, name: str) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if before is not None:
                self.point(before, f"before {name}")
            result = function(*arguments, **options)
            if after is not None:
                self.point(after, f"after {name}")
            return result

        return call

    def _wrap_write(self) -> None:
        """A line that is appended: half of it is written before a kill strikes."""
        write = os.write

        def half_written(descriptor: int, data: Any) -> int:
            path = self._inside(f"/proc/self/fd/{descriptor}")
            if path is not None and len(data) > 1:
                half = bytes(data[: len(data) // 2])
                self.point(label_of("os.write", path), f"os.write {path}", lambda: write(descriptor, half))
            return write(descriptor, data)

        os.write = half_written

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self._busy:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        paths = [path for path in map(self._inside, _paths(event, arguments)) if path is not None]
        if paths:
            self.point(label_of(event, paths[-1], paths[0]), f"{event} {' -> '.join(paths)}")

    def _inside(self, path: Any) -> str | None:
        """A path relative to the run folder, None outside of it."""
        if isinstance(path, int):
            return None
        real = os.path.realpath(os.path.dirname(os.fsdecode(path))) + "/" + os.path.basename(os.fsdecode(path))
        if real.startswith("/proc/"):
            real = os.path.realpath(os.fsdecode(path))
        return os.path.relpath(real, self.run) if real.startswith(f"{self.run}/") else None


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def _paths(event: str, arguments: tuple[Any, ...]) -> list[Any]:
    if event == "os.rename":
        return list(arguments[:2])
    descriptor = arguments[1] if event in ("os.remove", "os.rmdir") and len(arguments) > 1 else -1
    if isinstance(descriptor, int) and descriptor >= 0:
        return [os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(arguments[0]))]
    return [arguments[0]]


def label_of(event: str, path: str, source: str | None = None) -> str:
    """The kind of a change of the disk: what it is done to, and whether that is written, moved or deleted."""
    top = path.split("/")[0]
    gone = event in ("os.remove", "os.rmdir")
    if "checkpoint-" in path:
        if gone or (event == "os.rename" and source is not None and re.fullmatch(r"checkpoint-\d+", source)):
            return "checkpoint deleted"
        return "checkpoint renamed" if event == "os.rename" else "checkpoint written"
    if re.fullmatch(r"\.?(model|adapter|new)(\.vpd-.*)?", top):
        return "model/ exported"
    rewinds = gone or (event == "os.rename" and source is not None and source.endswith(".parquet"))
    if top == "rollouts":
        return "folder rewound" if rewinds else "rollouts written"
    if "metrics.jsonl" in top or "alarms.jsonl" in top:
        return "line appended" if event in ("open", "os.write") and not top.startswith(".") else "folder rewound"
    if "run.json" in top or "config.yaml" in top:
        return "run.json and config.yaml written"
    return "folder prepared"


def located(place: str) -> tuple[Any, str]:
    """The owner and the name of a place ``module:Class.method``.  Raises SystemExit where it has moved."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"torture: {place} is not there any more ({error}): mend PLACES in {__file__}") from error
    return owner, name


# --- what strikes ---------------------------------------------------------------------------------------------


def kill(watch: Watch) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(watch: Watch) -> None:
    """The process stands still until it gets SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Signal:
    """A signal, ``times`` in a row."""

    number: int
    times: int = 1

    def __call__(self, watch: Watch) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class FillDisk:
    """Fills the small disk that the run is on and leaves so many bytes, or takes every inode.

    Without a disk of its own, files may not grow beyond ``leave`` bytes instead.
    """

    leave: int
    inodes: bool
    mounted: bool

    def __call__(self, watch: Watch) -> None:
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.leave, resource.RLIM_INFINITY))
            return
        filler = watch.run.parent / "filler"
        filler.mkdir(exist_ok=True)
        try:
            if self.inodes:
                for number in range(100_000):
                    (filler / str(number)).touch()
            else:
                (filler / "kept").write_bytes(b"0" * self.leave)
                with (filler / "full").open("wb", buffering=0) as file:
                    while True:
                        file.write(b"0" * 65536)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        (filler / "kept").unlink(missing_ok=True)


@dataclass(frozen=True)
class ReadOnly:
    """Makes the folder around the run read-only for whatever is opened from now on; without mounts, its files."""

    mounted: bool

    def __call__(self, watch: Watch) -> None:
        work = watch.run.parent
        if not self.mounted:
            immutable(work, True)
            return
        mount(work, work, MS_BIND)
        mount(work, work, MS_BIND | MS_REMOUNT | MS_RDONLY)
        os.chdir(work)


MS_RDONLY, MS_REMOUNT, MS_BIND, MNT_DETACH = 1, 32, 4096, 2
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def end_with_parent() -> None:
    """This process is killed when the one that forked it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def mount(source: Path | str, target: Path, flags: int = 0, kind: str = "none", options: str = "") -> None:
    texts = [os.fsencode(str(text)) for text in (source, target, kind)]
    if _libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(options)):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def unmount(target: Path) -> None:
    """Takes one mount off a folder; nothing happens where there is none."""
    _libc.umount2(os.fsencode(str(target)), MNT_DETACH)


def immutable(folder: Path, on: bool) -> None:
    """The stand-in for a read-only mount: no permission to write, which root overrides with ``chattr +i``."""
    paths = [folder, *folder.rglob("*")]
    for path in paths if on else reversed(paths):
        if path.is_symlink():
            continue
        if os.geteuid() == 0:
            os.system(f"chattr {'+' if on else '-'}i '{path}' 2>/dev/null")
        else:
            path.chmod(path.stat().st_mode & ~0o222 if on else path.stat().st_mode | 0o200)
