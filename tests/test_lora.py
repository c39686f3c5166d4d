"""LoRA: one base for all roles equals a copy of the model for each, and nothing but the adapter is ever trained."""

import copy
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, metrics_of, oracle, random_groups, tiny_learner, tiny_model, vpd_train
from test_engine import KEYS, PROMPTS, Words
from test_oracle import Bare, rows_of
from transformers import AutoModelForCausalLM

from vpd import config
from vpd.algorithms.distill import Distill, GKDSettings
from vpd.algorithms.examples import student_logprobs, to_examples, with_loss_weights
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.bundled import load_bundled
from vpd.cli import main
from vpd.engines.torch_engine import TorchEngine
from vpd.errors import ConfigError, StorageError
from vpd.learners.teachers import TeacherSettings
from vpd.model import lora
from vpd.model.batch import Batch
from vpd.model.scorer import LogitMixture, Scorer
from vpd.types import Example

pytest.importorskip("peft")
SMALL = lora.LoraSettings(r=4, lora_alpha=8, target_modules="all-linear")
TEACHERS = [("ema", "dynamic"), ("ema", "fixed"), ("live", "dynamic"), ("live", "fixed"), ("trust_region", "dynamic")]


def adapted(seed: int = 0, dtype: torch.dtype = torch.float64, settings: lora.LoraSettings = SMALL) -> Any:
    model = tiny_model(dtype=dtype)
    lora.attach(model, settings, seed=seed)
    return model


def adapter_of(model: Any) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in lora.state(model).values()])


def base_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


class Copies:
    """The teacher as it is without adapter switching: a deep copy of the whole model for each set of weights."""

    def __init__(self, settings: TeacherSettings, live: Any):
        self.settings, self.live = settings, live
        self.copied, self.initial = copy.deepcopy(live), copy.deepcopy(live)

    def mixture(self, weights: str) -> LogitMixture:
        mix = self.settings.trust_region_mix
        mixtures: dict[str, LogitMixture] = {
            "live": ((self.live, 1.0),),
            "ema": ((self.copied, 1.0),),
            "frozen": ((self.initial, 1.0),),
            "trust_region": ((self.initial, 1.0 - mix), (self.live, mix)),
        }
        mixtures["initial"] = mixtures["frozen"]
        return mixtures[self.settings.kind if weights == "teacher" else weights]

    @torch.no_grad()
    def end_iteration(self, precise: Any = None) -> None:
        for old, new in zip(self.copied.parameters(), self.live.parameters(), strict=True):
            old.lerp_(new, self.settings.ema_rate)


def trained(settings: VPDSettings, *, copies: bool = False, **changes: Any) -> Any:
    """A learner after four iterations of VPD."""
    fixed = settings.prior == "fixed"
    if copies:
        learner = tiny_learner(adapted(), teacher=TeacherSettings(kind="live"), **changes)
        learner.teacher = Copies(settings.teacher_settings(), learner.model)  # type: ignore[assignment]
    else:
        learner = tiny_learner(adapted(), teacher=settings.teacher_settings(), keep_initial=fixed, **changes)
    algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
    for seed in range(4):
        algorithm.step(random_groups(seed), learner)
        learner.end_iteration()
    return learner


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize(("teacher", "prior"), TEACHERS)
def test_one_base_equals_a_copy_for_each_role(
    teacher: Any, prior: Any, share_prefixes: bool, checkpointing: str
) -> None:
    settings = VPDSettings(e_every=2, teacher=teacher, prior=prior, teacher_ema_rate=0.4, teacher_trust_region_mix=0.3)
    changes = {"share_prefixes": share_prefixes, "micro_batch_size": 5}
    ours = adapter_of(trained(settings, gradient_checkpointing=checkpointing, **changes).model)
    theirs = adapter_of(trained(settings, copies=True, **changes).model)
    moved = (theirs - adapter_of(adapted())).norm()
    assert moved > 1e-2 and (ours - theirs).norm() < 1e-10 * moved


def test_the_roles_differ() -> None:
    """Else the equality above would say nothing."""
    results = [
        adapter_of(trained(VPDSettings(e_every=2, teacher=t, prior=p, teacher_ema_rate=0.4)).model)  # type: ignore[arg-type]
        for t, p in TEACHERS
    ]
    for number, one in enumerate(results):
        assert all((one - other).norm() > 1e-5 * one.norm() for other in results[:number])


@pytest.mark.parametrize("prior", ["dynamic", "fixed"])
def test_vpd_with_lora_equals_the_oracle(prior: Any) -> None:
    scratch = oracle()
    settings = VPDSettings(e_every=2, prior=prior, teacher_ema_rate=0.3)
    learner = tiny_learner(adapted(), teacher=settings.teacher_settings(), keep_initial=prior == "fixed")
    algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
    other = adapted()
    master, initial = copy.deepcopy(other), copy.deepcopy(other)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.3)
    delta = None
    for k in range(3):
        groups = random_groups(k)
        algorithm.step(groups, learner)
        learner.end_iteration()
        delta = scratch.vpd_iteration(
            Bare(other),
            Bare(master),
            optimizer,
            rows_of(groups),
            k,
            delta,
            e_every=2,
            fixed_prior=Bare(initial) if prior == "fixed" else None,
            alpha=0.5,
            ema_rate=0.3,
        )
    ours, theirs = adapter_of(learner.model), adapter_of(other)
    moved = (theirs - adapter_of(adapted())).norm()
    assert moved > 1e-3 and (ours - theirs).norm() < 1e-10 * moved


def test_only_the_adapter_is_trained_and_the_base_is_there_once() -> None:
    model = adapted()
    before, size = base_of(model), sum(p.numel() for p in tiny_model().parameters())
    adapter = sum(p.numel() for p in lora.weights(model).values())
    settings = VPDSettings(e_every=2, teacher_ema_rate=0.4, prior="fixed")
    learner = tiny_learner(
        model, teacher=settings.teacher_settings(), keep_initial=True, optimizer="adamw", weight_decay=0.1
    )
    algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
    for seed in range(2):
        algorithm.step(random_groups(seed), learner)
        learner.end_iteration()
    held = [model] + [pair[0] for w in ("live", "initial", "teacher") for pair in learner.teacher.mixture(w)]  # type: ignore[arg-type]
    stored = {p.data_ptr(): p.numel() for module in held for p in module.parameters()}
    assert sum(stored.values()) == size + 2 * adapter and adapter > 0
    optimised = [p for group in learner._optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in lora.weights(model).values()}
    assert [p.requires_grad for p in model.parameters()] == [
        "lora_" in name and ".default." in name for name, _ in model.named_parameters()
    ]
    assert all(torch.equal(before[name], value) for name, value in base_of(model).items())
    average = torch.cat([v.flatten() for v in lora.state(model, lora.AVERAGE).values()])
    start, live = adapter_of(adapted()), adapter_of(model)
    assert 0 < (average - start).norm() < (live - start).norm()


@torch.no_grad()
def test_a_view_activates_its_adapter_for_one_pass_even_if_the_pass_fails() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("amid the pass")

    model, ids = adapted(), torch.arange(6)[None]
    plain = tiny_model()(ids).logits
    view, none = lora.average(model), lora.View(model, None)
    assert torch.equal(model(ids).logits, plain)  # B is 0
    for value in lora.weights(model).values():
        value.add_(0.1)
    live = model(ids).logits
    assert not torch.allclose(live, plain)
    for seen in (view, none):
        assert torch.equal(seen(input_ids=ids).logits, plain) and torch.equal(model(ids).logits, live)
        with pytest.raises(RuntimeError, match="amid"):
            hook = model.model.layers[1].register_forward_hook(fail)
            seen.base_model(input_ids=ids)
        hook.remove()
        assert torch.equal(model(ids).logits, live)
        assert {p.requires_grad for p in lora.weights(model).values()} == {True}
        assert {p.requires_grad for p in lora.weights(model, lora.AVERAGE).values()} == {False}
    for value in lora.weights(model, lora.AVERAGE).values():
        value.add_(0.1)
    assert torch.equal(view(input_ids=ids).logits, live) and torch.equal(none(input_ids=ids).logits, plain)


def test_a_teacher_pass_between_forward_and_backward_leaves_the_gradient_as_it_is() -> None:
    """Activation checkpointing computes layers again in the backward pass: the trained adapter must be active there."""
    made = [e for e in to_examples(random_groups(0)) if e.teacher_prompt]

    def gradient(kind: str, order: tuple[Any, ...]) -> torch.Tensor:
        learner = tiny_learner(adapted(), gradient_checkpointing=kind, teacher=TeacherSettings(ema_rate=0.5))
        with torch.no_grad():
            for n, value in enumerate(lora.weights(learner.model).values()):
                value.add_(0.05 * (n % 3 - 1))

        def objective(scorer: Scorer, batch: Batch) -> Any:
            seen = {role: scorer.logprobs(role) for role in order}
            return seen["student"] * seen["teacher"].exp()

        before = adapter_of(learner.model)
        learner.update("x", with_loss_weights(made, x=[1.0] * len(made)), {"x": objective})
        return adapter_of(learner.model) - before

    plain = gradient("none", ("teacher", "student"))
    assert plain.norm() > 0
    for kind in ("none", "selective", "full"):
        for order in (("student", "teacher"), ("teacher", "student")):
            assert torch.allclose(gradient(kind, order), plain, rtol=1e-10, atol=1e-13)


def test_an_external_teacher_is_no_lora_model() -> None:
    learner = tiny_learner(adapted(), teacher=TeacherSettings(kind="external"), external=tiny_model(seed=7))
    external = learner.teacher.mixture("teacher")[0][0]
    before, start = external.state_dict(), adapter_of(learner.model)
    settings = GKDSettings(teacher_model="given")
    losses = []
    for _ in range(6):
        losses.append(Distill(settings, own_prompt=True).step(random_groups(0), learner).metrics["m_step/divergence"])
    assert losses[-1] < losses[0] and not torch.equal(adapter_of(learner.model), start)
    assert not lora.is_attached(external) and all(torch.equal(before[n], v) for n, v in external.state_dict().items())


def test_the_engine_samples_from_the_live_adapter() -> None:
    learner = tiny_learner(adapted(dtype=torch.float32), share_prefixes=True)
    model = learner.model
    engine = TorchEngine(Words(), eos_ids=[0, 3])
    engine.load(learner.policy())
    before = engine.generate(PROMPTS, keys=KEYS, seed=0, max_tokens=8)
    with torch.no_grad():
        for value in lora.weights(model).values():
            value.add_(0.1)
    answers = engine.generate(PROMPTS, keys=KEYS, seed=0, max_tokens=8)
    assert [a.tokens for a in answers] != [a.tokens for a in before]
    examples = [
        Example(prompt=p, completion=a.tokens, mask=(True,) * len(a.tokens), behaviour=a.logprobs)
        for p, a in zip(PROMPTS, answers, strict=True)
    ]
    scores = learner.score(examples, student_logprobs)
    merged = tiny_learner(lora.merged(model)).score(examples, student_logprobs)
    for answer, score, plain in zip(answers, scores, merged, strict=True):
        assert score == pytest.approx(answer.logprobs, abs=1e-4) and plain == pytest.approx(score, abs=1e-4)


@torch.no_grad()
def test_merging_leaves_the_model_as_it_is() -> None:
    model, ids = adapted(), torch.arange(6)[None]
    lora.average(model)
    for value in lora.weights(model).values():
        value.add_(0.1)
    before, live = copy.deepcopy(model.state_dict()), model(ids).logits
    plain = lora.merged(model)
    assert plain.state_dict().keys() == tiny_model().state_dict().keys() and not lora.is_attached(plain)
    assert torch.allclose(plain(ids).logits, live, atol=1e-12) and not torch.allclose(live, tiny_model()(ids).logits)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {p.data_ptr() for p in plain.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


def test_adapters_of_a_16_bit_model_are_fp32_and_move() -> None:
    model = adapted(dtype=torch.bfloat16)
    learner = tiny_learner(model, teacher=TeacherSettings(ema_rate=0.01), learning_rate=1e-3)
    adapters = [*lora.weights(model).values(), *lora.weights(model, lora.AVERAGE).values()]
    assert {p.dtype for p in adapters} == {torch.float32} and model.dtype == torch.bfloat16
    start = adapter_of(model)
    made = to_examples(random_groups(0))
    learner.update(
        "x",
        with_loss_weights(made, x=[1.0] * len(made)),
        {"x": lambda scorer, batch: scorer.logprobs("student")},
    )
    learner.end_iteration()
    average = torch.cat([v.double().flatten() for v in lora.state(model, lora.AVERAGE).values()])
    moved = adapter_of(model) - start
    assert moved.norm() > 0 and torch.allclose(average - start, 0.01 * moved, atol=1e-7)


RUN: dict[str, object] = {
    "model__lora": "{r: 4, target_modules: all-linear}",
    "optim__learning_rate": 1e-2,
    "algorithm__name": "vpd",
    "algorithm__e_every": 2,
    "run__save_steps": 2,
}


def test_a_run_is_repeatable_and_resume_is_uninterrupted(tmp_path: Path) -> None:
    for prior in ("dynamic", "fixed"):
        extra, at = RUN | {"algorithm__prior": prior}, tmp_path / prior
        assert vpd_train(at / "whole", **extra) == 0
        assert vpd_train(at / "again", **extra) == 0
        assert vpd_train(at / "parts", **(extra | {"run__max_steps": 2})) == 0
        assert vpd_train(at / "parts", **(extra | {"run__resume": "true"})) == 0
        assert metrics_of(at / "whole") == metrics_of(at / "again") == metrics_of(at / "parts")
        whole, parts = (
            AutoModelForCausalLM.from_pretrained(at / run / "model").state_dict() for run in ("whole", "parts")
        )
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
        assert not (at / "whole" / "checkpoint-4" / "model.safetensors").exists()
        state = torch.load(at / "whole" / "checkpoint-4" / "state.pt", weights_only=True)
        assert all("lora_" in name for part in state["teacher"].values() for name in part)


def test_a_run_leaves_a_plain_model_and_an_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    assert vpd_train(tmp_path / "run", **(RUN | {"run__eval_steps": 4})) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(load_bundled())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain, ours = base(ids).logits, model(ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))(input_ids=ids).logits
    assert torch.allclose(ours, loaded, atol=1e-4) and not torch.allclose(loaded, plain, atol=1e-2)
    words = ["eval", "--config", str(tmp_path / "run" / "config.yaml"), "--num_samples", "2", "--limit", "8"]
    numbers = tmp_path / "eval.json"
    assert main([*words, "--model.name_or_path", str(tmp_path / "run" / "model"), "--output", str(numbers)]) == 0
    asked = json.loads(numbers.read_text())["student"]
    assert asked["tasks"] == 8 and asked["avg@2"] == metrics_of(tmp_path / "run")[-1]["eval/avg@2"]


@pytest.fixture
def no_peft(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    yield


def test_without_peft_the_error_says_what_to_install(
    no_peft: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vpd_train(tmp_path / "run", model__lora="{}") == 2
    error = capsys.readouterr().err
    assert "pip install peft" in error and error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert vpd_train(tmp_path / "run", run__max_steps=1) == 0


MISTAKES = {
    "unknown target": ("{target_modules: [q_proj, q_pro]}", ["'q_pro'", "Did you mean 'q_proj'"]),
    "not a layer": ("{target_modules: [layers]}", ["cannot be put into LlamaForCausalLM"]),
    "head": ("{target_modules: [lm_head]}", ["the head or the embedding"]),
    "embedding": ("{target_modules: [embed_tokens]}", ["the head or the embedding"]),
    "none": ("{target_modules: []}", ["target_modules is empty"]),
    "rank": ("{r: 0}", ["model.lora.r", "at least 1"]),
    "kind": ("{r: many}", ["model.lora.r", "'many'"]),
    "unknown key": ("{lora_alfa: 3}", ["model.lora.lora_alfa", "'lora_alpha'"]),
    "dropout": ("{dropout: 0.1}", ["unknown key model.lora.dropout"]),
    "word": ("16", ["model.lora"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value, expected = MISTAKES[mistake]
    assert vpd_train(tmp_path / "run", model__lora=value) == 2
    error = capsys.readouterr().err
    assert error.startswith("vpd: error: ") and error.count("\n") == 1
    assert all(piece in error for piece in expected), error
    assert not (tmp_path / "run").exists()


def test_an_architecture_that_peft_does_not_know_needs_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "target_module_mapping", {})
    with pytest.raises(ConfigError, match=re.escape("model.lora.target_modules")):
        lora.attach(tiny_model(), lora.LoraSettings(), seed=0)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"run__max_steps": 1, "run__save_steps": 1, "model__lora": "{r: 4}"}
    assert vpd_train(tmp_path / "run", **short) == 0
    assert vpd_train(tmp_path / "run", **(short | {"model__lora": "{r: 8}", "run__resume": "true"})) == 2
    assert "model.lora.r 4 -> 8" in capsys.readouterr().err
    assert vpd_train(tmp_path / "run", **(short | {"model__lora": "null", "run__resume": "true"})) == 2
    assert "model.lora {" in capsys.readouterr().err


def test_a_learner_refuses_the_files_of_another_kind_of_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_learner(adapted()).save(tmp_path / "lora")
    tiny_learner(tiny_model()).save(tmp_path / "plain")
    with pytest.raises(StorageError, match="got an adapter"):
        tiny_learner(tiny_model()).load(tmp_path / "lora")
    with pytest.raises(StorageError, match="got a whole model"):
        tiny_learner(adapted()).load(tmp_path / "plain")
    with pytest.raises(StorageError, match="does not fit"):
        lora.restore(adapted(), {})
    other = adapted()
    other.name_or_path = "another-base"
    tiny_learner(other).load(tmp_path / "lora")
    assert "'another-base'" in caplog.text


def test_no_copy_has_no_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "run", algorithm__teacher_dtype="float32", model__lora="{}") == 2
    assert "with model.lora there is none" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_settings_nest_on_the_command_line_and_come_back_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {lora: null}\n")
    made = config.load(str(tmp_path / "run.yaml"), ["--model.lora.r", "3", "--model.lora.target_modules", "[q_proj]"])
    assert made.model.lora == lora.LoraSettings(r=3, target_modules=("q_proj",))
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    assert config.load(str(tmp_path / "again.yaml")) == made
    assert config.load(str(tmp_path / "again.yaml"), ["--model.lora", "null"]).model.lora is None
