"""Runs to torture: their settings, their folders, and processes that are forked from one that has imported everything.

A run's folder of work holds all that it reads (model, teacher, data, grader, ``run.yaml``) under relative names, so
that every run of a variant has the same settings; its run folder is ``run/`` in there, with files of the user's in it.
"""

import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from torture.points import Point, Watch

TESTS = Path(__file__).resolve().parent.parent
WORKPLACE = Path(__file__).resolve().parent / "workplace"
BASE = TESTS / "fixtures" / "base"
LORA = {"r": 2, "target_modules": "all-linear"}
WORDS = {"env": {"name": "./grader.py:Words"}, "rollout": {"max_turns": 2}}
#: half of the variants bound their grader's time, so that it runs in a thread
LIMIT = {"env": {"seconds": 0.3}}
FEEDBACK = ["environment", "sibling", "./grader.py:nothing"]

#: what differs from COMMON, by variant: every algorithm, every teacher, whole weights and adapters
VARIANTS: dict[str, list[Mapping[str, Any]]] = {
    "grpo": [{"algorithm": {"name": "grpo"}, "run": {"save_steps": 2}}],
    "grpo-lora": [{"algorithm": {"name": "grpo", "updates_per_batch": 2}, "model": {"lora": LORA}}, LIMIT],
    "grpo-async": [{"algorithm": {"name": "grpo"}, "env": {"reward": "./grader.py:reward_async"}}, LIMIT],
    "sdpo-ema": [{"algorithm": {"name": "sdpo", "teacher_ema_rate": 0.5}, "feedback": FEEDBACK}, LIMIT],
    "sdpo-trust-region": [{"algorithm": {"name": "sdpo", "teacher": "trust_region"}, "run": {"save_total_limit": 1}}],
    "gkd": [{"algorithm": {"name": "gkd", "teacher_model": "./teacher", "student_fraction": 0.5}}, LIMIT],
    "gkd-lora": [{"algorithm": {"name": "gkd", "teacher_model": "./teacher"}, "model": {"lora": LORA}}],
    "plare": [{"algorithm": {"name": "plare"}, "feedback": [{"name": "judge", "judge": "reward"}]}, LIMIT],
    "vpd-ema": [{"algorithm": {"name": "vpd", "e_every": 2}, "run": {"save_steps": 2, "save_total_limit": 1}}],
    "vpd-live": [{"algorithm": {"name": "vpd", "preset": "paper", "prior": "fixed", "e_every": 1}}, LIMIT],
    "vpd-lora": [{"algorithm": {"name": "vpd", "e_every": 2}, "model": {"lora": LORA}, "run": {"save_total_limit": 2}}],
    "vpd-turns": [{"algorithm": {"name": "vpd", "e_every": 2}, "feedback": FEEDBACK}, WORDS],
    "gated": [{"algorithm": {"name": "gated", "e_every": 2}, "run": {"save_steps": 2}}],
    "gated-lora": [{"algorithm": {"name": "gated", "e_every": 1}, "model": {"lora": LORA}}, LIMIT],
    "reshape": [{"algorithm": {"name": "hybrid", "form": "reshape"}, "feedback": FEEDBACK}],
    "reweight-bf16": [
        {"algorithm": {"name": "hybrid", "form": "reweight", "teacher": "frozen"}, "model": {"dtype": "bfloat16"}}
    ],
    "vpd-no-checkpoints": [{"algorithm": {"name": "vpd", "e_every": 2}, "run": {"save_steps": 0}}],
}
STEPS = 4
COMMON: Mapping[str, Any] = {
    "model": {"name_or_path": "./base"},
    "env": {"name": "dataset", "path": "./tasks.jsonl", "eval_share": 0.3, "reward": "./grader.py:reward"},
    "rollout": {"prompts_per_step": 3, "num_generations": 3, "max_completion_length": 6},
    "optim": {"learning_rate": 0.01},
    "run": {
        "max_steps": STEPS,
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_steps": 2,
        "eval_limit": 4,
        "eval_samples": 1,
        "output_dir": "run",
    },
}
#: files that a user keeps in the run folder, with names that are nearly ours; "->" a link, None a folder
KEPT: Mapping[str, str | None] = {
    "notes.txt": "mine",
    "checkpoint-2-best/model.safetensors": "mine",
    "checkpoint-40-lr1e-4/state.pt": "mine",
    "checkpoint-²/trainer.json": "{}",
    "checkpoint-old": "-> notes.txt",
    "metrics.jsonl.bak": "mine",
    ".mine": "mine",
    "model-of-mine/config.json": "{}",
    "empty": None,
}
#: files that a user puts into the folders of a run that was begun
KEPT_LATER: Mapping[str, str | None] = {
    "rollouts/step-latest.parquet": "mine",
    "rollouts/notes/step-000001.parquet": "mine",
    "rollouts/.vpd-old": "mine",
}


def settings_of(variant: str) -> dict[str, Any]:
    """The settings of a variant, whole."""
    merged: dict[str, Any] = json.loads(json.dumps(COMMON))
    for changes in VARIANTS[variant]:
        for section, values in changes.items():
            if isinstance(values, Mapping) and values.get("name", merged.get(section, {}).get("name")) == merged.get(
                section, {}
            ).get("name"):
                merged.setdefault(section, {}).update(values)
            else:
                merged[section] = values
    return merged


def make_workplace(work: Path, variant: str) -> None:
    """Everything that a run of a variant reads, and the user's files in its run folder."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(WORKPLACE / "grader.py", work / "grader.py")
    shutil.copytree(BASE, work / "base")
    shutil.copytree(_teacher(work.parent), work / "teacher")
    prompts = [f"apply rule {'ABCD'[i % 4]} to {i % 10} {i // 10} 2 3 5 8" for i in range(24)]
    (work / "tasks.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (work / "run.yaml").write_text(yaml.safe_dump(settings_of(variant), sort_keys=False))
    _keep(work / "run", KEPT)


def keep_more(run: Path) -> bool:
    """Put the user's files into the folders of a run; false where it has not made them yet."""
    begun = (run / "rollouts").is_dir()
    if begun:
        _keep(run, KEPT_LATER)
    return begun


def _keep(run: Path, files: Mapping[str, str | None]) -> None:
    for name, text in files.items():
        path = run / name
        (path if text is None else path.parent).mkdir(parents=True, exist_ok=True)
        if text is not None and text.startswith("-> "):
            path.symlink_to(text.removeprefix("-> "))
        elif text is not None:
            path.write_text(text)


def _teacher(folder: Path) -> Path:
    """Another model with the base's tokenizer, made once."""
    made = folder / "teacher-of-all"
    if not made.exists():
        from safetensors.torch import load_file, save_file

        partial = folder / f"teacher-{os.getpid()}"
        shutil.copytree(BASE, partial)
        weights = load_file(BASE / "model.safetensors")
        draw = torch.Generator().manual_seed(5)
        moved = {name: value + 0.3 * torch.randn(value.shape, generator=draw) for name, value in weights.items()}
        save_file(moved, partial / "model.safetensors", metadata={"format": "pt"})
        with contextlib.suppress(OSError):  # another process was first
            partial.rename(made)
    return made


def user_files(run: Path, *, later: bool = False) -> dict[str, str]:
    """What became of the user's files (``later``: of all): for each that is not as it was, what is there instead."""
    found: dict[str, str] = {}
    for name, text in {**KEPT, **(KEPT_LATER if later else {})}.items():
        path = run / name
        if text is None:
            fine = path.is_dir()
        elif text.startswith("-> "):
            fine = path.is_symlink() and os.readlink(path) == text.removeprefix("-> ")
        else:
            fine = path.is_file() and path.read_bytes() == text.encode()
        if not fine:
            found[name] = "changed" if os.path.lexists(path) else "gone"
    return found


def is_users(name: str) -> bool:
    """Whether a path in a run folder is the user's, or a folder of the user's."""
    return name in KEPT_LATER or any(name == kept or kept.startswith(f"{name}/") for kept in KEPT)


# --- processes ------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a process ended: its exit code (-9: by SIGKILL, None: it hung), what it said, how many it left behind."""

    code: int | None
    out: str
    err: str
    seconds: float
    left: int
    passed: list[Point] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The lines on stderr."""
        return [line for line in self.err.splitlines() if line.strip()]


@dataclass
class Child:
    """A process in a process group of its own; what it says goes to two files beside its folder of work."""

    pid: int
    said: Path
    started: float

    def wait(self, seconds: float = 90.0) -> Ended:
        """Wait for the end; a process that takes longer is killed and counts as one that hung."""
        code = self._code(seconds)
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        return Ended(
            code=code,
            out=self._read("out"),
            err=self._read("err"),
            seconds=time.monotonic() - self.started,
            left=self._sweep(),
            **self._trace(),
        )

    def stopped(self, seconds: float = 90.0) -> bool:
        """Wait until it stands still; False if it ends before (its end is then still to be waited for)."""
        for _ in range(int(seconds / 0.005)):
            info = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is not None:
                return info.si_code == os.CLD_STOPPED
            time.sleep(0.005)
        return False

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _code(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def _sweep(self) -> int:
        """1 if a process of the group outlived it by a second (it is killed then), 0 if none did."""
        for _ in range(100):
            if not any(_lives_in_group(entry, self.pid) for entry in Path("/proc").glob("[0-9]*")):
                return 0
            time.sleep(0.01)
        os.killpg(self.pid, signal.SIGKILL)
        return 1

    def _trace(self) -> dict[str, Any]:
        """The points that a traced process passed, and the modules that it had at its end."""
        text = self._read("trace")
        data = json.loads(text) if text else {"passed": [], "modules": []}
        return {"passed": [Point(*pair) for pair in data["passed"]], "modules": data["modules"]}

    def _read(self, name: str) -> str:
        path = self.said.with_suffix(f".{name}")
        return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _lives_in_group(process: Path, group: int) -> bool:
    """Whether a process of /proc is of a group, and no zombie."""
    try:
        state, _, its_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(its_group) == group and state != "Z"


def start(
    work: Path, *words: str, watch: Watch | None = None, traced: bool = False, memory: int | None = None
) -> Child:
    """``vpd train --config run.yaml`` with more words, as a fork of this process.

    ``memory``: how many bytes it may map beyond what it has.
    """
    said = _said(work)
    pid = os.fork()
    if pid == 0:
        try:
            _run(work, words, said, watch or (Watch(work / "run") if traced else None), memory)
        finally:
            os._exit(99)
    return Child(pid, said, time.monotonic())


def start_anew(work: Path, *words: str) -> Child:
    """The same as a new process of the command line."""
    said = _said(work)
    with said.with_suffix(".out").open("wb") as out, said.with_suffix(".err").open("wb") as err:
        command = [sys.executable, "-m", "vpd.cli", "train", "--config", "run.yaml", *words]
        process = subprocess.Popen(command, cwd=work, stdout=out, stderr=err, start_new_session=True)
    process.returncode = 0  # it is waited for by its number
    return Child(process.pid, said, time.monotonic())


def train(work: Path, *words: str, **options: Any) -> Ended:
    return start(work, *words, **options).wait()


def resume(work: Path, *words: str, **options: Any) -> Ended:
    return train(work, "--run.resume", "true", *words, **options)


def _said(work: Path) -> Path:
    folder = work.with_name(f"{work.name}-said")
    folder.mkdir(exist_ok=True)
    return folder / f"{len(list(folder.glob('*.out'))) + 1:02d}.x"


def _run(work: Path, words: Sequence[str], said: Path, watch: Watch | None, memory: int | None) -> None:
    """The process that is tortured: the command line's ``main`` in this fork, with its exit code."""
    os.setsid()
    os.chdir(work)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False, errors="strict") for n in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]  # as in a new process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # makes torch's pool anew, before several threads of a fork find the old one
    if memory is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, resource.RLIM_INFINITY))
    if watch is not None:
        watch.__init__(watch.run, watch.at, watch.action)  # type: ignore[misc]  # of this process
        watch.install()
    code = _exit_code(words)
    if watch is not None and watch.action is None and code == 0:
        trace = {"passed": [[point.label, point.detail] for point in watch.passed], "modules": sorted(sys.modules)}
        said.with_suffix(".trace").write_text(json.dumps(trace))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def _exit_code(words: Sequence[str]) -> int:
    from vpd.cli import main

    code = 1
    try:
        code = main(["train", "--config", "run.yaml", *words])
        threading._shutdown()  # type: ignore[attr-defined]  # as a process that ends waits for its threads
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            os.write(2, f"{end.code}\n".encode(errors="replace"))
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    return code


def import_all(modules: Sequence[str]) -> None:
    """Import what a run has imported, so that a fork has it."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
