"""How good is the student, and how much better would it be if it read what was wrong?

The second number is the method's central quantity: the *teacher's* gain.  C is built on the student's failed answers,
and the same weights answer again with it.  Tasks with a failed answer are harder than the rest, and the student's
accuracy on them counts the very failures that they were chosen by, so neither is what the teacher compares with.  The
control is: the same failed attempts, answered again without C, with randomness of their own.  A teacher that ignores C
is then as good as the control in expectation, whatever the tasks.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from vpd.ranks import divide
from vpd.rollout import Request, RolloutSource, Sampling
from vpd.settings import Settings
from vpd.types import Group, Metrics, Rollout, SampleKey, Task, Tokens


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """k answers per task and how they are sampled.

    ``teacher``: failed attempts are answered again with their C; ``control``: and once more without it, to compare with
    (one more answer per failed attempt).
    """

    sampling: Sampling
    num_samples: int = 8
    teacher: bool = True
    control: bool = True


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Settings):
    """How a model is evaluated."""

    num_samples: Annotated[int, Ge(1), "k, answers per task"] = 8
    temperature: Annotated[float, Ge(0), "sampling temperature; 0 is greedy"] = 1.0
    top_p: Annotated[float, Interval(gt=0.0, le=1.0), "nucleus sampling; 1: off"] = 1.0
    limit: Annotated[int | None, Ge(1), "at most so many held-out tasks; null: all"] = None
    teacher: Annotated[
        bool, "also answer failed attempts again, with their feedback and (run.eval_control) without"
    ] = False


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of the student's answers, of the teacher's retries and of the control's, and the rollouts behind them.

    ``retries`` and ``control_retries`` answer the same failed attempts, in the same order; without a control the latter
    and ``control`` are empty.
    """

    student: Metrics
    teacher: Metrics
    control: Metrics
    groups: list[Group]
    retries: list[Rollout]
    control_retries: list[Rollout]

    def __repr__(self) -> str:
        parts = {"student": self.student, "teacher": self.teacher, "control": self.control}
        return f"Evaluation({'; '.join(f'{name}: {_line(metrics)}' for name, metrics in parts.items() if metrics)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluated:
    """One task: its attempts, and the retries of those that failed and have a context."""

    group: Group
    teacher: list[Rollout]
    control: list[Rollout]


def evaluate(source: RolloutSource, tasks: Sequence[Task], settings: EvalSettings) -> Evaluation:
    """Sample k answers per task; with ``settings.teacher`` also answer every failed attempt again, with its C.

    Metrics: ``avg@k``, ``pass@k`` (a task counts if any of its k answers passes), each with ``_se``, the standard
    error over tasks, and ``reward``.  Those of teacher and control are over the retries of failed attempts that have a
    context, one each: a task with such an attempt counts once, by the share of its retries that pass, and ``pass@k``
    says whether any of these passes.  With a control the teacher's also hold ``student_accuracy``, the control's
    accuracy, and ``gain``, the mean over tasks of teacher less control, with ``gain_se``.
    """

    def work(places: Sequence[int]) -> list[_Evaluated]:
        return _evaluate_share(source, places, [tasks[place] for place in places], settings)

    evaluated = divide(source.ranks, range(len(tasks)), work)
    retried = [task for task in evaluated if task.teacher]
    k = settings.num_samples
    teacher: Metrics = {}
    control: Metrics = {}
    if settings.teacher:
        teacher = summarise([task.teacher for task in retried], k)
    if settings.teacher and settings.control:
        control = summarise([task.control for task in retried], k)
        teacher |= _comparison([_share(task.teacher) for task in retried], [_share(task.control) for task in retried])
    return Evaluation(
        student=summarise([task.group.rollouts for task in evaluated], k),
        teacher=teacher,
        control=control,
        groups=[task.group for task in evaluated],
        retries=[retry for task in retried for retry in task.teacher],
        control_retries=[retry for task in retried for retry in task.control],
    )


def _evaluate_share(
    source: RolloutSource, places: Sequence[int], tasks: Sequence[Task], settings: EvalSettings
) -> list[_Evaluated]:
    """Each task's attempts and, asked for the teacher, the retries of its failed attempts."""
    keys = [SampleKey(phase="eval", step=0, task=place, sample=0) for place in places]
    groups = source.generate_groups(keys, tasks, settings.sampling, settings.num_samples)
    teacher: Mapping[int, list[Rollout]] = {}
    control: Mapping[int, list[Rollout]] = {}
    if settings.teacher:
        groups = source.add_feedback(groups)
        failed = [
            (rollout, rollout.teacher_prompt)
            for group in groups
            for rollout in group.rollouts
            if not rollout.success and rollout.teacher_prompt is not None
        ]
        teacher = _retry(source, "eval_retry", [(r, prompt.tokens) for r, prompt in failed], settings.sampling)
        if settings.control:
            control = _retry(source, "eval_control", [(r, r.prompt) for r, _ in failed], settings.sampling)
    return [
        _Evaluated(group=group, teacher=teacher.get(place, []), control=control.get(place, []))
        for place, group in zip(places, groups, strict=True)
    ]


def _retry(
    source: RolloutSource, phase: str, failed: Sequence[tuple[Rollout, Tokens]], sampling: Sampling
) -> dict[int, list[Rollout]]:
    """A retry of each failed attempt with the prompt paired with it, by task; each ``phase`` samples independently."""
    requests = [
        Request(key=dataclasses.replace(rollout.key, phase=phase), task=rollout.task, prompt=prompt)
        for rollout, prompt in failed
    ]
    retries: dict[int, list[Rollout]] = {}
    for retry in source.generate_rollouts(requests, sampling) if requests else ():
        retries.setdefault(retry.key.task, []).append(retry)
    return retries


def _comparison(teacher: Sequence[float], control: Sequence[float]) -> Metrics:
    """The control's accuracy and the paired difference over tasks; nothing where no task was retried."""
    if not teacher:
        return {}
    gains = [with_context - without for with_context, without in zip(teacher, control, strict=True)]
    return {
        "student_accuracy": statistics.fmean(control),
        "gain": statistics.fmean(gains),
        "gain_se": standard_error(gains),
    }


def _share(attempts: Sequence[Rollout]) -> float:
    return statistics.fmean(rollout.success for rollout in attempts)


def summarise(answers: Sequence[Sequence[Rollout]], k: int) -> Metrics:
    """Means over tasks with their standard errors; ``answers`` holds the attempts of each task."""
    if not answers:
        return {"tasks": 0.0, "answers": 0.0}
    shares = [_share(attempts) for attempts in answers]
    passes = [float(any(rollout.success for rollout in attempts)) for attempts in answers]
    rewards = [statistics.fmean(rollout.grade.reward for rollout in attempts) for attempts in answers]
    return {
        f"avg@{k}": statistics.fmean(shares),
        f"avg@{k}_se": standard_error(shares),
        f"pass@{k}": statistics.fmean(passes),
        f"pass@{k}_se": standard_error(passes),
        "reward": statistics.fmean(rewards),
        "tasks": float(len(answers)),
        "answers": float(sum(map(len, answers))),
    }


def _line(metrics: Metrics) -> str:
    """Metrics on a line, each with its standard error where it has one."""
    shown = []
    for name, value in metrics.items():
        error = metrics.get(f"{name}_se", math.nan)
        if not name.endswith("_se"):
            number = f"{value:.0f}" if name in ("tasks", "answers") else f"{value:.3f}"
            shown.append(f"{name} {number}" + ("" if math.isnan(error) else f" ± {error:.3f}"))
    return ", ".join(shown)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean; NaN for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
