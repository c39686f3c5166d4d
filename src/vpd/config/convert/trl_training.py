"""What the configurations of TRL (1.16) have in common: transformers' TrainingArguments, and the keys of the scripts'
YAML for model and data.

A step is not the same: TRL counts optimiser steps and completions, here ``run.max_steps`` counts iterations and
``rollout.prompts_per_step`` tasks.  An iteration is one of TRL's generation batches::

    prompts_per_step  = per_device_train_batch_size * processes * steps_per_generation / num_generations
    updates_per_batch = steps_per_generation / gradient_accumulation_steps
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from vpd.config.convert import (
    Foreign,
    Outcome,
    Rule,
    absent,
    always_ignored,
    common,
    ignored,
    impossible,
    mapped,
    only,
    only_where,
    same,
)
from vpd.config.convert.trl_best import best, greater, metric, upload
from vpd.config.convert.trl_rewards import rewards, weights
from vpd.config.convert.trl_trainer import TRAINER, split
from vpd.learners.settings import Schedule

NOTHING = (None, False, 0, 0.0, "", "no", (), "none")
AVERAGES = {"grpo": "seq_mean", "dapo": "token_mean", "bnpo": "token_mean"}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_hf")
RAW_TEXT = "a prompt that is a text becomes a user's message in the chat template; TRL reads it as it stands"
MEMORY = "how much is held in memory, not what is learned"
LOGGING = "every iteration and every completion is recorded"
PROCESSES = "how the work is divided, not what is learned"
FULL = "use_peft is false: all weights are trained"


def _per_generation(f: Foreign) -> float:
    steps = f["steps_per_generation"] or f.number("gradient_accumulation_steps", 1)
    if f["generation_batch_size"]:
        steps = f["generation_batch_size"] / (f.number("per_device_train_batch_size", 1) * f.num_processes)
    return float(steps)


def _completions(f: Foreign) -> float:
    return f.number("per_device_train_batch_size", 8) * f.num_processes * _per_generation(f)


def _prompts(f: Foreign) -> int:
    return max(round(_completions(f) / max(f.number("num_generations", 1), 1)), 1)


def updates(f: Foreign) -> int:
    return max(round(_per_generation(f) / max(f.number("gradient_accumulation_steps", 1), 1)), 1)


def _batch(value: Any, f: Foreign) -> Outcome:
    each = f"{_completions(f):g} completions of {f.num_processes} process(es) at each generation"
    found = {"rollout.prompts_per_step": _prompts(f)}
    if updates(f) > 1 and f["lmbda"] is None:
        found["algorithm.updates_per_batch"] = min(updates(f), _prompts(f))
        if updates(f) > _prompts(f):
            why = (
                f"{updates(f)} optimiser steps a batch; here it is split by whole groups, of which it has {_prompts(f)}"
            )
            return Outcome(verdict="impossible", why=why, settings=found)
    return Outcome(verdict="mapped", why=f"{each}, divided by num_generations", settings=found)


def _iterations(steps: float, f: Foreign) -> int:
    """TRL's optimiser steps as iterations."""
    return max(math.ceil(steps / (updates(f) * max(f.number("num_iterations", 1), 1))), 1)


def _total(f: Foreign) -> int | None:
    """Iterations of the whole run; None where that needs the number of records and it is unknown."""
    if f.number("max_steps", -1) > 0:
        return _iterations(f.number("max_steps"), f)
    return None if f.tasks is None else max(math.ceil(f.number("num_train_epochs", 3) * f.tasks / _prompts(f)), 1)


def _max_steps(value: Any, f: Foreign) -> Outcome:
    if f.number("max_steps", -1) <= 0:
        return ignored("num_train_epochs decides")
    return mapped("iterations, each of which may hold several optimiser steps", run__max_steps=_total(f))


def _epochs(value: Any, f: Foreign) -> Outcome:
    if f.number("max_steps", -1) > 0:
        return ignored("max_steps decides")
    if f.tasks is None:
        return impossible("the number of records is unknown: set run.max_steps to epochs * records / prompts_per_step")
    return mapped(f"{value:g} epoch(s) of {f.tasks} records, {_prompts(f)} an iteration", run__max_steps=_total(f))


def _every(key: str, strategy: str) -> Rule:
    """``save_steps`` and ``eval_steps``: a number of optimiser steps, a share of the run, or by epoch."""

    def rule(value: Any, f: Foreign) -> Outcome:
        how, total = str(f[strategy]), _total(f)
        if how == "no" or not value:
            return Outcome(verdict="mapped", why="0: never", settings={key: 0}) if how == "no" else ignored("not set")
        if how == "epoch" and f.tasks is not None:
            steps: float = f.tasks / _prompts(f)
        elif how in ("epoch", "best") or (isinstance(value, float) and value < 1 and total is None):
            return impossible(f"{strategy} {how} needs the number of records; set {key}, a number of iterations")
        else:
            steps = value * total if value < 1 and total else _iterations(value, f)
        return Outcome(verdict="mapped", why="iterations", settings={key: max(round(steps), 1)})

    return rule


def _warmup(value: Any, f: Foreign) -> Outcome:
    total = _total(f)
    if not value:
        return mapped(optim__warmup_steps=0)
    if f["lr_scheduler_type"] == "constant":
        return ignored("no effect: transformers' schedule constant has no warm-up (constant_with_warmup has)")
    if value < 1 and total is None:
        return impossible("a share of a run whose length is unknown; set optim.warmup_steps")
    return mapped(
        "iterations", optim__warmup_steps=round(value * total) if value < 1 and total else _iterations(value, f)
    )


def _warmup_ratio(value: Any, f: Foreign) -> Outcome:
    return ignored("warmup_steps decides") if f["warmup_steps"] else _warmup(value, f)


def _warmup_steps(value: Any, f: Foreign) -> Outcome:
    return _warmup(value, f) if value or not f["warmup_ratio"] else ignored("0: warmup_ratio decides")


def _optimiser(value: Any, f: Foreign) -> Outcome:
    if value in (*ADAMW, "sgd"):
        return mapped(optim__optimizer="sgd" if value == "sgd" else "adamw")
    return impossible("the optimisers are adamw and sgd; adamw is taken", optim__optimizer="adamw")


def _schedule(value: Any, f: Foreign) -> Outcome:
    if value in get_args(Schedule):
        return mapped(optim__lr_scheduler_type=value)
    return impossible(f"the schedules are {', '.join(get_args(Schedule))}")


def _bf16(value: Any, f: Foreign) -> Outcome:
    if not value or (f["fp16"] and "bf16" not in f.given):
        return mapped(optim__mixed_precision="no")
    return mapped("products alone; weights stay as model.dtype says", optim__mixed_precision="bf16")


def _checkpointing(value: Any, f: Foreign) -> Outcome:
    return mapped(
        f"{MEMORY}; full is transformers' form", optim__gradient_checkpointing="selective" if value else "none"
    )


def _dtype(value: Any, f: Foreign) -> Outcome:
    if value in ("float32", "bfloat16", "float64"):
        return mapped(model__dtype=value)
    return ignored("auto: float32 is taken") if value in (None, "auto") else impossible("float32 or bfloat16 is taken")


def _lora(key: str) -> Rule:
    return only_where(_uses_peft, FULL, same(f"model.lora.{key}"))


def _uses_peft(f: Foreign) -> bool:
    return bool(f["use_peft"])


def _peft(value: Any, f: Foreign) -> Outcome:
    rank = f["lora_r"] or 16
    return mapped(model__lora__r=rank) if value else ignored("all weights are trained")


def _targets(value: Any, f: Foreign) -> Outcome:
    whole = value in (["all-linear"], "all-linear")
    return mapped(model__lora__target_modules="all-linear" if whole else value)


def _datasets(value: Any, f: Foreign) -> Outcome:
    if not value:
        return ignored("dataset_name decides")
    if not isinstance(value, Sequence) or len(value) != 1 or not isinstance(value[0], Mapping):
        return impossible("one data set is read; join them into one file for env.path")
    one = value[0]
    if set(str(one.get("split", ""))) & set("[+"):
        return impossible("all records of a split are read: write this part to a file, and give it as --env.path")
    path = one.get("data_files") or one.get("path")
    return mapped(RAW_TEXT, env__path=path, env__subset=one.get("name"), env__split=one.get("split", "train"))


def _test_split(value: Any, f: Foreign) -> Outcome:
    if f["eval_strategy"] == "no":
        return mapped("eval_strategy no: nothing is held out", env__eval_share=0.0)
    return impossible("one split is read: write this one to a file, and give it as --env.eval_path")


def _evaluation(value: Any, f: Foreign) -> Outcome:
    if value == "no":
        return mapped(run__eval_steps=0, env__eval_share=0.0)
    if not f["eval_dataset"]:
        why = (
            "what is evaluated on is not in the file: set env.eval_path, or env.eval_share; all records are trained on"
        )
        return impossible(why, env__eval_share=0.0)
    return ignored("eval_steps says how often") if f["eval_steps"] else impossible("set run.eval_steps, iterations")


def _resume(value: Any, f: Foreign) -> Outcome:
    return (
        ignored("a checkpoint of TRL's cannot be continued; its model can be model.name_or_path")
        if value
        else (ignored("a new run"))
    )


def _prompt_length(value: Any, f: Foreign) -> Outcome:
    return ignored(
        "TRL cuts a longer prompt from the left; here it is never cut (prompts.max_prompt_length refuses it)"
    )


def _steps_share(key: str) -> Rule:
    """Keys of what one iteration holds: decided together."""
    return lambda value, f: _batch(value, f) if key in f.given or key == "per_device_train_batch_size" else ignored("")


def _model(value: Any, f: Foreign) -> Outcome:
    return mapped(model__name_or_path=value) if value else impossible("set model.name_or_path")


def uses_vllm(f: Foreign) -> bool:
    return bool(f["use_vllm"])


def _server(value: Any, f: Foreign) -> Outcome:
    """TRL's client asks at 0.0.0.0 where its server is on the same machine."""
    host = f["vllm_server_host"] if f["vllm_server_host"] not in (None, "0.0.0.0") else "127.0.0.1"
    url = f["vllm_server_base_url"] or f"http://{host}:{f['vllm_server_port'] or 8000}"
    return mapped("of a server that vpd serve starts, or another of vLLM's; trl vllm-serve is none", engine__url=url)


def _ignored_keys(why: str, *keys: str) -> dict[str, Rule]:
    return {key: always_ignored(why) for key in keys}


#: keys that change nothing where they have one of these values, and are impossible otherwise
HARMLESS: Mapping[str, Sequence[Any]] = {
    "adam_epsilon": (1e-8,),
    "auto_find_batch_size": NOTHING,
    "beta": NOTHING,
    "delta": NOTHING,
    "entropy_coef": NOTHING,
    "fp16": NOTHING,
    "generation_kwargs": (*NOTHING, {}),
    "importance_sampling_level": ("token",),
    "label_smoothing_factor": NOTHING,
    "load_in_4bit": NOTHING,
    "load_in_8bit": NOTHING,
    "lora_dropout": NOTHING,
    "lr_scheduler_kwargs": (*NOTHING, {}),
    "mask_truncated_completions": NOTHING,
    "min_p": NOTHING,
    "model_init_kwargs": (*NOTHING, {}),
    "neftune_noise_alpha": NOTHING,
    "num_iterations": (1,),
    "off_policy_mask_threshold": NOTHING,
    "repetition_penalty": (1.0,),
    "router_aux_loss_coef": NOTHING,
    "sync_ref_model": NOTHING,
    "teacher_sync_steps": (1,),
    "top_entropy_quantile": (1.0,),
    "top_k": (*NOTHING, -1),
    "top_p": (1.0,),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "model_revision": (None, "main"),
    "reward_model_name_or_path": NOTHING,
    "shuffle_dataset": (True,),
    "optim_target_modules": NOTHING,
    "optim_args": NOTHING,
    "use_rslora": NOTHING,
    "use_dora": NOTHING,
    "lora_target_parameters": NOTHING,
    "lora_modules_to_save": NOTHING,
    "max_tool_calling_iterations": NOTHING,
    "chat_template_path": NOTHING,
    "teacher_model_init_kwargs": (*NOTHING, {}),
}

#: what vLLM alone reads
VLLM: Mapping[str, Rule] = {
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_host", "vllm_server_port"), _server),
    **common.server_arguments(
        {
            "vllm_gpu_memory_utilization": "gpu-memory-utilization",
            "vllm_tensor_parallel_size": "tensor-parallel-size",
            "vllm_model_impl": "model-impl",
        }
    ),
    "vllm_max_model_length": common.context,
    "vllm_importance_sampling_correction": common.correction,
    "vllm_importance_sampling_mode": only(("token_truncate",), "the ratio is each token's, and truncated"),
    "vllm_importance_sampling_cap": only((None,), common.BOUND),
    "vllm_structured_outputs_regex": absent("min_p", NOTHING),
    "vllm_guided_decoding_regex": absent("min_p", NOTHING),
}

SHARED: Mapping[str, Rule] = {
    **{key: absent(key, values) for key, values in HARMLESS.items()},
    **TRAINER,
    **_ignored_keys(
        MEMORY,
        "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
        "activation_offloading", "use_liger_kernel", "liger_kernel_config", "torch_empty_cache_steps", "use_cache",
        "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32", "attn_implementation",
        "cast_lm_head_to_fp32", "pad_to_multiple_of", "bf16_full_eval", "fp16_full_eval", "eval_accumulation_steps",
        "per_device_eval_batch_size", "padding_free", "skip_memory_metrics", "packing", "packing_strategy",
        "eval_packing",
    ),
    **_ignored_keys(
        LOGGING,
        "logging_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
        "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm", "log_completions", "log_multimodal",
        "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo", "include_num_input_tokens_seen",
        "include_for_metrics", "diagnostics_warning_interval", "diagnostics_flat_tolerance", "run_name", "project",
        "debug",
    ),
    **_ignored_keys("taken over with push_to_hub", "hub_model_id", "hub_private_repo"),
    **_ignored_keys(
        PROCESSES,
        "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order", "deepspeed", "fsdp",
        "local_rank", "accelerator_config", "parallelism_config", "average_tokens_across_devices", "use_cpu",
        "ds3_gather_for_generation", "ignore_data_skip", "train_sampling_strategy", "length_column_name", "data_seed",
        "dataset_num_proc", "dataset_streaming", "streaming", "ignore_bias_buffers", "full_determinism",
        "enable_jit_checkpoint", "save_on_each_node", "save_only_model", "restore_callback_states_from_checkpoint",
        "gradient_checkpointing_use_reentrant", "lora_task_type", "label_names", "prediction_loss_only",
        "remove_unused_columns", "do_train", "do_eval", "do_predict", "eval_delay", "eval_do_concat_batches",
        "eval_use_gather_object", "batch_eval_metrics", "num_generations_eval_batch", "disable_dropout",
        "use_teacher_server",
    ),
    **_ignored_keys(
        common.SAMPLER,
        "cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching",
        "transformers_continuous_batching_config",
    ),
    "adam_beta1": same("optim.adam_beta1"),
    "adam_beta2": same("optim.adam_beta2"),
    "bf16": _bf16,
    "chat_template_kwargs": common.template_arguments,
    "dataset_config": same("env.subset"),
    "dataset_name": same("env.path", RAW_TEXT),
    "dataset_test_split": _test_split,
    "dataset_train_split": split,
    "datasets": _datasets,
    "dtype": _dtype,
    "early_stopping_patience": same("run.early_stopping_patience", "evaluations, as in transformers' callback"),
    "eval_on_start": always_ignored("step 0 is always evaluated where run.eval_steps is above 0"),
    "eval_steps": _every("run.eval_steps", "eval_strategy"),
    "eval_strategy": _evaluation,
    "generation_batch_size": _steps_share("generation_batch_size"),
    "gradient_accumulation_steps": _steps_share("gradient_accumulation_steps"),
    "gradient_checkpointing": _checkpointing,
    "greater_is_better": greater,
    "learning_rate": same("optim.learning_rate"),
    "load_best_model_at_end": best,
    "lora_alpha": _lora("lora_alpha"),
    "lora_dropout": only_where(_uses_peft, FULL, absent("lora_dropout", NOTHING)),
    "lora_r": _lora("r"),
    "lora_target_modules": only_where(_uses_peft, FULL, _targets),
    "lr_scheduler_type": _schedule,
    "max_completion_length": same("rollout.max_completion_length"),
    "max_grad_norm": lambda value, f: mapped(optim__max_grad_norm=value or None),
    "max_prompt_length": _prompt_length,
    "max_steps": _max_steps,
    "metric_for_best_model": metric,
    "model_name_or_path": _model,
    "num_generations": same("rollout.num_generations"),
    "num_generations_eval": same("run.eval_samples"),
    "num_train_epochs": _epochs,
    "push_to_hub": upload,
    "optim": _optimiser,
    "output_dir": same("run.output_dir"),
    "overwrite_output_dir": always_ignored("a folder that holds a run is never written over"),
    "per_device_train_batch_size": _steps_share("per_device_train_batch_size"),
    "report_to": common.trackers("none"),
    "resume_from_checkpoint": _resume,
    "reward_funcs": rewards,
    "reward_weights": weights,
    "save_steps": _every("run.save_steps", "save_strategy"),
    "save_strategy": lambda value, f: mapped(run__save_steps=0) if value == "no" else ignored("save_steps says it"),
    "save_total_limit": same("run.save_total_limit"),
    "seed": same("run.seed"),
    "steps_per_generation": _steps_share("steps_per_generation"),
    "temperature": same("rollout.temperature"),
    "torch_dtype": _dtype,
    "trust_remote_code": same("model.trust_remote_code"),
    "use_peft": _peft,
    "use_vllm": lambda value, f: common.vllm() if value else ignored("as here: engine.name is embedded"),
    **common.of_vllm(uses_vllm, VLLM),
    "warmup_ratio": _warmup_ratio,
    "warmup_steps": _warmup_steps,
    "weight_decay": same("optim.weight_decay"),
}  # fmt: skip
