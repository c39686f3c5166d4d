"""Families of models against their own plain forward pass: log-probs, gradients, and what the engine samples.

A dozen here, all of them in the slow target (``make models`` writes the table of docs/models.md).
"""

import copy
import dataclasses
import random
from typing import Any

import families
import pytest
import torch
import transformers
from families import OPTIM, NoText, Result, examples, learner_of, make, plain, rounding_errors, scan
from helpers import keys
from torch import Tensor

from vpd.engines.torch_engine import TorchEngine
from vpd.errors import ModelError
from vpd.learners.teachers import TeacherSettings
from vpd.model import attention, lora
from vpd.model.batch import Batch
from vpd.model.forward import forget_lengths, longest_input
from vpd.model.scorer import Scorer
from vpd.model.settings import LoraSettings
from vpd.policy import FixedPolicy
from vpd.types import Example, Tokens

FAMILIES = {
    "llama": ("packed", "shared"),
    "qwen3": ("packed", "shared"),
    "gpt2": ("packed", "shared"),
    "granite": ("packed", "shared"),  # logits are divided
    "cohere": ("packed", "shared"),  # logits are multiplied
    "opt": ("packed", "shared"),
    "mistral": ("padded", "cached"),  # a window of all layers
    "gemma2": ("padded", "cached"),  # windows, and soft caps of scores and logits
    "gpt_oss": ("padded", "cached"),  # windows and sinks
    "bert": ("packed", "shared"),  # layers between the last hidden states and the head
    "roberta": ("by_length", "recomputed"),  # numbers its positions from the ids
    "modernbert-decoder": ("padded", "cached"),  # layers before the head, and windows
    "bloom": ("padded", "cached"),  # ALiBi, no limit of positions
    # Multi-head latent attention; the probe finds that 5.10 can share its prompts.
    "deepseek_v3": ("packed", "shared" if transformers.__version__.startswith("5.10.") else "cached"),
    "falcon_h1": ("padded", "cached"),  # attention and Mamba in every layer
    "mamba": ("padded", "cached_by_length"),
    "rwkv": ("padded", "recomputed"),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_own_forward_pass(kind: str) -> None:
    result = scan(kind)
    assert result.verdict == "right", str(result)
    assert (result.learner, result.engine) == FAMILIES[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_16_bits_no_path_rounds_more_than_the_models_own_forward_pass(kind: str) -> None:
    for ours, plainly in rounding_errors(kind).values():
        assert ours <= 1.5 * plainly + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", families.kinds())
def test_no_family_is_silently_wrong(kind: str) -> None:
    result = scan(kind)
    assert result.verdict in ("right", "refused", "unbuilt"), str(result)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("xlnet", r"the model \(XLNetLMHeadModel\) is not causal: .*; got logits differ by .* with and without 3 more"),
        ("cpmant", r"the model \(CpmAntForCausalLM\) is not causal"),
        ("reformer", r"the model \(ReformerModelWithLMHead\) cannot be trained; got AssertionError"),
        ("prophetnet", "changes its logits after the head in a way that is not known"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_trained(kind: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        learner_of(make(kind))


def test_an_engine_refuses_a_model_that_sees_what_comes_after() -> None:
    with pytest.raises(ModelError, match="is not causal"):
        TorchEngine(NoText(), eos_ids=[2]).load(FixedPolicy(make("xlm", causal=False)))
    assert scan("xlm").verdict == "right"


def test_layers_before_the_head_are_those_of_the_adapter_too() -> None:
    """A role that is a view of the live model reads its head's input through that view."""
    model = make("bert")
    lora.attach(model, LoraSettings(r=2, target_modules=("query", "dense")), seed=0)
    with torch.no_grad():
        for tensor in lora.state(model).values():
            tensor.add_(0.3)
    learner = learner_of(model, teacher=TeacherSettings(kind="frozen"))
    rows = own_prompts()
    pristine = make("bert")
    for ours, row in zip(
        learner.score(rows, lambda scorer, batch: scorer.logprobs("student"), model="teacher"), rows, strict=True
    ):
        assert torch.allclose(
            torch.tensor(ours), plain(pristine, row.prompt, row.completion, 0.7)[1].detach(), atol=1e-4
        )
    live = learner.score(rows, lambda scorer, batch: scorer.logprobs("student"))
    assert (
        max(
            abs(a - b)
            for one, row in zip(live, rows, strict=True)
            for a, b in zip(one, plain(pristine, row.prompt, row.completion, 0.7)[1].tolist(), strict=True)
        )
        > 0.1
    )


def test_a_scan_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "plain", lambda *arguments: plain(*arguments[:3], 1.0))
    assert scan("llama").verdict == "wrong"


def of_length(prompt: int, completion: int) -> Example:
    draw = random.Random(prompt + completion)

    def ids(count: int) -> Tokens:
        return tuple(draw.randrange(3, families.VOCABULARY) for _ in range(count))

    return Example(
        prompt=ids(prompt), completion=ids(completion), mask=(True,) * completion, behaviour=(0.0,) * completion
    )


ROPE: dict[str, dict[str, Any]] = {
    "phi3": {
        "sliding_window": None, "max_position_embeddings": 256, "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
        },
    },
    "llama": {
        "max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_rope_that_follows_the_longest_row_leaves_rows_alone(kind: str) -> None:
    model = make(kind, **ROPE[kind])
    rows = [of_length(20, 15), of_length(20, 90), of_length(30, 45)]
    expected = [plain(copy.deepcopy(model), row.prompt, row.completion, 0.7)[1].detach() for row in rows]
    learner = learner_of(copy.deepcopy(model))
    assert learner.path == "by_length"
    for _ in range(2):  # dynamic RoPE remembers the longest row
        for ours, theirs in zip(learner.score(rows, lambda s, b: s.logprobs("student")), expected, strict=True):
            assert torch.allclose(torch.tensor(ours), theirs, atol=1e-4)
    engine = TorchEngine(NoText(), eos_ids=[])
    engine.load(FixedPolicy(copy.deepcopy(model)))
    prompts = [row.prompt for row in rows]
    sampled = engine.generate(prompts, keys=keys(3), seed=0, max_tokens=[12, 60, 40])
    assert engine.path == "recomputed"
    for prompt, completion in zip(prompts, sampled, strict=True):
        read = torch.tensor([[*prompt, *completion.tokens[:-1]]])  # a longer row would be another model
        with torch.no_grad():
            last_V = copy.deepcopy(model)(read).logits[0, -1].log_softmax(-1)
        assert completion.logprobs[-1] == pytest.approx(float(last_V[completion.tokens[-1]]), abs=1e-4)


def test_each_kind_of_layer_forgets_the_longest_row() -> None:
    kinds = {"full_attention": "dynamic", "sliding_attention": "default"}
    ropes = {kind: {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0} for kind, rope in kinds.items()}
    model = make(
        "gemma3_text", max_position_embeddings=64, num_hidden_layers=2, layer_types=list(kinds), rope_parameters=ropes
    ).eval()
    long, between = (torch.arange(3, 3 + count)[None] % families.VOCABULARY for count in (150, 80))
    with torch.no_grad():
        expected = copy.deepcopy(model)(between).logits
        model(long)
        assert not torch.allclose(model(between).logits, expected, atol=1e-4)
        forget_lengths(model)
        assert torch.allclose(model(between).logits, expected, atol=1e-6)


def teacher_logprobs(student: Any, teacher: Any, rows: list[Example]) -> tuple[list[Tensor], list[Tensor]]:
    """The external teacher's log-probs that an update sees: under the sampled estimator, and beside a divergence."""
    learner = learner_of(
        student, temperature=1.0, teacher=TeacherSettings(kind="external"), external=copy.deepcopy(teacher)
    )
    seen: dict[Tokens, Tensor] = {}

    def sampled(scorer: Scorer, batch: Batch) -> Tensor:
        logprobs_BT = scorer.logprobs("teacher").detach()
        seen.update((e.completion, logprobs_BT[row]) for row, e in enumerate(batch.examples))
        return scorer.logprobs("student") * logprobs_BT

    def whole(scorer: Scorer, batch: Batch) -> Tensor:
        found = scorer.divergence(alpha=1.0)
        seen.update((e.completion, found.teacher_logprobs[row]) for row, e in enumerate(batch.examples))
        return found.value

    results = []
    for objective in (sampled, whole):
        learner.update("x", rows, {"a": objective})
        results.append([seen[row.completion][: len(row.completion)] for row in rows])
    return results[0], results[1]


def own_prompts() -> list[Example]:
    rows = [dataclasses.replace(row, teacher=row.prompt) for row in examples()]
    return [dataclasses.replace(row, mask=(True,) * len(row.completion)) for row in rows]


def test_an_external_teachers_bias_counts_under_every_estimator() -> None:
    teacher = make("phi")
    torch.nn.init.normal_(teacher.get_output_embeddings().bias, 0, 2.0)
    rows = own_prompts()
    for found in teacher_logprobs(make("llama"), teacher, rows):
        for ours, row in zip(found, rows, strict=True):
            assert torch.allclose(ours, plain(teacher, row.prompt, row.completion)[1].detach(), atol=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "path"),
    [("llama", "mistral", "padded"), ("mistral", "llama", "padded"), ("llama", "phi3", "by_length")],
)
def test_a_path_is_right_for_student_and_external_teacher(student: str, teacher: str, path: str) -> None:
    models = [make(kind, **(ROPE["phi3"] if kind == "phi3" else {})) for kind in (student, teacher)]
    learner = learner_of(models[0], teacher=TeacherSettings(kind="external"), external=copy.deepcopy(models[1]))
    assert learner.path == path and not attention.is_installed(learner.model)
    rows = own_prompts()
    scored = learner.score(rows, lambda scorer, batch: scorer.logprobs("student"), model="teacher")
    for ours, row in zip(scored, rows, strict=True):
        expected = plain(models[1], row.prompt, row.completion, 0.7)[1].detach()
        assert torch.allclose(torch.tensor(ours), expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [(97, 105), (105, 97)])
def test_padded_vocabularies_are_compared_on_the_tokens_that_both_have(sizes: tuple[int, int]) -> None:
    student, teacher = make("llama", vocab_size=sizes[0]), make("qwen3", vocab_size=sizes[1])
    rows = own_prompts()
    for found in teacher_logprobs(student, teacher, rows):
        for ours, row in zip(found, rows, strict=True):
            logp_TV = plain(teacher, row.prompt, row.completion)[0].detach()[:, :97].log_softmax(-1)
            assert torch.allclose(ours, logp_TV.gather(1, torch.tensor(row.completion)[:, None])[:, 0], atol=1e-4)


def test_a_token_that_only_one_of_them_has_is_one_clear_error() -> None:
    rows = [dataclasses.replace(row, completion=(100, *row.completion[1:])) for row in own_prompts()]
    with pytest.raises(
        ModelError, match="a completion holds a token that not all models have; got token 100; expected"
    ):
        teacher_logprobs(make("llama", vocab_size=105), make("qwen3", vocab_size=97), rows)


@pytest.mark.parametrize(("kind", "longest"), [("llama", 512), ("gpt2", 512), ("bloom", None), ("mamba", None)])
def test_a_model_without_a_limit_of_positions_has_no_window(kind: str, longest: int | None) -> None:
    assert longest_input(make(kind)) == longest


DROPOUT = {"opt": {"dropout": 0.5}, "falcon": {"hidden_dropout": 0.5, "alibi": False}, "gpt2": {"resid_pdrop": 0.5}}


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("kind", DROPOUT)
def test_gradient_checkpointing_turns_no_dropout_on(kind: str, how: str) -> None:
    model = make(kind, **DROPOUT[kind])
    learner = learner_of(copy.deepcopy(model), dataclasses.replace(OPTIM, gradient_checkpointing=how))
    assert families.gradient_error(learner, model) < 1e-4


def test_a_result_says_what_became_of_a_family() -> None:
    assert str(Result("right", "packed", "shared", (1e-6, 2e-6))).split() == [
        "right",
        "packed",
        "shared",
        "1.0e-06",
        "2.0e-06",
    ]
