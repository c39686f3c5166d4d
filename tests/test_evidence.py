"""docs/evidence.md against the runs that it reports, which are kept in docs/evidence_runs.csv."""

import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from vpd.lab.reproduce.methods import RATES, load_rates, rate_of
from vpd.lab.reproduce.runs_table import rewards_of
from vpd.lab.reproduce.settings_table import SETTINGS

WEBSITE = Path(__file__).resolve().parent.parent / "website"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(WEBSITE))
    monkeypatch.delitem(sys.modules, "evidence_page", raising=False)
    return importlib.import_module("evidence_page")


def test_the_table_of_the_methods_is_that_of_its_runs(evidence: Any) -> None:
    shown = evidence.table_on(evidence.PAGE.read_text())
    assert shown == evidence.table(), "run python website/evidence_page.py"
    assert len(shown.splitlines()) == 2 + len(evidence.rows_by_method())


def test_runs_of_another_table_take_the_place_of_older_ones(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evidence.RUNS.read_text()
    head, first, *others = before.splitlines()
    new = first.split(",")
    new[list(evidence.COLUMNS).index("held_out")] = "0.5"
    (tmp_path / "runs.csv").write_text("\n".join([head, ",".join(new)]) + "\n")
    (tmp_path / "all.csv").write_text(before)
    monkeypatch.setattr(evidence, "RUNS", tmp_path / "all.csv")
    evidence._put_in([])
    assert (tmp_path / "all.csv").read_text() == before
    evidence._put_in([tmp_path / "runs.csv"])
    assert (tmp_path / "all.csv").read_text().splitlines() == [head, ",".join(new), *others]


def test_the_runs_of_a_method_are_of_one_rate_and_number_type_and_of_different_seeds(evidence: Any) -> None:
    rates = load_rates(RATES)
    for method, rows in evidence.rows_by_method().items():
        assert {row["setting"] for row in rows} == {"conventions"}
        assert len({(row["learning_rate"], row["dtype"]) for row in rows}) == 1, method
        assert float(rows[0]["learning_rate"]) == rate_of(rates, "conventions", method)
        assert len({row["seed"] for row in rows}) == len(rows), method
        for row in rows:
            rewards = [reward for _, reward in rewards_of(row)]
            assert len(rewards) == SETTINGS["conventions"].steps
            assert statistics.fmean(rewards[-10:]) == pytest.approx(float(row["final"]), abs=1e-4)
            assert len(row["commit"]) == 40
