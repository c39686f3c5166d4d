"""``run.report_to``: metrics and tables of completions reach each tracker, offline; a tracker's fault ends no run."""

import json
import logging
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import random_groups, vpd_train

from vpd.config import parse
from vpd.errors import ConfigError, EnvError
from vpd.report import trackers
from vpd.report.trackers import Trackers, completion_rows
from vpd.types import Group

HOSTILE = "a\x1b[31m <script>x</script> \ud83d `b`"


class Words:
    """A tokenizer that decodes to what it is asked."""

    def decode(self, tokens: Sequence[int]) -> str:
        return f"{HOSTILE} {len(tokens)}"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": f"{tmp_path}/trackio",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def send(name: str, folder: Path) -> None:
    """Two steps of a run named ``my-run``, the first an evaluation alone."""
    with Trackers([name], folder / "my-run", tokenizer=Words()) as sent:
        sent.on_step(0, {"eval/avg@4": 0.25}, [])
        own = {"env/tests, passed?": 1.0}  # a grader's own name
        sent.on_step(1, {"reward": 0.5, "eval/avg@4": 0.75, "gain": float("nan")} | own, random_groups(0))
        assert not sent._failed


def test_wandb_offline(offline: Path) -> None:
    pytest.importorskip("wandb")
    send("wandb", offline)
    [run] = (offline / "wandb").glob("offline-run-*")
    [table] = run.rglob("completions*.table.json")
    data = json.loads(table.read_text())
    assert data["columns"][:4] == ["step", "task", "prompt", "completion"] and len(data["data"]) == 8
    assert r"\x1b[31m" in data["data"][0][2] and "\x1b" not in table.read_text()
    [log] = run.glob("*.wandb")
    ends = time.monotonic() + 30
    while b"eval/avg@4" not in log.read_bytes() and time.monotonic() < ends:  # another process writes it
        time.sleep(0.1)
    assert b"eval/avg@4" in log.read_bytes()


def test_mlflow_in_a_local_file_store(offline: Path) -> None:
    pytest.importorskip("mlflow")
    send("mlflow", offline)
    [reward] = offline.rglob("metrics/reward")
    assert reward.read_text().split()[1:] == ["0.5", "1"]
    [accuracy] = offline.rglob("metrics/eval/avg_at_4")  # MLflow takes no @ in a name
    assert [line.split()[1:] for line in accuracy.read_text().splitlines()] == [["0.25", "0"], ["0.75", "1"]]
    assert list(offline.rglob("metrics/env/tests_ passed_"))
    [table] = offline.rglob("completions.json")
    assert len(json.loads(table.read_text())["data"]) == 8
    assert "my-run" in next(offline.rglob("tags/mlflow.runName")).read_text()


def test_trackio_on_this_machine(offline: Path) -> None:
    pytest.importorskip("trackio")
    send("trackio", offline)
    with sqlite3.connect(offline / "trackio" / "vpd.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    assert rows[0] == {"eval/avg@4": 0.25} and any(row.get("reward") == 0.5 for row in rows)
    assert any("completions" in row for row in rows)


def test_tensorboard_gets_texts_that_are_not_marked_up(offline: Path) -> None:
    send("tensorboard", offline)
    content = next((offline / "my-run" / "vpd").glob("events*")).read_bytes()
    assert b"completions" in content and b"    a\\x1b[31m <script>" in content and b"\x1b[31m" not in content


def test_texts_stay_here_unless_they_are_asked_for(offline: Path) -> None:
    small = {"run__max_steps": 1, "run__report_to": "tensorboard"}
    assert vpd_train(offline / "quiet", **small) == 0
    assert vpd_train(offline / "open", **small, run__log_completions="true") == 0
    quiet, opened = (next((offline / name / "vpd").glob("events*")).read_bytes() for name in ("quiet", "open"))
    assert b"completions/mean_length" in quiet and b"teacher_prompt" not in quiet
    assert b"**teacher_prompt**" in opened and b"apply rule" in opened


def test_rows_come_from_as_many_groups_as_there_are() -> None:
    rows = completion_rows(3, random_groups(1, groups=3, size=4), Words())
    assert [row["task"] for row in rows] == ["0", "1", "2", "0", "1", "2", "0", "1"]
    assert {row["step"] for row in rows} == {3} and completion_rows(1, [], Words()) == []
    assert completion_rows(1, [Group(rollouts=())], Words()) == []
    long = SimpleNamespace(decode=lambda tokens: "x" * 10_000_000)
    assert max(len(str(cell)) for row in completion_rows(1, random_groups(0), long) for cell in row.values()) < 9000


class Broken:
    """A tracker whose server is gone after the first step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, values: Any, step: int) -> None:
        self.steps.append(step)
        if step > 1:
            raise ConnectionError("connection reset")

    def finish(self) -> None:
        raise ConnectionError("connection reset")


def test_a_tracker_that_fails_ends_no_run(offline: Path, caplog: pytest.LogCaptureFixture) -> None:
    sent, broken = Trackers([], offline), Broken()
    with caplog.at_level(logging.WARNING, logger="vpd"), sent:
        sent._started["wandb"] = broken
        for step in (1, 2, 3):
            sent.on_step(step, {"reward": 1.0}, [])
    assert broken.steps == [1, 2, 3]
    assert [record.getMessage().split(" at ")[0] for record in caplog.records] == [
        "run.report_to: wandb raised ConnectionError",
        "run.report_to: 3 calls of wandb failed; metrics.jsonl has everything",
    ]


def test_a_tracker_that_cannot_start_is_one_line(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, **options: Any) -> None:
            raise PermissionError("api_key not configured")

    monkeypatch.setattr(trackers, "Accelerator", Refusing)
    with pytest.raises(
        EnvError, match=r"starting tensorboard raised PermissionError .* got api_key not configured. Log"
    ):
        Trackers(["tensorboard"], offline).__enter__()


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_missing_package_is_one_line_before_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match=f"{name} is not installed. pip install {trackers.PACKAGES[name]}"):
        trackers.check_installed([name])


def test_tables_need_pandas_where_the_tracker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["mlflow", "wandb"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check_installed(["mlflow"])
    trackers.check_installed(["wandb"], completions=True)
    with pytest.raises(ConfigError, match="tables for mlflow need pandas"):
        trackers.check_installed(["mlflow"], completions=True)


def test_a_word_or_a_list() -> None:
    assert parse({"run": {"report_to": "wandb"}}).run.report_to == ("wandb",)
    assert parse({"run": {"report_to": ["wandb", "mlflow"]}}).run.report_to == ("wandb", "mlflow")
