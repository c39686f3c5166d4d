"""docs/evidence.md against the runs that it reports, which are kept in docs/evidence_runs.csv."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from vpd.lab.reproduce.claims import standard_error
from vpd.lab.reproduce.methods import METHODS, RATES, load_rates, rate_of
from vpd.lab.reproduce.runs_table import Row, read_runs, rewards_of
from vpd.lab.reproduce.settings_table import SETTINGS

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = "| method | weights | rate | seeds | held out, before | after | last ten iterations | minutes of a core |"


def rows_by_method() -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in read_runs(DOCS / "evidence_runs.csv"):
        found.setdefault(row["method"], []).append(row)
    return found


def number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def cell(rows: Sequence[Row], column: str) -> str:
    values = [float(row[column]) for row in rows]
    return number(statistics.fmean(values)) + f" ± {number(standard_error(values))}" * (len(values) > 1)


def line(method: str, rows: Sequence[Row]) -> str:
    minutes = statistics.fmean(float(row["cpu"]) for row in rows) / 60
    seeds = ", ".join(row["seed"] for row in rows)
    cells = [METHODS[method].title, rows[0]["dtype"], f"{float(rows[0]['learning_rate']):g}", seeds]
    return f"| {' | '.join([*cells, *(cell(rows, name) for name in ('start', 'held_out', 'final'))])} | {minutes:.0f} |"


def test_the_table_of_the_methods_is_that_of_its_runs() -> None:
    text = (DOCS / "evidence.md").read_text()
    shown = text[text.index(HEAD) :].split("\n\n")[0].splitlines()[2:]
    assert shown == [line(method, rows) for method, rows in rows_by_method().items()]


def test_the_runs_of_a_method_are_of_one_rate_and_number_type_and_of_different_seeds() -> None:
    rates = load_rates(RATES)
    for method, rows in rows_by_method().items():
        assert {row["setting"] for row in rows} == {"conventions"}
        assert len({(row["learning_rate"], row["dtype"]) for row in rows}) == 1, method
        assert float(rows[0]["learning_rate"]) == rate_of(rates, "conventions", method)
        assert len({row["seed"] for row in rows}) == len(rows), method
        for row in rows:
            rewards = [reward for _, reward in rewards_of(row)]
            assert len(rewards) == SETTINGS["conventions"].steps
            assert statistics.fmean(rewards[-10:]) == pytest.approx(float(row["final"]), abs=1e-4)
            assert len(row["commit"]) == 40
