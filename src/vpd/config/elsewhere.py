"""Where the settings of TRL, verl and SDPO's code are found here, for the hint that follows an unknown key.

Settings of the same name need no line: they are looked up in the classes of the sections.
"""

from collections.abc import Mapping

#: (key elsewhere): place here, with a remark where the meaning differs.
RENAMED: Mapping[str, str] = {
    "bf16": "optim.mixed_precision: bf16 (products alone), or model.dtype: bfloat16 (weights)",
    "clip_ratio_high": "algorithm.clip_high",
    "clip_ratio_low": "algorithm.clip_low",
    "dataset_config": "env.subset",
    "dataset_name": "env.path, with env.name: dataset (or math, code, ...)",
    "dataset_test_split": "env.eval_path",
    "dataset_train_split": "env.split",
    "distillation_add_tail": "algorithm.distillation_tail",
    "distillation_is_clip": "algorithm.importance_clip",
    "distillation_mode": "algorithm.distillation_estimator (sampled or exact), with algorithm.distillation_topk",
    "ema_decay": "algorithm.teacher_ema_rate, which is 1 - decay",
    "environment_feedback_only_without_solution": "prompts.feedback_with_demonstration, with the opposite sign",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "eval_on_start": "run.eval_steps: step 0 is always evaluated where it is above 0",
    "eval_strategy": "run.eval_steps; 0: never",
    "evaluation_strategy": "run.eval_steps; 0: never",
    "feedback_template": "prompts.feedback_header",
    "full_logit_distillation": "algorithm.distillation_estimator: exact",
    "generation_batch_size": "rollout.prompts_per_step times rollout.num_generations",
    "include_environment_feedback": "feedback: [environment]",
    "is_clip": "algorithm.importance_clip",
    "lmbda": "algorithm.student_fraction, of algorithm.name: gkd",
    "logging_dir": "run.output_dir",
    "loss_agg_mode": "algorithm.average",
    "loss_type": "algorithm.average: seq_mean (grpo) or token_mean (dapo)",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "lr": "optim.learning_rate",
    "lr_scheduler": "optim.lr_scheduler_type",
    "lr_warmup_steps": "optim.warmup_steps",
    "max_feedback_len": "prompts.max_feedback_length",
    "max_new_tokens": "rollout.max_completion_length",
    "max_reprompt_len": "prompts.max_demonstration_length and prompts.max_feedback_length",
    "max_response_length": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "model": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_path": "model.name_or_path",
    "num_return_sequences": "rollout.num_generations",
    "optim": "optim.optimizer (adamw or sgd; no 8-bit one); optim itself is a section here",
    "overwrite_output_dir": "run.resume; a folder that holds a run is never written over",
    "per_device_train_batch_size": "rollout.prompts_per_step (tasks) times rollout.num_generations (answers); rows at"
    " once in memory: optim.micro_batch_size",
    "ppo_epochs": "algorithm.updates_per_batch",
    "ppo_micro_batch_size": "optim.micro_batch_size",
    "ppo_micro_batch_size_per_gpu": "optim.micro_batch_size",
    "ppo_mini_batch_size": "algorithm.updates_per_batch (how many parts, not how large)",
    "reprompt_template": "prompts.feedback_header, demonstration_header and closing",
    "resume_from_checkpoint": "run.resume: true",
    "reward_funcs": "env.reward, with env.name: dataset",
    "reward_functions": "env.reward, with env.name: dataset",
    "reward_weights": "env.reward: [{function: ..., weight: ...}]",
    "save_strategy": "run.save_steps; 0: never",
    "solution_template": "prompts.demonstration_header",
    "steps_per_generation": "algorithm.updates_per_batch",
    "success_reward_threshold": "rollout.success_threshold",
    "system_prompt": "env.system",
    "teacher_model_kind": "algorithm.teacher (base is called frozen)",
    "teacher_model_name_or_path": "algorithm.teacher_model, of algorithm.name: gkd",
    "teacher_regularization": "algorithm.teacher",
    "teacher_update_rate": "algorithm.teacher_ema_rate",
    "torch_dtype": "model.dtype",
    "total_epochs": "run.max_steps, which counts iterations: an epoch of n tasks is n / rollout.prompts_per_step",
    "train_batch_size": "rollout.prompts_per_step",
    "use_peft": "model.lora: {}",
    "use_successful_as_teacher": "feedback: [sibling]",
    "num_train_epochs": "run.max_steps, which counts iterations: an epoch of n tasks is n / rollout.prompts_per_step",
    "val_batch_size": "run.eval_limit",
    "warmup_ratio": "optim.warmup_steps, a number of iterations",
}

_LAUNCHER = "the launcher says how many processes there are: torchrun --nproc_per_node N -m vpd train ..."
_SHARDING = "optim.sharding is the one choice: none or fsdp2"
_EMBEDDED = "answers are sampled in the training process"
_LOADING = "a model is loaded whole, with the attention that transformers chooses"
_HUB = "nothing is sent to the Hub; run.output_dir/model can be uploaded"
_ALL_KEPT = "the last weights are exported, whatever their score"
_NUCLEUS = "training samples from the whole distribution, so that log-probs are of what was sampled"
_TRAINER = "its trainer's own; this library has another"
_EVERY_STEP = "every iteration is logged"

#: (key elsewhere): why there is nothing like it here.
ABSENT: Mapping[str, str] = {
    "actor_rollout_ref": "a section of verl's; its keys are in model, optim, rollout and algorithm",
    "adam_epsilon": "it is torch's default, 1e-8",
    "attn_implementation": _LOADING,
    "auto_find_batch_size": "set optim.micro_batch_size and optim.max_tokens_per_microbatch",
    "beta": "there is no KL penalty to a reference model (GKD's beta is algorithm.distillation_alpha;"
    " algorithm.teacher_beta is the scale of the implicit reward, another thing)",
    "chat_template_path": "the tokenizer's own template is used",
    "cispo_epsilon_max": "there is no such loss",
    "cache_implementation": _EMBEDDED,
    "data": "a section of verl's; its keys are in env, rollout and prompts",
    "data_seed": "run.seed fixes tasks and samples",
    "dataloader_num_workers": "tasks are drawn in the training process",
    "dataloader_drop_last": "tasks are an endless stream of epochs",
    "ddp_find_unused_parameters": _TRAINER,
    "deepspeed": _SHARDING,
    "delta": "there is no second clip",
    "disable_dropout": "dropout is always off",
    "ds3_gather_for_generation": _SHARDING,
    "early_stopping_patience": _ALL_KEPT,
    "entropy_coeff": "there is no bonus for entropy",
    "fp16": "the choices are fp32 and bf16 (optim.mixed_precision, model.dtype)",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "generation_kwargs": "temperature is the one setting of sampling, rollout.temperature",
    "gradient_accumulation_steps": "micro-batches of an iteration are summed by themselves; the batch is"
    " rollout.prompts_per_step times rollout.num_generations",
    "gradient_checkpointing_kwargs": "optim.gradient_checkpointing: none, selective or full",
    "greater_is_better": _ALL_KEPT,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
    "importance_sampling_level": "the ratio is each token's",
    "kl_coef": "there is no KL penalty to a reference model",
    "kl_loss_coef": "there is no KL penalty to a reference model",
    "load_best_model_at_end": _ALL_KEPT,
    "load_in_4bit": _LOADING,
    "load_in_8bit": _LOADING,
    "local_rank": _LAUNCHER,
    "log_completions": "every completion is in run.output_dir/rollouts",
    "log_level": _EVERY_STEP,
    "logging_first_step": _EVERY_STEP,
    "logging_steps": _EVERY_STEP,
    "logging_strategy": _EVERY_STEP,
    "lora_dropout": "a policy is one distribution, so there is no dropout",
    "lr_scheduler_kwargs": "only schedules without further settings can be used",
    "mask_truncated_completions": "an answer that was cut is graded and counts",
    "metric_for_best_model": _ALL_KEPT,
    "min_p": _NUCLEUS,
    "model_init_kwargs": _LOADING,
    "n_gpus_per_node": _LAUNCHER,
    "neftune_noise_alpha": _TRAINER,
    "nnodes": _LAUNCHER,
    "num_completions_to_print": "every completion is in run.output_dir/rollouts",
    "num_iterations": "a batch is learned from once; algorithm.updates_per_batch splits it into several steps",
    "packing": "rows that begin alike share one pass by themselves (optim.share_prefixes)",
    "per_device_eval_batch_size": "run.eval_limit and run.eval_samples say how many; rollout.max_rows how many at once",
    "push_to_hub": _HUB,
    "remove_unused_columns": "every column reaches the reward functions",
    "repetition_penalty": _NUCLEUS,
    "run_name": "the folder run.output_dir is its name",
    "seq_kd": "there is no supervised training on a teacher's texts",
    "sync_ref_model": "there is no reference model",
    "teacher_sync_steps": "the average moves in every iteration; algorithm.teacher_ema_rate says how far",
    "tensor_parallel_size": _EMBEDDED,
    "tf32": _TRAINER,
    "top_k": _NUCLEUS,
    "top_p": f"{_NUCLEUS} (vpd eval has --top_p)",
    "torch_compile": _TRAINER,
    "trainer": "a section of verl's; its keys are in run",
    "trust_remote_code": "code that comes with a model is not run",
    "use_cache": _EMBEDDED,
    "use_kl_in_reward": "there is no KL penalty to a reference model",
    "use_kl_loss": "there is no KL penalty to a reference model",
    "use_liger_kernel": "the head is computed in chunks by itself (optim.chunk_tokens)",
    "use_vllm": _EMBEDDED,
}
_ABSENT_PREFIXES: Mapping[str, str] = {"vllm_": _EMBEDDED, "hub_": _HUB, "fsdp_": _SHARDING, "bnb_": _LOADING}


def elsewhere(key: str) -> str | None:
    """What another library's setting is here, as a sentence; None for a key that none of them has."""
    if key in RENAMED:
        return f"That is {RENAMED[key]} here."
    why = ABSENT.get(key) or next((why for start, why in _ABSENT_PREFIXES.items() if key.startswith(start)), None)
    return f"{key} has no counterpart here: {why}." if why else None
