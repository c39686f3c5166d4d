"""Rows that share a prefix are computed as if each stood alone: hidden states, losses, gradients, trained weights.

In float64 on GPT-2 (its norms stay in float64) to 1e-10; Llama's norms round to fp32 inside, which leaves 1e-6.
"""

import dataclasses
import random
from typing import Any

import pytest
import torch
from helpers import ALGORITHMS as METHODS
from helpers import VOCABULARY, flat, random_groups, tiny_learner, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vpd.engines.torch_engine import TorchEngine
from vpd.model import attention, packing
from vpd.model.packing import Pack, lay_out, plan, tokens_of
from vpd.types import Group, Tokens

BIG = 1 << 20  # a hidden size at which every shared token pays


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def test_the_plan_by_hand() -> None:
    prompts: list[Tokens] = [(1, 2, 3), (1, 2, 3), (1, 2, 9), (5,), (5,)]
    completions: list[Tokens] = [(4,), (4, 4), (4,), (6,), (6,)]
    # the third row shares two tokens: it takes the prefix down to two; the fourth shares nothing
    assert plan(prompts, completions, BIG) == [Pack((0, 1, 2), 2), Pack((3, 4), 1)]
    # attention over a pack of two long completions costs more than a short prompt saves
    long = tuple(range(50))
    assert plan([(1,), (1,)], [long, long], 16) == [Pack((0,), 0), Pack((1,), 0)]
    assert plan([long, long], [(1,), (1,)], 16) == [Pack((0, 1), 50)]


@pytest.fixture(params=["alone", "grouped", "in groups of a few"])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How attention computes the segments: each alone, as on a CPU, or in groups, as on a GPU."""
    if request.param != "alone":
        monkeypatch.setattr(packing, "packed_segments", attention.GroupedSegments.of)
        if request.param == "in groups of a few":
            monkeypatch.setattr(attention, "SCORES_OF_A_GROUP", 400)
    return str(request.param)


@pytest.mark.parametrize("seed", range(6))
def test_hidden_states_and_gradients_are_those_of_rows_alone(seed: int, segments: str) -> None:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> Tokens:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high)))

    prompts: list[Tokens] = []
    for _ in range(3):
        task = ids(1, 8)
        prompts += [task + (ids(0, 5) if draw.random() < 0.5 else ()) for _ in range(3)]
    completions = [ids(1, 6) for _ in prompts]
    mask = [[draw.random() < 0.7 for _ in completion] for completion in completions]
    model = gpt2()
    assert attention.install(model)
    device, results = torch.device("cpu"), []
    weigh = torch.randn(sum(map(sum, mask)), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for size in (None, BIG):
        layout = lay_out(prompts, completions, mask, hidden_size=size, device=device, dtype=torch.float64)
        hidden = model.base_model(**layout.inputs, use_cache=False).last_hidden_state[layout.row_N, layout.place_N]
        model.zero_grad()
        (hidden * weigh).sum().backward()
        results.append((hidden.detach(), torch.cat([p.grad.flatten() for p in model.base_model.parameters()])))
        assert (layout.padding == 0) == (size == BIG) and layout.inputs["input_ids"].numel() == tokens_of(
            prompts, completions, size
        )
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-12 * theirs.norm()
    alone = model(input_ids=torch.tensor([prompts[0] + completions[0]]), output_hidden_states=True).hidden_states[-1][0]
    first = [t for t, counts in enumerate(mask[0]) if counts]
    expected = alone[[len(prompts[0]) - 1 + t for t in first]]
    assert torch.allclose(results[1][0][: len(first)], expected, atol=1e-12)


def trained(name: str, make: Any, **changes: Any) -> torch.Tensor:
    external = {"external": make(7)} if name == "gkd" else {}
    model = make(0)
    learner = tiny_learner(model, teacher=METHODS[name][1], **external, **changes)
    algorithm = METHODS[name][0]()
    for seed in range(3):
        algorithm.step(longer(random_groups(seed)), learner)
        learner.end_iteration()
    return flat(learner.model) - flat(make(0))


def longer(groups: list[Group]) -> list[Group]:
    """Prompts long enough that sharing pays, teacher's prompts that begin with the task."""

    def row(rollout: Any) -> Any:
        prompt = rollout.prompt * 4
        teacher = rollout.teacher_prompt and dataclasses.replace(
            rollout.teacher_prompt, tokens=prompt + rollout.teacher_prompt.tokens
        )
        return dataclasses.replace(rollout, prompt=prompt, teacher_prompt=teacher)

    return [Group(rollouts=tuple(row(r) for r in group.rollouts)) for group in groups]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_to_the_same_weights(name: str, segments: str) -> None:
    alone = trained(name, gpt2, share_prefixes=False)
    for size in (3, 100):
        assert (trained(name, gpt2, share_prefixes=True, micro_batch_size=size) - alone).norm() < 1e-10 * alone.norm()
    alone = trained(name, tiny_model, share_prefixes=False)
    assert (trained(name, tiny_model, share_prefixes=True) - alone).norm() < 1e-5 * alone.norm()


def test_groups_take_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    def counted(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls[form] = calls.get(form, 0) + 1
        return sdpa_attention_forward(module, query, *rest, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    sizes, prefixes = [5, *[3 + number % 4 for number in range(20)]], [None, *[0] * 20]
    states = torch.randn(1, 2, sum(sizes), 8, dtype=torch.float64)
    layer = tiny_model().model.layers[0].self_attn
    outputs = []
    kinds = {"alone": attention.PackedSegments, "grouped": attention.GroupedSegments}
    for form, kind in kinds.items():  # noqa: B007 - counted() reads it
        made = kind.of(sizes, prefixes, device=states.device, dtype=states.dtype)
        outputs.append(made.attend(layer, states, states, states, scaling=0.3, dropout=0.0))
    assert torch.allclose(*outputs, atol=1e-12)
    assert calls == {"alone": 21, "grouped": 1}
    assert isinstance(packed_on("cpu"), attention.PackedSegments)
    assert isinstance(packed_on("meta"), attention.GroupedSegments)


@pytest.mark.parametrize("make", [lambda: tiny_learner(tiny_model()), lambda: TorchEngine(None, eos_ids=())])
def test_attention_never_makes_a_plan_for_every_shape(make: Any) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    make()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def packed_on(device: str) -> Any:
    return attention.packed_segments([2, 3], [None, 0], device=torch.device(device), dtype=torch.float32)


def test_sharing_computes_fewer_tokens() -> None:
    def tokens(share: bool) -> int:
        model, seen = gpt2(), 0

        def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal seen
            seen += kwargs["input_ids"].numel()

        learner = tiny_learner(model, teacher=METHODS["vpd"][1], share_prefixes=share)
        model.base_model.register_forward_hook(count, with_kwargs=True)
        METHODS["vpd"][0]().step(longer(random_groups(0)), learner)
        return seen

    assert tokens(True) < 0.8 * tokens(False)


@pytest.mark.parametrize("name", METHODS)
def test_a_token_budget_changes_nothing(name: str) -> None:
    alone = trained(name, gpt2, share_prefixes=False)
    for shares in (False, True):
        ours = trained(name, gpt2, share_prefixes=shares, max_tokens_per_microbatch=50)
        assert (ours - alone).norm() < 1e-10 * alone.norm()


def test_padding_is_measured() -> None:
    def padding(share: bool) -> float:
        learner = tiny_learner(gpt2(), teacher=METHODS["vpd"][1], share_prefixes=share)
        return METHODS["vpd"][0]().step(longer(random_groups(0)), learner).metrics["m_step/padding"]

    assert padding(True) == 0.0 and 0.05 < padding(False) < 0.6


def test_a_model_that_takes_no_packed_segments_is_computed_row_by_row_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=3, max_position_embeddings=64,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    learner = tiny_learner(model, share_prefixes=True)
    assert not learner.shares_prefixes and learner.path == "padded"
    assert "padded, because packed: FastPathError: MistralAttention asks for more than causal" in caplog.text
    caplog.clear()
    assert tiny_learner(gpt2(), share_prefixes=True).shares_prefixes
    assert tiny_learner(model, share_prefixes=False).path == "padded"
    assert not caplog.text


@pytest.mark.parametrize("form", [attention.PackedSegments, attention.GroupedSegments])
def test_the_mask_has_the_dtype_of_the_queries(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mixed precision weights are float32 and queries are not; a GPU's kernels ask for one dtype (read, not run)."""
    masks = []

    def seen(module: Any, query: torch.Tensor, key: Any, value: Any, mask: torch.Tensor | None, **options: Any) -> Any:
        masks.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", seen)
    states = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    segments = form.of([3, 4, 2], [None, 0, 0], device=states.device, dtype=torch.float32)
    output = segments.attend(tiny_model().model.layers[0].self_attn, states, states, states, scaling=0.3, dropout=0.0)
    assert output.isfinite().all()
    assert {mask.dtype for mask in masks if mask is not None} == {torch.bfloat16}
