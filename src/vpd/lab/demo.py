"""``vpd demo``: four methods learn the same task from the same base model, with the same number of rollouts.

A rule's letter stands for an operation on digits.  The student does not know which, and is right about one time in a
thousand; after a wrong answer the environment says in words what the rule means.  A method that learns from this text
has much more to go on than one that sees the reward alone.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.table import Table

from vpd.config import Config, parse
from vpd.errors import ConfigError
from vpd.lab.processes import Advance, Call, available_cores, run_calls
from vpd.lab.reproduce.claims import WIDE, decide
from vpd.lab.reproduce.methods import load_rates, rate_of
from vpd.lab.reproduce.run import CurveRecorder, Job
from vpd.lab.runs import OTHER_OUTPUT, kept_run
from vpd.model.threads import one_thread
from vpd.recipes.assemble import assemble
from vpd.report import methods as named
from vpd.report.console import Terminal
from vpd.report.curves import Curve, draw_curves, mean_curve
from vpd.report.html import Options, write_report
from vpd.report.model_card import source_commit
from vpd.run_folder.files import prepare_folder, storage_errors, write_text

Curves: TypeAlias = Mapping[str, Sequence[Curve]]  # method -> one curve per seed

LEARNS_FROM = {
    "grpo": "reward alone",
    "sdpo": "feedback, with a teacher that is not trained",
    "vpd": "feedback, with a teacher trained on outcomes",
    "gated": "reward, and feedback as far as the teacher is right",
}
METHODS = {name: named.METHODS[name].title for name in LEARNS_FROM}
MOST_PROCESSES = 8  # of about half a gigabyte each
SETTING = "sparse"
REPORT = Options(title="The demo: four methods learn one task from one tiny model")
#: role -> its metric.  Teacher and control retry the same failed attempts, with and without the feedback.
ROLES = {
    "student": "eval/accuracy",
    "teacher": "eval_teacher/accuracy",
    "control": "eval_teacher/student_accuracy",
}


def config_of(method: str, seed: int, steps: int) -> Config:
    """The configuration of one method, as ``vpd reproduce sparse`` runs it, from the shipped base for every seed.

    All methods have the same tasks, number of rollouts and optimiser.  Each has its own learning rate, chosen for it
    from one grid on other seeds (rates.yaml), because a rate that suits one method can be far off for another.
    """
    rate = rate_of(load_rates(), SETTING, method)
    data = Job(setting=SETTING, method=method, seed=seed, learning_rate=rate).config_data()
    data["model"]["name_or_path"] = "tiny"
    data["run"] |= {"max_steps": steps, "eval_steps": max(steps // 10, 1)}
    return parse(data)


def demo(output: Path, *, seeds: int = 1, steps: int = 100, first_seed: int = 0) -> dict[str, Any]:
    """Run the methods side by side, show the results, write ``results.json``, ``curves.png``, ``report.html`` and
    the run folders under ``runs/``; returns the results.

    Raises ConfigError for an option out of range, StorageError if ``output`` cannot be written.
    """
    for option, value, least in (("--seeds", seeds, 1), ("--steps", steps, 1), ("--seed", first_seed, 0)):
        check_least(option, value, least)
    prepare_folder(output, OTHER_OUTPUT)
    console = Terminal()
    with one_thread():
        _introduce(first_seed, steps, console)
    calls = [
        Call(
            arguments=(method, seed, steps, str(output / "runs" / f"{method}-{seed}")),
            title=f"{title:<18}",
            steps=steps,
        )
        for seed in range(first_seed, first_seed + seeds)
        for method, title in METHODS.items()
    ]
    processes = min(available_cores(), MOST_PROCESSES)
    runs: list[dict[str, Any]] = run_calls(_run, calls, processes=processes, console=console)
    curves = {role: {name: [run[role] for run in runs if run["method"] == name] for name in METHODS} for role in ROLES}
    console.print(_table(curves))
    console.print("\n" + verdict(curves["student"], curves["teacher"], curves["control"]), highlight=False)
    results = _results(runs, curves, first_seed=first_seed, seeds=seeds)
    _write(output, results, curves)
    report = write_report([Path(call.arguments[-1]) for call in calls], output / "report.html", REPORT)
    console.print(
        f"\nWritten: {output}/results.json, {output}/curves.png and the runs in {output}/runs", highlight=False
    )
    console.print(f"Look at the runs in a browser: {report}", highlight=False, soft_wrap=True)
    return results


def _results(
    runs: Sequence[Mapping[str, Any]], curves: Mapping[str, Curves], *, first_seed: int, seeds: int
) -> dict[str, Any]:
    """What ``results.json`` holds: means over seeds by method and role, and every run."""
    return {
        "methods": {
            method: {role: mean_curve(of_role[method]) for role, of_role in curves.items()}
            | {
                "seconds": statistics.fmean(run["seconds"] for run in runs if run["method"] == method),
            }
            for method in METHODS
        },
        "seed": first_seed,
        "seeds": seeds,
        "commit": source_commit(),
        "runs": runs,
    }


def verdict(students: Curves, teachers: Curves, controls: Curves) -> str:
    """Which method to choose for a task like this, computed from the curves."""
    start = statistics.fmean(run[0][1] for runs in students.values() for run in runs)
    final = {name: statistics.fmean(_final(run) for run in runs) for name, runs in students.items()}
    best, second, *_ = sorted(final, key=lambda name: -final[name])
    seeds = len(students[best])
    lines = [_situation(start, teachers, controls)]
    if final[best] < start + WIDE:
        lines.append(
            f"No method has learned the task yet: {METHODS[best]} is best with {final[best]:.2f}. Add --steps."
        )
    else:
        lines.append(_choice(best, second, final, students))
        lines.append(_ranking(final))
    lines.append(
        "Where reward is frequent, or feedback says no more than right or wrong, the order may be different: "
        "`vpd reproduce` tests more settings."
    )
    caution = "One seed: use --seeds 3 before relying on a small difference." if seeds == 1 else f"{seeds} seeds."
    return "\n".join([*lines, caution])


def _situation(start: float, teachers: Curves, controls: Curves) -> str:
    """What kind of task this is, by the base's retries of the same failed attempts with and without feedback."""
    with_feedback, without = (
        statistics.fmean(run[0][1] for runs in curves.values() for run in runs if run)
        for curves in (teachers, controls)
    )
    relation = "so feedback helps" if with_feedback > without else "so feedback does not help"
    return (
        f"The task: the base is right {start:.1%} of the time; when it retries a failed attempt, {with_feedback:.1%} "
        f"with feedback and {without:.1%} without, {relation}."
    )


def _choice(best: str, second: str, final: Mapping[str, float], students: Curves) -> str:
    """The method to choose, or the two between which the runs do not decide."""
    differences = [_final(a) - _final(b) for a, b in zip(students[best], students[second], strict=True)]
    if decide(differences) != "holds":
        return (
            f"{METHODS[best]} ({final[best]:.2f} of its answers are right at the end) and {METHODS[second]} "
            f"({final[second]:.2f}) are too close to call: choose either for a task like this."
        )
    return (
        f"Choose {METHODS[best]} for a task like this: at the end {final[best]:.2f} of its answers are right, "
        f"{final[second]:.2f} with the next best method, {METHODS[second]}."
    )


def _ranking(final: Mapping[str, float]) -> str:
    """All methods by their final accuracy, with what each learns from."""
    order = sorted(final, key=lambda name: -final[name])
    rows = [f"  {final[name]:.2f}  {METHODS[name]}: {LEARNS_FROM[name]}" for name in order]
    return "\n".join(["At the end, and what each method learns from:", *rows])


def _run(method: str, seed: int, steps: int, folder: str, advance: Advance) -> dict[str, Any]:
    """Train with one method and return its curves; metrics, rollouts and alarms stay in the folder."""
    started = time.perf_counter()
    recorder = CurveRecorder(tuple(ROLES.values()), advance)
    with kept_run(assemble(config_of(method, seed, steps)), Path(folder), [recorder]) as loop:
        loop.run()
    return {
        "method": method,
        "seed": seed,
        **{role: recorder.curves[metric] for role, metric in ROLES.items()},
        "seconds": time.perf_counter() - started,
    }


def _introduce(seed: int, steps: int, console: Terminal) -> None:
    """Show one failed attempt of the base as text, before anything is trained."""
    parts = assemble(config_of("vpd", seed, steps))
    groups, _ = parts.source.take(0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failure, teacher_prompt = next((r, r.teacher_prompt) for r in rollouts if r.teacher_prompt and not r.success)
    console.print("One attempt, before training:", style="bold")
    for name, text in (
        ("the student reads", parts.tokenizer.decode(failure.prompt)),
        ("and answers", failure.completion.text),
        ("the feedback is", failure.grade.feedback),
        ("the teacher reads", parts.tokenizer.decode(teacher_prompt.tokens)),
    ):
        console.print(f"  {name:<19} {text}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _table(curves: Mapping[str, Curves]) -> Table:
    """Accuracy by iteration, a row for each method's student, teacher and control."""
    table = Table(
        title="Share of right answers (held-out tasks), by iteration",
        caption="student: all tasks; teacher and control: retries of its failed attempts, with and without feedback",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    steps = [step for step, _ in curves["student"]["vpd"][0]]
    shown = [step for step in steps if step in {steps[0], *steps[2::2], steps[-1]}]
    for column in ("", "", *(str(step) for step in shown), "peak", "mean"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for method in METHODS:
        for role, of_role in curves.items():
            runs = of_role[method]
            if not any(runs):
                continue
            curve = dict(mean_curve(runs))
            cells = [f"{curve[step]:.2f}" if step in curve else "-" for step in shown]
            summary = [statistics.fmean(part(run) for run in runs) for part in (_peak, _mean)]
            style = "bold" if role == "student" else "dim"
            first = METHODS[method] if role == "student" else ""
            table.add_row(first, role, *cells, *(f"{value:.2f}" for value in summary), style=style)
    return table


def _final(curve: Curve) -> float:
    return curve[-1][1]


def _peak(curve: Curve) -> float:
    return max(value for _, value in curve)


def _mean(curve: Curve) -> float:
    return statistics.fmean(value for _, value in curve)


def check_least(option: str, value: int, least: int) -> None:
    """Raises ConfigError for an option below ``least``."""
    if value < least:
        raise ConfigError(f"{option} is too small", got=value, expected=f"at least {least}")


def _write(output: Path, results: Mapping[str, Any], curves: Mapping[str, Curves]) -> None:
    write_text(output / "results.json", json.dumps(results, indent=1), OTHER_OUTPUT)
    with storage_errors(output / "curves.png", OTHER_OUTPUT):
        draw_curves(output / "curves.png", curves["student"], curves["teacher"], curves["control"])
