"""How good is the student, and how good would it be if it were told what was wrong?

The second number is the method's central quantity: the *teacher's* accuracy.  C is built on the student's failed
answers and the same weights answer again with it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vpd.engines import Engine
from vpd.envs import Env
from vpd.feedback import Feedback
from vpd.feedback.writers import ModelWriter
from vpd.prompts import Prompter
from vpd.rollout import Sampling, collect, generate_turns, grade_completions
from vpd.types import Group, Metrics, Rollout, Task


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """k answers per task, sampled in a way of their own."""

    sampling: Sampling
    num_samples: int = 8
    success_threshold: float = 0.5
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``student`` and ``teacher`` metrics, and the rollouts behind them."""

    student: Metrics
    teacher: Metrics
    groups: list[Group]
    retries: list[Rollout]


def evaluate(
    env: Env,
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    settings: EvalSettings,
    *,
    feedback: Sequence[Feedback] | None = None,
) -> Evaluation:
    """Sample k answers per task; with ``feedback`` also answer every failed attempt again, with its C.

    Metrics: ``avg@k``, ``pass@k`` (a task counts if any of its k answers passes), each with ``_se``, the standard
    error over tasks, and ``reward``.  The teacher's are over the tasks that have a failed answer with a context;
    its ``student_accuracy`` is the student's avg@k on just these tasks, so that the two can be compared.
    """
    groups = collect(
        env,
        engine,
        prompter,
        tasks,
        settings.sampling,
        num_generations=settings.num_samples,
        success_threshold=settings.success_threshold,
        stream=(settings.seed, "eval"),
    )
    student = summarise([group.rollouts for group in groups], settings.num_samples)
    if feedback is None:
        return Evaluation(student=student, teacher={}, groups=groups, retries=[])
    writer = ModelWriter(engine, prompter, stream=(settings.seed, "eval_feedback"))
    for source in feedback:
        groups = source(groups, writer)
    groups = prompter.attach(groups)
    failed = [
        (n, r) for n, g in enumerate(groups) for r in g.rollouts if not r.success and r.teacher_prompt is not None
    ]
    retries = _answer_again(env, engine, prompter, [r for _, r in failed], settings)
    by_task: dict[int, list[Rollout]] = {}
    for (number, _), retry in zip(failed, retries, strict=True):
        by_task.setdefault(number, []).append(retry)
    teacher = summarise(list(by_task.values()), settings.num_samples)
    if by_task:
        same = [statistics.fmean(r.success for r in groups[number].rollouts) for number in by_task]
        teacher["student_accuracy"] = statistics.fmean(same)
    return Evaluation(student=student, teacher=teacher, groups=groups, retries=retries)


def _answer_again(
    env: Env, engine: Engine, prompter: Prompter, failed: Sequence[Rollout], settings: EvalSettings
) -> list[Rollout]:
    tasks = [rollout.task for rollout in failed]
    prompts = [rollout.teacher_prompt.tokens for rollout in failed if rollout.teacher_prompt is not None]
    if not prompts:
        return []
    stream = (settings.seed, "eval_teacher")
    completions = generate_turns(env, engine, prompter, tasks, prompts, settings.sampling, stream=stream)
    return grade_completions(env, tasks, prompts, completions, settings.success_threshold)


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
