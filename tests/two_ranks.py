"""One process of tests/test_ranks.py: trains small runs whole and writes what came out to ``FOLDER/NAME-RANK.pt``.

two_ranks.py FOLDER NAME PART SHARDING...

PART is ``all``, ``resume``, or one of CASES, which is trained on the device that is there (tests/test_gpu.py).
"""

import dataclasses
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from helpers import (
    ALGORITHMS,
    norm_in_its_own_precision,
    random_groups,
    rotary_in_its_own_precision,
    tiny_learner,
    tiny_model,
)
from partial_env import Partial
from transformers.models.llama import modeling_llama

from vpd.algorithms.examples import student_logprobs, to_examples
from vpd.config import parse
from vpd.envs import Env
from vpd.envs.recorded import RecordedAnswers, beside
from vpd.errors import VPDError
from vpd.learners.sharding import whole
from vpd.model import lora
from vpd.model.settings import LoraSettings
from vpd.ranks import launched
from vpd.recipes.assemble import assemble
from vpd.recipes.loops import make_loop
from vpd.recipes.train import train
from vpd.types import Group, Metrics

FOLDER, NAME, PART, *SHARDINGS = sys.argv[1:]
RANK, WORLD = launched()

modeling_llama.LlamaRMSNorm.forward = norm_in_its_own_precision
modeling_llama.LlamaRotaryEmbedding.forward = rotary_in_its_own_precision

UNEVEN = {"prompts_per_step": 3, "num_generations": 3}
LORA = {"lora": {"r": 4}}
#: the servers of whole weights and of adapters, which the test runs
SERVERS = [
    {"name": "vllm", "url": os.environ[name], "sync_dir": f"{FOLDER}/sync-{NAME}"}
    for name in ("VLLM_URL", "VLLM_LORA_URL")
]
CRITIC = {"name": "self_critique", "template": "{task} {attempt} feedback :", "max_critique_length": 6}
#: the section algorithm of a run, and what else it has
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vpd": ({"name": "vpd", "e_every": 2}, {}),
    "vpd, epochs": ({"name": "vpd", "e_every": 2, "e_epochs": 2, "prior": "fixed", "updates_per_batch": 2}, {}),
    "vpd, retries": ({"name": "vpd", "e_every": 2}, {"rollout": {"retries": 2}}),
    "vpd, critique": ({"name": "vpd", "e_every": 2}, {"feedback": ["environment", CRITIC]}),
    "vpd, uneven": ({"name": "vpd", "e_every": 2}, {"rollout": UNEVEN}),
    "vpd, lora": ({"name": "vpd", "e_every": 2}, {"model": LORA}),
    "vpd, server": ({"name": "vpd", "e_every": 2}, {"rollout": UNEVEN, "engine": SERVERS[0]}),
    "gated": ({"name": "gated", "e_every": 2}, {}),
    "gated, uneven": ({"name": "gated", "e_every": 2, "teacher": "live"}, {"rollout": UNEVEN}),
    "sdpo": ({"name": "sdpo"}, {"rollout": {"retries": 1}}),
    "sdpo, lora": ({"name": "sdpo"}, {"model": LORA, "optim": {"gradient_checkpointing": "full"}}),
    "sdpo, lora, server": ({"name": "sdpo"}, {"model": LORA, "engine": SERVERS[1]}),
    "sdpo, trust region": (
        {"name": "sdpo", "teacher": "trust_region", "updates_per_batch": 2, "distillation_topk": 5},
        {"optim": {"gradient_checkpointing": "selective"}},
    ),
    "grpo": ({"name": "grpo", "updates_per_batch": 2}, {"optim": {"gradient_checkpointing": "full"}}),
    "grpo, uneven": ({"name": "grpo"}, {"rollout": UNEVEN, "optim": {"share_prefixes": False}}),
    "gkd": ({"name": "gkd", "teacher_model": f"{FOLDER}/teacher", "student_fraction": 0.5}, {}),
    "gkd, data": (
        {"name": "gkd", "teacher_model": f"{FOLDER}/teacher", "student_fraction": 0.5, "other_answers": "data"},
        {},
    ),
    "plare": ({"name": "plare"}, {"feedback": [{"name": "judge", "judge": "reward", "max_pairs": 5}]}),
    "hybrid": ({"name": "hybrid"}, {}),
    "ldd": ({"name": "ldd"}, {}),
    "vpd, tied": ({"name": "vpd", "e_every": 2}, {"dynamics": {"weight": 0.5}}),
    "sft": ({"name": "sft"}, {"rollout": {"retries": 1}}),
    "vpd, recorded": ({"name": "vpd", "e_every": 2, "importance_reference": "sampler"}, {"rollout": UNEVEN}),
    "sdpo, recorded": ({"name": "sdpo", "teacher": "live", "importance_reference": "sampler"}, {"model": LORA}),
    "hybrid, reweight": ({"name": "hybrid", "form": "reweight"}, {"rollout": UNEVEN}),
}


class Recorder:
    """Keeps metrics and a digest of every rollout."""

    def __init__(self) -> None:
        self.metrics: list[Metrics] = []
        self.rollouts = hashlib.sha256()

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        self.metrics.append(metrics)
        for r in [one for group in groups for attempt in group.rollouts for one in (attempt, *attempt.retries)]:
            self.rollouts.update(
                repr((r.key, r.task, r.completion.tokens, r.grade, r.context, r.teacher_prompt)).encode()
            )

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def config_of(algorithm: dict[str, Any], more: dict[str, Any], sharding: str, **run: Any) -> Any:
    optim = {"optimizer": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "max_grad_norm": None}
    data: dict[str, Any] = {
        "model": {"name_or_path": "tiny", "dtype": "float64"},
        "env": {"name": "digits", "length": 4},
        "feedback": ["environment", "sibling"],
        "algorithm": algorithm,
        "rollout": {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 6},
        "optim": optim | {"micro_batch_size": 8, "sharding": sharding},
        "run": {"max_steps": 2, "eval_steps": 2, "eval_limit": 6, "eval_samples": 2, "rank_timeout": 60.0} | run,
    }
    for section, value in more.items():
        data[section] = data.get(section, {}) | value if isinstance(value, dict) else value
    return parse(data)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([whole(p.detach()).double().flatten() for p in model.parameters()])


def env_of(name: str) -> Env:
    """What a run is trained on: of a case that says so, half of the tasks come with recorded answers."""
    fresh = Partial(length=4)
    log = RecordedAnswers(path=f"{FOLDER}/log.jsonl", group_size=3)
    return beside(log, fresh, 0.5) if "recorded" in name else fresh


def trained(name: str, sharding: str) -> dict[str, Any]:
    algorithm, more = CASES[name]
    parts = assemble(config_of(algorithm, more, sharding), env=env_of(name))
    seen, start = Recorder(), flat(parts.learner.model)
    make_loop(parts, [seen], output=None).run()
    average = parts.learner.teacher._average
    return {
        "device": parts.learner.accelerator.device.type,
        "start": start,
        "weights": flat(parts.learner.model),
        "average": torch.zeros(1) if average is None or "lora" in name else flat(average),
        "metrics": seen.metrics,
        "rollouts": seen.rollouts.hexdigest(),
        "policy": {key: value.clone() for key, value in parts.learner.policy().tensors()},
    }


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except VPDError as error:
        return type(error).__name__, str(error)


def disagreeing(sharding: str) -> dict[str, Any]:
    """What a learner says to rows that are not the same on every rank."""
    learner = tiny_learner(tiny_model(), sharding=sharding)
    rows = to_examples(random_groups(8, groups=2, size=3))
    other = dataclasses.replace(rows[4], loss_weights={"policy": 0.5 + RANK})
    longer = dataclasses.replace(rows[1], prompt=rows[1].prompt + (1,) * RANK)
    return {
        "numbers": outcome(lambda: learner.update("policy", [*rows[:4], other, rows[5]], {})),
        "tokens": outcome(lambda: learner.score([rows[0], longer], student_logprobs)),
        "count": outcome(lambda: learner.score(rows[: 2 + RANK], student_logprobs)),
    }


def written_after_a_score(sharding: str) -> dict[str, Any]:
    """Scores before all weights are scaled, after it, and after a backward pass, and those of a model made so."""
    learner = tiny_learner(tiny_model(), sharding=sharding)
    rows = to_examples(random_groups(5, groups=2, size=2))
    found = {"before": learner.score(rows, student_logprobs)}
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.mul_(1.1)
    found["after"] = learner.score(rows, student_logprobs)
    with_weight = [dataclasses.replace(row, loss_weights={"loss": 1.0}) for row in rows]
    learner.update("policy", with_weight, {"loss": student_logprobs}, lr_scale=0.0)
    found["later"] = learner.score(rows, student_logprobs)
    fresh = tiny_learner(tiny_model().double(), sharding="none")
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.mul_(1.1)
    return found | {"expected": fresh.score(rows, student_logprobs)}


def masters(sharding: str) -> Any:
    """The fp32 masters of a bfloat16 model after three iterations."""
    model = tiny_model(dtype=torch.bfloat16)
    changes: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "max_grad_norm": 0.1, "micro_batch_size": 1}
    learner, grpo = tiny_learner(model, **changes), ALGORITHMS["grpo"][0]()
    for seed in range(3):
        grpo.step(random_groups(seed, groups=3, size=3), learner)
        learner.end_iteration()
    return learner.state()["master_weights"]


def in_bfloat16(sharding: str) -> Any:
    """How far fp32 weights move that are computed in bfloat16, with all that is in shards on the CPU."""
    offload = {"cpu_offload": True} if sharding == "fsdp2" else {}
    model = tiny_model(dtype=torch.float32)
    AcceleratorState._reset_state()  # it keeps one precision for the whole process
    learner = tiny_learner(model, mixed_precision="bf16", sharding=sharding, learning_rate=0.03, **offload)
    start, grpo = flat(model), ALGORITHMS["grpo"][0]()
    rows = to_examples(random_groups(5, groups=2, size=2))
    before = learner.score(rows, student_logprobs)
    for seed in range(3):
        grpo.step(random_groups(seed, groups=3, size=3), learner)
        learner.end_iteration()
    after = learner.score(rows, student_logprobs)
    AcceleratorState._reset_state()
    scores = [torch.tensor([one for row in scored for one in row]) for scored in (before, after)]
    return {"start": start, "weights": flat(model), "before": scores[0], "after": scores[1]}


def an_adapter_in_bfloat16(sharding: str) -> Any:
    """How far an fp32 adapter moves whose base has 16 bits, and the types of both."""
    model = tiny_model(dtype=torch.bfloat16)
    model.name_or_path = "tiny"
    lora.attach(model, LoraSettings(r=2, target_modules=("q_proj", "up_proj")), seed=0)
    learner, grpo = tiny_learner(model, sharding=sharding, learning_rate=0.03), ALGORITHMS["grpo"][0]()
    start = {name: whole(value).clone() for name, value in lora.state(model).items()}
    for seed in range(3):
        grpo.step(random_groups(seed, groups=3, size=3), learner)
        learner.end_iteration()
    types = {str(parameter.dtype) for parameter in model.parameters()}
    moved = {name: whole(value) - start[name] for name, value in lora.state(model).items()}
    return {"moved": moved, "types": types, "sampled": learner.policy().call(lambda model: model.dtype)}


#: what the runs in folders have beside a whole model that they sample from
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"model": LORA | {"dtype": "float64"}},
    "server": {"engine": SERVERS[0]},
}


def run_folder(which: str, sharding: str, steps: int) -> None:
    """Train runs of each kind in their folders up to a step, or go on there."""
    for kind in RUNS:
        run_in(f"{FOLDER}/{which}-{sharding}-{kind}", kind, sharding, steps)


def run_in(output: str, kind: str, sharding: str, steps: int) -> None:
    again = Path(output).exists()
    run = {"output_dir": output, "max_steps": steps, "save_steps": 2, "resume": again, "eval_steps": 0}
    best = {"metric_for_best_model": "learning_rate", "load_best_model_at_end": True}  # warmed up at step 3
    optim = {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_steps": 3}
    more = {"model": {"dtype": "float64"}, "optim": optim} | RUNS[kind]
    train(config_of({"name": "vpd", "e_every": 2}, more, sharding, **run, **best), env=Partial(length=4))


def damaged() -> Any:
    """What a learner says to shards of which one file is cut."""
    folder = Path(FOLDER) / f"cut-{NAME}"
    learner = tiny_learner(tiny_model(), sharding="fsdp2")
    learner.save(folder)
    learner.ranks.all_gather(None)
    if RANK == 0:
        for path in (folder / "shards").glob("*.distcp"):
            os.truncate(path, 100)
    learner.ranks.all_gather(None)
    return outcome(lambda: learner.load(folder))


def all_of(sharding: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(name, sharding) for name in CASES}
    found["adapter"] = an_adapter_in_bfloat16(sharding)
    if sharding == "none":
        found["masters"] = masters(sharding)
    found["bfloat16"] = in_bfloat16(sharding)
    found["written"] = written_after_a_score(sharding)
    if sharding == "fsdp2":
        found["damaged"] = damaged()
    if WORLD > 1:
        found["disagreeing"] = disagreeing(sharding)
        run_folder("begun-by-two", sharding, 2)
        run_folder("begun-by-one", sharding, 4)
    else:
        run_folder("whole", sharding, 4)
        run_folder("begun-by-one", sharding, 2)
    return found


if __name__ == "__main__":
    out: dict[str, Any] = {"world": WORLD}
    try:
        for kind in SHARDINGS:
            if PART in CASES:
                out[kind] = trained(PART, kind)
            elif PART == "all":
                out[kind] = all_of(kind)
            else:
                run_folder("begun-by-two", kind, 4)
    except BaseException:
        out["error"] = traceback.format_exc()
        print(out["error"], file=sys.stderr)
    torch.save(out, f"{FOLDER}/{NAME}-{RANK}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor may hang at exit (pytorch issue 56297)
