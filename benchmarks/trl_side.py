"""The other side of ``vs_trl.py``: TRL's own trainers on recorded rollouts, in a process of its own.

What is overridden, and nothing else:

* generation (``SDPOTrainer._generate``, ``GRPOTrainer._generate_single_turn``): the recorded completions are returned,
  so that both sides train on the same tokens; in the last step TRL's own runs first and is timed;
* ``SDPOTrainer._prepare_training_batch`` is handed each attempt's own feedback, because TRL reads feedback from a
  column of the data set, one for a whole group.

Tokenizing, teacher's prompts (made by TRL from its templates, and checked token for token against the record), scoring,
losses, backward, clipping, AdamW and the EMA teacher are TRL's code, untouched.  Runs under the interpreter that has
trl; prints one line of JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from meters import GPU, elapsed, fixed_bytes, peak, reset_peak, resident
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.trainer.utils import selective_log_softmax

STEPS = 2  # AdamW's moments appear at the end of the first


class Clock(TrainerCallback):
    """Times optimiser steps; added last, so that the EMA teacher has moved when a step ends."""

    def __init__(self, recorded: dict[str, Any]):
        self.recorded = recorded
        self.steps: list[dict[str, Any]] = []
        self.rollout: dict[str, float] = {"rollout_s": 0.0}
        self.warming = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        reset_peak()
        self.started = elapsed()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        spent = elapsed() - self.started - self.rollout["rollout_s"] - self.warming
        self.steps.append({"e_step": False, "train_s": spent, "train_peak": peak()})

    def on_teacher_context_built(
        self, teacher_input_ids: torch.Tensor, teacher_attention_mask: torch.Tensor, **_: Any
    ) -> None:
        """TRL calls it when the teacher's inputs stand: they must be ours."""
        for row, ids, mask in zip(
            self.recorded["rows"], teacher_input_ids.tolist(), teacher_attention_mask.tolist(), strict=True
        ):
            kept = [token for token, keep in zip(ids, mask, strict=True) if keep]
            assert kept == row["teacher"] + row["completion"], "TRL's teacher reads other tokens"

    def roll_out(self, sample: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The recorded completions; in the last step after running and timing TRL's own generation."""
        assert prompt_ids == [row["prompt"] for row in self.recorded["rows"]], "TRL's student reads other tokens"
        if len(self.steps) == STEPS - 1:
            if GPU:  # the first call loads kernels
                self.warming = -elapsed()
                sample()
                self.warming += elapsed()
            started = elapsed()
            sample()
            self.rollout = {"rollout_s": elapsed() - started, "rollout_peak": peak()}
            reset_peak()
        return [row["completion"] for row in self.recorded["rows"]]


class RecordedSDPO(SDPOTrainer):
    clock: Clock

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> Any:
        feedback = [row["feedback"] for row in self.clock.recorded["rows"]]
        own = [given | {"privileged_context": text} for given, text in zip(inputs, feedback, strict=True)]
        self.last_batch = super()._prepare_training_batch(own)
        return self.last_batch

    def _generate(self, prompt_ids: Any) -> Any:
        recorded = self.clock.roll_out(lambda: super(RecordedSDPO, self)._generate(prompt_ids), prompt_ids)
        return prompt_ids, recorded

    def score(self) -> torch.Tensor:
        """Log-probs of the completions by the two calls of ``_compute_rollout_logps``, which one update skips."""
        batch = self.last_batch
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        logits = self._forward_logits(self.model, ids, mask, batch["completion_ids"].size(1))
        return selective_log_softmax(logits, batch["completion_ids"])


class RecordedGRPO(GRPOTrainer):
    clock: Clock

    def _generate_single_turn(self, prompt_ids: Any, *given: Any, **named: Any) -> Any:
        sample = super()._generate_single_turn
        return self.clock.roll_out(lambda: sample(prompt_ids, *given, **named), prompt_ids), None

    def score(self) -> torch.Tensor:
        """Log-probs of the completions by the method that TRL scores with, in micro-batches as it does."""
        batch = {k: torch.cat([part[k] for part in self._buffered_inputs]) for k in ("prompt_ids", "completion_ids")}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat(
            [torch.cat([part[k] for part in self._buffered_inputs]) for k in ("prompt_mask", "completion_mask")], 1
        )
        size = batch["completion_ids"].size(1)
        rows = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, size, batch_size=rows)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--method", choices=["sdpo", "grpo"], required=True)
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--flags", type=json.loads, default={}, help="more settings of TRL's config, as JSON")
    options = parser.parse_args()
    imported = resident()
    recorded = json.loads(options.record.read_text())
    with tempfile.TemporaryDirectory() as folder:
        result = measure(recorded, options, folder)
    print(json.dumps({"imported": imported} | result))


def measure(recorded: dict[str, Any], options: argparse.Namespace, folder: str) -> dict[str, Any]:
    clock = Clock(recorded)
    trainer = make_trainer(recorded, options, folder)
    trainer.clock = clock
    trainer.add_callback(clock)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "grad_norm" in line]
    for step, line in zip(clock.steps, logs, strict=True):
        step |= {"loss": line["loss"], "grad_norm": line["grad_norm"]}
    reset_peak()
    started = elapsed()
    with torch.no_grad():
        total = float(trainer.score().double().sum())
    seconds = elapsed() - started
    fixed = fixed_bytes(trainer.model, teacher_copy=options.method == "sdpo")
    scored = {"score_s": seconds, "score_peak": peak(), "logprob": total}
    return {"fixed": fixed, "steps": clock.steps} | clock.rollout | scored


def make_trainer(recorded: dict[str, Any], options: argparse.Namespace, folder: str) -> Any:
    """TRL as fast as its settings make it here: fp32 as ours, no checkpointing, fused AdamW, nothing saved or sent."""
    shape = recorded["shape"]
    rows = shape["prompts"] * shape["generations"]
    shared: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": rows // options.micro_batch_size,
        "num_generations": shape["generations"],
        "max_completion_length": shape["completion"],
        "generation_kwargs": {"min_new_tokens": shape["completion"]},
        "shuffle_dataset": False,
        "max_steps": STEPS,
        "learning_rate": recorded["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": not GPU,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(recorded["folder"])
    model = AutoModelForCausalLM.from_pretrained(recorded["folder"], dtype=torch.float32)
    first = recorded["rows"][:: shape["generations"]]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["content"]}]} for row in first])

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [row["reward"] for row in recorded["rows"]]

    named = {"model": model, "reward_funcs": reward, "train_dataset": data, "processing_class": tokenizer}
    if options.method == "grpo":
        return RecordedGRPO(args=GRPOConfig(epsilon=0.2, epsilon_high=0.28, **shared | options.flags), **named)
    distil = {
        "distillation_mode": "topk_logits",
        "distillation_topk": recorded["top_k"],
        "distillation_add_tail": True,
        "distillation_alpha": 0.5,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.05,
        "use_successful_as_teacher": False,
        "include_environment_feedback": True,
        "reprompt_template": "{prompt}{solution}{feedback}" + recorded["closing"],
        "feedback_template": recorded["feedback_header"] + "{feedback_raw}",
        "max_prompt_length": None,
    }
    return RecordedSDPO(args=SDPOConfig(**shared | distil | options.flags), **named)


if __name__ == "__main__":
    main()
