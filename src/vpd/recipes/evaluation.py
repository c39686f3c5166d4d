"""``vpd eval``: avg@k and pass@k of a model, and how much better it retries with feedback than without."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from vpd.config import Config
from vpd.envs import Env, required_held_out_tasks
from vpd.evaluation import EvalOptions as EvalOptions
from vpd.evaluation import EvalSettings, Evaluation
from vpd.evaluation import evaluate as evaluate_tasks
from vpd.feedback import Feedback
from vpd.model.threads import threads_for
from vpd.printable import cut
from vpd.ranks import start_ranks, together
from vpd.recipes.assemble import Parts, assemble
from vpd.report.console import Terminal
from vpd.types import Metrics, Rollout

LOG = logging.getLogger("vpd")
LEAST_TASKS = 8  # with a failed attempt, to say anything about a gain
LONGEST_ANSWER = 600  # characters of one text that show_answers prints


def evaluate(
    config: Config,
    options: EvalOptions | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    env: Env | None = None,
    feedback: Sequence[Feedback] | None = None,
) -> Evaluation:
    """Evaluate ``config.model`` on the held-out tasks of ``config.env``; objects take the place of their sections."""
    options = options or EvalOptions()
    plain = dataclasses.replace(config.model, lora=None)  # a run's model/ has its adapter in its weights
    run = dataclasses.replace(config.run, eval_limit=options.limit)
    config = dataclasses.replace(config, model=plain, run=run)
    objects: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "env": env, "feedback": feedback}
    ranks = start_ranks(run.rank_timeout)
    return together(ranks, "the evaluation", lambda: _evaluated(assemble(config, **objects, ranks=ranks), options))


def _evaluated(parts: Parts, options: EvalOptions) -> Evaluation:
    """The evaluation of assembled parts; all processes call this."""
    rollout = parts.config.rollout
    settings = EvalSettings(
        sampling=dataclasses.replace(rollout.sampling, temperature=options.temperature, top_p=options.top_p),
        num_samples=options.num_samples,
        teacher=options.teacher,
        control=parts.config.run.eval_control,
    )
    tasks = required_held_out_tasks(parts.env, options.limit)
    model, k = parts.config.model.name_or_path, options.num_samples
    again = ", failed ones again with their feedback" if options.teacher else ""
    LOG.info("evaluating %s: %d tasks, %d answers each%s", model, len(tasks), k, again)
    with threads_for(parts.learner.model):
        return evaluate_tasks(parts.source, tasks, settings)


def show(result: Evaluation, k: int) -> None:
    """Print the student's numbers and, where failed attempts were retried, teacher, control and the gain between them.

    Every ``±`` is the standard error over tasks; one task has none.
    """
    console = Terminal()
    student = _table("", f"avg@{k}", f"pass@{k}")
    student.add_row("student", *_cells(result.student, k))
    console.print(student)
    if not result.teacher:
        return
    if not result.retries:
        console.print("No failed attempt has feedback, so the teacher has nothing to retry.")
        return
    retries = _table("failed attempts again", "right", "any right")
    retries.add_row("teacher, with feedback", *_cells(result.teacher, k))
    if result.control:
        retries.add_row("control, without", *_cells(result.control, k))
    console.print(retries)
    console.print(
        f"right: share of a task's retries (avg@{k} in --output); any right: share of the tasks with a right retry "
        f"(pass@{k} in --output), not with a right answer among {k}.",
        highlight=False,
    )
    if result.control:
        gain, error = result.teacher["gain"], result.teacher["gain_se"]
        found = _with_error(f"{gain:+.3f}", error)
        console.print(f"gain from feedback (teacher less control, by task): {found}", style="bold")
        console.print(verdict(gain, error, round(result.teacher["tasks"])), highlight=False)


def verdict(gain: float, error: float, tasks: int) -> str:
    """What a gain and its standard error over so many tasks (NaN: of one) say about a run with this feedback."""
    if math.isnan(error):
        return "One task says nothing about others: evaluate on more."
    if tasks < LEAST_TASKS:  # two that agree by chance have no error at all
        return f"{tasks} tasks with a failed attempt say little about others: evaluate on {LEAST_TASKS} at least."
    if gain > 2 * error:
        return "The feedback helps: there is something to distil."
    if gain < -2 * error:
        return (
            "The feedback makes answers worse: look at the teacher's prompts, or use a method that reads none (grpo)."
            " After a run that is no fault where the student has overtaken its teacher."
        )
    smallest = 2 * error
    return (
        f"No gain that these tasks can show (it would take {smallest:+.3f}): nothing to distil yet, or too few tasks."
        " Make the feedback say more, evaluate on more tasks, or use a method that reads none (grpo)."
    )


def show_answers(result: Evaluation, count: int) -> None:
    """Print the first answers to ``count`` tasks, failures first, with the retries of teacher and control."""
    console = Terminal()
    attempts = [group.rollouts[0] for group in result.groups]
    retries = {(retry.key.task, retry.key.sample): retry for retry in result.retries}
    controls = {(retry.key.task, retry.key.sample): retry for retry in result.control_retries}
    for attempt in sorted(attempts, key=lambda rollout: rollout.success)[:count]:
        place = (attempt.key.task, attempt.key.sample)
        lines = [("task", str(attempt.task.messages[-1]["content"])), *_answer("answer", attempt)]
        lines += [("feedback", attempt.grade.feedback)] if attempt.grade.feedback else []
        lines += _answer("teacher", retries[place]) if place in retries else []
        lines += _answer("control", controls[place]) if place in controls else []
        for name, text in lines:
            console.print(f"{name:<10} {cut(text, LONGEST_ANSWER)}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _answer(name: str, rollout: Rollout) -> list[tuple[str, str]]:
    outcome = "right" if rollout.success else "wrong"
    return [(name, f"[{outcome}, reward {rollout.grade.reward:g}] {rollout.completion.text}")]


def _table(title: str, mean: str, best: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in (title, "tasks", "answers", mean, best, "reward"):
        table.add_column(column, no_wrap=True, min_width=22 if column == title else None)
    return table


def _cells(metrics: Metrics, k: int) -> list[str]:
    """The cells of a row after its name."""
    if not metrics["tasks"]:
        return ["0", "0", "-", "-", "-"]
    shares = [_with_error(f"{metrics[key]:.3f}", metrics[f"{key}_se"]) for key in (f"avg@{k}", f"pass@{k}")]
    return [str(int(metrics["tasks"])), str(int(metrics["answers"])), *shares, f"{metrics['reward']:.3f}"]


def _with_error(value: str, error: float) -> str:
    return value if math.isnan(error) else f"{value} ± {error:.3f}"
