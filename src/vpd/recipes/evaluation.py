"""``vpd eval``: avg@k and pass@k of a model, and of the same model told what was wrong."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from vpd.config import Config
from vpd.envs import held_out_tasks
from vpd.evaluate import EvalSettings, Evaluation, evaluate
from vpd.recipes.assemble import assemble
from vpd.types import Metrics


def run_eval(config: Config, settings: EvalSettings, *, limit: int | None, teacher: bool) -> Evaluation:
    """Evaluate ``config.model`` on the held-out tasks of ``config.env``."""
    model = dataclasses.replace(config.model, lora=None)  # a run's model/ has its adapter in its weights
    run = dataclasses.replace(config.run, eval_limit=limit)
    parts = assemble(dataclasses.replace(config, model=model, run=run))
    tasks = held_out_tasks(parts.env, limit)
    feedback = config.feedback if teacher else None
    return evaluate(parts.env, parts.engine, parts.prompter, tasks, settings, feedback=feedback)


def show(rows: Sequence[tuple[str, Metrics]], k: int, console: Console | None = None) -> None:
    """Print student's and teacher's numbers, with the standard error over tasks."""
    table = Table("", "tasks", "answers", f"avg@{k}", f"pass@{k}", "mean reward", "student here")
    for name, metrics in rows:
        if not metrics.get("tasks"):
            table.add_row(name, "0", "0", "-", "-", "-", "-")
            continue
        cells = [f"{metrics[key]:.3f} ± {metrics[key + '_se']:.3f}" for key in (f"avg@{k}", f"pass@{k}")]
        table.add_row(
            name,
            str(int(metrics["tasks"])),
            str(int(metrics["answers"])),
            *cells,
            f"{metrics['reward']:.3f}",
            f"{metrics['student_accuracy']:.3f}" if "student_accuracy" in metrics else "",
        )
    (console or Console()).print(table)
