"""One side of ``vs_trl.py``: our iterations on recorded rollouts, in a process of its own.  Prints one line of JSON."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from material import LEARNING_RATE, Shape, groups_of, load, prompter_of, record
from meters import GPU, elapsed, fixed_bytes, peak, reset_peak, resident

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.examples import student_logprobs, to_examples
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.engines.torch_engine import TorchEngine
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
from vpd.learners.teachers import TeacherSettings


class Clocked:
    """A learner whose verbs add up their seconds."""

    def __init__(self, learner: AccelerateLearner):
        self._learner = learner
        self.seconds = {"scoring_s": 0.0, "update_s": 0.0}

    def score(self, *given: Any, **named: Any) -> Any:
        return self._clock("scoring_s", self._learner.score, given, named)

    def update(self, *given: Any, **named: Any) -> Any:
        return self._clock("update_s", self._learner.update, given, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def _clock(self, name: str, verb: Any, given: Any, named: Any) -> Any:
        started = elapsed()
        result = verb(*given, **named)
        self.seconds[name] += elapsed() - started
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "SHAPE"), help="write the record (SHAPE as JSON) and stop")
    parser.add_argument("--method", choices=["vpd", "sdpo", "grpo"])
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--token_budget", type=int, help="most tokens per forward pass (default: any number)")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="selective")
    parser.add_argument("--profile", action="store_true", help="add what the operators of the last M-step cost")
    options = parser.parse_args()
    if options.make:
        name, shape = options.make
        options.record.write_text(json.dumps(record(name, Shape(**json.loads(shape)))))
        return
    imported = resident()
    recorded = json.loads(options.record.read_text())
    print(json.dumps({"imported": imported} | measure(recorded, options)))


def measure(recorded: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    method = options.method
    shape = Shape(**recorded["shape"])
    model, tokenizer, _ = load(recorded["model"])
    prompter = prompter_of(recorded["model"], tokenizer, shape)
    groups = groups_of(recorded, prompter)
    like_trl = {"distillation_alpha": 0.5, "distillation_topk": recorded["top_k"], "distillation_tail": True}
    if method == "vpd":
        settings: Any = VPDSettings(e_every=2, **like_trl)
        algorithm: Any = VPD(settings, prompter)
    elif method == "sdpo":
        settings = SDPOSettings(**like_trl)
        algorithm = Distill(settings)
    else:
        settings = GRPOSettings()
        algorithm = GRPO(settings)
    teacher = TeacherSettings(kind="live") if method == "grpo" else settings.teacher_settings()
    optim = OptimSettings(
        learning_rate=LEARNING_RATE,
        micro_batch_size=options.micro_batch_size,
        gradient_checkpointing=options.checkpointing,
        max_tokens_per_microbatch=options.token_budget,
    )
    learner = AccelerateLearner(model, optim, teacher=teacher)
    result: dict[str, Any] = {"fixed": fixed_bytes(model, teacher_copy=method != "grpo"), "steps": []}
    prompts = [r.prompt for group in groups for r in group.rollouts]
    engine = TorchEngine(tokenizer, eos_ids=())
    kinds = 3 if method == "vpd" else 2  # with an E-step, without, with; the optimiser's moments are there after one
    for _ in range(kinds):
        reset_peak()
        clocked, started = Clocked(learner), elapsed()
        metrics = algorithm.step(groups, clocked).metrics
        learner.end_iteration()
        name = "policy" if method == "grpo" else "m_step"
        result["steps"].append(
            {
                "e_step": bool(metrics.get("e_step/rows", 0)),
                "train_s": elapsed() - started,
                **clocked.seconds,
                "train_peak": peak(),
                "loss": metrics[f"{name}/loss"],
                "grad_norm": metrics[f"{name}/grad_norm"],
            }
        )
    engine.load(learner.policy())
    keys = [rollout.key for group in groups for rollout in group.rollouts]
    if GPU:  # the first call loads kernels
        engine.generate(prompts, keys=keys, seed=0, max_tokens=shape.completion)
    reset_peak()
    started = elapsed()
    engine.generate(prompts, keys=keys, seed=0, max_tokens=shape.completion)
    result |= {"rollout_s": elapsed() - started, "rollout_peak": peak()}
    reset_peak()
    started = elapsed()
    scores = learner.score(to_examples(groups), student_logprobs)
    result |= {"score_s": elapsed() - started, "score_peak": peak(), "logprob": sum(map(sum, scores))}
    if options.profile:
        result["profile"] = profile(lambda: Distill(settings).step(groups, learner))
    return result


def profile(step: Callable[[], Any], most: int = 12) -> list[tuple[str, float]]:
    """(operator, its share of the CPU time it spent itself) of one call, the costliest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as taken:
        step()
    spent = sorted(((e.self_cpu_time_total, e.key) for e in taken.key_averages()), reverse=True)
    whole = sum(time for time, _ in spent)
    return [(name, time / whole) for time, name in spent[:most]]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
