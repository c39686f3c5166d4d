"""What a person sees while a run goes: a progress bar with rate and ETA, and a line of a short table per step."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from vpd.monitor import Alarm
from vpd.printable import for_terminal
from vpd.report.metric_table import meaning_of
from vpd.types import Group, Metrics


class Column(NamedTuple):
    """A column of the table: its title, its metric, and how its numbers are written."""

    title: str
    metric: str
    form: str = ".3f"


COLUMNS = (
    Column("reward", "reward"),
    Column("success", "success"),
    Column("length", "completions/mean_length", ".1f"),
    Column("context", "teacher/rows_with_context", ".0f"),
    Column("retries", "retries/success"),
    Column("E rows", "e_step/rows", ".0f"),
    Column("E acc", "e_step/accuracy"),
    Column("M rows", "m_step/rows", ".0f"),
    Column("diverg.", "m_step/divergence"),
    Column("trust", "gate/trust"),
    Column("policy", "policy/loss"),
    Column("unsure", "judge/unsure"),
    Column("pref acc", "preference/accuracy"),
    Column("LDD", "ldd/loss"),
    Column("SFT", "sft/loss"),
    Column("student", "eval/accuracy"),
    Column("teacher", "eval_teacher/accuracy"),
    Column("control", "eval_teacher/student_accuracy"),
)


class Terminal(Console):
    """The console that everything is shown on: control characters in a text are made visible, a long one is cut.

    In a notebook it writes plain lines, as rich's own output there needs ipywidgets.
    """

    def __init__(self, **options: Any) -> None:
        plain: dict[str, Any] = {"force_jupyter": False}
        if "ipykernel" in sys.modules:  # which has set FORCE_COLOR
            plain["force_terminal"] = False
        super().__init__(**{**plain, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(for_terminal(text), **options)


class ConsoleProgress:
    """An observer; use as a context manager.

    ``every`` steps one line of the table is printed, with columns for evaluation where the run ``evaluates``.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        title: str = "",
        every: int = 1,
        evaluates: bool = True,
        console: Terminal | None = None,
    ):
        self._console = console or Terminal()
        self._evaluates = evaluates
        self._every = every
        self._header_shown = False
        self._columns: list[Column] = []
        self._progress = Progress(
            TextColumn(for_terminal(title) or "training", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._start = 0
        self._bar = self._progress.add_task("", total=max_steps, rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.stop()

    def warn(self, alarm: Alarm) -> None:
        """Print an alarm above the progress bar."""
        text = f"[alarm at step {alarm.step}] {alarm.saw}. {alarm.do}"
        self._console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def rewind(self, step: int) -> None:
        """Set the bar back; what was printed stays."""
        self._start = max(step, 0)
        self._progress.update(self._bar, completed=self._start)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        elapsed = self._progress.tasks[self._bar].elapsed or 0.0
        done = step - self._start
        rate = f"{elapsed / done:.1f} s/step" if done else ""
        self._progress.update(self._bar, completed=step, rate=rate)
        if step % self._every and not any(name.startswith("eval/") for name in metrics):
            return
        if groups and not self._header_shown:
            self._show_header(metrics)
        if not groups:
            values = [f"{c.title} {_cell(c, metrics[c.metric])}" for c in COLUMNS if c.metric in metrics]
            when = "the evaluation made later" if step else "before training"
            self._console.print(f"{step:6d}  {when}: {', '.join(values)}", highlight=False, soft_wrap=True)
        elif self._header_shown:
            cells = "".join(f"{_cell(column, metrics.get(column.metric)):>9}" for column in self._columns)
            self._console.print(f"{step:6d}{cells}", highlight=False, soft_wrap=True)

    def _show_header(self, metrics: Metrics) -> None:
        """What the columns mean, and their titles: those of the parts that the method has, and an evaluation's.

        A part that learned from no row at the first step has its columns all the same.
        """
        prefixes = {name.split("/")[0] for name in metrics}
        by_part = ("e_step/", "m_step/", "policy/", "preference/", "ldd/", "sft/")
        self._columns = [
            column
            for column in COLUMNS
            if (column.metric.startswith("eval") and self._evaluates)
            or column.metric in metrics
            or (column.metric.startswith(by_part) and column.metric.split("/")[0] in prefixes)
        ]
        legend = "; ".join(f"{column.title}: {meaning_of(column.metric)}" for column in self._columns)
        self._console.print(legend, style="dim", highlight=False, markup=False)
        titles = "".join(f"{column.title:>9}" for column in self._columns)
        self._console.print("  step" + titles, style="bold", soft_wrap=True)
        self._header_shown = True


def _cell(column: Column, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None or math.isnan(value) else str(value)
    return f"{round(value, 3) + 0.0:{column.form}}"  # + 0.0: no minus zero
