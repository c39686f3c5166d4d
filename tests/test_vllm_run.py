"""Whole runs on a fake vLLM server."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from fake_vllm import FakeVLLM, serving
from helpers import metrics_of, vpd_train
from transformers import AutoModelForCausalLM

from vpd.bundled import load_bundled

VPD = {"algorithm.name": "vpd", "algorithm.e_every": 2}


@pytest.fixture
def server() -> Iterator[tuple[FakeVLLM, dict[str, object]]]:
    fake = FakeVLLM(AutoModelForCausalLM.from_pretrained(load_bundled()), window=512, dtype="torch.float32")
    with serving(fake) as url:
        yield fake, {"engine.name": "vllm", "engine.url": url}


def test_a_run_trains_on_the_server_and_goes_on_where_it_stopped(
    server: tuple[FakeVLLM, dict[str, object]], tmp_path: Path
) -> None:
    fake, engine = server
    options = engine | {"engine.sync_dir": tmp_path / "sync", "run.save_steps": 1, **VPD}
    assert vpd_train(tmp_path / "whole", **options, run__max_steps=3) == 0
    assert (
        yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["algorithm"]["importance_reference"]
        == "sampler"
    )
    lines = [line for line in metrics_of(tmp_path / "whole") if line.get("step")]
    assert all(line["engine/canary_difference"] < 1e-4 and line["rollout/staleness"] == 0 for line in lines)
    assert lines[1]["m_step/sampler_mismatch"] < 1e-4 and lines[1]["m_step/sampling_logp_difference"] == 0
    versions = [Path(body["kwargs"]["weights_path"]).name for path, body in fake.asked if path == "/collective_rpc"]
    assert versions == ["v0", "v1", "v2", "v3"]

    assert vpd_train(tmp_path / "parts", **options, run__max_steps=2) == 0
    assert vpd_train(tmp_path / "parts", **options, run__max_steps=3, run__resume="true") == 0
    whole, parts = (pq.read_table(tmp_path / run / "rollouts").to_pylist() for run in ("whole", "parts"))
    assert [row["completion"] for row in whole] == [row["completion"] for row in parts]


def test_a_learner_under_autocast_is_not_taken_for_a_server_with_other_weights(
    server: tuple[FakeVLLM, dict[str, object]], tmp_path: Path
) -> None:
    _, engine = server
    options = engine | {"engine.sync_dir": tmp_path / "sync", "optim.mixed_precision": "bf16", "run.max_steps": 1}
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision for all
    try:
        assert vpd_train(tmp_path / "out", **options) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert 1e-3 < max(line["engine/canary_difference"] for line in metrics_of(tmp_path / "out") if line.get("step")) < 1


def test_a_stale_server_ends_the_run_with_one_line_and_the_checkpoint_stays(
    server: tuple[FakeVLLM, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, engine = server
    options = engine | {"engine.sync_dir": tmp_path / "sync", "run.save_steps": 1, "run.max_steps": 3}
    assert vpd_train(tmp_path / "out", **options | {"run.max_steps": 1}) == 0
    fake.keep = lambda name: "mlp" in name
    with torch.no_grad():
        for parameter in fake.model.parameters():
            parameter.mul_(1.1)
    capsys.readouterr()
    assert vpd_train(tmp_path / "out", **options, run__resume="true") == 2
    error = capsys.readouterr().err
    assert "does not serve the weights of version" in error and (tmp_path / "out" / "checkpoint-1").is_dir()
    fake.keep = lambda name: False
    assert vpd_train(tmp_path / "out", **options, run__resume="true") == 0


def test_a_server_that_does_not_fit_leaves_no_run_folder(
    server: tuple[FakeVLLM, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, engine = server
    fake.window = 10
    assert vpd_train(tmp_path / "out", **engine | {"engine.sync_dir": tmp_path / "sync"}) == 2
    assert "too short for this run; got 10 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
