"""The dry run: its memory model against what the real learner holds, its operations by hand, and what it shows."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, Qwen3Config

from vpd.algorithms.distill import SDPOSettings
from vpd.algorithms.grpo import GRPOSettings
from vpd.algorithms.vpd import VPDSettings
from vpd.cli import main
from vpd.config import load, parse
from vpd.config.dry_run import load_dry_run
from vpd.errors import ConfigError, ModelError
from vpd.estimate import memory
from vpd.estimate.architecture import Architecture, find_architecture, head_weight, layer_sizes, multiplied
from vpd.estimate.known_models import KNOWN_MODELS
from vpd.estimate.memory import Trained, Weights, update_peak
from vpd.estimate.rehearsal import Call, Rehearsal
from vpd.estimate.settings import DryRunSettings
from vpd.estimate.stand_in_tokenizer import StandInTokenizer
from vpd.estimate.tracing import LiveBytes
from vpd.estimate.work import Decoding, Sizes, decoding_work, work_of
from vpd.learners.accelerate_learner import AccelerateLearner
from vpd.learners.settings import OptimSettings, TeacherSettings
from vpd.model import lora
from vpd.model.settings import LoraSettings, ModelSettings
from vpd.prompts import Prompter, PromptSettings
from vpd.recipes.dry_run import dry_run
from vpd.types import Completion, Grade, Group, Rollout, SampleKey, Section, Task, TeacherPrompt

PUBLISHED = {  # parameters, in 1e9, as the models' own pages say
    "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8, "qwen3-32b": 32.8,
    "olmo-3-7b-instruct": 7.3, "llama-3.1-8b-instruct": 8.0, "llama-3.3-70b-instruct": 70.6,
    "smollm2-135m-instruct": 0.135,
}  # fmt: skip


class Kept:
    """A prompter that leaves the teacher's prompts as they are."""

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)


def small_config(**changes: Any) -> Any:
    options = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Qwen3Config(**(options | changes))


def groups_of(*, prompts: int = 2, answers: int = 4, prompt: int = 48, completion: int = 40) -> list[Group]:
    """Groups of half right answers; every row has a teacher's prompt with a context of its own."""
    made = []
    for number in range(prompts):
        start = tuple((number * 97 + place * 13) % 500 for place in range(prompt))
        rollouts = [
            Rollout(
                key=SampleKey(phase="train", step=0, task=number, sample=index),
                task=Task(id=str(number), messages=({"role": "user", "content": "?"},)),
                prompt=start,
                completion=Completion(
                    tokens=tuple((index + place) % 500 for place in range(completion)),
                    sampled=(True,) * completion, logprobs=(-6.2,) * completion, text="", finish="stop",
                ),
                grade=Grade(reward=float(index % 2), success=bool(index % 2)),
                context=(Section(kind="feedback", source="environment", text="x"),),
                teacher_prompt=TeacherPrompt(tokens=start + (index,) * 16, sources=("environment",)),
            )
            for index in range(answers)
        ]  # fmt: skip
        made.append(Group(rollouts=tuple(rollouts)))
    return made


def rehearsed(settings: Any, groups: Sequence[Group]) -> list[Call]:
    learner = Rehearsal()
    settings.build(Kept()).step(groups, learner)
    return learner.calls


def held_by_the_learner(trained: Trained, settings: Any, groups: Sequence[Group]) -> dict[str, int]:
    """The most bytes of new tensors in each update of the real learner's second iteration, gradients included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        trained.architecture.config, dtype=getattr(torch, trained.model.dtype)
    ).eval()
    if trained.model.lora is not None:
        lora.attach(model, trained.model.lora, seed=0)
    learner = AccelerateLearner(model, trained.optim, teacher=trained.teacher)
    method = settings.build(Kept())
    method.step(groups, learner)
    learner.end_iteration()
    there = torch.nn.Module()
    there.kept = torch.nn.ParameterList(learner._masters.parameters)
    for number, moments in enumerate(learner._optimizer.optimizer.state.values()):
        for name, value in moments.items():
            there.register_buffer(f"{name}_{number}", value)
    watched = Watched(learner, (model, there, *learner.teacher.modules().values()))
    method.step(groups, watched)
    return watched.most


class Watched:
    """The learner, with the peak of each update's tensors."""

    def __init__(self, learner: AccelerateLearner, modules: Sequence[torch.nn.Module]):
        self.most: dict[str, int] = {}
        self.logprob_tolerance = learner.logprob_tolerance
        self.score = learner.score
        self._learner, self._modules = learner, modules

    def update(self, name: str, *args: Any, **options: Any) -> Any:
        live = LiveBytes(*self._modules)
        with live:
            done = self._learner.update(name, *args, **options)
        self.most[name] = max(live.peaks)
        return done


EVERY_STEP = VPDSettings(e_every=1)
LORA = LoraSettings(r=4, target_modules="all-linear")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "none": ({}, {}, EVERY_STEP),
    "selective": ({}, {"gradient_checkpointing": "selective"}, EVERY_STEP),
    "full": ({}, {"gradient_checkpointing": "full"}, EVERY_STEP),
    "live": ({}, {}, VPDSettings(e_every=1, teacher="live")),
    "bf16": ({"dtype": "bfloat16"}, {}, EVERY_STEP),
    "bf16, selective": ({"dtype": "bfloat16"}, {"gradient_checkpointing": "selective"}, EVERY_STEP),
    "bf16, micro-batches": ({"dtype": "bfloat16"}, {"max_tokens_per_microbatch": 200}, EVERY_STEP),
    "micro-batches": ({}, {"max_tokens_per_microbatch": 200}, EVERY_STEP),
    "autocast": ({}, {"mixed_precision": "bf16"}, EVERY_STEP),
    "rows alone": ({}, {"share_prefixes": False}, EVERY_STEP),
    "lora": ({"lora": LORA}, {}, EVERY_STEP),
    "lora, bf16, full": ({"lora": LORA, "dtype": "bfloat16"}, {"gradient_checkpointing": "full"}, EVERY_STEP),
    "grpo": ({}, {}, GRPOSettings()),
    "top-k": ({}, {}, SDPOSettings(distillation_topk=20)),
    "sampled": ({}, {}, SDPOSettings(distillation_estimator="sampled", distillation_alpha=1.0)),
}


def trained_as(case: str, **config: Any) -> tuple[Trained, Any]:
    model, optim, settings = CASES[case]
    architecture = Architecture(config=small_config(**config), origin="this test")
    teacher = settings.needs.teacher or TeacherSettings(kind="live")
    return Trained(
        architecture=architecture, model=ModelSettings(**model), optim=OptimSettings(**optim), teacher=teacher
    ), settings


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [{}, {"vocab_size": 4096, "tie_word_embeddings": False}], ids=["tied", "untied"])
def test_the_model_of_memory_is_what_the_learner_holds(case: str, config: dict[str, Any]) -> None:
    trained, settings = trained_as(case, **config)
    groups = groups_of()
    held = held_by_the_learner(trained, settings, groups)
    gradients = Weights(trained).gradients_bytes
    updates = {call.name: call for call in rehearsed(settings, groups) if call.kind == "update"}
    assert set(updates) == set(held)
    for name, call in updates.items():
        assert gradients + update_peak(trained, call).bytes == pytest.approx(held[name], rel=0.15), name
