"""Make the runs of a plan, in parallel; a finished run is a JSON file and is used again."""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vpd.config import Config, parse
from vpd.envs.digits import LENGTH
from vpd.errors import StorageError
from vpd.lab import tiny
from vpd.lab.processes import Advance, Call, run_calls
from vpd.lab.reproduce import bases
from vpd.lab.reproduce.methods import find_method
from vpd.lab.reproduce.settings_table import GENERATIONS, PROMPTS_PER_STEP, find_setting
from vpd.lab.reproduce.versions import code_version
from vpd.recipes.assemble import assemble
from vpd.recipes.train import make_loop
from vpd.report.console import Terminal
from vpd.types import Group, Metrics

Run: TypeAlias = Mapping[str, Any]

EVAL_EVERY = 20
BLOCK = 5  # iterations of one point of the student's curve
EVAL_ANSWERS = 256
EXPERT = ("tiny-expert", 0)  # GKD's teacher: the base and its seed
SECONDS = {"base": 45.0, "grpo": 0.07, "other": 0.11}  # on one core: a base; an iteration with answers of six digits
KEPT = (
    "reward",
    "frac_reward_zero_std",
    "eval/accuracy",
    "eval_teacher/accuracy",
    "eval_teacher/student_accuracy",
    "eval_teacher/gain",
    "eval_teacher/gain_se",
    "e_step/accuracy",
    "e_step/student_drift_kl",
    "gate/trust",
    "gate/auc",
    "gate/groups",
    "retries/success",
    "judge/unsure",
)
#: summary number -> (curve, which part of it)
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

    setting: str
    method: str
    seed: int
    learning_rate: float

    def base(self) -> tuple[str, int]:
        """Name and seed of the base it starts from."""
        return find_setting(self.setting).base, self.seed

    def bases(self) -> list[tuple[str, int]]:
        """Name and seed of every base it needs."""
        return [self.base(), *([EXPERT] if self._has_expert else [])]

    def config_data(self) -> dict[str, Any]:
        """The whole configuration, with the names of bases in place of their folders.

        A method that reads no feedback gets none, so that settings which differ in feedback alone share its runs.
        """
        setting, method = find_setting(self.setting), find_method(self.method)
        env = setting.env if method.reads_feedback else {k: v for k, v in setting.env.items() if k == "length"}
        algorithm = dict(method.algorithm)
        samples = setting.eval_samples if method.reads_feedback else 1
        if self._has_expert:
            algorithm["teacher_model"] = _label(EXPERT)
        return {
            "model": {"name_or_path": _label(self.base())},
            "env": {"name": "digits", **env},
            "feedback": self._feedback(),
            "prompts": asdict(tiny.TEMPLATE),
            "rollout": {
                "prompts_per_step": PROMPTS_PER_STEP,
                "num_generations": GENERATIONS,
                "max_completion_length": setting.length,
                "max_rows": 512,
                **method.rollout,
            },
            "algorithm": algorithm,
            "optim": {"learning_rate": self.learning_rate, "weight_decay": 0.0, "micro_batch_size": 128},
            "run": {
                "max_steps": setting.steps,
                "eval_steps": EVAL_EVERY,
                "eval_limit": EVAL_ANSWERS // samples,
                "eval_samples": samples,
                "seed": self.seed,
            },
        }

    @property
    def _has_expert(self) -> bool:
        return bool(find_method(self.method).algorithm["name"] == "gkd")

    def _feedback(self) -> list[Any]:
        """The method's own sources, else the setting's, which a method that reads no feedback does not get."""
        method = find_method(self.method)
        if method.feedback is not None:
            return list(method.feedback)
        return list(find_setting(self.setting).feedback) if method.reads_feedback else []

    def key(self) -> str:
        """A hash (12 characters) of the configuration and of the code that determines the results."""
        whole = json.dumps([self.config_data(), self.code()], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def code(self) -> str:
        """The version of the code that determines the results."""
        return f"{code_version(find_method(self.method).algorithm['name'])}-{tiny.recipe_hash(self.base()[0])}"

    def file(self, folder: Path) -> Path:
        return folder / f"{find_setting(self.setting).base}-{self.method}-{self.seed}-{self.key()}.json"

    def seconds(self) -> float:
        """Estimated time on one idle core."""
        setting = find_setting(self.setting)
        rate = SECONDS["grpo"] if self.method == "grpo" else SECONDS["other"]
        return rate * setting.steps * setting.length / LENGTH


class CurveRecorder:
    """An observer that keeps the curves of some metrics: name -> [(step, value), ...], NaN left out."""

    def __init__(self, names: Sequence[str], advance: Advance) -> None:
        self._advance = advance
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in names}

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        for name, curve in self.curves.items():
            if name in metrics and metrics[name] == metrics[name]:
                curve.append((step, metrics[name]))
        if step:
            self._advance(1)

    def rewind(self, step: int) -> None:
        """Such a run is never continued."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Such a run is never continued."""


def make(job: Job, folder: Path, advance: Advance) -> Run:
    """Make one run and write its file; a file that exists is loaded instead."""
    file = job.file(folder)
    if file.is_file():
        return load(file)
    started, cpu = time.perf_counter(), time.process_time()
    parts = assemble(_config(job))
    recorder = CurveRecorder(KEPT, advance)
    make_loop(parts, [recorder], output=None).run()
    run = {
        "job": asdict(job),
        "settings": job.config_data(),
        "code": job.code(),
        "curves": recorder.curves,
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


def _make_base(name: str, seed: int, advance: Advance) -> Path:
    return bases.ensure(name, seed)


def load(file: Path) -> Run:
    """Load a finished run.  Raises StorageError if the file is damaged."""
    try:
        run: Run = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot read the run {file}",
            got=" ".join(str(error).split()),
            do="Remove the file; the run is then made again.",
        ) from error
    return run


def make_all(jobs: Sequence[Job], folder: Path, *, processes: int, console: Terminal) -> dict[Job, Run]:
    """All runs of a plan, made in ``processes`` of one thread each; runs whose files exist are used again."""
    first = list({job.key(): job for job in jobs if not job.file(folder).is_file()}.values())
    missing = list(dict.fromkeys(b for job in first for b in job.bases() if bases.find(*b) is None))
    console.print(estimate(len(jobs), first, missing, processes), highlight=False)
    if missing:
        calls = [Call(arguments=base, title="bases") for base in missing]
        run_calls(_make_base, calls, processes=processes, console=console)
    if first:
        first.sort(key=Job.seconds, reverse=True)
        calls = [
            Call(arguments=(job, folder), title="iterations", steps=find_setting(job.setting).steps) for job in first
        ]
        run_calls(make, calls, processes=processes, console=console)
    return {job: load(job.file(folder)) for job in jobs}


def estimate(asked: int, todo: Sequence[Job], missing: Sequence[Any], processes: int) -> str:
    """The plan in one line."""
    seconds = sum(job.seconds() for job in todo) + SECONDS["base"] * len(missing)
    return (
        f"{asked} runs in the plan, {len(todo)} to make, {len(missing)} bases to make: "
        f"about {seconds / 60:.0f} minutes of one core, {seconds / 60 / processes:.0f} with --jobs {processes}."
    )


def _config(job: Job) -> Config:
    """The configuration with the folders of bases."""
    data = job.config_data()
    data["model"]["name_or_path"] = str(bases.ensure(*job.base()))
    if "teacher_model" in data["algorithm"]:
        data["algorithm"]["teacher_model"] = str(bases.ensure(*EXPERT))
    return parse(data)


def _label(base: tuple[str, int]) -> str:
    return f"{base[0]}:{base[1]}"


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    """One curve of a run; empty where the method has none.

    ``student``: the success rate of its training rollouts, by blocks of iterations.  Every iteration has new tasks, and
    rollouts are sampled before the update, so that this is an unbiased estimate on unseen tasks, at no cost.
    """
    if name != "student":
        return [(int(step), float(value)) for step, value in run["curves"][name]]
    rewards = [value for _, value in curve(run, "reward")]
    blocks = [rewards[start : start + BLOCK] for start in range(0, len(rewards), BLOCK)]
    return [(number * BLOCK + len(block) // 2, statistics.fmean(block)) for number, block in enumerate(blocks)]


def measure(run: Run, name: str) -> float | None:
    """A summary number of a run; None if the method has no such curve.

    Student: ``start`` (held out, before training), ``final`` (the last two blocks of its rollouts), ``peak``
    (the best block), ``mean`` (of all), ``held_out`` (the last evaluation).  Teacher: ``teacher_start``,
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
