"""The chunked head: value and gradient of the plain form, whether the weights are known, unknown or wrong; and the same
for a remote teacher's top-k log-probs."""

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
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2ForCausalLM, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from vpd import losses
from vpd.algorithms.examples import to_examples
from vpd.model import head
from vpd.model.batch import Batch, collate
from vpd.model.scorer import Scorer
from vpd.types import TopKLogprobs

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


def batch_of(dtype: torch.dtype, remote: int | None = None) -> Batch:
    """Rows with ragged masks, half of them with a reference; with ``remote`` = K they carry top-k log-probs."""
    examples = []
    for number, example in enumerate(e for e in to_examples(random_groups(0)) if e.teacher):
        mask = tuple(number % 3 != 1 or place % 2 == 0 for place in range(len(example.completion)))
        reference = tuple(-2.0 - 0.3 * place for place in range(len(mask))) if number % 2 else None
        changes: dict[str, Any] = {
            "mask": mask,
            "reference": reference,
            "loss_weights": {"distill": 0.1 * (number + 1)},
        }
        if remote is not None:
            changes["teacher"] = random_top_k(len(mask), remote, seed=number)
        examples.append(dataclasses.replace(example, **changes))
    return collate(examples, device=CPU, dtype=torch.promote_types(dtype, torch.float32))


def random_top_k(tokens: int, k: int, seed: int) -> TopKLogprobs:
    draw = torch.Generator().manual_seed(seed)
    logp = (2 * torch.randn(tokens, VOCABULARY, generator=draw, dtype=torch.float64)).log_softmax(-1)
    best = logp.topk(k, -1)
    return TopKLogprobs(ids=totuple(best.indices), logprobs=totuple(best.values))


def totuple(table: Tensor) -> Any:
    return tuple(map(tuple, table.tolist()))


def row_weights(batch: Batch) -> Tensor:
    return torch.tensor([e.loss_weights["distill"] for e in batch.examples])


Loss = Callable[[Scorer, Batch], Tensor]


def result(
    loss: Loss,
    dtype: torch.dtype,
    *,
    tied: bool = True,
    analytic: bool,
    frozen: bool = False,
    remote: int | None = None,
) -> Tensor:
    """A loss and all its gradients, as one vector."""
    model, teacher, batch = model_of(dtype, tied), model_of(dtype, tied, seed=1), batch_of(dtype, remote)
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


def weighted(options: dict[str, Any], *, known: bool = True, clip: float | None = 1.1, factor: float = 1.0) -> Loss:
    """A loss that clips the importance ratio at 1.1; the scorer knows so, or does not, or expects another ``clip``."""

    def loss(scorer: Scorer, batch: Batch) -> Tensor:
        of_term = scorer.for_term(row_weights(batch)) if known else scorer
        compared = of_term.divergence(**options, importance_clip=clip)
        reference_BT = batch.reference_or(compared.student_logprobs)
        ratio_BT = losses.importance_ratio(compared.student_logprobs, reference_BT, clip=1.1)
        weight_B1 = row_weights(batch).to(compared.value.dtype)[:, None]
        return factor * (weight_B1 * ratio_BT * compared.value * batch.mask_BT).sum()

    return loss


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_divergence_equals_the_plain_form(options: dict[str, Any], tied: bool, dtype: torch.dtype) -> None:
    for loss in (
        weighted(options),
        weighted(options, known=False),
        weighted(options, clip=None),
        weighted(options, factor=3.0),
    ):
        agree(loss, dtype, tied=tied)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logprobs_equal_the_plain_form(dtype: torch.dtype) -> None:
    agree(lambda scorer, batch: (scorer.logprobs("student") * batch.reference_BT.sin()).sum(), dtype)


def test_a_frozen_head_gets_no_gradient() -> None:
    agree(weighted(OPTIONS[1]), torch.float64, tied=False, frozen=True)
    agree(lambda scorer, batch: scorer.logprobs("student").square().sum(), torch.float64, tied=False, frozen=True)


def capped(config: dict[str, Any]) -> Any:
    """A model of the Gemma 2 or the Granite kind: its logits are capped or divided."""
    kind = Gemma2ForCausalLM if "final_logit_softcapping" in config else GraniteForCausalLM
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    } | config  # fmt: skip
    return kind(kind.config_class(**settings)).double().eval()


@pytest.mark.parametrize("config", [{"final_logit_softcapping": 2.0}, {"logits_scaling": 4.0}], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_capped_and_scaled_logits_have_the_value_and_gradient_of_the_plain_form(
    known: bool, config: dict[str, float]
) -> None:
    batch, results = batch_of(torch.float64), []
    for analytic in (False, True):
        model = capped(config)
        scorer = Scorer(
            batch, student=((model, 1.0),), teacher=((model_of(torch.float64, True), 1.0),), train="student",
            temperature=0.8, chunk_tokens=7, analytic=analytic,
        )  # fmt: skip
        loss = weighted({"alpha": 0.3}, known=known)(scorer, batch) + scorer.logprobs("student").sum()
        loss.backward()  # type: ignore[no-untyped-call]
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    example = batch.examples[0]
    ids = torch.tensor([example.prompt + example.completion])
    logp = (model(ids).logits[0].double() / 0.8).log_softmax(-1)[len(example.prompt) - 1 : -1]
    expected = logp.gather(1, torch.tensor(example.completion)[:, None])[:, 0] * torch.tensor(example.mask)
    assert torch.allclose(scorer.logprobs("student")[0, : len(expected)], expected, atol=1e-5)
    assert results[0].norm() > 1e-2 and (results[0] - results[1]).norm() < 1e-10 * results[0].norm()


def test_known_weights_spare_the_second_logits() -> None:
    def operations(**changes: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            result(weighted({"alpha": 0.5}, **changes), torch.float32, analytic=True)
        return counter.get_total_flops()

    product = 2 * int(batch_of(torch.float32).mask_BT.sum()) * 16 * VOCABULARY
    logits = 3 * product  # of the student and the teacher's two modules
    assert operations() + logits == operations(known=False)
    # formed for another clip, and then once more; the counter does not see the in-place product of the head's gradient
    assert operations(clip=None) == operations(known=False) + product


@pytest.mark.parametrize("analytic", [False, True])
@torch.no_grad()
def test_a_mixture_is_the_weighted_sum_of_its_modules_logits(analytic: bool) -> None:
    models = [model_of(torch.float64, True, seed) for seed in (0, 1)]
    batch = batch_of(torch.float64)
    scorer = Scorer(
        batch, student=((models[0], 1.0),), teacher=((models[0], 0.7), (models[1], 0.3)), train=None, temperature=0.8,
        chunk_tokens=7, analytic=analytic,
    )  # fmt: skip
    shares = {"student": (1.0, 0.0), "teacher": (0.7, 0.3)}
    for role in ("student", "teacher"):
        for row, example in enumerate(batch.examples):
            prompt = example.prompt if role == "student" else example.teacher_prompt
            assert prompt is not None
            ids = torch.tensor([prompt + example.completion])
            parts = zip(shares[role], models, strict=True)
            logits = torch.stack([share * model(ids).logits[0] for share, model in parts]).sum(0) / 0.8
            logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logp.gather(1, torch.tensor(example.completion)[:, None])[:, 0] * torch.tensor(example.mask)
            assert torch.allclose(scorer.logprobs(role)[row, : len(expected)], expected, atol=1e-5)
            entropy = -(logp.exp() * logp).sum(-1) * torch.tensor(example.mask)
            assert torch.allclose(scorer.entropy(role)[row, : len(expected)], entropy, atol=1e-5)


def test_a_scorer_of_a_term_shares_what_was_computed() -> None:
    model, batch = model_of(torch.float64, True), batch_of(torch.float64)
    seen: list[int] = []
    model.base_model.register_forward_hook(lambda *_: seen.append(1))
    mixture = ((model, 1.0),)
    scorer = Scorer(batch, student=mixture, teacher=mixture, train="student", temperature=1.0, chunk_tokens=None)
    first = scorer.for_term(row_weights(batch))
    first.divergence(alpha=0.5)
    assert scorer.logprobs("student") is scorer.for_term(row_weights(batch)).logprobs("student")
    assert len(seen) == 2 and scorer.tokens == first.tokens > scorer.padding > 0  # one pass for each role


def test_aux_is_that_of_the_plain_form() -> None:
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
def test_the_gradients_are_those_of_autograd(options: dict[str, Any]) -> None:
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


REMOTE = [{"alpha": alpha, "tail": tail} for alpha in (0.0, 0.3, 1.0) for tail in (True, False)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", REMOTE, ids=str)
def test_a_remote_teacher_equals_the_plain_form(options: dict[str, Any], dtype: torch.dtype) -> None:
    for loss in (weighted(options), weighted(options, known=False), weighted(options, clip=None)):
        agree(loss, dtype, remote=4)


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("options", REMOTE, ids=str)
def test_a_remote_teacher_of_the_whole_vocabulary_is_the_local_one(options: dict[str, Any], analytic: bool) -> None:
    model, teacher, batch = model_of(torch.float64, True), model_of(torch.float64, True, 1), batch_of(torch.float64)

    def compared(batch: Batch) -> Tensor:
        """Value, aux and gradients, as one vector."""
        model.zero_grad()
        scorer = Scorer(
            batch, student=((model, 1.0),), teacher=((teacher, 1.0),), train="student", temperature=0.8,
            chunk_tokens=5, analytic=analytic,
        )  # fmt: skip
        found = scorer.for_term(row_weights(batch)).divergence(**options, top_k=None)
        (row_weights(batch).double()[:, None] * found.value).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        return torch.cat([*(column.detach().flatten() for column in found), *gradients])

    examples = []
    for example in batch.examples:
        with torch.no_grad():
            logits = teacher(torch.tensor([example.teacher_prompt + example.completion])).logits[0] / 0.8
        logp = logits.log_softmax(-1)[len(example.teacher_prompt or ()) - 1 : -1]
        best = logp.topk(VOCABULARY, -1)
        top_k = TopKLogprobs(ids=totuple(best.indices), logprobs=totuple(best.values))
        examples.append(dataclasses.replace(example, teacher=top_k))
    local, remote = compared(batch), compared(collate(examples, device=CPU, dtype=torch.float64))
    assert local.norm() > 1e-2 and (local - remote).norm() < 1e-10 * local.norm()


@pytest.mark.parametrize("options", REMOTE, ids=str)
def test_gradients_from_top_k_are_those_of_autograd(options: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(6, 9, generator=draw, dtype=torch.float64).mul(3).requires_grad_()
    logprobs = torch.tensor(random_top_k(6, 3, seed=5).logprobs, dtype=torch.float64)
    ids = torch.tensor([[4, 0, 7]] * 6)
    value = losses.divergence_from_top_k(student, ids, logprobs, **options)
    (expected,) = torch.autograd.grad(value.sum(), student)
    found = losses.divergence_from_top_k_and_grad(student.detach(), ids, logprobs, torch.arange(6), **options)
    assert torch.allclose(found.value_N, value) and torch.allclose(found.gradient_NV, expected, atol=1e-12)
    assert expected.norm() > 1e-2


def test_what_a_remote_teacher_cannot_do_is_refused() -> None:
    model, batch = model_of(torch.float64, True), batch_of(torch.float64, remote=4)

    def scorer(batch: Batch) -> Scorer:
        mixture = ((model, 1.0),)
        return Scorer(batch, student=mixture, teacher=mixture, train=None, temperature=1.0, chunk_tokens=None)

    for wrong in (scorer(batch).logprobs, scorer(batch).entropy):
        with pytest.raises(ValueError, match="a remote teacher gives top-k log-probs only"):
            wrong("teacher")
    with pytest.raises(ValueError, match="top_k is 3, but the remote teacher gave its 4"):
        scorer(batch).divergence(alpha=0.5, top_k=3)
    prompted = batch_of(torch.float64).examples
    for mixed in ([*batch.examples, *prompted], [*prompted, dataclasses.replace(prompted[0], teacher=None)]):
        with pytest.raises(ValueError, match="without a teacher's prompt"):
            scorer(collate(mixed, device=CPU, dtype=torch.float64)).divergence(alpha=0.5)


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
        return head.BlockResult(got.value_N, got.gradient_NV, got.aux, torch.ones(len(block_nV)))

    return measure

before = held("VmRSS")
inputs = head.HeadInputs(states_NH, weight_VH, head.LogitFunction(), 1.0)
value_N = head.apply_in_chunks(inputs, open_chunk, chunk=(1 << 24) // V, weights_known=True)[0]
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
