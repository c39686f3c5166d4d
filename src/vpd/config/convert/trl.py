"""TRL's SDPOConfig, GRPOConfig and GKDConfig (1.16) as settings of this library."""

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
    only_where,
    same,
    templates,
)
from vpd.config.convert.common import of_vllm
from vpd.config.convert.trl_trainer import PREFIXES as ADAPTER
from vpd.config.convert.trl_training import AVERAGES, NOTHING, PROCESSES, SHARED, updates, uses_vllm
from vpd.config.elsewhere import ABSENT

SCALES = {True: "group", "group": "group", "batch": "batch", False: "none", "none": "none"}
KINDS = {"base": "frozen", "live": "live", "ema": "ema"}
NO_FEEDBACK = "SDPO without demonstrations and feedback has nothing to read; sibling is taken"
GRADERS_TEXT = "the environment's is what a grader writes about an attempt; TRL reads the column privileged_context"
NO_DISTILLATION = "distillation_weight is 0"
UNUSED = "of the policy gradient, which distillation_weight 1 leaves out"

#: of transformers' TrainingArguments, as far as they are settings here
TRAINING: dict[str, Any] = {
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "eval_strategy": "no",
    "seed": 42,
    "bf16": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
}
ONLINE: dict[str, Any] = TRAINING | {"num_generations": 8, "temperature": 1.0, "loss_type": "dapo"}


def _policy_only(rule: Rule) -> Rule:
    """A key of the policy gradient, which SDPO has only where the distillation's weight is below 1."""
    return only_where(lambda f: not _is_distillation(f), UNUSED, rule)


def _is_distillation(f: Foreign) -> bool:
    return f["distillation_weight"] is not None and f.number("distillation_weight") > 0


def _clip_low(value: Any, f: Foreign) -> Outcome:
    high = value if f["epsilon_high"] is None else f["epsilon_high"]
    return mapped(algorithm__clip_low=value, algorithm__clip_high=high)


def _clip_high(value: Any, f: Foreign) -> Outcome:
    return ignored("epsilon is taken") if value is None else mapped(algorithm__clip_high=value)


def _loss_type(value: Any, f: Foreign) -> Outcome:
    if value in AVERAGES:
        return mapped("over the whole batch", algorithm__average=AVERAGES[value])
    return impossible(f"the means are those of {', '.join(AVERAGES)}")


def _scale(value: Any, f: Foreign) -> Outcome:
    return mapped(algorithm__scale_rewards=SCALES[value]) if value in SCALES else impossible("group, batch or none")


def _weight(value: Any, f: Foreign) -> Outcome:
    if value == 0:
        return mapped("the policy gradient alone", algorithm__name="grpo")
    if value == 1:
        return mapped(algorithm__name="sdpo")
    return impossible(
        "no method here mixes both losses by a fixed share: sdpo is taken; gated weighs them by evidence",
        algorithm__name="sdpo",
    )


def _distills(place: str) -> Rule:
    """A setting of the distillation, left out where its weight is 0."""
    return only_where(_is_distillation, NO_DISTILLATION, same(place))


def _mode(value: Any, f: Foreign) -> Outcome:
    estimator = "sampled" if value == "sampled_token" else "exact"
    if value not in ("sampled_token", "full_logits", "topk_logits"):
        return impossible("the estimators are sampled and exact")
    topk = f["distillation_topk"] if value == "topk_logits" else None
    return mapped(algorithm__distillation_estimator=estimator, algorithm__distillation_topk=topk)


def _kind(value: Any, f: Foreign) -> Outcome:
    return mapped(algorithm__teacher=KINDS[value]) if value in KINDS else impossible(f"one of {', '.join(KINDS)}")


def _teacher_rate(value: Any, f: Foreign) -> Outcome:
    """TRL's teacher moves with every optimiser step, here with every iteration."""
    steps = updates(f)
    if steps == 1:
        return mapped(algorithm__teacher_ema_rate=value)
    rate = round(1 - (1 - value) ** steps, 6)
    return mapped(f"{value:g} at each of {steps} steps of the optimiser, as one", algorithm__teacher_ema_rate=rate)


def _sources(value: Any, f: Foreign) -> Outcome:
    if not _is_distillation(f):
        return mapped(feedback=[])
    thinking = f["remove_thinking_from_demonstration"]
    found = templates.sources(
        f["include_environment_feedback"], f["use_successful_as_teacher"], remove_thinking=thinking
    )
    if not found:
        return impossible(NO_FEEDBACK, feedback=["sibling"])
    return mapped(GRADERS_TEXT if "environment" in found else "", feedback=found)


def _implied_sdpo(f: Foreign) -> Mapping[str, Any]:
    data = {"env.name": "dataset"}
    if not _is_distillation(f):
        return data
    return data | {"algorithm.average": "seq_mean", "algorithm.denominator": "all", "prompts.layout": "block"}


PREFIXES: Mapping[str, Rule] = {
    **ADAPTER,
    "bnb_": always_ignored("of quantised weights (load_in_4bit)"),
    "ddp_": always_ignored(PROCESSES),
    "fsdp_": always_ignored(PROCESSES),
    "hub_": always_ignored(ABSENT["hub_token"]),
    "test_split_size": only(NOTHING, "set env.eval_share, the share that is held out"),
    "trackio_": always_ignored("a tracker's own settings are its environment variables"),
    "use_bnb_nested_quant": always_ignored("of quantised weights (load_in_4bit)"),
    **of_vllm(uses_vllm, {"vllm_": always_ignored("vpd serve sets the server up for the run")}),
}

SDPO = Dialect(
    name="TRL's SDPOConfig",
    defaults=ONLINE
    | {
        "max_completion_length": 256,
        "distillation_weight": 1.0,
        "distillation_alpha": 1.0,
        "distillation_mode": "sampled_token",
        "distillation_is_clip": 2.0,
        "distillation_add_tail": False,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.05,
        "use_successful_as_teacher": True,
        "include_environment_feedback": False,
        "environment_feedback_only_without_solution": False,
        "success_reward_threshold": 1.0,
        "remove_thinking_from_demonstration": False,
        "scale_rewards": "group",
        "epsilon": 0.2,
    },
    rules={
        **SHARED,
        "distillation_weight": _weight,
        "distillation_alpha": _distills("algorithm.distillation_alpha"),
        "distillation_mode": only_where(_is_distillation, NO_DISTILLATION, _mode),
        "distillation_topk": always_ignored("taken over with distillation_mode"),
        "distillation_is_clip": _distills("algorithm.importance_clip"),
        "distillation_add_tail": _distills("algorithm.distillation_tail"),
        "teacher_model_kind": only_where(_is_distillation, NO_DISTILLATION, _kind),
        "teacher_update_rate": only_where(_is_distillation, NO_DISTILLATION, _teacher_rate),
        "use_successful_as_teacher": _sources,
        "include_environment_feedback": _sources,
        "environment_feedback_only_without_solution": lambda value, f: templates.without_solution(
            value, f["include_environment_feedback"]
        ),
        "success_reward_threshold": same("rollout.success_threshold"),
        "dont_reprompt_on_self_success": templates.own_success,
        "remove_thinking_from_demonstration": _sources,
        "max_reprompt_len": templates.reprompt_length,
        "reprompt_template": templates.reprompt,
        "solution_template": templates.header("prompts.demonstration_header", "successful_previous_attempt"),
        "feedback_template": templates.header("prompts.feedback_header", "feedback_raw"),
        "loss_type": lambda value, f: (
            ignored("of the policy gradient; the distillation's is always the mean of sequence means")
            if _is_distillation(f)
            else _loss_type(value, f)
        ),
        "scale_rewards": _policy_only(_scale),
        "epsilon": _policy_only(_clip_low),
        "epsilon_high": _policy_only(_clip_high),
        "beta": _policy_only(absent("beta", NOTHING)),
        "importance_sampling_level": _policy_only(absent("importance_sampling_level", ("token",))),
    },
    prefixes=PREFIXES,
    implied=_implied_sdpo,
)

OTHER_LOSSES = "of a loss that is not here (loss_type)"
GRPO = Dialect(
    name="TRL's GRPOConfig",
    defaults=ONLINE
    | {"learning_rate": 1e-6, "max_completion_length": 512, "epsilon": 0.2, "scale_rewards": "group", "beta": 0.0},
    rules={
        **SHARED,
        "loss_type": _loss_type,
        "scale_rewards": _scale,
        "epsilon": _clip_low,
        "epsilon_high": _clip_high,
        "use_bias_correction_kl": always_ignored("of the KL penalty (beta)"),
    },
    prefixes={
        **PREFIXES,
        "sapo_": always_ignored(OTHER_LOSSES),
        "vespo_": always_ignored(OTHER_LOSSES),
        "ref_model_": always_ignored("of a reference model (sync_ref_model)"),
        "entropy_": always_ignored("of the entropy bonus (entropy_coef)"),
        "use_adaptive_entropy": only(NOTHING, ABSENT["entropy_coeff"]),
    },
    implied=lambda f: {"env.name": "dataset", "algorithm.name": "grpo", "feedback": []},
)


def _gkd_batch(value: Any, f: Foreign) -> Outcome:
    size = f.number("per_device_train_batch_size", 8) * f.num_processes * f.number("gradient_accumulation_steps", 1)
    return mapped("prompts of one optimiser step", rollout__prompts_per_step=int(size))


def _gkd_temperature(value: Any, f: Foreign) -> Outcome:
    if value == 1:
        return mapped(rollout__temperature=value)
    why = "it divides the logits in the divergence too, which TRL compares at temperature 1; 1 makes both the same"
    return impossible(why, rollout__temperature=value)


def _other_answers(value: Any, f: Foreign) -> Outcome:
    if value:
        return mapped("of the prompts that the student does not answer", algorithm__other_answers="teacher")
    if f.number("lmbda", 0.5) >= 1:
        return mapped("the student answers all", algorithm__other_answers="data")
    why = "the data's, from the column answer; vpd convert makes it of the last message"
    return mapped(why, algorithm__other_answers="data", env__solution_column="answer")


GKD = Dialect(
    name="TRL's GKDConfig",
    defaults=TRAINING
    | {
        "learning_rate": 2e-5,
        "temperature": 0.9,
        "lmbda": 0.5,
        "seq_kd": False,
        "beta": 0.5,
        "max_new_tokens": 128,
        "num_generations": 1,
    },
    rules={
        **SHARED,
        "per_device_train_batch_size": _gkd_batch,
        "gradient_accumulation_steps": _gkd_batch,
        "temperature": _gkd_temperature,
        "lmbda": same("algorithm.student_fraction"),
        "beta": same("algorithm.distillation_alpha"),
        "seq_kd": _other_answers,
        "max_new_tokens": same("rollout.max_completion_length"),
        "teacher_model_name_or_path": lambda value, f: (
            mapped(algorithm__teacher_model=value) if value else impossible("set algorithm.teacher_model")
        ),
        "max_length": always_ignored("prompts are never cut, and answers end at rollout.max_completion_length"),
        "loss_type": always_ignored("of supervised fine-tuning"),
        "completion_only_loss": always_ignored("as here: the loss is on answers alone"),
        "assistant_only_loss": always_ignored("as here: the loss is on answers alone"),
    },
    prefixes={
        **PREFIXES,
        "dataset_": always_ignored("the chat template makes the prompt"),
        "eos_token": always_ignored("answers end where the model's folder says"),
        "pad_token": always_ignored("rows are padded by themselves"),
        "truncation_mode": always_ignored("prompts are never cut"),
    },
    implied=lambda f: {
        "env.name": "dataset",
        "env.reward": "vpd.envs.dataset:no_reward",
        "algorithm.name": "gkd",
        "algorithm.average": "token_mean",
        "feedback": [],
    },
)
