"""One run of a plan, and many of them in processes; every finished run is a file that is never made twice."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vpd.config import Config, parse
from vpd.envs.digits import LENGTH
from vpd.errors import StorageError, VPDError
from vpd.lab import tiny
from vpd.lab.reproduce import bases
from vpd.lab.reproduce.methods import method
from vpd.lab.reproduce.regimes import GENERATIONS, PROMPTS_PER_STEP, regime
from vpd.lab.reproduce.versions import code_version
from vpd.recipes.assemble import assemble
from vpd.recipes.train import make_loop
from vpd.types import Group, Metrics

Run: TypeAlias = Mapping[str, Any]

EVAL_EVERY = 20
BLOCK = 5  # iterations of one point of the student's curve
EVAL_ANSWERS = 256
EXPERT = ("tiny-expert", 0)  # GKD's teacher: the base and its seed
SECONDS = {"base": 45.0, "grpo": 0.07, "other": 0.11}  # of one core: a base; an iteration on six digits
KEPT = (
    "reward",
    "frac_reward_zero_std",
    "eval/accuracy",
    "eval_teacher/accuracy",
    "e_step/accuracy",
    "e_step/student_drift_kl",
    "gate/trust",
    "gate/auc",
    "gate/groups",
)
#: a number of a run: the curve, and what is taken of it
MEASURES = {
    "start": ("eval/accuracy", "first"),
    "held_out": ("eval/accuracy", "last"),
    "final": ("student", "last two"),
    "peak": ("student", "peak"),
    "mean": ("student", "mean"),
    "teacher_start": ("eval_teacher/accuracy", "first"),
    "teacher_peak": ("eval_teacher/accuracy", "peak"),
    "e_accuracy": ("e_step/accuracy", "later half"),
    "drift": ("e_step/student_drift_kl", "mean"),
    "trust": ("gate/trust", "later half"),
}


@dataclass(frozen=True, kw_only=True, order=True)
class Job:
    """One run to make."""

    regime: str
    method: str
    seed: int
    learning_rate: float

    def base(self) -> tuple[str, int]:
        """The base it starts from, and that base's seed."""
        return regime(self.regime).base, self.seed

    def bases(self) -> list[tuple[str, int]]:
        """All the bases it needs."""
        return [self.base(), *([EXPERT] if self.method == "gkd" else [])]

    def settings(self) -> dict[str, Any]:
        """The whole configuration, with names of bases where folders will stand.

        A method that reads no text is not told any, so that regimes that differ in the text alone share its runs.
        """
        world, how = regime(self.regime), method(self.method)
        env = world.env if how.reads else {k: v for k, v in world.env.items() if k == "length"}
        algorithm = dict(how.algorithm)
        samples = world.eval_samples if how.reads else 1
        if self.method == "gkd":
            algorithm["teacher_model"] = _label(EXPERT)
        return {
            "model": {"name_or_path": _label(self.base())},
            "env": {"name": "digits", **env},
            "feedback": list(world.feedback) if how.reads else [],
            "prompts": asdict(tiny.TEMPLATE),
            "rollout": {
                "prompts_per_step": PROMPTS_PER_STEP,
                "num_generations": GENERATIONS,
                "max_completion_length": world.length,
                "max_rows": 512,
            },
            "algorithm": algorithm,
            "optim": {"learning_rate": self.learning_rate, "weight_decay": 0.0, "micro_batch_size": 128},
            "run": {
                "max_steps": world.steps,
                "eval_steps": EVAL_EVERY,
                "eval_limit": EVAL_ANSWERS // samples,
                "eval_samples": samples,
                "seed": self.seed,
            },
        }

    def key(self) -> str:
        """Twelve characters that change with any setting and with the code that decides the numbers."""
        whole = json.dumps([self.settings(), self.code()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def code(self) -> str:
        """The version of the code that decides the numbers."""
        return f"{code_version(method(self.method).algorithm['name'])}-{tiny.recipe_hash(self.base()[0])}"

    def file(self, folder: Path) -> Path:
        return folder / f"{regime(self.regime).base}-{self.method}-{self.seed}-{self.key()}.json"

    def seconds(self) -> float:
        """About what it will take on one idle core."""
        world = regime(self.regime)
        rate = SECONDS["grpo"] if self.method == "grpo" else SECONDS["other"]
        return rate * world.steps * world.length / LENGTH


class Trace:
    """An observer that keeps the curves: name -> [(step, value), ...]."""

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in KEPT}

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        for name in KEPT:
            if name in metrics and metrics[name] == metrics[name]:
                self.curves[name].append((step, metrics[name]))

    def rewind(self, step: int) -> None:
        """Such a run is never continued."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Such a run is never continued."""


def make(job: Job, folder: Path) -> Run:
    """Make one run, unless its file is there already, and return it."""
    file = job.file(folder)
    if file.is_file():
        return load(file)
    started, cpu = time.perf_counter(), time.process_time()
    parts = assemble(_config(job))
    trace = Trace()
    make_loop(parts, [trace], output=None).run()
    run = {
        "job": asdict(job),
        "settings": job.settings(),
        "code": job.code(),
        "curves": trace.curves,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(run))
        draft.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}", got=error.strerror, do="Choose another --output_dir.") from error
    return load(file)


def load(file: Path) -> Run:
    """A finished run.  Raises StorageError if the file is damaged."""
    try:
        run: Run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot read the run {file}", got=" ".join(str(error).split()), do="Remove it; it is made anew."
        ) from error
    return run


def make_all(jobs: Sequence[Job], folder: Path, *, processes: int, console: Console) -> dict[Job, Run]:
    """Every run of a plan, in processes of one thread each; what was made before is not made again."""
    first = list({job.key(): job for job in jobs if not job.file(folder).is_file()}.values())
    missing = list(dict.fromkeys(b for job in first for b in job.bases() if bases.find(*b) is None))
    console.print(estimate(len(jobs), first, missing, processes), highlight=False)
    if missing:
        _work(bases.ensure, [(name, seed) for name, seed in missing], "bases", processes, console)
    if first:
        first.sort(key=Job.seconds, reverse=True)
        _work(make, [(job, folder) for job in first], "runs", processes, console)
    return {job: load(job.file(folder)) for job in jobs}


def estimate(asked: int, todo: Sequence[Job], missing: Sequence[Any], processes: int) -> str:
    """The plan in a line."""
    seconds = sum(job.seconds() for job in todo) + SECONDS["base"] * len(missing)
    return (
        f"{asked} runs asked for, {len(todo)} to make, {len(missing)} bases to warm up: "
        f"about {seconds / 60:.0f} minutes of one core, {seconds / 60 / processes:.0f} with --jobs {processes}."
    )


def _work(function: Any, arguments: Sequence[Any], title: str, processes: int, console: Console) -> None:
    """Call ``function`` on every tuple of arguments, in ``processes``, with a progress bar."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(arguments))
        if processes == 1:
            quiet()
            for call in arguments:
                function(*call)
                progress.advance(bar)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=quiet) as pool:
            futures = [pool.submit(function, *call) for call in arguments]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    progress.advance(bar)
            except (VPDError, KeyboardInterrupt):
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def quiet() -> None:
    """One thread, and none of the warnings that a library repeats at every call."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _config(job: Job) -> Config:
    """The configuration with folders for bases."""
    data = job.settings()
    data["model"]["name_or_path"] = str(bases.ensure(*job.base()))
    if "teacher_model" in data["algorithm"]:
        data["algorithm"]["teacher_model"] = str(bases.ensure(*EXPERT))
    return parse(data)


def _label(base: tuple[str, int]) -> str:
    return f"{base[0]}:{base[1]}"


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    """One curve of a run; empty where the method has none.

    ``student``: the share of its own rollouts that are right, by blocks of iterations, before their updates.  Tasks are
    drawn anew for every iteration, so that this is an unbiased measure on fresh tasks, and it costs nothing.
    """
    if name != "student":
        return [(int(step), float(value)) for step, value in run["curves"][name]]
    rewards = [value for _, value in curve(run, "reward")]
    blocks = [rewards[start : start + BLOCK] for start in range(0, len(rewards), BLOCK)]
    return [(number * BLOCK + len(block) // 2, statistics.fmean(block)) for number, block in enumerate(blocks)]


def measure(run: Run, name: str) -> float | None:
    """A number of a run: None where the method has no such curve.

    Of the student: ``start`` (held out, before training), ``final`` (the last two blocks of its rollouts), ``peak``
    (the best block), ``mean`` (of all), ``held_out`` (the last evaluation).  Of the teacher: ``teacher_start``,
    ``teacher_peak``.  ``e_accuracy`` (the later half of the E-steps), ``drift``, ``trust`` (the later half), ``cpu``
    seconds.
    """
    if name == "cpu":
        return float(run["cpu_seconds"])
    source, part = MEASURES[name]
    values = [value for _, value in curve(run, source)]
    if not values:
        return None
    match part:
        case "first":
            return values[0]
        case "last":
            return values[-1]
        case "last two":
            return statistics.fmean(values[-2:])
        case "peak":
            return max(values)
        case "later half":
            return statistics.fmean(values[len(values) // 2 :])
        case _:
            return statistics.fmean(values)
