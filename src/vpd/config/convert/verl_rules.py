"""What becomes of a key of verl's, where that hangs on its value or on other keys (:mod:`vpd.config.convert.verl`)."""

from collections.abc import Mapping
from typing import Any

from vpd.config.convert import (
    Foreign,
    Outcome,
    Rule,
    common,
    ignored,
    impossible,
    mapped,
    only_where,
    same,
    templates,
)
from vpd.config.elsewhere import ABSENT

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
SELF = f"{ACTOR}.self_distillation"
CORRECTION = "algorithm.rollout_correction"
NOTHING = (None, False, 0, 0.0, "", "null")
AVERAGES = {"token-mean": "token_mean", "seq-mean-token-mean": "seq_mean"}
SCORES = (
    "verl scores a record by its data_source; here the environment does, which follows from the path, or is math (a"
    r" value in \boxed{}; after #### with env.answer_form): see env.name"
)
SOURCE = "a record's source is its column data_source"
DATA = {"sciknoweval": "science", "tooluse": "tooluse", "lcb": "code", "livecodebench": "code"}
SYSTEM = "how the work is divided and held in memory, not what is learned"
NO_POLICY_GRADIENT = "sdpo has no policy gradient"
FULL = "all weights are trained"
EVALUATED = "the evaluation of a run samples as the training does (vpd eval has --temperature and --top_p)"
REPLIES = "an environment replies through a method respond (docs/own_task.md)"

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
    f"{ACTOR}.clip_ratio_c": 3.0,
    f"{MODEL}.lora_alpha": 16,
    f"{MODEL}.target_modules": "all-linear",
    "data.reward_fn_key": "data_source",
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


def mini_batch(value: Any, f: Foreign) -> Outcome:
    return mapped(f"{_batch(f)} tasks in parts of {value}", algorithm__updates_per_batch=_updates(f))


def _total(f: Foreign) -> int | None:
    steps = f.number("trainer.total_training_steps", -1)
    if steps > 0:
        return int(steps)
    return None if f.tasks is None else max(int(f.number("trainer.total_epochs", 30) * f.tasks // _batch(f)), 1)


def epochs(value: Any, f: Foreign) -> Outcome:
    if f.number("trainer.total_training_steps", -1) > 0:
        return ignored("trainer.total_training_steps decides")
    if f.tasks is None:
        return impossible("the number of records is unknown: set run.max_steps to epochs * records / prompts_per_step")
    return mapped(f"{value:g} epoch(s) of {f.tasks} records, {_batch(f)} an iteration", run__max_steps=_total(f))


def steps(value: Any, f: Foreign) -> Outcome:
    return ignored("total_epochs decides") if (value or -1) <= 0 else mapped(run__max_steps=int(value))


def freq(place: str) -> Rule:
    def rule(value: Any, f: Foreign) -> Outcome:
        often = int(value) if value and value > 0 else 0
        if often and place == "run.eval_steps" and not f["data.val_files"]:
            why = "there is no data.val_files: set env.eval_path, or env.eval_share; all records are trained on"
            return Outcome(verdict="impossible", why=why, settings={place: often})
        return Outcome(verdict="mapped", why="" if often else "0: never", settings={place: often})

    return rule


def warmup(value: Any, f: Foreign) -> Outcome:
    share, total = f.number(f"{ACTOR}.optim.lr_warmup_steps_ratio"), _total(f)
    if value is not None and value > 0:
        return mapped(optim__warmup_steps=int(value))
    if share and total is None:
        return impossible("a share of a run whose length is unknown; set optim.warmup_steps")
    return mapped(optim__warmup_steps=round(share * (total or 0)))


def schedule(value: Any, f: Foreign) -> Outcome:
    if value == "constant":
        return mapped("with optim.warmup_steps", optim__lr_scheduler_type="constant_with_warmup")
    if value == "cosine" and not f.number(f"{ACTOR}.optim.min_lr_ratio"):
        return mapped(optim__lr_scheduler_type="cosine")
    return impossible("constant, or cosine down to 0")


def betas(value: Any, f: Foreign) -> Outcome:
    first, second = value
    return mapped(optim__adam_beta1=first, optim__adam_beta2=second)


def optimiser(value: Any, f: Foreign) -> Outcome:
    known = {"AdamW": "adamw", "SGD": "sgd"}
    if value in known:
        return mapped(optim__optimizer=known[value])
    return impossible("the optimisers are adamw and sgd")


def loss_mode(value: Any, f: Foreign) -> Outcome:
    if value == "sdpo":
        return mapped(algorithm__name="sdpo", algorithm__denominator="all")
    if value == "vanilla":
        return mapped(algorithm__name="grpo", feedback=[])
    return impossible("vanilla (grpo) or sdpo; grpo is taken", algorithm__name="grpo", feedback=[])


def estimator(value: Any, f: Foreign) -> Outcome:
    if value == "grpo":
        return ignored("as here: no critic" if _distills(f) else "as here: grpo")
    return impossible("an advantage is relative to the group (grpo); there is no critic")


def scale(value: Any, f: Foreign) -> Outcome:
    if _distills(f):
        return ignored("sdpo has no advantage")
    return mapped(algorithm__scale_rewards="group" if value else "none")


def policy_only(place: str) -> Rule:
    return only_where(lambda f: not _distills(f), NO_POLICY_GRADIENT, same(place))


def clip(value: Any, f: Foreign) -> Outcome:
    return ignored("clip_ratio_low and clip_ratio_high decide, which verl sets to 0.2 each where they are not given")


def second_clip(value: Any, f: Foreign) -> Outcome:
    if _updates(f) == 1 or _distills(f):
        return ignored("no effect with one update on a batch")
    return impossible(ABSENT["delta"])


def sampler(value: Any, f: Foreign) -> Outcome:
    """``rollout.name``."""
    return common.vllm() if value == "vllm" else ignored(common.SAMPLER)


def uses_vllm(f: Foreign) -> bool:
    return bool(f[f"{ROLLOUT}.name"] == "vllm")


def server_type(value: Any, f: Foreign) -> Outcome:
    """``rollout.dtype``: the number type of the server's weights."""
    if value in ("float32", "bfloat16", "float16"):
        return mapped(engine__dtype=value)
    return ignored("model.dtype is taken")


def correction(value: Any, f: Foreign) -> Outcome:
    """``rollout_correction.rollout_is``: whether, and how, the ratio is against the sampler's log-probs."""
    return impossible(ABSENT["importance_sampling_level"]) if value == "sequence" else common.correction(value, f)


def correction_bound(value: Any, f: Foreign) -> Outcome:
    return impossible(common.BOUND) if value is not None and f[f"{CORRECTION}.rollout_is"] else ignored("of rollout_is")


def average(value: Any, f: Foreign) -> Outcome:
    if value in AVERAGES:
        return mapped("over the whole batch", algorithm__average=AVERAGES[value])
    return impossible(f"the means are {' and '.join(AVERAGES)}")


def lora_rank(value: Any, f: Foreign) -> Outcome:
    return mapped(model__lora__r=value) if value else ignored(FULL)


def lora(place: str) -> Rule:
    return only_where(lambda f: f.number(f"{MODEL}.lora_rank") > 0, FULL, same(place))


def micro_batch(value: Any, f: Foreign) -> Outcome:
    return (
        mapped("rows at once; memory, not what is learned", optim__micro_batch_size=value) if value else ignored("none")
    )


def most_tokens(value: Any, f: Foreign) -> Outcome:
    if not f[f"{ACTOR}.use_dynamic_bsz"]:
        return ignored("use_dynamic_bsz is false")
    return mapped("memory, not what is learned", optim__max_tokens_per_microbatch=value)


def scorer(value: Any, f: Foreign) -> Outcome:
    """``data.reward_fn_key``: the column that says who scores a record, where no function of the user's does."""
    if not _has_reward(f):
        return impossible(SCORES)
    return ignored("custom_reward_function scores") if value in (None, "data_source") else impossible(SOURCE)


def path(place: str) -> Rule:
    def rule(value: Any, f: Foreign) -> Outcome:
        files = [value] if isinstance(value, str) else list(value or ())
        if len(files) > 1:
            return impossible("one file is read; join them", **{place.replace(".", "__"): files[0]})
        return Outcome(verdict="mapped", settings={place: files[0]}) if files else ignored("none")

    return rule


def reward(folder: str) -> Rule:
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


def prompt_key(value: Any, f: Foreign) -> Outcome:
    if value == "prompt":
        return ignored("as here")
    return mapped(env__prompt=value) if _has_reward(f) else impossible("the column is prompt")


def folder(value: Any, f: Foreign) -> Outcome:
    return mapped(run__output_dir=value) if value else ignored("none")


def experiment(value: Any, f: Foreign) -> Outcome:
    if f["trainer.default_local_dir"]:
        return ignored("trainer.default_local_dir is the folder")
    return mapped(
        "the folder is its name", run__output_dir=f"checkpoints/{f['trainer.project_name'] or 'verl'}/{value}"
    )


def prompt_length(value: Any, f: Foreign) -> Outcome:
    if f["data.filter_overlong_prompts"] or f["data.truncation"] not in (None, "error"):
        return impossible("a longer prompt is neither left out nor cut; leave such records out of the data")
    return mapped("a longer one is an error", prompts__max_prompt_length=value)


def regularization(value: Any, f: Foreign) -> Outcome:
    kinds = {"ema": "ema", "trust-region": "trust_region"}
    return mapped(algorithm__teacher=kinds[value]) if value in kinds else impossible("ema or trust-region")


def teacher_rate(value: Any, f: Foreign) -> Outcome:
    if f[f"{SELF}.teacher_regularization"] == "trust-region":
        return mapped(algorithm__teacher_trust_region_mix=value)
    return mapped(algorithm__teacher_ema_rate=value)


def exact(value: Any, f: Foreign) -> Outcome:
    topk = f[f"{SELF}.distillation_topk"] if value else None
    return mapped(algorithm__distillation_estimator="exact" if value else "sampled", algorithm__distillation_topk=topk)


def sources(value: Any, f: Foreign) -> Outcome:
    environment, thinking = f[f"{SELF}.include_environment_feedback"], f[f"{SELF}.remove_thinking_from_demonstration"]
    return mapped(feedback=templates.sources(environment, True, remove_thinking=thinking))


def of_sdpo(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Keys of ``self_distillation``, which nothing but sdpo reads."""
    why = "of sdpo (policy_loss.loss_mode)"
    return {f"{SELF}.{key}": only_where(_distills, why, rule) for key, rule in rules.items()}


def implied(f: Foreign) -> Mapping[str, Any]:
    block: dict[str, Any] = {"prompts.layout": "block"} if _distills(f) else {}
    if not f["data.val_files"]:
        block["env.eval_share"] = 0.0
    if _has_reward(f):
        return block
    path = str(f["data.train_files"]).lower()
    name = next((name for part, name in DATA.items() if part in path), "math")
    block |= {"env.name": name}
    if name == "math" and "dapo" not in path:  # whose frame around a problem the environment takes away
        block["env.ask"] = ""
    return block | ({"env.answer_form": "hashes"} if name == "math" and "gsm8k" in path else {})
