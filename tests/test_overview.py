"""``vpd runs``: what it says of folders that real runs left, and of damaged ones."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import vpd_train

from vpd.cli import main
from vpd.errors import StorageError
from vpd.run_folder.files import FileSystem
from vpd.run_folder.lock import is_locked, locked
from vpd.run_folder.overview import Overview, overview
from vpd.run_folder.reading import read_run
from vpd.run_folder.state import Recorder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert vpd_train(folder / "a", run__max_steps=2, run__eval_steps=1) == 0
    assert vpd_train(folder / "deep" / "b", run__max_steps=2, algorithm__name="grpo", optim__learning_rate=1e-4) == 0
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def by_name(folder: Path, metric: str | None = None) -> dict[str, Overview]:
    return {run.folder.name: run for run in overview([folder], metric)}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_has_its_method_progress_and_best(runs: Path) -> None:
    found = by_name(runs)
    a, b = found["a"], found["b"]
    assert (a.method, a.state, a.step, a.max_steps, a.metric) == ("gated", "done", 2, 2, "eval/accuracy")
    measured = {int(line["step"]): line["eval/accuracy"] for line in lines(runs / "a") if line["step"]}
    assert a.last is not None and (a.last.step, a.last.value) == (2, measured[2])
    assert a.best is not None and a.best.value == max(measured.values())
    assert (b.method, b.metric) == ("grpo", "reward")


def test_settings_that_another_method_does_not_have_are_no_difference(runs: Path) -> None:
    assert not [key for run in by_name(runs).values() for key in run.differs if key.startswith("algorithm.")]


def test_only_settings_that_differ_are_shown(runs: Path) -> None:
    found = by_name(runs)
    assert found["a"].differs["optim.learning_rate"] == 1e-3 and found["b"].differs["optim.learning_rate"] == 1e-4
    assert found["a"].differs["run.eval_steps"] == 1
    assert not {"run.seed", "run.output_dir", "algorithm.name"} & found["a"].differs.keys()
    assert not overview([runs / "a"])[0].differs


def test_the_least_is_the_best_of_a_loss_and_a_metric_can_be_chosen(runs: Path) -> None:
    chosen = by_name(runs, "m_step/divergence")["a"]
    assert chosen.metric == "m_step/divergence" and by_name(runs, "m_step/divergence")["b"].metric is None
    path = runs / "a" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line | {"e_step/loss": line["step"]}) + "\n" for line in lines(runs / "a")))
    best = by_name(runs, "e_step/loss")["a"].best
    assert best is not None and best.step == 1
    settings = dict(read_run(runs / "a").settings)  # which way is better is said of the run's own metric alone
    settings["run"] = {**settings["run"], "metric_for_best_model": "eval/accuracy", "greater_is_better": True}
    Recorder(folder=runs / "a", files=FileSystem(), settings=settings).record("done", 2)
    best = by_name(runs, "e_step/loss")["a"].best
    assert best is not None and best.step == 1


def test_a_run_that_a_process_holds_is_running_and_one_that_it_left_has_stopped(runs: Path) -> None:
    state = json.loads((runs / "a" / "run.json").read_text()) | {"phase": "training", "step": 1}
    (runs / "a" / "run.json").write_text(json.dumps(state))
    assert by_name(runs)["a"].state == "stopped" and not is_locked(runs / "a")
    with locked(runs / "a"):
        assert is_locked(runs / "a") and by_name(runs)["a"].state == "running"


def test_a_damaged_run_is_a_line_and_no_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "a" / "run.json").write_text("{")
    assert by_name(runs)["a"].state == "damaged" and by_name(runs)["b"].state == "done"
    assert main(["runs", str(runs), "--json"]) == 0
    found = {Path(run["folder"]).name: run for run in json.loads(capsys.readouterr().out)}
    assert "is damaged" in found["a"]["fault"] and found["b"]["last"]["step"] == 2


def test_the_table_names_every_run(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["runs", str(runs / "a"), str(runs / "deep")]) == 0
    shown = capsys.readouterr().out
    assert "grpo" in shown and "2/2" in shown and "learning_rate 0.0001" in shown
    monkeypatch.chdir(runs)
    assert main(["runs", "a", str(runs / "deep")]) == 0  # one relative, one absolute
    assert str(runs / "deep" / "b") in capsys.readouterr().out


def test_on_a_narrow_screen_no_setting_is_broken_and_what_most_runs_have_is_said_once(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("c", "d"):
        shutil.copytree(runs / "a", runs / name)
    assert main(["runs", str(runs)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80 and len(shown) < 20
    usual, own = shown.index("settings of most runs:"), shown.index("deep/b:")
    assert "optim.learning_rate 0.001" in shown[usual + 1] and "run.eval_steps 1" in shown[usual + 1]
    assert "optim.learning_rate 0.0001" in " ".join(shown[own:])
    assert not {"a:", "c:", "d:"} & set(shown)


def test_a_folder_without_runs_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run in" in capsys.readouterr().out
    with pytest.raises(StorageError, match="is no folder"):
        overview([tmp_path / "x"])
