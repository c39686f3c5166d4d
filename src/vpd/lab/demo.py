"""``vpd demo``: GRPO, SDPO and VPD learn side by side from the same base, on the same budget of rollouts.

The task is in words.  A rule's letter hides an operation on digits; the student is not told which, is right about one
time in a few hundred, and after each wrong answer the environment says in a sentence what the rule means.  Who reads
that sentence learns; who sees the reward alone has almost nothing to go on.
"""

import dataclasses
import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from vpd.config import Config, parse
from vpd.errors import StorageError
from vpd.recipes.assemble import assemble
from vpd.recipes.train import make_loop
from vpd.report.console import ConsoleProgress
from vpd.report.curves import Curve, draw_curves, mean_curve
from vpd.types import Group, Metrics

Curves: TypeAlias = Mapping[str, Sequence[Curve]]

METHODS = ("grpo", "sdpo", "vpd")
LEARNING_RATES = {"grpo": 1e-3, "sdpo": 2e-4, "vpd": 2e-4}  # each method's own best; one rate for all would be unfair


class _Trace:
    """An observer that keeps the two curves and one failed attempt to show."""

    def __init__(self) -> None:
        self.student: list[tuple[int, float]] = []
        self.teacher: list[tuple[int, float]] = []
        self.failure: Any = None

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        if "eval/accuracy" in metrics:
            self.student.append((step, metrics["eval/accuracy"]))
        if "eval_teacher/accuracy" in metrics:
            self.teacher.append((step, metrics["eval_teacher/accuracy"]))
        if self.failure is None:
            rollouts = [r for group in groups for r in group.rollouts]
            self.failure = next((r for r in rollouts if r.teacher_prompt is not None and not r.success), None)

    def rewind(self, step: int) -> None:
        """Such a run is never continued."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Such a run is never continued."""


def settings_of(method: str, seed: int, steps: int) -> Config:
    """The demo's settings of one method; all but algorithm and learning rate are shared."""
    average = {} if method == "grpo" else {"average": "token_mean"}
    return parse(
        {
            "model": {"name_or_path": "tiny"},
            "env": {"name": "digits"},
            "feedback": ["environment"],
            "rollout": {"prompts_per_step": 16, "num_generations": 8, "max_completion_length": 6, "max_rows": 512},
            "algorithm": {"name": method, **average},
            "optim": {"learning_rate": LEARNING_RATES[method], "weight_decay": 0.0, "micro_batch_size": 128},
            "run": {
                "max_steps": steps,
                "eval_steps": max(steps // 10, 1),
                "eval_limit": 256,
                "eval_samples": 1,
                "seed": seed,
            },
        }
    )


def demo(output: Path, *, seeds: int = 1, steps: int = 100, first_seed: int = 0) -> dict[str, Any]:
    """Run the three methods, show what happened, write ``results.json`` and ``curves.png``; returns the results."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".probe").touch()
        (output / ".probe").unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {output}", got=error.strerror, do="Choose another --output_dir."
        ) from error
    console = Console()
    runs: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + seeds):
        for method in METHODS:
            trace, seconds = _run(method, seed, steps, console, introduce=not runs)
            runs.append(
                {"method": method, "seed": seed, "student": trace.student, "teacher": trace.teacher, "seconds": seconds}
            )
    students = {method: [run["student"] for run in runs if run["method"] == method] for method in METHODS}
    teachers = {method: [run["teacher"] for run in runs if run["method"] == method] for method in METHODS}
    console.print(_table(students, teachers))
    console.print("\n" + verdict(students, teachers), highlight=False)
    results = {
        "methods": {
            method: {
                "student": mean_curve(students[method]),
                "teacher": mean_curve(teachers[method]),
                "seconds": statistics.fmean(run["seconds"] for run in runs if run["method"] == method),
            }
            for method in METHODS
        },
        "seed": first_seed,
        "seeds": seeds,
        "commit": commit(),
        "runs": runs,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    draw_curves(output / "curves.png", students, teachers)
    console.print(f"\nWritten: {output}/results.json and {output}/curves.png")
    return results


def verdict(students: Curves, teachers: Curves) -> str:
    """What the numbers say, computed from them: who learned from the text, and where reward alone stands."""
    mean = {name: statistics.fmean(_mean(run) for run in runs) for name, runs in students.items()}
    peak = {name: statistics.fmean(_peak(run) for run in runs) for name, runs in students.items()}
    start = statistics.fmean(run[0][1] for runs in students.values() for run in runs)
    taught = {name: statistics.fmean(_peak(run) for run in runs) for name, runs in teachers.items()}
    relation = "above" if mean["vpd"] > mean["sdpo"] else "not above"
    lead = (
        f"From a base that is right {start:.1%} of the time, VPD's student averages {mean['vpd']:.2f} over the run, "
        f"{relation} SDPO's {mean['sdpo']:.2f}; its teacher, trained on outcomes, peaks at {taught['vpd']:.2f} "
        f"against {taught['sdpo']:.2f}."
    )
    best = max(mean["vpd"], mean["sdpo"])
    place = (
        "behind both"
        if mean["grpo"] < min(mean["vpd"], mean["sdpo"])
        else ("ahead of both" if mean["grpo"] > best else "between the two")
    )
    seeds = len(students["vpd"])
    caution = (
        "One seed: run with --seeds 3 before believing a small difference."
        if seeds == 1
        else f"Means of {seeds} seeds."
    )
    alone = f"GRPO, which sees the reward alone, averages {mean['grpo']:.2f} (peak {peak['grpo']:.2f}): {place}."
    return f"{lead} {alone} {caution}"


def _run(method: str, seed: int, steps: int, console: Console, *, introduce: bool) -> tuple[_Trace, float]:
    started = time.perf_counter()
    parts = assemble(settings_of(method, seed, steps))
    trace = _Trace()
    progress = ConsoleProgress(steps, title=f"{method:>4}, seed {seed}", every=steps + 1, console=console)
    loop = make_loop(parts, [trace, progress], output=None)
    if introduce:
        _introduce(dataclasses.replace(loop), parts.tokenizer, console)
    with progress:
        loop.run()
    return trace, time.perf_counter() - started


def _introduce(loop: Any, tokenizer: Any, console: Console) -> None:
    """Show one failed attempt as text, before anything is trained."""
    groups, _ = loop.source.take(0)
    failure = next(r for group in groups for r in group.rollouts if r.teacher_prompt is not None and not r.success)
    console.print("One attempt, before training:", style="bold")
    console.print(
        f"  the student reads   {tokenizer.decode(failure.prompt)}", markup=False, highlight=False, soft_wrap=True
    )
    console.print(f"  and answers         {failure.completion.text}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"  the feedback is     {failure.grade.feedback}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"  the teacher reads   {tokenizer.decode(failure.teacher_prompt.tokens)}\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _table(students: Curves, teachers: Curves) -> Table:
    table = Table(title="Share of right answers (held-out tasks), by iteration")
    steps = [step for step, _ in students["vpd"][0]]
    shown = [step for step in steps if step in {steps[0], *steps[2::2], steps[-1]}]
    for column in ("", *(str(step) for step in shown), "final", "peak", "mean"):
        table.add_column(column, justify="right" if column else "left")
    for method in METHODS:
        for role, curves in (("student", students[method]), ("teacher", teachers[method])):
            curve = dict(mean_curve(curves))
            cells = [f"{curve[step]:.2f}" if step in curve else "-" for step in shown]
            summary = [statistics.fmean(part(run) for run in curves) for part in (_final, _peak, _mean)]
            style = "bold" if role == "student" else "dim"
            table.add_row(f"{method.upper()} {role}", *cells, *(f"{value:.2f}" for value in summary), style=style)
    return table


def _final(curve: Curve) -> float:
    return curve[-1][1]


def _peak(curve: Curve) -> float:
    return max(value for _, value in curve)


def _mean(curve: Curve) -> float:
    return statistics.fmean(value for _, value in curve)


def commit() -> str | None:
    """The commit of the source tree, None outside one."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
