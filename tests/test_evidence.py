"""docs/evidence.md against the runs that it reports, which are kept in docs/evidence_runs.csv."""

import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from vpd.lab.reproduce.methods import RATES, load_rates, rate_of
from vpd.lab.reproduce.pictures import EVIDENCE, evidence_file
from vpd.lab.reproduce.runs_table import read_runs, rewards_of
from vpd.lab.reproduce.settings_table import SETTINGS

WEBSITE = Path(__file__).resolve().parent.parent / "website"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(WEBSITE))
    monkeypatch.delitem(sys.modules, "evidence_page", raising=False)
    return importlib.import_module("evidence_page")


@pytest.mark.parametrize("setting", EVIDENCE)
def test_the_table_of_the_methods_is_that_of_its_runs(setting: str, evidence: Any) -> None:
    page = evidence.PAGE.read_text()
    shown = evidence.table_on(page, setting)
    assert shown == evidence.table(setting), "run python website/evidence_page.py"
    assert len(shown.splitlines()) == 2 + len(evidence.rows_by_method(setting)) > 2
    assert f"images/{evidence_file(setting)}" in page and (evidence.PICTURES / evidence_file(setting)).is_file()
    assert page.count(evidence.HEAD) == len(EVIDENCE)  # no other table was overwritten


def test_every_run_is_in_a_table(evidence: Any) -> None:
    shown = [row for setting in EVIDENCE for rows in evidence.rows_by_method(setting).values() for row in rows]
    kept = read_runs(evidence.RUNS)
    assert len(shown) == len(kept) and all(row in shown for row in kept)


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


@pytest.mark.parametrize("setting", EVIDENCE)
def test_the_runs_of_a_method_are_of_one_rate_and_number_type_and_of_different_seeds(
    setting: str, evidence: Any
) -> None:
    rates = load_rates(RATES)
    for method, rows in evidence.rows_by_method(setting).items():
        assert {(float(row["learning_rate"]), row["dtype"]) for row in rows} == {
            (rate_of(rates, setting, method), "float32")
        }
        assert [row["seed"] for row in rows] == ["0", "1", "2"][: 2 if method == "vpd_no_e" else 3], method
        for row in rows:
            rewards = [reward for _, reward in rewards_of(row)]
            assert len(rewards) == SETTINGS[setting].steps
            assert statistics.fmean(rewards[-10:]) == pytest.approx(float(row["final"]), abs=1e-4)
            assert len(row["commit"]) == 40 and row["device"]
