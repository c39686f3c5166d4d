"""What is printed while a run goes."""

import io
import sys
from types import ModuleType

import pytest
from helpers import random_groups
from rich.console import Console

from vpd.report.console import ConsoleProgress, Terminal


def test_the_first_evaluation_is_printed_and_counts_are_whole_numbers() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(2, console=Console(file=out, width=200))
    progress.on_step(0, {"eval/accuracy": 0.25, "eval_teacher/accuracy": 0.5}, [])
    rows = {"reward": 1.0, "teacher/rows_with_context": 1.0, "e_step/rows": 0.0, "m_step/rows": 4.0}
    progress.on_step(1, rows | {"m_step/divergence": float("inf")}, random_groups(0))
    progress.on_step(2, rows | {"reward": 0.0, "m_step/divergence": float("nan")}, random_groups(0))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["0", "before", "training:", "student", "0.250,", "teacher", "0.500"]
    columns = ["step", "reward", "context", "E", "rows", "E", "acc", "M", "rows", "diverg."]
    header = next(place for place, line in enumerate(lines) if line[0] == "step")
    legend = " ".join(word for line in lines[1:header] for word in line)
    assert legend.startswith("reward: mean reward; context: answers with feedback for the teacher; E rows:")
    assert "policy" not in legend and legend.endswith("control: the same again without")
    assert lines[header:] == [
        [*columns, "student", "teacher", "control"],
        ["1", "1.000", "1", "0", "-", "4", "inf", "-", "-", "-"],
        ["2", "0.000", "1", "0", "-", "4", "-", "-", "-", "-"],
    ]


def test_a_run_without_evaluation_has_no_columns_for_it() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(2, evaluates=False, console=Console(file=out, width=200))
    progress.on_step(1, {"reward": 1.0, "sft/loss": 2.0}, random_groups(0))
    legend, header, _ = out.getvalue().splitlines()
    assert header.split() == ["step", "reward", "SFT"] and "held-out" not in legend and "control" not in legend


@pytest.mark.parametrize(
    ("part", "metric", "title"),
    [
        ("preference", "accuracy", "pref acc"),
        ("policy", "loss", "policy"),
        ("sft", "loss", "SFT"),
        ("ldd", "loss", "LDD"),
    ],
)
def test_a_part_without_rows_at_the_first_step_has_its_column(part: str, metric: str, title: str) -> None:
    out = io.StringIO()
    progress = ConsoleProgress(2, evaluates=False, console=Console(file=out, width=200))
    progress.on_step(1, {"reward": 1.0, f"{part}/rows": 0.0}, random_groups(0))
    progress.on_step(2, {"reward": 1.0, f"{part}/rows": 4.0, f"{part}/{metric}": 0.5}, random_groups(0))
    _, header, first, second = out.getvalue().splitlines()
    assert title in header and first.split()[-1] == "-" and second.split()[-1] == "0.500"


def test_a_notebook_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel says that it takes colours, and rich would ask for ipywidgets there."""
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    progress = ConsoleProgress(2, console=Terminal(file=out))
    with progress:
        progress.on_step(1, {"reward": 0.5}, [])
    assert "\x1b" not in out.getvalue()


def test_a_column_writes_all_its_numbers_alike() -> None:
    out = io.StringIO()
    progress = ConsoleProgress(2, console=Console(file=out, width=200))
    for step, length in ((1, 6.0), (2, 5.75)):
        progress.on_step(
            step, {"reward": 0.0, "completions/mean_length": length, "m_step/rows": 128.0}, random_groups(0)
        )
    rows = [line.split() for line in out.getvalue().splitlines() if line.split()[0] in ("1", "2")]
    assert [row[1:3] for row in rows] == [["0.000", "6.0"], ["0.000", "5.8"]] and "128" in rows[0]
