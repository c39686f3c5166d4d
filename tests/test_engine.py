"""The embedded engine: its log-probs are the learner's, and a row's sample is its own."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, keys, tiny_learner, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.bundled import check_hashes, load_bundled
from vpd.engines import ScriptedEngine
from vpd.engines.mixed_engine import MixedEngine
from vpd.engines.torch_engine import TorchEngine, draw, truncate
from vpd.errors import NonFiniteError
from vpd.lab import tiny
from vpd.model.decoding import decoder_for
from vpd.model.probe import engine_path
from vpd.policy import FixedPolicy
from vpd.types import Example


class Words:
    """A stand-in tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split()]


def grouped_heads(dtype: torch.dtype) -> Any:
    """A model in which several heads of queries share one of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


PROMPTS = [(1, 2, 3), (4,), (1, 2, 3), (5, 6, 7, 8, 9, 10), (4,), (2, 2)]
KEYS = keys(len(PROMPTS))


def engine(dtype: torch.dtype = torch.float32, **changes: object) -> TorchEngine:
    made = TorchEngine(Words(), eos_ids=[0, 3], **changes)  # type: ignore[arg-type]
    made.load(FixedPolicy(tiny_model(dtype=dtype), 7))
    return made


def test_logprobs_are_those_of_an_unpadded_forward_at_the_temperature() -> None:
    model = tiny_model(dtype=torch.float32)
    answers = engine().generate(PROMPTS, keys=KEYS, seed=100, max_tokens=12, temperature=0.8)
    assert len({len(answer.tokens) for answer in answers}) > 1  # rows ended at different times
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        logits = model(torch.tensor([prompt + answer.tokens])).logits[0] / 0.8
        logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        assert answer.logprobs == pytest.approx([logp[t, i].item() for t, i in enumerate(answer.tokens)], abs=1e-4)
        ended = answer.tokens[-1] in (0, 3)
        assert answer.finish == ("stop" if ended else "length") and answer.version == 7
        assert not set(answer.tokens[:-1]) & {0, 3} and (ended or len(answer.tokens) == 12)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    together = engine(torch.float64).generate(PROMPTS, keys=KEYS, seed=100, max_tokens=12)
    for row in range(len(PROMPTS)):
        [alone] = engine(torch.float64).generate([PROMPTS[row]], keys=[KEYS[row]], seed=100, max_tokens=12)
        assert alone.tokens == together[row].tokens
    assert [
        a.tokens for a in engine(torch.float64, max_rows=2).generate(PROMPTS, keys=KEYS, seed=100, max_tokens=12)
    ] == [a.tokens for a in together]
    assert together[0].tokens != together[2].tokens  # the same prompt under another seed


def test_equal_prompts_are_prefilled_once() -> None:
    model = tiny_model(dtype=torch.float32)
    made = TorchEngine(Words(), eos_ids=[0, 3])
    made.load(FixedPolicy(model))
    seen: list[int] = []
    model.base_model.register_forward_hook(lambda m, a, k, o: seen.append(len(k["input_ids"])), with_kwargs=True)
    made.generate([(1, 2)] * 5 + [(3, 4)], keys=keys(6), seed=0, max_tokens=2)
    assert seen[0] == 2 and seen[1] <= 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shared_prompts_give_the_logits_of_padded_rows(dtype: torch.dtype) -> None:
    model = grouped_heads(dtype)
    assert engine_path(model) == "shared"
    decoders = [decoder_for(model, PROMPTS, "cached"), decoder_for(model, PROMPTS, "shared")]
    assert [type(d).__name__ for d in decoders] == ["PaddedDecoder", "SharedDecoder"]
    draw_tokens = torch.Generator().manual_seed(0)
    keep = {3: [0, 2, 3, 5], 40: [1, 2], 45: [1]}  # prompts lose some rows, then all; room for the rows' own grows
    rows = len(PROMPTS)
    with torch.no_grad():
        for step in range(50):
            if step in keep:
                for decoder in decoders:
                    decoder.keep(torch.tensor(keep[step]))
                rows = len(keep[step])
            chosen = torch.randint(VOCABULARY, (rows,), generator=draw_tokens)
            padded, shared = (decoder.step(chosen) for decoder in decoders)
            tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
            assert (padded - shared).norm() <= tolerance * padded.norm()


def test_a_model_without_the_attention_interface_decodes_from_padded_rows() -> None:
    model = grouped_heads(torch.float32)
    model.set_attn_implementation("eager")
    made = TorchEngine(Words(), eos_ids=[0, 3])
    made.load(FixedPolicy(model))
    eager = made.generate(PROMPTS, keys=KEYS, seed=100, max_tokens=6)
    assert engine_path(model) == "cached" and model.config._attn_implementation == "eager"
    made.load(FixedPolicy(grouped_heads(torch.float32)))
    for ours, theirs in zip(made.generate(PROMPTS, keys=KEYS, seed=100, max_tokens=6), eager, strict=True):
        assert ours.tokens == theirs.tokens and ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_sampling_and_training_use_the_current_interface_of_transformers(checkpointing: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        folder = load_bundled()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        learner = tiny_learner(model, share_prefixes=True, gradient_checkpointing=checkpointing)
        made = TorchEngine(tokenizer, eos_ids=[tokenizer.eos_token_id])
        made.load(learner.policy())
        answers = made.generate(PROMPTS, keys=KEYS, seed=0, max_tokens=4)
        decoder_for(model, PROMPTS, "cached").step(torch.tensor([4] * len(PROMPTS)))
        examples = [
            Example(
                prompt=prompt,
                completion=answer.tokens,
                mask=answer.sampled,
                behaviour=answer.logprobs,
                teacher=(1, *prompt),
                loss_weights={"distill": 1.0},
            )
            for prompt, answer in zip(PROMPTS, answers, strict=True)
        ]
        update = learner.update("m", examples, {"distill": Distill(SDPOSettings()).loss})
    assert update.metrics["m/grad_norm"] > 0


def test_greedy_and_top_k_1_agree() -> None:
    greedy = engine().generate(PROMPTS, keys=KEYS, seed=100, max_tokens=8, temperature=0.0)
    first = engine().generate(PROMPTS, keys=KEYS, seed=100, max_tokens=8, top_k=1)
    assert [a.tokens for a in greedy] == [a.tokens for a in first]


def test_draw_follows_the_probabilities_and_never_takes_an_impossible_token() -> None:
    logp = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log().expand(20_000, 4)
    uniform = torch.tensor(np.random.default_rng(0).random(20_000))
    counts = torch.bincount(draw(logp, uniform), minlength=4) / 20_000
    assert counts.tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.015) and counts[1] == 0
    wide = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).log_softmax(-1)
    u = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = torch.searchsorted(wide.exp().cumsum(-1), u[:, None], right=True)[:, 0]
    assert draw(wide, u).tolist() == whole.tolist()  # as if all of the vocabulary were cumulated
    edge = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(torch.tensor([[0.0, 0.5, 0.5]] * 2).log(), edge).tolist() == [1, 2]


def test_nucleus_keeps_the_smallest_set_that_reaches_p() -> None:
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert truncate(logp, 0.7, None).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logp, 0.5, None).isfinite().tolist() == [[True, False, False, False]]
    assert truncate(logp, 1.0, 3).isfinite().tolist() == [[True, True, True, False]]


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="one key for each prompt"):
        engine().generate(PROMPTS, keys=keys(1), seed=0, max_tokens=2)
    with pytest.raises(RuntimeError, match="load"):
        TorchEngine(Words(), eos_ids=[0]).generate([(1,)], keys=keys(1), seed=0, max_tokens=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_the_sampling(temperature: float) -> None:
    """As of a model whose float16 overflows on some text: it was right when it was tried."""
    policy = FixedPolicy(tiny_model(dtype=torch.float32), 7)
    made = TorchEngine(Words(), eos_ids=[])
    made.load(policy)
    made.generate(PROMPTS, keys=KEYS, seed=100, max_tokens=3, temperature=temperature)
    passes = 0

    def overflow(module: Any, inputs: Any, states: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return states * torch.inf if passes > 2 else states

    policy.model.model.norm.register_forward_hook(overflow)
    with pytest.raises(NonFiniteError, match=r"logits are not finite; got NaN or infinity .* token 2 .*float16"):
        made.generate(PROMPTS, keys=KEYS, seed=100, max_tokens=5, temperature=temperature)


def test_mixed_engine_sends_whole_groups_and_loads_the_first_only() -> None:
    first, second = (ScriptedEngine(Words(), lambda prompt, key, text=text: text) for text in ("1", "2"))
    mixed = MixedEngine(first, second, first_fraction=0.5)
    mixed.load(FixedPolicy(None, 3))
    assert (first.version, second.version) == (3, -1)
    prompts = [(7,)] * 3 * VOCABULARY  # one prompt for all: the task decides, not what it reads
    asked = [dataclasses.replace(key, sample=sample) for key in keys(VOCABULARY) for sample in range(3)]
    answers = mixed.generate(prompts, keys=asked, seed=0, max_tokens=4)
    groups = [{answers[row + i].text for i in range(3)} for row in range(0, len(prompts), 3)]
    assert all(len(group) == 1 for group in groups) and {"1", "2"} == set().union(*groups)
    # nor does an attempt change hands from turn to turn, and answers of weights that never change are never stale
    later = [dataclasses.replace(key, step=5) for key in asked]
    first_turn, *turns = [
        mixed.generate(prompts, keys=[dataclasses.replace(key, turn=turn) for key in later], seed=0, max_tokens=4)
        for turn in range(3)
    ]
    assert all([a.text for a in turn] == [a.text for a in first_turn] for turn in turns)
    assert {(a.text, a.version) for a in first_turn} == {("1", 3), ("2", 5)}


@pytest.mark.parametrize("phase", ["eval", "eval_retry", "eval_control", "train/feedback-0"])
def test_a_mixture_answers_training_tasks_only(phase: str) -> None:
    mixed = MixedEngine(*(ScriptedEngine(Words(), lambda prompt, key: "1") for _ in range(2)), first_fraction=0.5)
    with pytest.raises(ValueError, match=f"training tasks only; got {phase}"):
        mixed.generate([(1,), (2,)], keys=[*keys(1), *keys(1, phase)], seed=0, max_tokens=2)


def test_the_shipped_base_follows_hints() -> None:
    from vpd.envs.digits import RULES, Digits, apply
    from vpd.feedback import Section
    from vpd.prompts import Prompter

    folder = load_bundled()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) < 100 and tokenizer.decode(tokenizer.encode("apply rule B to 3 1")) == "apply rule B to 3 1"
    prompter = Prompter(tokenizer, tiny.TEMPLATE, window=96, max_completion_length=6)
    made = TorchEngine(tokenizer, eos_ids=[tokenizer.eos_token_id], max_rows=512)
    made.load(FixedPolicy(AutoModelForCausalLM.from_pretrained(folder).eval()))
    env = Digits()
    tasks = list(env.eval_tasks(256))

    def per_digit(prompts: list[tuple[int, ...]]) -> float:
        hits = 0
        for task, answer in zip(tasks, made.generate(prompts, keys=keys(256), seed=0, max_tokens=6), strict=True):
            rule, digits, _ = task.payload
            right = [str(d) for d in apply(RULES[rule], digits)]
            hits += sum(a == b for a, b in zip(answer.text.split(), right, strict=False))
        return hits / (6 * len(tasks))

    with_hint = []
    for task in tasks:
        [grade] = env.grade([task], ["0"])
        section = Section(kind="feedback", source="environment", text=grade.feedback or "")
        prompt = prompter.build_teacher_prompt(task, [section])
        assert prompt is not None
        with_hint.append(prompt.tokens)
    assert per_digit(with_hint) - per_digit([prompter.build_student_prompt(task) for task in tasks]) >= 0.3


def test_a_damaged_base_is_refused(tmp_path: object) -> None:
    import shutil
    from pathlib import Path

    from vpd.errors import ModelError

    copy = Path(str(tmp_path)) / "tiny"
    shutil.copytree(tiny.FOLDER, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelError, match=r"model.safetensors has changed"):
        check_hashes(copy, "the base", "Copy it anew.")
