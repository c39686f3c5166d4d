"""``vpd eval``: avg@k and pass@k of a model, and of the same model told what was wrong."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Interval
from rich.console import Console
from rich.table import Table

from vpd.config import Config
from vpd.envs import Env, held_out_tasks
from vpd.evaluation import EvalSettings, Evaluation
from vpd.evaluation import evaluate as evaluate_tasks
from vpd.feedback import Feedback
from vpd.recipes.assemble import assemble
from vpd.settings import Settings
from vpd.types import Metrics


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Settings):
    """How a model is evaluated."""

    num_samples: Annotated[int, Ge(1), "k, answers per task"] = 8
    temperature: Annotated[float, Ge(0), "sampling temperature; 0 is greedy"] = 1.0
    top_p: Annotated[float, Interval(gt=0.0, le=1.0), "nucleus sampling; 1: off"] = 1.0
    limit: Annotated[int | None, Ge(1), "at most so many held-out tasks; null: all"] = None
    teacher: Annotated[bool, "also answer failed attempts again, with their feedback"] = False


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
    parts = assemble(config, model=model, tokenizer=tokenizer, env=env, feedback=feedback)
    rollout = parts.config.rollout
    settings = EvalSettings(
        sampling=dataclasses.replace(rollout.sampling, temperature=options.temperature, top_p=options.top_p),
        num_samples=options.num_samples,
        teacher=options.teacher,
    )
    return evaluate_tasks(parts.source, held_out_tasks(parts.env, options.limit), settings)


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
