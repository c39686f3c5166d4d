"""``vpd convert`` of verl's keys: what changes rewards or sampling is named, and an unknown key is never harmless."""

from typing import Any

import pytest

from vpd.config.convert import Converted, Foreign, convert
from vpd.config.convert.files import DIALECTS

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def converted(given: dict[str, Any], *overrides: str, name: str = "verl", tasks: int | None = None) -> Converted:
    dialect = DIALECTS[name]
    whole = {"actor_rollout_ref.model.path": "m", "data.train_files": "x.parquet", f"{ROLLOUT}.n": 2} | given
    return convert(dialect, Foreign(given=whole, defaults=dialect.defaults, tasks=tasks), overrides)


def line(result: Converted, key: str) -> Any:
    return next(line.outcome for line in result.lines if line.key == key)


CHANGING = {
    "reward_model.overlong_buffer.enable": True,
    "reward_model.reward_kwargs.overlong_buffer_cfg.enable": True,
    "reward_model.reward_manager": "dapo",
    f"{ROLLOUT}.repetition_penalty": 1.1,
    f"{ROLLOUT}.ignore_eos": True,
    f"{ROLLOUT}.over_sample_rate": 0.2,
    "data.custom_cls.path": "mine.py",
    "data.custom_cls.name": "Mine",
    "data.sampler.class_path": "mine.py",
    f"{ACTOR}.optim.num_cycles": 2,
    f"{ACTOR}.tis_imp_ratio_cap": 2.0,
    "trainer.val_only": True,
}


@pytest.mark.parametrize("key", CHANGING)
def test_what_changes_rewards_or_sampling_is_impossible(key: str) -> None:
    assert line(converted({key: CHANGING[key]}), key).verdict == "impossible"


def test_verls_own_values_of_these_change_nothing() -> None:
    own = {
        "reward_model.overlong_buffer.enable": False, "reward_model.reward_manager": "naive",
        f"{ROLLOUT}.repetition_penalty": 1.0, f"{ROLLOUT}.ignore_eos": False, "data.custom_cls.path": None,
        f"{ACTOR}.optim.num_cycles": 0.5, f"{ACTOR}.fsdp_config.param_offload": True, "trainer.nnodes": 2,
        f"{ACTOR}.profiler.enable": True, "critic.optim.lr": 1.0, f"{ROLLOUT}.multi_turn.format": "hermes",
        f"{ACTOR}.policy_loss.clip_cov_ratio": 0.0002, "algorithm.kl_ctrl.kl_coef": 0.001,
        "reward_model.sandbox_fusion.url": None, f"{ROLLOUT}.val_kwargs.top_k": -1,
    }  # fmt: skip
    result = converted(own)
    assert {key: line(result, key).verdict for key in own} == dict.fromkeys(own, "ignored")


UNKNOWN = {
    f"{ACTOR}.use_klloss": "use_kl_loss",
    f"{ROLLOUT}.temprature": "temperature",
    "data.shufle": "data.shuffle",
    "trainer.total_epoch": "total_epochs",
    "reward_model.reward_mangaer": "reward_manager",
    "actor_rollout_ref.model.lora_rnk": "lora_rank",
    "algorithm.kl_ctl.kl_coeff": "kl_ctrl.kl_coef",
    f"{ACTOR}.policy_loss.clip_cov": "clip_cov",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_impossible_and_answered_with_the_nearest(key: str) -> None:
    found = line(converted({key: 1}), key)
    assert found.verdict == "impossible" and UNKNOWN[key] in found.why and "Did you mean" in found.why


def test_the_optimisers_own_bound_on_the_gradient_is_taken() -> None:
    assert converted({f"{ACTOR}.optim.clip_grad": 0.3}).config.optim.max_grad_norm == 0.3
    both = converted({f"{ACTOR}.optim.clip_grad": 0.3, f"{ACTOR}.grad_clip": 0.5})
    assert both.config.optim.max_grad_norm == 0.5
