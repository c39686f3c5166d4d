"""verl's configuration (0.9.1) and that of SDPO's authors, a fork of verl, as settings of this library.

A step of verl is an iteration here, ``data.train_batch_size`` counts tasks in both, and ``ppo_mini_batch_size`` tasks
too: ``algorithm.updates_per_batch`` is the one divided by the other.
"""

from collections.abc import Mapping
from typing import Any

from vpd.config.convert import (
    Dialect,
    Foreign,
    Outcome,
    Rule,
    absent,
    always_ignored,
    ignored,
    impossible,
    mapped,
    only,
    same,
    templates,
)
from vpd.config.elsewhere import ABSENT

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
SELF = f"{ACTOR}.self_distillation"
NOTHING = (None, False, 0, 0.0, "", "null")
AVERAGES = {"token-mean": "token_mean", "seq-mean-token-mean": "seq_mean"}
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
SCORES = "verl scores a record by its data_source; this environment follows from the path, or is math: see env.name"
DATA = {"sciknoweval": "science", "tooluse": "tooluse", "lcb": "code", "livecodebench": "code"}
SYSTEM = "how the work is divided and held in memory, not what is learned"
SAMPLER = "answers are sampled by the engine of this library"
EVALUATED = "the evaluation of a run samples as the training does (vpd eval has --temperature and --top_p)"
REPLIES = "an environment replies through a method respond (docs/environments.md)"

DEFAULTS: dict[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_response_length": 512,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.optim.weight_decay": 0.01,
    f"{ACTOR}.optim.lr_warmup_steps": -1,
    f"{ACTOR}.optim.lr_scheduler_type": "constant",
    f"{ACTOR}.ppo_mini_batch_size": 256,
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.temperature": 1.0,
    "algorithm.adv_estimator": "gae",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "trainer.total_epochs": 30,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "trainer.max_actor_ckpt_to_keep": None,
}


def _distills(f: Foreign) -> bool:
    return bool(f[f"{ACTOR}.policy_loss.loss_mode"] == "sdpo")


def _batch(f: Foreign) -> int:
    return int(f.number("data.train_batch_size", 1024))


def _updates(f: Foreign) -> int:
    return max(round(_batch(f) / max(f.number(f"{ACTOR}.ppo_mini_batch_size", 256), 1)), 1)


def _mini_batch(value: Any, f: Foreign) -> Outcome:
    return mapped(f"{_batch(f)} tasks in parts of {value}", algorithm__updates_per_batch=_updates(f))


def _total(f: Foreign) -> int | None:
    steps = f.number("trainer.total_training_steps", -1)
    if steps > 0:
        return int(steps)
    return None if f.tasks is None else max(int(f.number("trainer.total_epochs", 30) * f.tasks // _batch(f)), 1)


def _epochs(value: Any, f: Foreign) -> Outcome:
    if f.number("trainer.total_training_steps", -1) > 0:
        return ignored("trainer.total_training_steps decides")
    if f.tasks is None:
        return impossible("the number of records is unknown: set run.max_steps to epochs * records / prompts_per_step")
    return mapped(f"{value:g} epoch(s) of {f.tasks} records, {_batch(f)} an iteration", run__max_steps=_total(f))


def _steps(value: Any, f: Foreign) -> Outcome:
    return ignored("total_epochs decides") if (value or -1) <= 0 else mapped(run__max_steps=int(value))


def _freq(place: str) -> Rule:
    def rule(value: Any, f: Foreign) -> Outcome:
        often = int(value) if value and value > 0 else 0
        return Outcome(verdict="mapped", why="" if often else "0: never", settings={place: often})

    return rule


def _warmup(value: Any, f: Foreign) -> Outcome:
    share, total = f.number(f"{ACTOR}.optim.lr_warmup_steps_ratio"), _total(f)
    if value is not None and value > 0:
        return mapped(optim__warmup_steps=int(value))
    if share and total is None:
        return impossible("a share of a run whose length is unknown; set optim.warmup_steps")
    return mapped(optim__warmup_steps=round(share * (total or 0)))


def _schedule(value: Any, f: Foreign) -> Outcome:
    if value == "constant":
        return mapped("with optim.warmup_steps", optim__lr_scheduler_type="constant_with_warmup")
    if value == "cosine" and not f.number(f"{ACTOR}.optim.min_lr_ratio"):
        return mapped(optim__lr_scheduler_type="cosine")
    return impossible("constant, or cosine down to 0")


def _betas(value: Any, f: Foreign) -> Outcome:
    first, second = value
    return mapped(optim__adam_beta1=first, optim__adam_beta2=second)


def _optimiser(value: Any, f: Foreign) -> Outcome:
    known = {"AdamW": "adamw", "SGD": "sgd"}
    if value in known:
        return mapped(optim__optimizer=known[value])
    return impossible("the optimisers are adamw and sgd")


def _loss_mode(value: Any, f: Foreign) -> Outcome:
    if value == "sdpo":
        return mapped(algorithm__name="sdpo", algorithm__denominator="all")
    if value == "vanilla":
        return mapped(algorithm__name="grpo", feedback=[])
    return impossible("vanilla (grpo) or sdpo; grpo is taken", algorithm__name="grpo", feedback=[])


def _estimator(value: Any, f: Foreign) -> Outcome:
    if value == "grpo":
        return ignored("as here: no critic" if _distills(f) else "as here: grpo")
    return impossible("an advantage is relative to the group (grpo); there is no critic")


def _scale(value: Any, f: Foreign) -> Outcome:
    if _distills(f):
        return ignored("sdpo has no advantage")
    return mapped(algorithm__scale_rewards="group" if value else "none")


def _policy_only(place: str) -> Rule:
    return lambda value, f: (
        ignored("sdpo has no policy gradient") if _distills(f) else Outcome(verdict="mapped", settings={place: value})
    )


def _clip(value: Any, f: Foreign) -> Outcome:
    if _distills(f) or f[f"{ACTOR}.clip_ratio_low"] != DEFAULTS[f"{ACTOR}.clip_ratio_low"]:
        return ignored("clip_ratio_low and clip_ratio_high decide")
    high = f[f"{ACTOR}.clip_ratio_high"] if f"{ACTOR}.clip_ratio_high" in f.given else value
    return mapped(algorithm__clip_low=value, algorithm__clip_high=high)


def _second_clip(value: Any, f: Foreign) -> Outcome:
    if _updates(f) == 1 or _distills(f):
        return ignored("no effect with one update on a batch")
    return impossible(ABSENT["delta"])


def _average(value: Any, f: Foreign) -> Outcome:
    if value in AVERAGES:
        return mapped("over the whole batch", algorithm__average=AVERAGES[value])
    return impossible(f"the means are {' and '.join(AVERAGES)}")


def _lora_rank(value: Any, f: Foreign) -> Outcome:
    return mapped(model__lora__r=value) if value else ignored("all weights are trained")


def _lora(place: str) -> Rule:
    def rule(value: Any, f: Foreign) -> Outcome:
        if not f.number(f"{MODEL}.lora_rank"):
            return ignored("all weights are trained")
        return Outcome(verdict="mapped", settings={place: value})

    return rule


def _micro_batch(value: Any, f: Foreign) -> Outcome:
    return (
        mapped("rows at once; memory, not what is learned", optim__micro_batch_size=value) if value else ignored("none")
    )


def _most_tokens(value: Any, f: Foreign) -> Outcome:
    if not f[f"{ACTOR}.use_dynamic_bsz"]:
        return ignored("use_dynamic_bsz is false")
    return mapped("memory, not what is learned", optim__max_tokens_per_microbatch=value)


def _path(place: str) -> Rule:
    def rule(value: Any, f: Foreign) -> Outcome:
        files = [value] if isinstance(value, str) else list(value or ())
        if len(files) > 1:
            return impossible("one file is read; join them", **{place.replace(".", "__"): files[0]})
        return Outcome(verdict="mapped", settings={place: files[0]}) if files else ignored("none")

    return rule


def _reward(folder: str) -> Rule:
    """``custom_reward_function.path`` with its ``name``."""

    def rule(value: Any, f: Foreign) -> Outcome:
        if not value:
            return ignored("none")
        name = f[f"{folder}.name"] or "compute_score"
        why = "called as verl calls it; a mapping with score and feedback gives the teacher something to read"
        return mapped(why, env__name="dataset", env__reward=f"{value}:{name}")

    return rule


def _has_reward(f: Foreign) -> bool:
    return bool(f["custom_reward_function.path"] or f["reward.custom_reward_function.path"])


def _prompt_key(value: Any, f: Foreign) -> Outcome:
    if value == "prompt":
        return ignored("as here")
    return mapped(env__prompt=value) if _has_reward(f) else impossible("the column is prompt")


def _logger(value: Any, f: Foreign) -> Outcome:
    names = [value] if isinstance(value, str) else list(value or ())
    known = [name for name in names if name in TRACKERS]
    if set(names) - {*TRACKERS, "console", "file"}:
        return impossible(f"the trackers are {', '.join(TRACKERS)}", run__report_to=known)
    return mapped("the console always", run__report_to=known)


def _folder(value: Any, f: Foreign) -> Outcome:
    return mapped(run__output_dir=value) if value else ignored("none")


def _experiment(value: Any, f: Foreign) -> Outcome:
    if f["trainer.default_local_dir"]:
        return ignored("trainer.default_local_dir is the folder")
    return mapped(
        "the folder is its name", run__output_dir=f"checkpoints/{f['trainer.project_name'] or 'verl'}/{value}"
    )


def _template(value: Any, f: Foreign) -> Outcome:
    if not value:
        return ignored("none")
    if isinstance(value, Mapping) and set(value) == {"enable_thinking"}:
        return mapped(prompts__enable_thinking=bool(value["enable_thinking"]))
    return impossible("of a template's arguments enable_thinking alone can be given")


def _prompt_length(value: Any, f: Foreign) -> Outcome:
    if f["data.filter_overlong_prompts"] or f["data.truncation"] not in (None, "error"):
        return impossible("a longer prompt is neither left out nor cut; leave such records out of the data")
    return mapped("a longer one is an error", prompts__max_prompt_length=value)


def _regularization(value: Any, f: Foreign) -> Outcome:
    kinds = {"ema": "ema", "trust-region": "trust_region"}
    return mapped(algorithm__teacher=kinds[value]) if value in kinds else impossible("ema or trust-region")


def _teacher_rate(value: Any, f: Foreign) -> Outcome:
    if f[f"{SELF}.teacher_regularization"] == "trust-region":
        return mapped(algorithm__teacher_trust_region_mix=value)
    return mapped(algorithm__teacher_ema_rate=value)


def _exact(value: Any, f: Foreign) -> Outcome:
    topk = f[f"{SELF}.distillation_topk"] if value else None
    return mapped(algorithm__distillation_estimator="exact" if value else "sampled", algorithm__distillation_topk=topk)


def _sources(value: Any, f: Foreign) -> Outcome:
    environment, thinking = f[f"{SELF}.include_environment_feedback"], f[f"{SELF}.remove_thinking_from_demonstration"]
    return mapped(feedback=templates.sources(environment, True, remove_thinking=thinking))


def _of_sdpo(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Keys of ``self_distillation``, which nothing but sdpo reads."""

    def guarded(rule: Rule) -> Rule:
        return lambda value, f: rule(value, f) if _distills(f) else ignored("of sdpo (policy_loss.loss_mode)")

    return {f"{SELF}.{key}": guarded(rule) for key, rule in rules.items()}


def _implied(f: Foreign) -> Mapping[str, Any]:
    if _has_reward(f):
        return {}
    path = str(f["data.train_files"]).lower()
    return {"env.name": next((name for part, name in DATA.items() if part in path), "math")}


RULES: Mapping[str, Rule] = {
    "data.train_files": _path("env.path"),
    "data.val_files": _path("env.eval_path"),
    "data.prompt_key": _prompt_key,
    "data.train_batch_size": same("rollout.prompts_per_step"),
    "data.max_prompt_length": _prompt_length,
    "data.max_response_length": same("rollout.max_completion_length"),
    "data.seed": lambda value, f: ignored("none") if value is None else mapped(run__seed=value),
    "data.shuffle": only((True,), ABSENT["shuffle_dataset"]),
    "data.train_max_samples": only((-1, None), "all records are read"),
    "data.val_max_samples": lambda value, f: mapped(run__eval_limit=value if value and value > 0 else None),
    "data.trust_remote_code": always_ignored("model.trust_remote_code decides"),
    "data.apply_chat_template_kwargs": _template,
    f"{MODEL}.path": same("model.name_or_path"),
    f"{MODEL}.trust_remote_code": same("model.trust_remote_code"),
    f"{MODEL}.lora_rank": _lora_rank,
    f"{MODEL}.lora_alpha": _lora("model.lora.lora_alpha"),
    f"{MODEL}.target_modules": _lora("model.lora.target_modules"),
    f"{MODEL}.lora_adapter_path": only(NOTHING, "give the adapter's folder as model.name_or_path: it is merged"),
    f"{MODEL}.enable_gradient_checkpointing": lambda value, f: mapped(
        "memory, not what is learned", optim__gradient_checkpointing="selective" if value else "none"
    ),
    f"{MODEL}.custom_chat_template": only(NOTHING, ABSENT["chat_template_path"]),
    f"{ACTOR}.optim.lr": same("optim.learning_rate"),
    f"{ACTOR}.optim.weight_decay": same("optim.weight_decay"),
    f"{ACTOR}.optim.betas": _betas,
    f"{ACTOR}.optim.optimizer": _optimiser,
    f"{ACTOR}.optim.lr_warmup_steps": _warmup,
    f"{ACTOR}.optim.lr_warmup_steps_ratio": always_ignored("taken over with lr_warmup_steps"),
    f"{ACTOR}.optim.lr_scheduler_type": _schedule,
    f"{ACTOR}.optim.warmup_style": lambda value, f: ignored("none") if value is None else _schedule(value, f),
    f"{ACTOR}.grad_clip": same("optim.max_grad_norm"),
    f"{ACTOR}.ppo_mini_batch_size": _mini_batch,
    f"{ACTOR}.ppo_micro_batch_size": _micro_batch,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": _micro_batch,
    f"{ACTOR}.ppo_max_token_len_per_gpu": _most_tokens,
    f"{ACTOR}.ppo_epochs": absent("num_iterations", (1,)),
    f"{ACTOR}.clip_ratio": _clip,
    f"{ACTOR}.clip_ratio_low": _policy_only("algorithm.clip_low"),
    f"{ACTOR}.clip_ratio_high": _policy_only("algorithm.clip_high"),
    f"{ACTOR}.clip_ratio_c": _second_clip,
    f"{ACTOR}.policy_loss.loss_mode": _loss_mode,
    f"{ACTOR}.loss_agg_mode": _average,
    f"{ACTOR}.entropy_coeff": absent("entropy_coeff", NOTHING),
    f"{ACTOR}.use_kl_loss": absent("use_kl_loss", NOTHING),
    f"{ACTOR}.freeze_vision_tower": only(NOTHING, "images are not read"),
    f"{ROLLOUT}.n": same("rollout.num_generations"),
    f"{ROLLOUT}.temperature": same("rollout.temperature"),
    f"{ROLLOUT}.top_p": absent("top_p", (1, 1.0)),
    f"{ROLLOUT}.top_k": absent("top_k", (-1, 0, None)),
    f"{ROLLOUT}.do_sample": only((True,), ABSENT["top_p"]),
    f"{ROLLOUT}.val_kwargs.n": same("run.eval_samples"),
    f"{ROLLOUT}.val_kwargs.temperature": always_ignored(EVALUATED),
    f"{ROLLOUT}.multi_turn.enable": only(NOTHING, REPLIES),
    "algorithm.adv_estimator": _estimator,
    "algorithm.norm_adv_by_std_in_grpo": _scale,
    "algorithm.use_kl_in_reward": absent("use_kl_in_reward", NOTHING),
    "algorithm.filter_groups.enable": only(NOTHING, "no group is drawn again; one of equal rewards has no advantage"),
    "algorithm.use_pf_ppo": only(NOTHING, "there is no such weighting"),
    "custom_reward_function.path": _reward("custom_reward_function"),
    "custom_reward_function.name": always_ignored("taken over with its path"),
    "reward.custom_reward_function.path": _reward("reward.custom_reward_function"),
    "reward.custom_reward_function.name": always_ignored("taken over with its path"),
    "reward.reward_model.enable": only(NOTHING, ABSENT["reward_model_name_or_path"]),
    "reward_model.enable": only(NOTHING, ABSENT["reward_model_name_or_path"]),
    "distillation.enabled": only(NOTHING, "algorithm.name gkd distils an external teacher"),
    "trainer.total_epochs": _epochs,
    "trainer.total_training_steps": _steps,
    "trainer.save_freq": _freq("run.save_steps"),
    "trainer.test_freq": _freq("run.eval_steps"),
    "trainer.val_before_train": always_ignored("step 0 is always evaluated where run.eval_steps is above 0"),
    "trainer.logger": _logger,
    "trainer.default_local_dir": _folder,
    "trainer.experiment_name": _experiment,
    "trainer.max_actor_ckpt_to_keep": same("run.save_total_limit"),
    "trainer.critic_warmup": only(NOTHING, "there is no critic"),
    **_of_sdpo(
        {
            "full_logit_distillation": _exact,
            "distillation_topk": always_ignored("taken over with full_logit_distillation"),
            "distillation_add_tail": same("algorithm.distillation_tail"),
            "alpha": same("algorithm.distillation_alpha"),
            "is_clip": same("algorithm.importance_clip"),
            "kl_pointwise_clip": only(NOTHING, "the divergence of a token has no bound"),
            "success_reward_threshold": same("rollout.success_threshold"),
            "teacher_regularization": _regularization,
            "teacher_update_rate": _teacher_rate,
            "ema_update_rate": _teacher_rate,
            "max_reprompt_len": templates.reprompt_length,
            "reprompt_truncation": always_ignored("a text that is too long loses its middle"),
            "dont_reprompt_on_self_success": templates.own_success,
            "remove_thinking_from_demonstration": _sources,
            "include_environment_feedback": _sources,
            "environment_feedback_only_without_solution": lambda value, f: templates.without_solution(
                value, f[f"{SELF}.include_environment_feedback"]
            ),
            "reprompt_template": templates.reprompt,
            "solution_template": templates.header("prompts.demonstration_header", "successful_previous_attempt"),
            "feedback_template": templates.header("prompts.feedback_header", "feedback_raw"),
        }
    ),
}
PREFIXES: Mapping[str, Rule] = {
    "defaults": always_ignored("files named there are not read; of verl's own, what matters is known"),
    "actor_rollout_ref.actor.kl_loss": always_ignored("of use_kl_loss"),
    "actor_rollout_ref.actor.": always_ignored(SYSTEM),
    "actor_rollout_ref.ref.": always_ignored("of a reference model, which is used for a KL penalty alone"),
    "actor_rollout_ref.rollout.": always_ignored(SAMPLER),
    "actor_rollout_ref.model.": always_ignored(SYSTEM),
    "actor_rollout_ref.hybrid_engine": always_ignored(SYSTEM),
    "actor_rollout_ref.nccl_timeout": always_ignored(SYSTEM),
    "model_engine": always_ignored(SYSTEM),
    "critic.": always_ignored("there is no critic"),
    "algorithm.rollout_correction.": always_ignored("answers are sampled with the weights that learn: the ratio is 1"),
    "algorithm.kl_": always_ignored("of the KL penalty (use_kl_in_reward)"),
    "algorithm.gamma": always_ignored("of an estimator with a critic"),
    "algorithm.lam": always_ignored("of an estimator with a critic"),
    "algorithm.pf_ppo.": always_ignored("of use_pf_ppo"),
    "algorithm.filter_groups.": always_ignored("of filter_groups.enable"),
    "data.": always_ignored("how verl reads and batches its data"),
    "reward.": always_ignored("how verl runs its reward functions"),
    "reward_model.": always_ignored("how verl runs its reward functions"),
    "reward_manager.": always_ignored("how verl runs its reward functions"),
    "sandbox_fusion.": always_ignored("programs run in this library's sandbox"),
    "distillation.": always_ignored("of distillation.enabled"),
    "trainer.project_name": always_ignored("a part of run.output_dir"),
    "trainer.": always_ignored(SYSTEM),
    "transfer_queue.": always_ignored(SYSTEM),
    "global_profiler.": always_ignored(SYSTEM),
    "ray_kwargs.": always_ignored(SYSTEM),
    "ray_init.": always_ignored(SYSTEM),
    "skip.": always_ignored(SYSTEM),
    "hydra.": always_ignored(SYSTEM),
}

VERL = Dialect(name="verl's configuration", defaults=DEFAULTS, rules=RULES, prefixes=PREFIXES, implied=_implied)
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
    implied=_implied,
)
