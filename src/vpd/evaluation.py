"""How good is the student, and how good would it be if it were told what was wrong?

The second number is the method's central quantity: the *teacher's* accuracy.  C is built on the student's failed
answers and the same weights answer again with it.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vpd.ranks import divide
from vpd.rollout import Request, RolloutSource, Sampling
from vpd.types import Group, Metrics, Rollout, SampleKey, Task


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """k answers per task and how they are sampled; ``teacher``: failed attempts are answered again with their C."""

    sampling: Sampling
    num_samples: int = 8
    teacher: bool = True


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``student`` and ``teacher`` metrics, and the rollouts behind them."""

    student: Metrics
    teacher: Metrics
    groups: list[Group]
    retries: list[Rollout]


def evaluate(source: RolloutSource, tasks: Sequence[Task], settings: EvalSettings) -> Evaluation:
    """Sample k answers per task; with ``settings.teacher`` also answer every failed attempt again, with its C.

    Metrics: ``avg@k``, ``pass@k`` (a task counts if any of its k answers passes), each with ``_se``, the standard
    error over tasks, and ``reward``.  The teacher's are over the tasks that have a failed answer with a context;
    its ``student_accuracy`` is the student's avg@k on just these tasks, so that the two can be compared.
    """

    def work(places: Sequence[int]) -> list[tuple[Group, list[Rollout]]]:
        return _evaluate_share(source, places, [tasks[place] for place in places], settings)

    pairs = divide(source.ranks, range(len(tasks)), work)
    groups = [group for group, _ in pairs]
    student = summarise([group.rollouts for group in groups], settings.num_samples)
    retried = [(group, retries) for group, retries in pairs if retries]
    teacher: Metrics = {}
    if settings.teacher:
        teacher = summarise([retries for _, retries in retried], settings.num_samples)
    if retried:
        same_tasks = [statistics.fmean(r.success for r in group.rollouts) for group, _ in retried]
        teacher["student_accuracy"] = statistics.fmean(same_tasks)
    return Evaluation(
        student=student, teacher=teacher, groups=groups, retries=[r for _, retries in retried for r in retries]
    )


def _evaluate_share(
    source: RolloutSource, places: Sequence[int], tasks: Sequence[Task], settings: EvalSettings
) -> list[tuple[Group, list[Rollout]]]:
    """Each task's attempts and, asked for the teacher, the retries of its failed attempts."""
    keys = [SampleKey(phase="eval", step=0, task=place, sample=0) for place in places]
    groups = source.attempt(keys, tasks, settings.sampling, settings.num_samples)
    if not settings.teacher:
        return [(group, []) for group in groups]
    groups = source.add_feedback(groups)
    requests = [
        Request(
            key=dataclasses.replace(rollout.key, phase="eval_retry"),
            task=rollout.task,
            prompt=rollout.teacher_prompt.tokens,
        )
        for group in groups
        for rollout in group.rollouts
        if not rollout.success and rollout.teacher_prompt is not None
    ]
    retries: dict[int, list[Rollout]] = {place: [] for place in places}
    for retry in source.answer(requests, settings.sampling) if requests else ():
        retries[retry.key.task].append(retry)
    return [(group, retries[place]) for place, group in zip(places, groups, strict=True)]


def summarise(answers: Sequence[Sequence[Rollout]], k: int) -> Metrics:
    """Means over tasks with their standard errors; ``answers`` holds the attempts of each task."""
    if not answers:
        return {"tasks": 0.0, "answers": 0.0}
    shares = [statistics.fmean(rollout.success for rollout in attempts) for attempts in answers]
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


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean; NaN for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
