"""Arguments of TRL's trainers, of ``from_pretrained`` and of peft's LoraConfig, beside the configuration."""

from collections.abc import Mapping
from typing import Any

from vpd.config.convert import Foreign, Outcome, Rule, always_ignored, ignored, impossible, mapped, only

NONE: tuple[Any, ...] = (None, False, 0, 0.0, "", (), [], {}, (None, None))
PLAIN = "an adapter is peft's plain LoRA, of r, lora_alpha and target_modules"
OWN_TOKENIZER = "the model's own tokenizer is taken"
PLACED = "where a model is found and put, not what is learned"
TEACHERS = "the teacher is loaded as model.dtype says"


def _held_out(value: Any, f: Foreign) -> Outcome:
    return mapped(env__eval_path=value) if isinstance(value, str) else impossible("one file is read: env.eval_path")


def split(value: Any, f: Foreign) -> Outcome:
    """``dataset_train_split``: a part of a split (``train[:50%]``), or several, is no split of its own."""
    name = str(value).partition("[")[0]
    if name == value and "+" not in name:
        return mapped(env__split=value)
    why = "all records of a split are read: write this part to a file, and give it as --env.path"
    return impossible(why, **({} if "+" in str(value) else {"env__split": name}))


def _plain(value: Any, f: Foreign) -> Outcome:
    return ignored("none") if value in NONE else impossible(PLAIN)


TRAINER: Mapping[str, Rule] = {
    "eval_dataset": _held_out,
    "processing_class": always_ignored(OWN_TOKENIZER),
    "tokenizer": always_ignored(OWN_TOKENIZER),
    "data_collator": always_ignored("the chat template makes the prompt, and rows are padded by themselves"),
    "compute_metrics": always_ignored("of the evaluation alone; the environment's grades are its metrics"),
    "preprocess_logits_for_metrics": always_ignored("of the evaluation alone"),
    "reward_processing_classes": always_ignored("of a reward model (reward_funcs)"),
    "optimizers": only(NONE, "the optimiser is what the section optim says"),
    "optimizer_cls_and_kwargs": only(NONE, "the optimiser is what the section optim says"),
    "rollout_func": only(NONE, "the engine samples; an environment replies through a method respond"),
    "environment_factory": only(NONE, "an environment is a class that env.name names (docs/own_task.md)"),
    "tools": only(NONE, "an environment replies through a method respond (docs/own_task.md)"),
    "formatting_func": only(NONE, "the records must hold the prompt as it is to be read"),
    "quantization_config": only(NONE, "weights are loaded as model.dtype says"),
    "teacher_quantization_config": only(NONE, TEACHERS),
    **dict.fromkeys(
        ("device_map", "low_cpu_mem_usage", "cache_dir", "local_files_only", "token", "use_safetensors", "max_memory",
         "teacher_device_map", "teacher_low_cpu_mem_usage", "teacher_cache_dir", "teacher_attn_implementation",
         "teacher_local_files_only", "teacher_token", "teacher_use_cache"),
        always_ignored(PLACED),
    ),
    **dict.fromkeys(("teacher_torch_dtype", "teacher_dtype"), always_ignored(TEACHERS)),
    "teacher_trust_remote_code": always_ignored("model.trust_remote_code decides"),
    "LoraConfig.bias": only(("none",), PLAIN),
    "LoraConfig.init_lora_weights": only((True,), PLAIN),
}  # fmt: skip
PREFIXES: Mapping[str, Rule] = {"LoraConfig.": _plain}
