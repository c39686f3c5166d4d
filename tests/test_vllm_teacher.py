"""A teacher behind a fake vLLM server: what it says is learned from as what a teacher here says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, serving
from helpers import metrics_of, vpd_train
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.bundled import load_bundled
from vpd.model import lora
from vpd.model.settings import LoraSettings

SAME = ("m_step/loss", "m_step/divergence", "m_step/teacher_entropy", "m_step/grad_norm", "m_step/rows", "reward")


def compare(far: Path, near: Path) -> None:
    """Whether two runs learned the same."""
    for ours, theirs in zip(metrics_of(far), metrics_of(near), strict=True):
        for name in SAME:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), name
    assert metrics_of(far)[-1]["m_step/divergence"] > 1e-3


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
    fake.faults["/v1/completions"] = [None, "drop", (503, "busy"), "half"]  # scores are asked for again
    assert vpd_train(tmp_path / "far", **settings, feedback="[]", run__max_steps=2) == 0
    assert vpd_train(tmp_path / "near", **local, run__max_steps=2) == 0
    compare(tmp_path / "far", tmp_path / "near")
    paths = {path for path, _ in fake.asked}
    assert paths == {"/v1/models", "/tokenize", "/v1/completions"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm.teacher_model": "qwen"}, "serves no model 'qwen'; got policy"),
        ({"algorithm.distillation_topk": "null"}, "a server gives its likeliest tokens, not the whole vocabulary"),
        ({"algorithm.student_fraction": 0.5}, "a teacher's server scores answers, and writes none"),
        ({"algorithm.distillation_topk": 30}, "does not give its 30 likeliest tokens; got .*greater than max allowed"),
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
    teacher[0].most_logprobs = 20
    usual = {"algorithm.distillation_topk": 20}
    assert vpd_train(tmp_path / "out", **teacher[1] | usual | changes) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_is_refused(
    teacher: tuple[FakeVLLM, dict[str, object], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, settings, _ = teacher
    fake.encode = lambda text: [1, 2, 3]
    assert vpd_train(tmp_path / "out", **settings) == 2
    assert "teacher and student need one tokenizer; got 3 tokens from the server" in capsys.readouterr().err


def test_a_teacher_may_be_an_adapter_that_the_server_has_under_a_name(
    teacher: tuple[FakeVLLM, dict[str, object], Path], tmp_path: Path
) -> None:
    fake, settings, folder = teacher
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora.attach(model, LoraSettings(r=2), seed=0)
    for value in lora.weights(model).values():
        value.data += 0.05
    lora.save(model, tmp_path / "tuned")
    name = {"lora_name": "tuned", "lora_path": str(tmp_path / "tuned")}
    fake.adapter("/v1/load_lora_adapter", name)  # as --lora-modules does
    assert vpd_train(tmp_path / "far", **settings | {"algorithm.teacher_model": "tuned"}, run__max_steps=2) == 0
    local = {"algorithm.name": "gkd", "algorithm.teacher_model": tmp_path / "tuned"}
    assert vpd_train(tmp_path / "near", **local, run__max_steps=2) == 0
    compare(tmp_path / "far", tmp_path / "near")


@pytest.fixture
def initial(teacher: tuple[FakeVLLM, dict[str, object], Path]) -> dict[str, object]:
    """Settings of SDPO whose teacher is the initial weights at a server."""
    fake, settings, _ = teacher
    fake.model = AutoModelForCausalLM.from_pretrained(load_bundled())
    return settings | {"algorithm.name": "sdpo", "algorithm.teacher": "frozen"}


def test_a_frozen_teacher_at_a_server_reads_the_feedback(initial: dict[str, object], tmp_path: Path) -> None:
    usual: dict[str, object] = {"run.max_steps": 3, "optim.learning_rate": 0.01, "rollout.retries": 1}
    usual["feedback"] = "[environment, sibling]"
    assert vpd_train(tmp_path / "far", **initial | usual) == 0
    local = {"algorithm.name": "sdpo", "algorithm.teacher": "frozen"}
    assert vpd_train(tmp_path / "near", **local | usual) == 0
    compare(tmp_path / "far", tmp_path / "near")


def test_with_adapters_the_runs_own_server_has_the_frozen_teacher(tmp_path: Path) -> None:
    model, tokenizer = (kind.from_pretrained(load_bundled()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    fake = FakeVLLM(model, window=512, dtype="torch.float32")
    fake.encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
    usual = {"model.lora.r": 4, "algorithm.name": "sdpo", "algorithm.teacher": "frozen", "run.max_steps": 2}
    with serving(fake) as url:
        engine = {"engine.name": "vllm", "engine.url": url, "engine.sync_dir": tmp_path / "sync"}
        served = {"algorithm.teacher_url": url, "algorithm.teacher_model": "policy"}
        topk = {"algorithm.distillation_topk": len(tokenizer)}
        assert vpd_train(tmp_path / "far", **usual | engine | served | topk) == 0
        assert vpd_train(tmp_path / "near", **usual | engine) == 0
    compare(tmp_path / "far", tmp_path / "near")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm.teacher": "ema"}, "a teacher behind a server never moves; got algorithm.teacher ema"),
        ({"algorithm.retry_loss": "forward_kl"}, "scores attempts, and no retries"),
        ({"algorithm.teacher_model": "''"}, "one needs the other; got teacher_model '', teacher_url http"),
        ({"algorithm.teacher_url": "null"}, "one needs the other; got teacher_model 'policy', teacher_url None"),
        ({"algorithm.name": "vpd"}, "unknown key algorithm.teacher_url"),
    ],
)
def test_settings_of_a_frozen_teacher_that_do_not_fit_are_one_line(
    initial: dict[str, object],
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert vpd_train(tmp_path / "out", **initial | changes) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_server_that_is_sent_the_students_weights_is_no_teachers(
    initial: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {"engine.name": "vllm", "engine.url": initial["algorithm.teacher_url"]}
    assert vpd_train(tmp_path / "out", **initial | engine) == 2
    assert "the server at engine.url gets the student's weights" in capsys.readouterr().err
