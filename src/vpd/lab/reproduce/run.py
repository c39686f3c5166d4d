"""One run: what it is, how it is made, what is measured of it; a finished one is a JSON file and is used again."""

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vpd.config import Config, parse
from vpd.errors import StorageError
from vpd.lab.processes import Advance
from vpd.lab.reproduce import bases
from vpd.lab.reproduce.forgetting import abilities
from vpd.lab.reproduce.methods import find_method
from vpd.lab.reproduce.samples import held_out_samples
from vpd.lab.reproduce.settings_table import Family, find_setting
from vpd.lab.reproduce.versions import code_version
from vpd.lab.reproduce.warmups import Warmup, warm_up
from vpd.lab.reproduce.workplace import Workplace, workplace
from vpd.model.number_types import device_name, faster_type, training_device
from vpd.recipes.assemble import Parts, assemble
from vpd.report.model_card import source_commit
from vpd.run_folder.lock import LockedError
from vpd.types import Group, Metrics

Run: TypeAlias = Mapping[str, Any]

BLOCK = 5  # iterations of one point of the student's curve
EVAL_ANSWERS = 256
E_EVERY = 5  # the methods' own F
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
    "retries/quoted_run",
    "completions/quoted_run",
    "completions/mean_length",
    "m_step/entropy",
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
    "gain_start": ("eval_teacher/gain", "first"),
    "e_accuracy": ("e_step/accuracy", "later half"),
    "drift": ("e_step/student_drift_kl", "mean"),
    "trust": ("gate/trust", "later half"),
    "length": ("completions/mean_length", "last two"),
    "quoted": ("completions/quoted_run", "last two"),
    "entropy": ("m_step/entropy", "last two"),
}
#: summary number -> ability, whose change by training it is
ABILITIES = {"instructions": "instructions/accuracy", "text_nll": "text/nll"}


@dataclass(frozen=True, kw_only=True, order=True)
class Job:
    """One run to make; ``dtype`` is that of the base's weights."""

    setting: str
    method: str
    seed: int
    learning_rate: float
    dtype: str = "float32"

    def base(self) -> tuple[str, int]:
        """Name and seed of the base it starts from."""
        base = find_setting(self.setting).base
        return base, bases.seed_of(base, self.seed)

    def bases(self) -> list[tuple[str, int]]:
        """Name and seed of every base it needs."""
        return [self.base(), *([self.expert()] if self._has_expert else [])]

    def expert(self) -> tuple[str, int]:
        """Name and seed of GKD's teacher."""
        return bases.EXPERTS[find_setting(self.setting).base], 0

    def config_data(self) -> dict[str, Any]:
        """The whole configuration, with the names of bases in place of their folders.

        A method that reads no feedback gets none, so that settings which differ in feedback alone share its runs.
        """
        setting, method = find_setting(self.setting), find_method(self.method)
        family = setting.family
        algorithm = dict(method.algorithm)
        samples = setting.eval_samples if method.reads_feedback or family.same_evaluation else 1
        if self._has_expert:
            algorithm["teacher_model"] = _label(self.expert())
        attempts = family.num_generations // 2 if method.retries else family.num_generations
        return {
            "model": {"name_or_path": _label(self.base()), "dtype": self.dtype},
            "env": {"name": family.env, **setting.env, **(setting.text if method.reads_feedback else {})},
            "feedback": self._feedback(),
            "prompts": dict(family.prompts),
            "rollout": {
                "prompts_per_step": family.prompts_per_step,
                "num_generations": attempts,
                "max_completion_length": setting.length,
                **family.rollout,
                **({"retries": 1} if method.retries else {}),
            },
            "algorithm": algorithm,
            **({"dynamics": dict(method.dynamics)} if method.dynamics else {}),
            "optim": {"learning_rate": self.learning_rate, **family.optim},
            "run": {
                "max_steps": setting.steps,
                "eval_steps": family.eval_steps,
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

    def warmup(self) -> Warmup | None:
        """How the base is trained before."""
        name = find_method(self.method).warmup
        setting = find_setting(self.setting)
        if name is None:
            return None
        family = setting.family
        env = {"name": family.env, **setting.env, **setting.text}
        return Warmup(name=name, base=self.base(), dtype=self.dtype, length=setting.length, env=env, family=family)

    def key(self) -> str:
        """A hash (12 characters) of the configuration and of the code that determines the results."""
        warmup = self.warmup()
        before = [] if warmup is None else [warmup.as_data()]
        whole = json.dumps([self.config_data(), self.code(), *before], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def code(self) -> str:
        """The version of the code that determines the results."""
        method, env = find_method(self.method), find_setting(self.setting).family.env
        names = [method.algorithm["name"], *([method.warmup] if method.warmup else [])]
        return "-".join([*(code_version(name, env) for name in names), bases.recipe_hash(self.base()[0])])

    def file(self, folder: Path) -> Path:
        return folder / f"{find_setting(self.setting).base}-{self.method}-{self.seed}-{self.key()}.json"

    def seconds(self) -> float:
        """Estimated time on one idle core."""
        setting, method = find_setting(self.setting), find_method(self.method)
        seconds = setting.family.seconds.get(self.dtype) or next(iter(setting.family.seconds.values()))
        distils = method.reads_feedback and method.algorithm.get("distillation_weight", 1.0)
        rate = seconds.distilling if distils else seconds.plain
        if method.algorithm["name"] in ("vpd", "gated") and (every := method.algorithm.get("e_every", E_EVERY)):
            rate += seconds.e_step / every
        warming = seconds.warming if method.warmup else 0.0
        return rate * setting.steps * setting.length / setting.family.length + warming


def dtype_of(setting: str, asked: str | None = None) -> str:
    """The number type of the weights in a setting: the one asked for, else its family's; of several the faster one."""
    known = tuple(find_setting(setting).family.seconds)
    if asked is not None:
        return asked
    return known[0] if len(known) == 1 else faster_type(training_device())


class CurveRecorder:
    """An observer that keeps the curves of some metrics: name -> [(step, value), ...], NaN left out.

    ``began`` and ``began_cpu`` are the times, in seconds, since when this process has been at it; they lie further back
    where a run was continued.
    """

    def __init__(self, names: Sequence[str], advance: Advance) -> None:
        self._advance = advance
        self.began, self.began_cpu = time.perf_counter(), time.process_time()
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in names}

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        for name, curve in self.curves.items():
            if name in metrics and metrics[name] == metrics[name]:
                curve.append((step, metrics[name]))
        if step:
            self._advance(1)

    def rewind(self, step: int) -> None:
        """Nothing to do: what :meth:`restore` sets ends at the checkpoint."""

    def state(self) -> dict[str, Any]:
        return {"curves": self.curves, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def restore(self, state: dict[str, Any]) -> None:
        curves = state["curves"]
        self.curves = {name: [(int(step), value) for step, value in curves[name]] for name in self.curves}
        self.took_before(state["seconds"], state["cpu_seconds"])

    def took_before(self, seconds: float, cpu_seconds: float) -> None:
        """Set the times spent up to now."""
        self.began, self.began_cpu = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        """Time spent."""
        return time.perf_counter() - self.began

    @property
    def cpu_seconds(self) -> float:
        """Time of a core spent."""
        return time.process_time() - self.began_cpu


def make(job: Job, folder: Path, advance: Advance) -> Run | None:
    """Make one run and write its file; a file that exists is loaded instead.  None: another process is making it.

    A run whose family saves it goes on where it was stopped.
    """
    file = job.file(folder)
    if file.is_file():
        return load(file)
    try:
        with workplace(file, is_kept=find_setting(job.setting).family.save_steps > 0) as place:
            if not file.is_file():
                _write(_made(job, place, advance), file)
    except LockedError:
        return load(file) if file.is_file() else None
    except StorageError:
        if not file.is_file():  # else another process ended it while this one came to its folder
            raise
    return load(file)


def _write(run: Run, file: Path) -> None:
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(run))
        draft.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}", got=error.strerror, do="Choose another --output_dir.") from error


def _made(job: Job, place: Workplace, advance: Advance) -> dict[str, Any]:
    recorder = CurveRecorder(KEPT, advance)
    family = find_setting(job.setting).family
    parts = assemble(_config(job, _base(job, place)))
    before = place.once("before", lambda: _looked_at(parts, family))
    recorder.took_before(recorder.seconds + place.seconds, recorder.cpu_seconds + place.cpu_seconds)
    loop = place.loop(parts, [recorder])
    advance(loop.step)
    loop.run()
    parts.engine.load(parts.learner.policy())
    after = _looked_at(parts, family)
    return {
        "job": asdict(job),
        "settings": job.config_data(),
        "code": job.code(),
        "commit": source_commit() or "",
        "device": device_name(),
        "curves": recorder.curves,
        "abilities": {name: (before["abilities"][name], value) for name, value in after["abilities"].items()},
        "samples": {"before": before["samples"], "after": after["samples"]} if after["samples"] else {},
        "seconds": recorder.seconds,
        "cpu_seconds": recorder.cpu_seconds,
    }


def _looked_at(parts: Parts, family: Family) -> dict[str, Any]:
    """A model before or after training: its other abilities, and some of its answers."""
    return {
        "abilities": abilities(parts) if family.forgetting else {},
        "samples": list(held_out_samples(parts, family.samples)) if family.samples else [],
    }


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


def _base(job: Job, place: Workplace) -> Path:
    """The folder of the base, warmed up where the method says so."""
    base, warmup = bases.ensure(*job.base()), job.warmup()
    if warmup is None:
        return base
    folder = place.folder / "warm"

    def warm() -> bool:
        shutil.rmtree(folder, ignore_errors=True)  # of a warm-up that was stopped
        folder.mkdir()
        return warm_up(warmup, base, folder) != base

    return folder / "model" if place.once("is_warm", warm) else base


def _config(job: Job, base: Path) -> Config:
    data = job.config_data()
    data["model"]["name_or_path"] = str(base)
    data["run"] |= {"save_steps": find_setting(job.setting).family.save_steps, "save_total_limit": 1}
    if "teacher_model" in data["algorithm"]:
        data["algorithm"]["teacher_model"] = str(bases.ensure(*job.expert()))
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
    seconds.  Change by training: ``instructions`` (share followed), ``text_nll`` (nats a token).
    """
    if name == "cpu":
        return float(run["cpu_seconds"])
    if name in ABILITIES:
        pair = run["abilities"].get(ABILITIES[name])
        return None if pair is None else float(pair[1]) - float(pair[0])
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
