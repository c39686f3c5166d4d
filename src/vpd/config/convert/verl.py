"""verl's configuration (0.9.1) and that of SDPO's authors, a fork of verl, as settings of this library.

A step of verl is an iteration here, ``data.train_batch_size`` counts tasks in both, and ``ppo_mini_batch_size`` tasks
too: ``algorithm.updates_per_batch`` is the one divided by the other.
"""

from collections.abc import Mapping

from vpd.config.convert import (
    Dialect,
    Rule,
    absent,
    always_ignored,
    common,
    ignored,
    mapped,
    only,
    only_where,
    same,
    templates,
)
from vpd.config.convert import verl_rules as rules
from vpd.config.convert.verl_known import KNOWN, PREFIXES
from vpd.config.convert.verl_rules import (
    ACTOR,
    CORRECTION,
    DEFAULTS,
    EVALUATED,
    MODEL,
    NOTHING,
    REPLIES,
    ROLLOUT,
    SELF,
)
from vpd.config.elsewhere import ABSENT

SAME_WEIGHTS = "answers are sampled with the weights that learn: the ratio is 1"

RULES: Mapping[str, Rule] = {
    **KNOWN,
    "data.train_files": rules.path("env.path"),
    "data.reward_fn_key": rules.scorer,
    "data.val_files": rules.path("env.eval_path"),
    "data.prompt_key": rules.prompt_key,
    "data.train_batch_size": same("rollout.prompts_per_step"),
    "data.max_prompt_length": rules.prompt_length,
    "data.max_response_length": same("rollout.max_completion_length"),
    "data.seed": lambda value, f: ignored("none") if value is None else mapped(run__seed=value),
    "data.shuffle": only((True,), ABSENT["shuffle_dataset"]),
    "data.train_max_samples": only((-1, None), "all records are read"),
    "data.val_max_samples": lambda value, f: mapped(run__eval_limit=value if value and value > 0 else None),
    "data.trust_remote_code": always_ignored("model.trust_remote_code decides"),
    "data.apply_chat_template_kwargs": common.template_arguments,
    f"{MODEL}.path": same("model.name_or_path"),
    f"{MODEL}.trust_remote_code": same("model.trust_remote_code"),
    f"{MODEL}.lora_rank": rules.lora_rank,
    f"{MODEL}.lora_alpha": rules.lora("model.lora.lora_alpha"),
    f"{MODEL}.target_modules": rules.lora("model.lora.target_modules"),
    f"{MODEL}.lora_adapter_path": only(NOTHING, "give the adapter's folder as model.name_or_path: it is merged"),
    f"{MODEL}.enable_gradient_checkpointing": lambda value, f: mapped(
        "memory, not what is learned", optim__gradient_checkpointing="selective" if value else "none"
    ),
    f"{MODEL}.custom_chat_template": only(NOTHING, ABSENT["chat_template_path"]),
    f"{ACTOR}.optim.lr": same("optim.learning_rate"),
    f"{ACTOR}.optim.weight_decay": same("optim.weight_decay"),
    f"{ACTOR}.optim.betas": rules.betas,
    f"{ACTOR}.optim.optimizer": rules.optimiser,
    f"{ACTOR}.optim.lr_warmup_steps": rules.warmup,
    f"{ACTOR}.optim.lr_warmup_steps_ratio": always_ignored("taken over with lr_warmup_steps"),
    f"{ACTOR}.optim.lr_scheduler_type": rules.schedule,
    f"{ACTOR}.optim.warmup_style": lambda value, f: ignored("none") if value is None else rules.schedule(value, f),
    f"{ACTOR}.grad_clip": same("optim.max_grad_norm"),
    f"{ACTOR}.ppo_mini_batch_size": rules.mini_batch,
    f"{ACTOR}.ppo_micro_batch_size": rules.micro_batch,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": rules.micro_batch,
    f"{ACTOR}.ppo_max_token_len_per_gpu": rules.most_tokens,
    f"{ACTOR}.ppo_epochs": absent("num_iterations", (1,)),
    f"{ACTOR}.clip_ratio": rules.clip,
    f"{ACTOR}.clip_ratio_low": rules.policy_only("algorithm.clip_low"),
    f"{ACTOR}.clip_ratio_high": rules.policy_only("algorithm.clip_high"),
    f"{ACTOR}.clip_ratio_c": rules.second_clip,
    f"{ACTOR}.policy_loss.loss_mode": rules.loss_mode,
    f"{ACTOR}.loss_agg_mode": rules.average,
    f"{ACTOR}.entropy_coeff": absent("entropy_coeff", NOTHING),
    f"{ACTOR}.use_kl_loss": absent("use_kl_loss", NOTHING),
    f"{ACTOR}.freeze_vision_tower": only(NOTHING, "images are not read"),
    f"{ROLLOUT}.name": rules.sampler,
    **common.of_vllm(
        rules.uses_vllm,
        {
            **common.server_arguments(
                {
                    f"{ROLLOUT}.gpu_memory_utilization": "gpu-memory-utilization",
                    f"{ROLLOUT}.tensor_model_parallel_size": "tensor-parallel-size",
                }
            ),
            f"{ROLLOUT}.max_model_len": common.context,
            f"{ROLLOUT}.dtype": rules.server_type,
        },
    ),
    f"{ROLLOUT}.n": same("rollout.num_generations"),
    f"{ROLLOUT}.temperature": same("rollout.temperature"),
    f"{ROLLOUT}.top_p": absent("top_p", (1, 1.0)),
    f"{ROLLOUT}.top_k": absent("top_k", (-1, 0, None)),
    f"{ROLLOUT}.do_sample": only((True,), ABSENT["top_p"]),
    f"{ROLLOUT}.val_kwargs.n": same("run.eval_samples"),
    f"{ROLLOUT}.val_kwargs.temperature": always_ignored(EVALUATED),
    f"{ROLLOUT}.multi_turn.enable": only(NOTHING, REPLIES),
    "algorithm.adv_estimator": rules.estimator,
    "algorithm.norm_adv_by_std_in_grpo": rules.scale,
    f"{CORRECTION}.rollout_is": only_where(rules.uses_vllm, SAME_WEIGHTS, rules.correction),
    f"{CORRECTION}.rollout_is_threshold": only_where(rules.uses_vllm, SAME_WEIGHTS, rules.correction_bound),
    f"{CORRECTION}.rollout_rs": only_where(rules.uses_vllm, SAME_WEIGHTS, absent("off_policy_mask_threshold", NOTHING)),
    "algorithm.use_kl_in_reward": absent("use_kl_in_reward", NOTHING),
    "algorithm.filter_groups.enable": only(NOTHING, "no group is drawn again; one of equal rewards has no advantage"),
    "algorithm.use_pf_ppo": only(NOTHING, "there is no such weighting"),
    "custom_reward_function.path": rules.reward("custom_reward_function"),
    "custom_reward_function.name": always_ignored("taken over with its path"),
    "reward.custom_reward_function.path": rules.reward("reward.custom_reward_function"),
    "reward.custom_reward_function.name": always_ignored("taken over with its path"),
    "reward.reward_model.enable": only(NOTHING, ABSENT["reward_model_name_or_path"]),
    "reward_model.enable": only(NOTHING, ABSENT["reward_model_name_or_path"]),
    "distillation.enabled": only(NOTHING, "algorithm.name gkd distils an external teacher"),
    "trainer.total_epochs": rules.epochs,
    "trainer.total_training_steps": rules.steps,
    "trainer.save_freq": rules.freq("run.save_steps"),
    "trainer.test_freq": rules.freq("run.eval_steps"),
    "trainer.val_before_train": always_ignored("step 0 is always evaluated where run.eval_steps is above 0"),
    "trainer.logger": common.trackers("console", "file", why="the console always"),
    "trainer.default_local_dir": rules.folder,
    "trainer.experiment_name": rules.experiment,
    "trainer.max_actor_ckpt_to_keep": same("run.save_total_limit"),
    "trainer.critic_warmup": only(NOTHING, "there is no critic"),
    **rules.of_sdpo(
        {
            "full_logit_distillation": rules.exact,
            "distillation_topk": always_ignored("taken over with full_logit_distillation"),
            "distillation_add_tail": same("algorithm.distillation_tail"),
            "alpha": same("algorithm.distillation_alpha"),
            "is_clip": same("algorithm.importance_clip"),
            "kl_pointwise_clip": only(NOTHING, "the divergence of a token has no bound"),
            "success_reward_threshold": same("rollout.success_threshold"),
            "teacher_regularization": rules.regularization,
            "teacher_update_rate": rules.teacher_rate,
            "ema_update_rate": rules.teacher_rate,
            "max_reprompt_len": templates.reprompt_length,
            "reprompt_truncation": always_ignored("a text that is too long loses its middle"),
            "dont_reprompt_on_self_success": templates.own_success,
            "remove_thinking_from_demonstration": rules.sources,
            "include_environment_feedback": rules.sources,
            "environment_feedback_only_without_solution": lambda value, f: templates.without_solution(
                value, f[f"{SELF}.include_environment_feedback"]
            ),
            "reprompt_template": templates.reprompt,
            "solution_template": templates.header("prompts.demonstration_header", "successful_previous_attempt"),
            "feedback_template": templates.header("prompts.feedback_header", "feedback_raw"),
        }
    ),
}
VERL = Dialect(name="verl's configuration", defaults=DEFAULTS, rules=RULES, prefixes=PREFIXES, implied=rules.implied)
SDPO = Dialect(
    name="the configuration of SDPO's authors",
    defaults=DEFAULTS
    | {
        "data.train_batch_size": 32,
        f"{ACTOR}.optim.lr": 1e-5,
        f"{ACTOR}.ppo_mini_batch_size": 32,
        f"{ACTOR}.policy_loss.loss_mode": "sdpo",
        f"{ROLLOUT}.n": 8,
        "algorithm.adv_estimator": "grpo",
        f"{SELF}.full_logit_distillation": True,
        f"{SELF}.distillation_topk": 100,
        f"{SELF}.distillation_add_tail": True,
        f"{SELF}.alpha": 0.5,
        f"{SELF}.is_clip": 2.0,
        f"{SELF}.success_reward_threshold": 0.5,
        f"{SELF}.teacher_regularization": "ema",
        f"{SELF}.teacher_update_rate": 0.05,
        f"{SELF}.remove_thinking_from_demonstration": True,
        f"{SELF}.include_environment_feedback": True,
        f"{SELF}.environment_feedback_only_without_solution": True,
    },
    rules=RULES,
    prefixes=PREFIXES,
    implied=rules.implied,
)
