"""``vpd eval``: avg@k and pass@k of a model, and how much better it retries with feedback than without."""

import dataclasses
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
from vpd.ranks import start_ranks, together
from vpd.recipes.assemble import Parts, assemble
from vpd.report.console import Terminal
from vpd.types import Metrics


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
    return evaluate_tasks(parts.source, required_held_out_tasks(parts.env, options.limit), settings)


def show(result: Evaluation, k: int, console: Terminal | None = None) -> None:
    """Print the student's numbers and, where failed attempts were retried, teacher, control and the gain between them.

    Every ``±`` is the standard error over tasks; one task has none.
    """
    console = console or Terminal()
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
