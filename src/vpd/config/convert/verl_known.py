"""Keys of verl's that change nothing of what is learned, or nothing as long as they have verl's own value.

A key that is neither here nor in :mod:`vpd.config.convert.verl` is unknown, perhaps a slip of the pen: it is named.
"""

from collections.abc import Mapping
from typing import Any

from vpd.config.convert import Rule, absent, always_ignored, common, ignored, mapped, only, only_where
from vpd.config.convert.verl_rules import ACTOR, CORRECTION, EVALUATED, MODEL, NOTHING, ROLLOUT, SYSTEM, uses_vllm
from vpd.config.elsewhere import ABSENT

EMPTY: tuple[Any, ...] = (*NOTHING, {}, [])
OTHER_LOSS = "of another loss (policy_loss.loss_mode)"
FILTERED = "taken over with data.max_prompt_length"
READING = "how verl reads and batches its data"
REWARDING = "how verl runs its reward functions"
OVERLONG = "a penalty for long answers is no part of a reward here: subtract it in the reward function (env.reward)"
MANAGER = "the environment grades: what this manager adds to a score belongs in the reward function (env.reward)"
OWN_CLASS = "a class of verl's that reads or draws records is not called: write what it makes to a file for env.path"


def _keys(why: str, section: str, names: str) -> dict[str, Rule]:
    return {f"{section}.{name}": always_ignored(why) for name in names.split()}


def _clip(value: Any, f: Any) -> Any:
    """The bound on the gradient of the optimiser's section, where the actor gives none."""
    if f"{ACTOR}.grad_clip" in f.given:
        return ignored("grad_clip of the actor is taken")
    return mapped(optim__max_grad_norm=value or None)


def _overlong(section: str) -> dict[str, Rule]:
    """A penalty for long answers: its switch, and what is read where that is on."""
    on = only_where(lambda f: bool(f[f"{section}.enable"]), "of overlong_buffer", always_ignored("said with enable"))
    return {f"{section}.enable": only(NOTHING, OVERLONG)} | {
        f"{section}.{name}": on for name in ("len", "penalty_factor", "log")
    }


_MANAGERS = ("naive", "prime", "batch", None)
KNOWN: Mapping[str, Rule] = {
    **_keys(SYSTEM, ACTOR, "strategy use_dynamic_bsz use_torch_compile use_fused_kernels use_remove_padding"
            " ulysses_sequence_parallel_size entropy_from_logits_with_chunking entropy_checkpointing load_weight"
            " data_loader_seed rollout_n use_prefix_grouper calculate_entropy calculate_sum_pi_squared"
            " sum_pi_squared_checkpointing infer_micro_batch_size_per_gpu infer_max_token_len_per_gpu"
            " ppo_infer_max_token_len_per_gpu use_dynamic_bsz_balance"),
    **_keys("of use_kl_loss", ACTOR, "kl_loss_coef kl_loss_type"),
    **_keys(OTHER_LOSS, f"{ACTOR}.policy_loss", "clip_cov_ratio clip_cov_lb clip_cov_ub kl_cov_ratio ppo_kl_coef"),
    **_keys("trainer.total_training_steps decides", f"{ACTOR}.optim", "total_training_steps"),
    f"{ACTOR}.optim.min_lr_ratio": always_ignored("taken over with lr_scheduler_type"),
    f"{ACTOR}.optim.num_cycles": only((0.5, None), "a cosine falls once, from the peak to 0"),
    f"{ACTOR}.optim.clip_grad": _clip,
    f"{ACTOR}.optim.optimizer_impl": only(("torch.optim", None), "the optimisers are adamw and sgd of torch"),
    f"{ACTOR}.optim.override_optimizer_config": only(EMPTY, ABSENT["optim_args"]),
    f"{ACTOR}.optim.zero_indexed_step": only((True, None), "the first iteration is at step 0 of the schedule"),
    f"{ACTOR}.shuffle": only(NOTHING, "the parts of a batch are whole groups, in their order"),
    f"{ACTOR}.tis_imp_ratio_cap": only((*NOTHING, -1), common.BOUND),
    f"{ACTOR}.use_rollout_log_probs": only(NOTHING, "set algorithm.importance_reference: sampler"),
    f"{ACTOR}.loss_scale_factor": only(NOTHING, "the means are token-mean and seq-mean-token-mean"),
    **_keys(common.SAMPLER, ROLLOUT, "mode prompt_length response_length enforce_eager cudagraph_capture_sizes"
            " free_cache_engine max_num_batched_tokens max_num_seqs disable_log_stats data_parallel_size"
            " expert_parallel_size pipeline_model_parallel_size enable_chunked_prefill enable_prefix_caching"
            " load_format multi_stage_wake_up layered_summon calculate_log_probs skip_tokenizer_init nnodes"
            " n_gpus_per_node enable_sleep_mode scheduling_policy logprobs_mode update_weights_bucket_megabytes"
            " log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu log_prob_use_dynamic_bsz"
            " log_prob_max_token_len_per_gpu skip_dump_dir agent.num_workers"),
    f"{ROLLOUT}.repetition_penalty": absent("repetition_penalty", (1, 1.0, None)),
    f"{ROLLOUT}.min_p": absent("min_p", NOTHING),
    f"{ROLLOUT}.ignore_eos": only(NOTHING, "an answer ends with the model's end token"),
    f"{ROLLOUT}.over_sample_rate": only(NOTHING, "every answer is waited for"),
    f"{ROLLOUT}.skip_rollout": only(NOTHING, "answers are always sampled; env.name recorded reads recorded ones"),
    f"{ROLLOUT}.quantization": only(NOTHING, "the server has the weights as they are"),
    f"{ROLLOUT}.agent.agent_loop_config_path": only(NOTHING, "an environment replies (docs/own_task.md)"),
    f"{ROLLOUT}.agent.default_agent_loop": only((None, "single_turn_agent"), "an environment replies"),
    f"{ROLLOUT}.agent.custom_async_server.path": only(NOTHING, "the engines are embedded and vllm"),
    f"{ROLLOUT}.agent.custom_async_server.name": only(NOTHING, "the engines are embedded and vllm"),
    **_keys(SYSTEM, MODEL, "hf_config_path use_shm enable_activation_offload use_remove_padding use_liger"
            " use_fused_kernels load_tokenizer override_config.attn_implementation"),
    f"{MODEL}.tokenizer_path": only(NOTHING, "the model's own tokenizer is taken"),
    f"{MODEL}.external_lib": only(NOTHING, "no other library is loaded with the model"),
    f"{MODEL}.override_config": only(EMPTY, "the model has the configuration of its folder"),
    f"{MODEL}.exclude_modules": only(NOTHING, "model.lora.target_modules names layers"),
    **_keys(READING, "data", "use_shm val_batch_size return_raw_input_ids return_raw_chat return_full_prompt"
            " dataloader_num_workers validation_shuffle filter_overlong_prompts_workers image_key video_key"
            " image_patch_size return_multi_modal_inputs need_tools_kwargs gen_batch_size"),
    **_keys(FILTERED, "data", "filter_overlong_prompts truncation"),
    CORRECTION: only(EMPTY, "its keys are read one by one"),
    "algorithm.filter_groups": only(EMPTY, "its keys are read one by one"),
    "custom_reward_function.reward_kwargs": only(EMPTY, "a reward function is given a record's columns alone"),
    "reward_model.reward_kwargs": only(EMPTY, MANAGER),
    "reward_model.use_reward_loop": always_ignored(REWARDING),
    "data.tokenizer": only(NOTHING, "the model's own tokenizer is taken"),
    "data.tool_config_path": only(NOTHING, "an environment replies through a method respond (docs/own_task.md)"),
    **dict.fromkeys(
        ("data.custom_cls.path", "data.custom_cls.name", "data.sampler.class_path", "data.sampler.class_name",
         "data.datagen.path", "data.datagen.name"),
        only(NOTHING, OWN_CLASS),
    ),
    **_keys(REWARDING, "reward_model", "strategy micro_batch_size micro_batch_size_per_gpu max_length use_dynamic_bsz"
            " forward_max_token_len_per_gpu launch_reward_fn_async ulysses_sequence_parallel_size num_workers"
            " enable_resource_pool nnodes n_gpus_per_node"),
    **_keys(REWARDING, "reward", "num_workers"),
    "reward_model.reward_manager": only(_MANAGERS, MANAGER),
    "reward.reward_manager.name": only(_MANAGERS, MANAGER),
    "reward_manager.name": only(_MANAGERS, MANAGER),
    **_keys(REWARDING, "reward.reward_manager", "source module.path module.name"),
    **_keys(REWARDING, "reward_manager", "source module.path module.name"),
    **_overlong("reward_model.overlong_buffer"),
    **_overlong("reward_model.reward_kwargs.overlong_buffer_cfg"),
    **_overlong("reward.reward_kwargs.overlong_buffer_cfg"),
    **_keys("of overlong_buffer", "reward_model.reward_kwargs", "max_resp_len"),
    **_keys("of overlong_buffer", "reward.reward_kwargs", "max_resp_len"),
    **_keys("of the KL penalty (use_kl_in_reward)", "algorithm", "kl_penalty kl_ctrl.type kl_ctrl.kl_coef"
            " kl_ctrl.horizon kl_ctrl.target_kl"),
    **_keys("of an estimator with a critic", "algorithm", "gamma lam"),
    **_keys("of rollout_is and rollout_rs", CORRECTION, "rollout_is_batch_normalize rollout_rs_threshold"
            " rollout_rs_threshold_lower rollout_token_veto_threshold"),
    **{
        f"{CORRECTION}.{name}": only_where(uses_vllm, "the ratio is 1", only((*NOTHING, *also), common.BOUND))
        for name, also in (("bypass_mode", ()), ("use_policy_gradient", ()), ("loss_type", ("ppo_clip",)))
    },
    **_keys(SYSTEM, "trainer", "balance_batch nnodes n_gpus_per_node log_val_generations rollout_data_dir"
            " validation_data_dir esi_redundant_time resume_mode resume_from_path default_hdfs_dir"
            " del_local_ckpt_after_load max_critic_ckpt_to_keep ray_wait_register_center_timeout device"
            " use_legacy_worker_impl profile_steps remove_previous_ckpt_in_save"),
    "trainer.project_name": always_ignored("a part of run.output_dir"),
    "trainer.val_only": only(NOTHING, "vpd eval evaluates without training"),
}  # fmt: skip
PREFIXES: Mapping[str, Rule] = {
    "defaults": always_ignored("files named there are not read; of verl's own, what matters is known"),
    **dict.fromkeys(
        (f"{ACTOR}.fsdp_config", f"{ACTOR}.checkpoint", f"{ACTOR}.profiler", f"{ACTOR}.megatron", f"{ACTOR}.veomni",
         f"{ACTOR}.router_replay", f"{MODEL}.fused_kernel_options", f"{MODEL}.tiled_mlp",
         "actor_rollout_ref.hybrid_engine", "actor_rollout_ref.nccl_timeout", "model_engine", "transfer_queue.",
         "global_profiler.", "ray_kwargs.", "ray_init.", "skip.", "hydra.", "trainer.npu_profile"),
        always_ignored(SYSTEM),
    ),
    "actor_rollout_ref.ref.": always_ignored("of a reference model, which is used for a KL penalty alone"),
    **dict.fromkeys(
        (f"{ROLLOUT}.engine_kwargs", f"{ROLLOUT}.trace", f"{ROLLOUT}.profiler", f"{ROLLOUT}.checkpoint_engine",
         f"{ROLLOUT}.prometheus"),
        always_ignored(common.SAMPLER),
    ),
    f"{ROLLOUT}.val_kwargs.": always_ignored(EVALUATED),
    f"{ROLLOUT}.multi_turn.": always_ignored("of multi_turn.enable"),
    "critic.": always_ignored("there is no critic"),
    "algorithm.pf_ppo.": always_ignored("of use_pf_ppo"),
    "algorithm.filter_groups.": always_ignored("of filter_groups.enable"),
    "reward_model.model.": always_ignored("of reward_model.enable"),
    "reward_model.rollout.": always_ignored("of reward_model.enable"),
    "reward.reward_model.": always_ignored("of reward_model.enable"),
    "reward_model.profiler.": always_ignored(SYSTEM),
    **dict.fromkeys(
        ("sandbox_fusion.", "reward_model.sandbox_fusion.", "reward.sandbox_fusion."),
        always_ignored("programs run in this library's sandbox"),
    ),
    "distillation.": always_ignored("of distillation.enabled"),
}  # fmt: skip
