"""Run folders side by side."""

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd.commands import path
from vpd.printable import for_terminal

if TYPE_CHECKING:
    from vpd.run_folder.overview import Overview, Value

NAME = "runs"
ABOUT = "Show the runs in a folder: method, the settings that differ, the last and the best value of a metric, state."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=path, metavar="FOLDER", help="run folders, or folders with runs in them (default .)"
    )
    parser.add_argument(
        "--metric",
        help="the metric to compare by (default: the run's metric_for_best_model, else eval/accuracy, eval/reward or"
        " reward, which was measured)",
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.run_folder.overview import as_json, overview

    found = overview(options.folders or [Path()], options.metric)
    if options.json:
        print(for_terminal(json.dumps([as_json(run) for run in found], indent=1, default=str)))
    elif not found:
        print(for_terminal(f"no run in {', '.join(map(str, options.folders)) or 'this folder'}"))
    else:
        _show(found)


def _show(found: "list[Overview]") -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from vpd.report.console import Terminal

    metrics = {run.metric for run in found if run.metric}
    title = f"last and best (step) {metrics.pop()}" if len(metrics) == 1 else None
    columns = ["run", "method", "step", "state", *(["metric"] if title is None else []), "last", "best"]
    table = Table(*columns, box=box.SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
    shared = _shared_parent([run.folder for run in found])
    names = [str(run.folder.relative_to(shared) if run.folder.is_relative_to(shared) else run.folder) for run in found]
    for name, run in zip(names, found, strict=True):
        metric = [run.metric or ""] if title is None else []
        cells = [name, run.method, _steps(run), _state(run), *metric, _value(run.last), _value(run.best, at_step=True)]
        table.add_row(*(escape(for_terminal(cell)) for cell in cells))
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header not in ("run", "state")
    console = Terminal()
    console.print(table)
    for line in _differences(names, found, console.width):
        console.print(for_terminal(line), markup=False, highlight=False, soft_wrap=True)


def _differences(names: list[str], found: "list[Overview]", width: int) -> list[str]:
    """The settings that differ: what most runs have, then of each run what is different in it, or why it is damaged."""
    usual = _usual([run.differs for run in found])
    lines = _paragraph("settings of most runs:", usual, width) if usual else []
    for name, run in zip(names, found, strict=True):
        own = {key: value for key, value in run.differs.items() if key not in usual or str(usual[key]) != str(value)}
        if own or run.fault:
            lines += _paragraph(f"{name}:", own, width) + ([f"  {run.fault}"] if run.fault else [])
    return lines


def _usual(differs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The values that more than half of the runs with a setting have; a value of one run alone is not usual."""
    usual = {}
    for key in dict.fromkeys(key for settings in differs for key in settings):
        values = [settings[key] for settings in differs if key in settings]
        text, count = Counter(map(str, values)).most_common(1)[0]
        if count > max(1, len(values) / 2):
            usual[key] = next(value for value in values if str(value) == text)
    return usual


def _paragraph(title: str, settings: Mapping[str, Any], width: int) -> list[str]:
    """A title, and below it the settings; a line ends after a setting, within one only where it is longer than that."""
    room = width - 2
    texts = [" ".join(f"{key} {value}".split()) for key, value in settings.items()]
    held = [text.replace(" ", "\xa0") if len(text) < room else text for text in texts]
    wrapped = textwrap.wrap(", ".join(held), room, break_long_words=False, break_on_hyphens=False)
    return [title, *(f"  {line}".replace("\xa0", " ") for line in wrapped)]


def _shared_parent(folders: list[Path]) -> Path:
    """The folder that all lie in, which the table leaves out."""
    parents = [set(folder.parents) for folder in folders]
    return max(set.intersection(*parents), key=lambda parent: len(parent.parts), default=Path())


def _steps(run: "Overview") -> str:
    return f"{run.step}" if run.max_steps is None else f"{run.step}/{run.max_steps}"


def _state(run: "Overview") -> str:
    alarms = f", {run.alarms} alarm{'s' * (run.alarms > 1)}" if run.alarms else ""
    return f"{run.state}{alarms}"


def _value(found: "Value | None", *, at_step: bool = False) -> str:
    if found is None:
        return "-"
    return f"{found.value:.4g} ({found.step})" if at_step else f"{found.value:.4g}"
