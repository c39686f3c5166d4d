"""Whole runs on a fake vLLM server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fake_vllm import FakeVLLM, serving
from helpers import metrics_of, vpd_train
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.bundled import load_bundled


@pytest.fixture
def server() -> Iterator[tuple[FakeVLLM, dict[str, object]]]:
    fake = FakeVLLM(AutoModelForCausalLM.from_pretrained(load_bundled()), window=512, dtype="torch.float32")
    with serving(fake) as url:
        yield fake, {"engine.name": "vllm", "engine.url": url}


def test_a_run_trains_on_the_server_and_goes_on_where_it_stopped(
    server: tuple[FakeVLLM, dict[str, object]], tmp_path: Path
) -> None:
    fake, engine = server
    options = engine | {"engine.sync_dir": tmp_path / "sync", "run.save_steps": 1, "algorithm.e_every": 2}
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


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[tuple[FakeVLLM, dict[str, object], Path]]:
    """A teacher's server without development mode, settings that name it, and the folder of the same teacher."""
    model, tokenizer = (kind.from_pretrained(load_bundled()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def template(messages: list[Any]) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    fake = FakeVLLM(model, window=512, development=False, encode=encode, template=template)
    with serving(fake) as url:
        settings = {"algorithm.name": "gkd", "algorithm.teacher_url": url, "algorithm.teacher_model": "policy"}
        yield fake, settings | {"algorithm.distillation_topk": len(tokenizer)}, tmp_path / "teacher"


def test_a_teacher_behind_a_server_that_gives_every_token_teaches_what_a_local_one_does(
    teacher: tuple[FakeVLLM, dict[str, object], Path], tmp_path: Path
) -> None:
    fake, settings, folder = teacher
    local = {"algorithm.name": "gkd", "algorithm.teacher_model": folder, "feedback": "[]"}
    fake.faults["/v1/completions"] = ["drop", (503, "busy"), "half"]  # scores are asked for again
    assert vpd_train(tmp_path / "far", **settings, feedback="[]", run__max_steps=2) == 0
    assert vpd_train(tmp_path / "near", **local, run__max_steps=2) == 0
    far, near = (metrics_of(tmp_path / name) for name in ("far", "near"))
    for ours, theirs in zip(far, near, strict=True):
        for name in ("m_step/loss", "m_step/divergence", "m_step/teacher_entropy", "m_step/grad_norm", "reward"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4)
    assert far[-1]["m_step/divergence"] > 1e-3
    paths = {path for path, _ in fake.asked}
    assert paths == {"/v1/models", "/tokenize", "/v1/completions"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm.teacher_model": "qwen"}, "serves no model 'qwen'; got policy"),
        ({"algorithm.distillation_topk": "null"}, "a server gives its likeliest tokens, not the whole vocabulary"),
        ({"algorithm.student_fraction": 0.5}, "a teacher's server scores answers, and writes none"),
        ({"rollout.temperature": 0.5}, "a remote teacher's log-probs are at temperature 1"),
        ({"algorithm.teacher_url": "x"}, "algorithm.teacher_url is no address of a server"),
        (
            {"algorithm.teacher_api_key_env": "NOT_SET"},
            "algorithm.teacher_api_key_env: the environment variable NOT_SET",
        ),
    ],
)
def test_a_teacher_that_cannot_be_used_is_one_line_and_leaves_no_folder(
    teacher: tuple[FakeVLLM, dict[str, object], Path],
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert vpd_train(tmp_path / "out", **teacher[1] | changes) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_is_refused(
    teacher: tuple[FakeVLLM, dict[str, object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, settings, _ = teacher
    fake.encode = lambda text: [1, 2, 3]
    assert vpd_train(tmp_path / "out", **settings) == 2
    assert "teacher and student need one tokenizer; got 3 tokens from the server" in capsys.readouterr().err
