"""Small things that several tests share: a tiny float64 model and groups of random rollouts with contexts."""

import dataclasses
import importlib.util
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from vpd.algorithms import Algorithm
from vpd.algorithms.distill import Distill, GKDSettings, SDPOSettings
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.algorithms.ldd import LDD, LDDSettings
from vpd.algorithms.plare import PLARE, PLARESettings
from vpd.algorithms.sft import SFT, SFTSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.cli import main
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
from vpd.learners.teachers import TeacherSettings
from vpd.types import Comparison, Completion, Grade, Group, Rollout, SampleKey, Section, Task, TeacherPrompt

VOCABULARY = 23


def keys(count: int, phase: str = "train") -> list[SampleKey]:
    """Keys of one attempt at each of so many tasks."""
    return [SampleKey(phase=phase, step=0, task=task, sample=0) for task in range(count)]


def cycling(texts: Sequence[str]) -> Callable[..., str]:
    """An answer function of a fake: the texts one after the other, from the front again at the end."""
    endless = itertools.cycle(texts)
    return lambda *asked: next(endless)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_learner(model: Any, **changes: Any) -> AccelerateLearner:
    """SGD without clipping: a wrong loss scale cannot hide.  Rows are computed alone, which is the reference."""
    changes = {"share_prefixes": False} | changes
    known = {f.name for f in dataclasses.fields(OptimSettings)}
    optim = {"optimizer": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "max_grad_norm": None}
    optim |= {name: changes.pop(name) for name in list(changes) if name in known}
    PartialState(cpu=True)
    return AccelerateLearner(model, OptimSettings(**optim), **changes)


def norm_in_its_own_precision(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Llama's norm; transformers' own computes in fp32 even in an fp64 model, and another batch flips a rounding."""
    return norm.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon))  # type: ignore[no-any-return]


def rotary_in_its_own_precision(
    rotary: Any, hidden: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's rotary angles; transformers' own are fp32 even in an fp64 model, and another device rounds a cosine."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    angles = position_ids[..., None].to(dtype) * rotary.inv_freq.to(dtype)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    return cos.to(hidden.dtype), sin.to(hidden.dtype)


class TokenPrompter:
    """A prompter whose sections hold token ids as text: teacher's prompt = those ids, then the task's prompt."""

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        return [Group(rollouts=tuple(self._attach(r) for r in group.rollouts)) for group in groups]

    def environment_text(self, text: str, before: Sequence[int]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Token ids as text, behind a header of the one token 1."""
        ids = tuple(int(word) for word in text.split())
        return (1, *ids), (False, *(True for _ in ids))

    def _attach(self, rollout: Rollout) -> Rollout:
        if not rollout.context:
            return dataclasses.replace(rollout, teacher_prompt=None)
        ids = tuple(int(word) for section in rollout.context for word in section.text.split())
        sources = tuple(section.source for section in rollout.context)
        return dataclasses.replace(rollout, teacher_prompt=TeacherPrompt(tokens=ids + rollout.prompt, sources=sources))


def random_groups(seed: int, *, groups: int = 3, size: int = 4) -> list[Group]:
    """Ragged rollouts; failures carry a context, successes only now and then; both classes in most groups."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high)))

    made = []
    for number in range(groups):
        prompt = ids(2, 6)
        rollouts = []
        for index in range(size):
            key = SampleKey(phase="train", step=seed, task=number, sample=index)
            tokens = ids(1, 5)
            success = index == 0 or draw.random() < 0.3
            text = " ".join(map(str, ids(1, 4)))
            context = (Section(kind="feedback", source="environment", text=text),)
            rollouts.append(
                Rollout(
                    key=key,
                    task=Task(id=str(number), messages=({"role": "user", "content": ""},)),
                    prompt=prompt,
                    completion=Completion(
                        tokens=tokens,
                        sampled=(True,) * len(tokens),
                        logprobs=(-1.0,) * len(tokens),
                        text="",
                        finish="stop",
                    ),
                    grade=Grade(reward=float(success) + draw.random() / 4, success=success, feedback=text),
                    context=() if success and draw.random() < 0.6 else context,
                )
            )
        made.append(compared(Group(rollouts=tuple(rollouts))))
    return TokenPrompter().attach(made)


def compared(group: Group) -> Group:
    """The group with comparisons: of each attempt with the next by reward, of the first and the last unsure."""
    rollouts = list(group.rollouts)
    for index, (first, second) in enumerate(itertools.pairwise(group.rollouts)):
        better = Comparison(other=index + 1, preferred=first.grade.reward > second.grade.reward)
        rollouts[index] = dataclasses.replace(first, comparisons=(better,))
    unsure = Comparison(other=len(rollouts) - 1, preferred=None)
    rollouts[0] = dataclasses.replace(rollouts[0], comparisons=(*rollouts[0].comparisons, unsure))
    return Group(rollouts=tuple(rollouts))


Make = Callable[[], Algorithm]
#: every algorithm with small settings, and the teacher that it wants of its learner
ALGORITHMS: dict[str, tuple[Make, TeacherSettings]] = {
    "vpd": (lambda: VPD(VPDSettings(e_every=2, teacher_ema_rate=0.5), TokenPrompter()), TeacherSettings(ema_rate=0.5)),  # type: ignore[arg-type]
    "gated": (
        lambda: GatedVPD(GatedSettings(e_every=2, teacher_ema_rate=0.5), TokenPrompter()),  # type: ignore[arg-type]
        TeacherSettings(ema_rate=0.5),
    ),
    "sdpo": (lambda: Distill(SDPOSettings(updates_per_batch=2)), TeacherSettings()),
    "grpo": (lambda: GRPO(GRPOSettings(updates_per_batch=2)), TeacherSettings(kind="live")),
    "reshape": (lambda: Hybrid(HybridSettings(form="reshape")), TeacherSettings()),
    "reweight": (lambda: Hybrid(HybridSettings(form="reweight")), TeacherSettings()),
    "plare": (lambda: PLARE(PLARESettings(preference_alpha=0.5)), TeacherSettings(kind="live")),
    "sft": (lambda: SFT(SFTSettings()), TeacherSettings(kind="live")),
    "ldd": (lambda: LDD(LDDSettings(), TokenPrompter()), TeacherSettings(kind="live")),  # type: ignore[arg-type]
    "gkd": (lambda: Distill(GKDSettings(teacher_model="given"), own_prompt=True), TeacherSettings(kind="external")),
}


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def oracle() -> ModuleType:
    """The one-file implementation, loaded by path."""
    path = Path(__file__).resolve().parent.parent / "examples" / "vpd_from_scratch.py"
    spec = importlib.util.spec_from_file_location("vpd_from_scratch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vpd_from_scratch"] = module
    spec.loader.exec_module(module)
    return module


SMALL = {
    "model.name_or_path": "tiny",
    "env.name": "digits",
    "rollout.prompts_per_step": 4,
    "rollout.num_generations": 4,
    "rollout.max_completion_length": 6,
    "optim.learning_rate": 1e-3,
    "run.max_steps": 4,
    "run.eval_limit": 8,
    "run.eval_samples": 2,
}


def vpd_train(folder: Path, **changes: object) -> int:
    settings = SMALL | {"run.output_dir": folder} | {key.replace("__", "."): value for key, value in changes.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return main(["train", *words])


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]
