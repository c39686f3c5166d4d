"""A run folder read afterwards: whole, being written, damaged, or none."""

import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import vpd_train

from vpd.errors import StorageError
from vpd.run_folder.files import FileSystem
from vpd.run_folder.reading import find_runs, holds_run, read_rollouts, read_run, read_tokens, rollout_steps
from vpd.run_folder.state import Recorder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert vpd_train(folder, run__max_steps=2, algorithm__name="vpd") == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_settings_metrics_and_rollouts_of_a_run(folder: Path) -> None:
    run = read_run(folder)
    assert run.settings["algorithm"]["name"] == "vpd" and run.phase == "done"
    assert [line["step"] for line in run.metrics] == sorted(line["step"] for line in run.metrics)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run.series("reward") == [(line["step"], line["reward"]) for line in lines]
    assert run.last("reward") == lines[-1]["reward"] and math.isnan(run.last("no such metric"))
    assert "step" not in run.names() and set(run.names()) == {name for line in lines for name in line} - {"step"}
    steps = rollout_steps(folder)
    table = read_rollouts(folder)
    assert table.num_rows == sum(read_rollouts(folder, [step]).num_rows for step in steps) > 0
    assert read_rollouts(folder, steps, ["reward", "no such column"]).column_names == ["reward"]
    assert read_tokens(folder).num_rows > 0 == read_tokens(folder, []).num_rows


def test_what_is_being_written_or_damaged_is_left_out_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read_run(folder)
    Recorder(folder=folder, files=FileSystem(), settings=whole.settings).record("training", whole.step)
    steps = rollout_steps(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "reward": null, "note": "text"}\nnot json\n{"step": 100, "rew')
    (folder / "rollouts" / f"step-{steps[0]:06d}.parquet").write_bytes(b"PAR1 no")
    with caplog.at_level(logging.WARNING, logger="vpd"):
        run, table = read_run(folder), read_rollouts(folder)
    assert len(run.metrics) == len(whole.metrics) + 1
    assert math.isnan(run.metrics[-1]["reward"]) and "note" not in run.metrics[-1]
    assert run.last("reward") == whole.last("reward")
    assert set(table["step"].to_pylist()) == set(steps[1:])
    assert "left out 1 lines" in caplog.text and f"step-{steps[0]:06d}.parquet: left out" in caplog.text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(StorageError, match="no such folder"):
        read_run(tmp_path / "none")
    assert not holds_run(tmp_path) and find_runs(tmp_path) == [] and find_runs(tmp_path / "none") == []


def test_runs_are_found_below_a_folder_and_not_inside_a_run(tmp_path: Path) -> None:
    for name in ("b/vpd", "a", "a/inner"):
        Recorder(folder=tmp_path / name, files=FileSystem(), settings={}).record("done", 1)
    (tmp_path / "none").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "none" / name).write_text("")
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b" / "vpd"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]


def test_reading_needs_no_torch() -> None:
    script = "import sys; import vpd.run_folder.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
