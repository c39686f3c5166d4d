"""The analytic head: value and gradient of the plain form, whether the weights are announced, unknown or wrong."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, random_groups
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vpd import losses
from vpd.algorithms.examples import to_examples
from vpd.model import head
from vpd.model.scorer import Batch, Scorer, collate

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
OPTIONS: list[dict[str, Any]] = [
    {"alpha": 0.0},
    {"alpha": 0.3},
    {"alpha": 1.0},
    {"alpha": 0.5, "top_k": 4},
    {"alpha": 1.0, "top_k": 4, "tail": False},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "BLOCK", 3 * VOCABULARY)


def model_of(dtype: torch.dtype, tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def batch_of(dtype: torch.dtype) -> Batch:
    examples = []
    for number, example in enumerate(e for e in to_examples(random_groups(0)) if e.teacher_prompt):
        mask = tuple(number % 3 != 1 or place % 2 == 0 for place in range(len(example.completion)))
        reference = tuple(-2.0 - 0.3 * place for place in range(len(mask))) if number % 2 else None
        weights = {"distill": 0.1 * (number + 1)}
        examples.append(dataclasses.replace(example, mask=mask, reference=reference, loss_weights=weights))
    return collate(examples, device=CPU, dtype=torch.promote_types(dtype, torch.float32))


Loss = Callable[[Scorer, Batch], Tensor]


def result(loss: Loss, dtype: torch.dtype, *, tied: bool = True, analytic: bool, frozen: bool = False) -> Tensor:
    """A loss and all its gradients, as one vector."""
    model, teacher, batch = model_of(dtype, tied), model_of(dtype, tied, seed=1), batch_of(dtype)
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    scorer = Scorer(
        batch, student=((model, 1.0),), teacher=((teacher, 0.7), (model, 0.3)), train="student", temperature=0.8,
        chunk_tokens=7, analytic=analytic,
    )  # fmt: skip
    value = loss(scorer, batch)
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters())) - frozen and not any(p.grad for p in teacher.parameters())
    return torch.cat([value.detach()[None], *gradients]).double()


def agree(loss: Loss, dtype: torch.dtype, **changes: Any) -> None:
    plain, fast = (result(loss, dtype, analytic=analytic, **changes) for analytic in (False, True))
    assert plain.norm() > 1e-2
    assert (plain - fast).norm() <= TOLERANCE[dtype] * plain.norm()


def weighted(options: dict[str, Any], announce: dict[str, Any], factor: float = 1.0) -> Loss:
    def loss(scorer: Scorer, batch: Batch) -> Tensor:
        compared = scorer.divergence(**options, **announce)
        reference_BT = batch.reference_or(compared.student_logprobs)
        ratio_BT = losses.importance_ratio(compared.student_logprobs, reference_BT, clip=1.1)
        weight_B = torch.tensor([e.loss_weights["distill"] for e in batch.examples], dtype=compared.value.dtype)
        return factor * (weight_B[:, None] * ratio_BT * compared.value * batch.mask_BT).sum()

    return loss


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_divergence_equals_the_plain_form(options: dict[str, Any], tied: bool, dtype: torch.dtype) -> None:
    for announce in ({"term": "distill", "clip": 1.1}, {}, {"term": "distill", "clip": None}):
        agree(weighted(options, announce), dtype, tied=tied)
    agree(weighted(options, {"term": "distill", "clip": 1.1}, factor=3.0), dtype, tied=tied)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logprobs_equal_the_plain_form(dtype: torch.dtype) -> None:
    agree(lambda scorer, batch: (scorer.logprobs("student") * batch.reference_BT.sin()).sum(), dtype)


def test_a_frozen_head_gets_no_gradient() -> None:
    agree(weighted(OPTIONS[1], {"term": "distill", "clip": 1.1}), torch.float64, tied=False, frozen=True)
    agree(lambda scorer, batch: scorer.logprobs("student").square().sum(), torch.float64, tied=False, frozen=True)


def test_announced_weights_spare_the_second_logits() -> None:
    def made(announce: dict[str, Any]) -> int:
        calls = 0
        whole = head._ChunkedHead.logits

        def count(self: Any, *args: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return whole(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head._ChunkedHead, "logits", count)
            result(weighted({"alpha": 0.5}, announce), torch.float32, analytic=True)
        return calls

    assert 2 * made({"term": "distill", "clip": 1.1}) == made({}) == made({"term": "distill", "clip": None})


def test_by_products_are_those_of_the_plain_form() -> None:
    for options in OPTIONS:
        both = []
        for analytic in (False, True):
            model, teacher, batch = (
                model_of(torch.float64, True),
                model_of(torch.float64, True, 1),
                batch_of(torch.float64),
            )
            scorer = Scorer(
                batch, student=((model, 1.0),), teacher=((teacher, 1.0),), train=None, temperature=1.0,
                chunk_tokens=5, analytic=analytic,
            )  # fmt: skip
            entropies = scorer.entropy("student"), scorer.entropy("teacher")
            both.append(torch.stack([*scorer.divergence(**options), scorer.logprobs("teacher"), *entropies]).detach())
        assert torch.allclose(*both, atol=1e-12) and not both[0].requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_slope_is_the_gradient(options: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    tokens = torch.arange(6)
    student.requires_grad_()
    value = losses.divergence(student, teacher, **options)
    (expected,) = torch.autograd.grad(value.sum(), student)
    got = losses.divergence_and_grad(student.detach(), teacher, tokens, **options)
    assert torch.allclose(got.value_N, value) and torch.allclose(got.gradient_NV, expected, atol=1e-12)
    logp = losses.token_logprobs(student, tokens)
    (expected,) = torch.autograd.grad(logp.sum(), student)
    scored = losses.logprobs_and_grad(student.detach(), tokens)
    assert torch.allclose(scored.value_N, logp) and torch.allclose(scored.gradient_NV, expected, atol=1e-12)


def test_far_apart_distributions_stay_finite() -> None:
    student, teacher = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    for alpha in (0.0, 0.5, 1.0):
        got = losses.divergence_and_grad(student, teacher, torch.tensor([0]), alpha=alpha)
        assert got.gradient_NV.isfinite().all()
        assert got.value_N.item() == pytest.approx(losses.divergence(student, teacher, alpha=alpha).item(), rel=1e-5)


MEMORY = """
import re, sys
from pathlib import Path
import torch
from vpd import losses
from vpd.model import head

def held(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
N, V, H = map(int, sys.argv[1:])
states_NH, weight_VH = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
other_VH, tokens_N = torch.randn(V, H), torch.randint(0, V, (N,))

def open_chunk(rows):
    teacher_nV = states_NH.detach()[rows] @ other_VH.T

    def measure(block_nV, place, wanted):
        got = losses.divergence_and_grad(block_nV, teacher_nV[place], tokens_N[rows][place], alpha=0.5)
        return head.Measured(got.value_N, got.gradient_NV, got.aux, torch.ones(len(block_nV)))

    return measure

before = held("VmRSS")
value_N = head.measure(states_NH, weight_VH, open_chunk, chunk=(1 << 24) // V, scale=1.0, weights_known=True)[0]
value_N.sum().backward()
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's count of memory")
def test_memory_stays_below_one_tensor_of_all_logits() -> None:
    tokens, vocabulary = 1536, 120_000
    words = [sys.executable, "-c", MEMORY, str(tokens), str(vocabulary), "8"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 4 * tokens * vocabulary
