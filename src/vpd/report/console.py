"""What a person sees while a run goes: a progress bar with rate and ETA, and a line of a short table per step."""

import math
import sys
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from vpd.monitor import Alarm
from vpd.printable import for_terminal
from vpd.types import Group, Metrics

COLUMNS = (
    ("reward", "reward"),
    ("success", "success"),
    ("length", "completions/mean_length"),
    ("context", "teacher/rows_with_context"),
    ("retries", "retries/success"),
    ("E rows", "e_step/rows"),
    ("E acc", "e_step/accuracy"),
    ("M rows", "m_step/rows"),
    ("diverg.", "m_step/divergence"),
    ("policy", "policy/loss"),
    ("student", "eval/accuracy"),
    ("teacher", "eval_teacher/accuracy"),
    ("control", "eval_teacher/student_accuracy"),
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
    """An observer; use as a context manager.  ``every`` steps one line of the table is printed."""

    def __init__(self, max_steps: int, *, title: str = "", every: int = 1, console: Terminal | None = None):
        self._console = console or Terminal()
        self._every = every
        self._header_shown = False
        self._columns: list[tuple[str, str]] = []
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
            self._columns = [c for c in COLUMNS if c[1] in metrics or c[1].startswith(("e_step", "m_step", "eval"))]
            prefixes = {name.split("/")[0] for name in metrics}
            self._columns = [c for c in self._columns if c[1].split("/")[0] in prefixes or c[1].startswith("eval")]
            self._console.print(
                "  step" + "".join(f"{title:>9}" for title, _ in self._columns), style="bold", soft_wrap=True
            )
            self._header_shown = True
        if not groups:
            values = [f"{title} {_cell(name, metrics[name])}" for title, name in COLUMNS if name in metrics]
            self._console.print(f"{step:6d}  before training: {', '.join(values)}", highlight=False, soft_wrap=True)
        elif self._header_shown:
            cells = "".join(f"{_cell(name, metrics.get(name)):>9}" for _, name in self._columns)
            self._console.print(f"{step:6d}{cells}", highlight=False, soft_wrap=True)


def _cell(name: str, value: float | None) -> str:
    """Counts, and other whole numbers from 2 on, without decimals."""
    if value is None or not math.isfinite(value):
        return "-" if value is None or math.isnan(value) else str(value)
    if value == int(value) and ("rows" in name or abs(value) >= 2):
        return str(int(value))
    return f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no minus zero
