"""``vpd rollouts``: rollouts of a run in the terminal."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.text import Text

from vpd.errors import ConfigError, StorageError
from vpd.printable import cut, for_terminal, printable
from vpd.report.console import Terminal
from vpd.report.html.sections import parts_of
from vpd.run_folder.reading import read_rollouts, read_run, recorded_tokens, rollout_steps

SHORT = 1500  # characters of one text
STYLES = {"header": "italic dim", "demonstration": "green", "feedback": "cyan", "closing": "magenta", "task": ""}
#: log-ratio in nats, at least -> style; the teacher likes a token more, or less
MORE = ((2.0, "black on bright_blue"), (0.7, "white on blue"), (0.2, "blue"))
LESS = ((2.0, "black on yellow"), (0.7, "yellow bold"), (0.2, "yellow"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which rollouts; None: all.  ``limit`` 0 is no limit."""

    step: int | None = None
    role: str | None = None
    success: bool | None = None
    source: str | None = None
    task: str | None = None
    recorded: bool = False
    limit: int = 5


def show(
    folder: Path, wanted: Wanted, *, whole: bool = False, as_json: bool = False, out: TextIO | None = None
) -> None:
    """Print the rollouts that are wanted.

    Raises StorageError (no run, no rollouts) and ConfigError (a step without rollouts, a negative limit).
    """
    if wanted.limit < 0:
        raise ConfigError("--limit is negative", got=wanted.limit, expected="0 (all) or more")
    run = read_run(folder)
    step = _step(folder, wanted.step)
    rows = _rows(folder, step)
    found = [row for row in rows if _passes(row, wanted)]
    kept = found[: wanted.limit] if wanted.limit else found
    if as_json:
        for row in kept:
            (out or sys.stdout).write(json.dumps(row, default=str) + "\n")
        return
    console = Terminal(file=out) if out else Terminal()
    prompts = run.settings.get("prompts") or {}
    for row in kept:
        _show_row(console, row, prompts, whole=whole)
    steps = rollout_steps(folder)
    console.print(
        f"{len(kept)} of {len(found)} rollouts that pass, {len(rows)} in all, of step {step} "
        f"(steps {steps[0]} to {steps[-1]} have some; --step, --limit, --outcome, --role, --source choose)",
        style="dim",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _step(folder: Path, wanted: int | None) -> int:
    steps = rollout_steps(folder)
    if not steps:
        raise StorageError(f"{folder} holds no rollouts", do="They are there after the run's first step.")
    if wanted is not None and wanted not in steps:
        raise ConfigError(
            f"step {wanted} has no rollouts", expected=f"a step from {steps[0]} to {steps[-1]} ({len(steps)} have some)"
        )
    return steps[-1] if wanted is None else wanted


def _rows(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step, each with its recorded tokens under ``by_token`` (None: not recorded)."""
    recorded = recorded_tokens(folder, step)
    rows = read_rollouts(folder, [step]).to_pylist()
    return [{**row, "by_token": recorded.get(number)} for number, row in enumerate(rows)]


def _passes(row: Mapping[str, Any], wanted: Wanted) -> bool:
    return (
        (wanted.role is None or row.get("role", "student") == wanted.role)
        and (wanted.success is None or (row["success"] == wanted.success and row.get("graded") is not False))
        and (wanted.source is None or (row["source"] or "none") == wanted.source)
        and (wanted.task is None or wanted.task in row["task"])
        and (row["by_token"] is not None or not wanted.recorded)
    )


def _show_row(console: Terminal, row: Mapping[str, Any], prompts: Mapping[str, Any], *, whole: bool) -> None:
    def text(value: Any) -> str:
        return for_terminal(str(value) if whole else cut(str(value), SHORT))

    head, style = _head(row)
    console.rule(Text(head), style=style, align="left")
    _print(console, "task", Text(text(row["task"])))
    if row["teacher_prompt"]:
        _print(console, "student read", Text(text(row["prompt"])))
        _print(console, "teacher read", _teacher_prompt(row, prompts, text))
    else:
        _print(console, "teacher read" if row.get("role") == "teacher" else "student read", Text(text(row["prompt"])))
    _print(console, "answer", Text(text(row["completion"])) if row["by_token"] is None else _answer(row["by_token"]))
    if row["by_token"] is not None:
        _print(console, "", Text(_sum_of(row["by_token"]), style="dim"))
    if row["feedback"]:
        _print(console, "grader wrote", Text(text(row["feedback"])))
    console.print()


def _head(row: Mapping[str, Any]) -> tuple[str, str]:
    """(title, style) of a row; an answer that nobody graded, a demonstration, has no outcome."""
    place, length = f"step {row['step']}, group {row['group']}", f"{row['tokens']} tokens"
    if row.get("graded") is False:
        return f"{place}, a demonstration: {length}", "dim"
    role = "the teacher's retry" if row.get("role") == "teacher" else "the student's attempt"
    verdict, style = ("success", "green") if row["success"] else ("failure", "red")
    return f"{place}, {role}: {verdict}, reward {row['reward']:g}, {length}", style


def _print(console: Terminal, name: str, text: Text) -> None:
    console.print(Text(f"{name:<13} ", style="bold").append_text(text), soft_wrap=True)


def _teacher_prompt(row: Mapping[str, Any], prompts: Mapping[str, Any], text: Any) -> Text:
    """The teacher's prompt with its sections in colours, and what was cut from them counted."""
    context = json.loads(row["context"]) if row["context"] else []
    shown = Text()
    for part in parts_of(row["prompt"], row["teacher_prompt"], context, prompts):
        shown.append(text(part.text), style=STYLES[part.kind])
        if part.missing:
            shown.append(f"[{len(part.missing)} characters were cut from the {part.kind}]", style="red")
    return shown


def _answer(tokens: Mapping[str, Any]) -> Text:
    """The answer with each token in the colour of the teacher's log-ratio."""
    ratios = _ratios(tokens)
    shown = Text()
    for place, piece in enumerate(tokens["texts"]):
        shown.append(printable(cut(piece, 200)), style=_style(ratios[place] if ratios else None))
    return shown


def _ratios(tokens: Mapping[str, Any]) -> list[float | None]:
    """Teacher less student of each token; of a retry that no update scored the teacher's own log-probs."""
    student, teacher = tokens["student"] or tokens["student_before"], tokens["teacher"] or tokens["teacher_before"]
    if not student or not teacher:
        return []
    return [
        q - pi if sampled and q is not None and pi is not None and math.isfinite(q - pi) else None
        for q, pi, sampled in zip(teacher, student, tokens["sampled"], strict=True)
    ]


def _style(ratio: float | None) -> str:
    for least, style in MORE if ratio is not None and ratio > 0 else LESS:
        if ratio is not None and abs(ratio) >= least:
            return style
    return ""


def _sum_of(tokens: Mapping[str, Any]) -> str:
    known = [ratio for ratio in _ratios(tokens) if ratio is not None]
    if not known:
        return "recorded without a teacher: only the log-probs of the weights that sampled it"
    return f"teacher less student: {sum(known):+.2f} nats in sum (blue: likelier to the teacher, yellow: less likely)"
