"""A real vLLM server on SmolLM2-135M: the contract, the canary, three steps of VPD, an adapter; minutes long.

``make test-vllm`` makes the environment; VPD_VLLM_PYTHON names its python, VPD_SMOLLM2 the model's folder.  What is
measured is printed.
"""

import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import keys, metrics_of
from launching import Launch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.cli import main
from vpd.config import load
from vpd.engines.settings import EngineParts
from vpd.engines.torch_engine import TorchEngine
from vpd.errors import EngineError
from vpd.policy import FixedPolicy
from vpd.types import Completion, Tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("VPD_VLLM_PYTHON" not in os.environ, reason="make test-vllm"),
]
ASKED = ["Name a colour.", "What is the capital of France?", "Write one short sentence about a cat.", "2+2=?"]
RUN = """
model: {{name_or_path: {model}}}
env: {{name: instructions, constraints: [max_words, no_commas]}}
rollout: {{prompts_per_step: 2, num_generations: 4, max_completion_length: 24}}
algorithm: {{name: vpd, e_every: 2}}
engine: {{name: vllm, url: "{url}", python: {python}, sync_dir: {folder}/sync, dtype: {dtype}, max_model_len: 1024}}
optim: {{learning_rate: 1.0e-5}}
run: {{max_steps: 3, seed: 3, save_steps: 0, output_dir: {folder}/out}}
"""


@contextlib.contextmanager
def served(folder: Path, dtype: str, *words: str) -> Iterator[Path]:
    """The file of settings of a run whose server is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = folder / "run.yaml"
    model, python = Path(os.environ["VPD_SMOLLM2"]).resolve(), Path(os.environ["VPD_VLLM_PYTHON"]).absolute()
    config.write_text(RUN.format(model=model, url=url, python=python, folder=folder, dtype=dtype))
    command = [sys.executable, "-m", "vpd", "serve", "--config", str(config), *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | CPU)
    try:
        assert server.stdout is not None
        lines = iter(server.stdout)
        ready = next((line for line in lines if line.startswith("ready")), None)
        assert ready, "the server ended before it was ready"
        print(ready.strip())
        yield config
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with served(tmp_path_factory.mktemp("whole"), "float32") as config:
        yield config


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with served(tmp_path_factory.mktemp("adapters"), "bfloat16", "--model.lora", "{r: 8}") as config:
        yield config


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(os.environ["VPD_SMOLLM2"])


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(os.environ["VPD_SMOLLM2"], dtype=torch.float32).eval()


def engine_of(config: Path, tokenizer: Any, rows: int = 64) -> Any:
    parts = EngineParts(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,), max_rows=rows)
    return load(str(config)).engine.build(parts)


def prompts_of(tokenizer: Any, each: int) -> list[Tokens]:
    chats = [[{"role": "user", "content": text}] for text in ASKED for _ in range(each)]
    return [tuple(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats]


@torch.no_grad()
def logprobs(model: Any, prompt: Tokens, completion: Tokens, temperature: float = 1.0) -> list[float]:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    logp = torch.log_softmax(logits, -1)
    return [float(logp[place, token]) for place, token in enumerate(completion)]


def gaps(model: Any, prompts: Sequence[Tokens], answers: Sequence[Completion], temperature: float = 1.0) -> list[float]:
    return [
        abs(ours - theirs)
        for prompt, answer in zip(prompts, answers, strict=True)
        for ours, theirs in zip(logprobs(model, prompt, answer.tokens, temperature), answer.logprobs, strict=True)
    ]


def test_the_engine_keeps_the_contract(whole: Path, tokenizer: Any) -> None:
    policy, engine, prompts = model(), engine_of(whole, tokenizer), prompts_of(tokenizer, 4)
    engine.load(FixedPolicy(policy))
    limits = [1, 8, 16, 24] * 4
    answers = engine.generate(prompts, keys=keys(16), seed=1, max_tokens=limits)
    print("16 rows, log-probs against a forward pass: at most", f"{max(gaps(policy, prompts, answers)):.1e} nats")
    assert max(gaps(policy, prompts, answers)) < 1e-3
    assert all(1 <= len(answer.tokens) <= limit for answer, limit in zip(answers, limits, strict=True))
    assert all((a.tokens[-1] == tokenizer.eos_token_id) == (a.finish == "stop") for a in answers)
    assert answers == engine.generate(prompts, keys=keys(16), seed=1, max_tokens=limits)
    turned = engine.generate(prompts[::-1], keys=keys(16)[::-1], seed=1, max_tokens=limits[::-1])
    alone = [engine.generate([p], keys=[k], seed=1, max_tokens=m)[0] for p, k, m in zip(prompts, keys(16), limits, strict=True)]  # noqa: E501  # fmt: skip
    assert [a.tokens for a in turned[::-1]] == [a.tokens for a in answers] == [a.tokens for a in alone]
    cooler = engine.generate(prompts, keys=keys(16), seed=1, max_tokens=12, temperature=0.7)
    assert max(gaps(policy, prompts, cooler, 0.7)) < 1e-3


def test_tokens_a_second_beside_the_embedded_engine(whole: Path, tokenizer: Any) -> None:
    policy, prompts = FixedPolicy(model()), prompts_of(tokenizer, 16)
    embedded = TorchEngine(tokenizer, eos_ids=[tokenizer.eos_token_id], max_rows=64)
    for name, engine in (("embedded", embedded), ("vllm", engine_of(whole, tokenizer))):
        engine.load(policy)
        engine.generate(prompts[:4], keys=keys(4), seed=0, max_tokens=8)
        started = time.perf_counter()
        answers = engine.generate(prompts, keys=keys(64), seed=1, max_tokens=64)
        count = sum(len(answer.tokens) for answer in answers)
        rate = count / (time.perf_counter() - started)
        print(f"{name}: 64 rows, {count} tokens, {rate:.0f} tokens a second")
        assert rate > 0


class Tampered(FixedPolicy):
    """A policy whose folder lacks some tensors, or holds old ones."""

    def __init__(self, model: Any, version: int, *, old: Any = None, drop: str = "", every: int = 0):
        super().__init__(model, version)
        self.old, self.drop, self.every = old, drop, every

    def save(self, folder: Path) -> None:
        super().save(folder)
        path = folder / "model.safetensors"
        kept = {name: value for name, value in load_file(path).items() if not self.drop or self.drop not in name}
        if self.old is not None:
            before = self.old.state_dict()
            kept = {n: before[n].clone() if i % self.every == 0 else v for i, (n, v) in enumerate(kept.items())}
        save_file(kept, path, metadata={"format": "pt"})


def moved(model: Any, by: float) -> Any:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * parameter.std() * by)
    return model


def test_the_canary_catches_stale_half_updated_and_incomplete_weights(whole: Path, tokenizer: Any) -> None:
    old, new = model(), moved(model(), 1e-2)
    for name, policy in {
        "stale": Tampered(new, 1, old=old, every=1),
        "every second tensor": Tampered(new, 1, old=old, every=2),
        "without layer 7, at the first sync": Tampered(new, 1, drop=".layers.7."),
    }.items():
        engine = engine_of(whole, tokenizer)
        if "first" not in name:
            engine.load(FixedPolicy(old, 0))
        else:
            engine_of(whole, tokenizer).load(FixedPolicy(old, 0))
        with pytest.raises(EngineError, match="does not serve the weights of version 1") as caught:
            engine.load(policy)
        print(f"{name}: {str(caught.value).partition('got ')[2].partition(';')[0]}")
    engine = engine_of(whole, tokenizer)
    engine.load(FixedPolicy(old, 0))
    with pytest.raises(EngineError, match="are not those that were sent before"):
        engine.load(Tampered(new, 1, drop=".layers.7."))
    engine.load(FixedPolicy(new, 1))
    print("right again:", engine.metrics())


def test_three_steps_of_vpd(whole: Path, tmp_path: Path) -> None:
    words = ["train", "--config", str(whole), "--run.output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    for line in [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]:
        shown = {k: v for k, v in line.items() if k.startswith(("engine/", "time/")) or k.endswith("mismatch")}
        print(f"step {line['step']}:", ", ".join(f"{key} {value:.3g}" for key, value in shown.items()))
        assert line["engine/canary_difference"] < 1e-3 and line["m_step/rows"] > 0
    assert metrics_of(tmp_path / "out")[1]["m_step/sampler_mismatch"] < 1e-3


def test_two_steps_with_an_adapter_on_a_16_bit_server(adapters: Path, tmp_path: Path) -> None:
    words = ["train", "--config", str(adapters), "--model.lora", "{r: 8}", "--run.max_steps", "2"]
    assert main([*words, "--optim.learning_rate", "1e-4", "--run.output_dir", str(tmp_path / "out")]) == 0
    for line in metrics_of(tmp_path / "out"):
        print({name: value for name, value in line.items() if name.startswith("engine/") or name.endswith("mismatch")})
        assert line["engine/canary_difference_mean"] < 0.1 and line["m_step/rows"] > 0
    assert metrics_of(tmp_path / "out")[1]["m_step/sampler_mismatch"] < 0.1


def in_two_processes(config: Path, folder: Path, *words: str) -> list[dict[str, float]]:
    """The metrics of a run in shards over two processes."""
    command = ["-m", "vpd", "train", "--config", str(config), "--optim.sharding", "fsdp2", "--run.max_steps", "2"]
    run = Launch([*command, "--run.output_dir", str(folder / "two"), *words], 2, folder)
    assert run.end(900) == [0, 0], run.outputs
    for line in [json.loads(line) for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]:
        shown = {k: v for k, v in line.items() if k.startswith(("engine/", "time/")) or k.endswith("mismatch")}
        print(f"two processes, step {line['step']}:", ", ".join(f"{key} {value:.3g}" for key, value in shown.items()))
    return metrics_of(folder / "two")


def test_two_processes_in_shards_get_the_answers_of_one(whole: Path, tmp_path: Path) -> None:
    lines = in_two_processes(whole, tmp_path)
    assert all(line["engine/canary_difference"] < 1e-3 and line["m_step/rows"] > 0 for line in lines)
    words = ["train", "--config", str(whole), "--run.max_steps", "2", "--run.output_dir", str(tmp_path / "one")]
    assert main(words) == 0
    for ours, theirs in zip(lines, metrics_of(tmp_path / "one"), strict=True):
        for name in ("reward", "m_step/loss", "m_step/divergence", "m_step/grad_norm", "m_step/tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_two_processes_train_one_adapter_in_shards_on_a_16_bit_server(adapters: Path, tmp_path: Path) -> None:
    words = ["--model.lora", "{r: 8}", "--optim.learning_rate", "1e-4"]
    for line in in_two_processes(adapters, tmp_path, *words):
        assert line["engine/canary_difference_mean"] < 0.1 and line["m_step/rows"] > 0
    assert (tmp_path / "two" / "adapter" / "adapter_config.json").is_file()


def test_the_truncated_ratio_corrects_a_16_bit_server(adapters: Path, tokenizer: Any) -> None:
    """Of d = log mu - log pi, mu the server's and pi the learner's distribution, the learner's mean is at most 0.

    Over the server's samples it is KL(mu || pi), above 0: what a gradient that trusts them drifts along.  With each
    token weighted by min(pi / mu, 2) it is the learner's own again.
    """
    from vpd.model import lora
    from vpd.model.settings import LoraSettings

    policy, prompts = model(), prompts_of(tokenizer, 48)
    adapted = model()
    adapted.name_or_path = os.environ["VPD_SMOLLM2"]
    lora.attach(adapted, LoraSettings(r=8), seed=0)  # changes nothing yet
    engine = engine_of(adapters, tokenizer)
    engine.load(Adapter(adapted))
    answers = engine.generate(prompts, keys=keys(len(prompts)), seed=1, max_tokens=32)
    plain, corrected = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        for ours, theirs in zip(logprobs(policy, prompt, answer.tokens), answer.logprobs, strict=True):
            plain.append(theirs - ours)
            corrected.append(min(math.exp(ours - theirs), 2.0) * (theirs - ours))
    bias, rest = statistics.fmean(plain), statistics.fmean(corrected)
    errors = [statistics.stdev(values) / len(values) ** 0.5 for values in (plain, corrected)]
    size = statistics.fmean(map(abs, plain))
    print(f"{len(plain)} tokens, mean |d| {size:.4f}; mean d {bias:.5f} ± {errors[0]:.5f} as sampled,")
    print(f"{rest:.5f} ± {errors[1]:.5f} with the ratio")
    assert bias > 0 and rest < bias


class Adapter(FixedPolicy):
    """A policy that is an adapter."""

    def save(self, folder: Path) -> None:
        from vpd.model import lora

        lora.save(self.model, folder)
