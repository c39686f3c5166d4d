"""Training on a GPU is training on a CPU; run with ``make test-gpu`` on a machine that has one.

In float64, the norms and rotary angles included, they sample the same tokens and agree in weights and metrics.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metrics_of
from launching import Launch
from safetensors.torch import load_file
from test_ranks import CASES, OWN, write_material

from vpd.config import parse
from vpd.lab.reproduce.forgetting import text_nll
from vpd.model.number_types import bfloat16_ratio
from vpd.recipes.assemble import assemble

HERE = Path(__file__).resolve().parent
ALONE = [name for name in CASES if "server" not in name]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(200),
]
DEVICES = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "gpu": {}}
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another teacher and a log of answers."""
    folder = tmp_path_factory.mktemp("gpu")
    write_material(folder)
    return folder


def made_on(device: str, case: str, folder: Path, *shardings: str) -> dict[str, Any]:
    """What tests/two_ranks.py leaves of a case that it trained on a device."""
    name = f"{device}-{ALONE.index(case)}"
    place = folder / name
    place.mkdir()
    program = [str(HERE / "two_ranks.py"), str(folder), name, case, *shardings]
    servers = {"VLLM_URL": "", "VLLM_LORA_URL": ""}
    Launch(program, 1, place, **DEVICES[device], **servers).end(150)
    found: dict[str, Any] = torch.load(folder / f"{name}-0.pt", weights_only=False, map_location="cpu")
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("case", ALONE)
def test_a_run_in_float64_is_the_same_on_both(case: str, material: Path) -> None:
    cpu, gpu = made_on("cpu", case, material, "none")["none"], made_on("gpu", case, material, "none", "fsdp2")
    moved = (cpu["weights"] - cpu["start"]).norm()
    assert moved > 1e-3
    for sharding, run in ((kind, gpu[kind]) for kind in ("none", "fsdp2")):
        assert run["device"] == "cuda", sharding
        assert run["rollouts"] == cpu["rollouts"], sharding
        assert (run["weights"] - cpu["weights"]).norm() / moved < 1e-8, sharding
        assert (run["average"] - cpu["average"]).norm() / moved < 1e-8, sharding
        for ours, theirs in zip(run["metrics"], cpu["metrics"], strict=True):
            assert ours.keys() - theirs.keys() <= {"memory/peak_cuda_gib"} and not theirs.keys() - ours.keys()
            for key in theirs:
                if not key.startswith(OWN):
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-7, nan_ok=True), (sharding, key)


@pytest.fixture
def train(tmp_path: Path) -> Train:
    return functools.partial(trained, tmp_path)


def trained(place: Path, name: str, *words: str, device: str = "gpu") -> Path:
    """The folder of a small run that ``vpd train`` made; it must end well."""
    folder = place / name
    small = [
        "--run.max_steps", "4", "--run.save_steps", "2", "--run.eval_limit", "8", "--rollout.prompts_per_step", "4",
        "--algorithm.e_every", "1", "--optim.learning_rate", "1e-3", "--env.name", "digits",
        "--feedback", "[environment,sibling]",
        "--run.output_dir", str(folder),
    ]  # fmt: skip
    logs = place / f"{name}-log"
    logs.mkdir(exist_ok=True)
    launch = Launch(["-m", "vpd", "train", *small, *words], 1, logs, **DEVICES[device])
    assert launch.end(150) == [0], launch.outputs
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "--model.dtype bfloat16",
        "--optim.mixed_precision bf16",
        "--model.dtype bfloat16 --optim.gradient_checkpointing selective --rollout.retries 1",
        "--optim.gradient_checkpointing full --algorithm.teacher trust_region",
        "--optim.sharding fsdp2 --optim.mixed_precision bf16",
        "--optim.sharding fsdp2 --optim.cpu_offload true --optim.mixed_precision bf16",
        "--model.dtype bfloat16 --model.lora.r 4",
        "--optim.share_prefixes false --model.dtype bfloat16",
        "--optim.max_tokens_per_microbatch 64 --algorithm.name gated",
    ],
)
def test_each_way_to_save_memory_trains(words: str, train: Train) -> None:
    last = metrics_with_memory(train("run", *words.split()))[-1]
    assert last["step"] == 4 and last["memory/peak_cuda_gib"] > 0
    for part in ("e_step", "m_step"):
        assert abs(last[f"{part}/loss"]) < 1e3 and 0 < last[f"{part}/grad_norm"] < 1e6


def metrics_with_memory(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("words", ["", "--model.dtype bfloat16", "--optim.sharding fsdp2"])
def test_a_run_goes_on_from_its_checkpoint(words: str, train: Train) -> None:
    whole = train("whole", *words.split())
    train("parts", *words.split(), "--run.max_steps", "2")
    parts = train("parts", *words.split(), "--run.resume", "true")
    ours, theirs = metrics_of(parts), metrics_of(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key, value in theirs[-1].items():
        assert ours[-1][key] == pytest.approx(value, rel=0.05, abs=0.02, nan_ok=True), key
    mine, other = (load_file(folder / "model" / "model.safetensors") for folder in (parts, whole))
    for name, value in other.items():
        assert torch.allclose(mine[name].float(), value.float(), rtol=2**-7, atol=2e-3), name  # one step of bfloat16


def test_float32_samples_the_same_answers_as_the_cpu(train: Train) -> None:
    gpu, cpu = train("gpu"), train("cpu", device="cpu")
    for ours, theirs in zip(metrics_of(gpu), metrics_of(cpu), strict=True):
        for key in ("reward", "eval/accuracy", "m_step/loss", "e_step/loss"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-3), (ours["step"], key)


def test_plain_text_is_as_likely_as_on_the_cpu() -> None:
    parts = assemble(parse({"model": {"name_or_path": "tiny", "dtype": "float64"}, "env": {"name": "digits"}}))
    assert next(parts.learner.model.parameters()).is_cuda
    found = text_nll(parts)
    parts.learner.model.to("cpu")
    assert found == pytest.approx(text_nll(parts), abs=1e-5)  # its probabilities are float32


def test_the_doctor_finds_the_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    from vpd.cli import main

    main(["doctor"])
    said = capfd.readouterr().out
    assert torch.cuda.get_device_properties(0).name in said and "on this GPU" in said
    assert bfloat16_ratio("cuda") < 0.5
