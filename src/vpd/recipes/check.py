"""``vpd check``: what ``check_env`` found about an environment, and how a task and its feedback read."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from vpd.config.sections import announce, make_env
from vpd.envs.check import Attempt, Report, check_env
from vpd.report.console import Terminal

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


def check(spec: Any, *, tasks: int, seed: int) -> Report:
    """Check the environment of a config, show what was found, and raise EnvError if there is a fault."""
    console = Terminal()
    report = examine(spec, tasks=tasks, seed=seed)
    if report.attempts:
        _show_example([a for a in report.attempts if a.task is report.attempts[0].task], console)
    table = Table("", "promise", "found", title=f"vpd check {spec.name}", title_justify="left")
    for found in report.checks:
        style = STYLES[found.status]
        table.add_row(f"[{style}]{found.status}[/]", found.name, escape(found.detail))
    console.print(table)
    report.require()
    return report


def examine(spec: Any, *, tasks: int, seed: int) -> Report:
    """What is found about the environment of a config; a fault does not raise."""
    env = make_env(spec)
    announce(env)
    return check_env(env, tasks=tasks, seed=seed)


def _show_example(attempts: Sequence[Attempt], console: Terminal) -> None:
    """One task with each kind of answer and the feedback on it."""

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    task = attempts[0].task
    line(f"Task {task.id}", "bold")
    for message in task.messages:
        line(f"  {message['role']}: {message['content'].strip()}")
    for attempt in attempts:
        grade = attempt.grade
        reader = "" if grade.feedback is None or grade.informative else "  (for people; the teacher does not read it)"
        line(f"\n{attempt.kind.capitalize()} answer: {attempt.text[:80]!r}{'...' * (len(attempt.text) > 80)}", "bold")
        line(f"  reward {grade.reward:g}, feedback: {grade.feedback or 'none'}{reader}")
    line("")
