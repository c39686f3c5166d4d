"""``vpd convert`` of verl's keys: what changes rewards or sampling is named, and an unknown key is never harmless."""

from pathlib import Path
from typing import Any

import pytest

from vpd.config.convert import Converted, Foreign, Unread, convert
from vpd.config.convert.files import DIALECTS, read

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


@pytest.mark.parametrize(
    "before",
    [
        "if [ $# -lt 1 ]; then echo usage; exit 1; fi",
        "echo Waiting for the cluster",
        "python3 - <<'EOF'\nfor x in range(3):\n    print(x)\nEOF",
        "echo done # if it is",
    ],
)
def test_words_that_open_nothing_leave_later_variables_plain(before: str, tmp_path: Path) -> None:
    found = of_shell(tmp_path, f"{before}\nN=4\npython3 -m verl.trainer.main_ppo data.train_batch_size=$N\n")
    assert found["data.train_batch_size"] == 4


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


def test_verls_clip_is_that_of_low_and_high() -> None:
    result = converted({f"{ACTOR}.clip_ratio": 0.3})
    assert (result.settings["algorithm"]["clip_low"], result.settings["algorithm"]["clip_high"]) == (0.2, 0.2)
    assert "0.2 each" in line(result, f"{ACTOR}.clip_ratio").why


def test_verls_second_clip_is_named_where_it_has_an_effect() -> None:
    assert line(converted({}), f"{ACTOR}.clip_ratio_c").verdict == "impossible"
    one = converted({"data.train_batch_size": 64, f"{ACTOR}.ppo_mini_batch_size": 64})
    assert f"{ACTOR}.clip_ratio_c" not in [line.key for line in one.lines]


def test_all_records_are_trained_on_where_there_is_no_other_file() -> None:
    result = converted({"trainer.test_freq": 5}, tasks=2048)
    assert result.settings["env"]["eval_share"] == 0.0 and result.config.run.max_steps == 60
    assert line(result, "trainer.test_freq").verdict == "impossible"
    result = converted({"trainer.test_freq": 5, "data.val_files": "v.parquet"})
    assert "eval_share" not in result.settings["env"] and line(result, "trainer.test_freq").verdict == "mapped"


SHELL = """
LR=1e-6
{more}
python3 -m verl.trainer.main_ppo {key}=$LR data.train_batch_size=8
"""


def of_shell(path: Path, text: str) -> dict[str, Any]:
    (path / "run.sh").write_text(text)
    return read(path / "run.sh", "verl")[1]


def test_a_shell_variable_has_its_last_value_before_its_use(tmp_path: Path) -> None:
    key = f"{ACTOR}.optim.lr"
    assert of_shell(tmp_path, SHELL.format(more="LR=3e-6", key=key))[key] == 3e-6
    assert of_shell(tmp_path, SHELL.format(more="", key=key) + "LR=5e-6\n")[key] == 1e-6
    text = f"A=1\nB=${{A}}e-6; LR=$B\npython3 x {key}=$LR"
    assert of_shell(tmp_path, text)[key] == 1e-6


COMPUTED = [
    "if [ $1 = a ]; then\n  LR=3e-6\nfi",
    "if [ $1 = a ]; then LR=3e-6; else LR=2e-6; fi",
    "for LR in 1 2; do LR=$X; done",
    "LR=$(python3 rate.py)",
    "LR=`cat rate`",
    '[ -n "$FAST" ] && LR=3e-6',
    "set_rate() {\n  LR=3e-6\n}",
    "RATE=$(cat rate)\nLR=${RATE}",
]


@pytest.mark.parametrize("more", COMPUTED)
def test_a_shell_variable_that_is_computed_is_not_read(more: str, tmp_path: Path) -> None:
    found = of_shell(tmp_path, SHELL.format(more=more, key=f"{ACTOR}.optim.lr"))
    assert isinstance(found[f"{ACTOR}.optim.lr"], Unread) and "computed" in found[f"{ACTOR}.optim.lr"].why
    assert found["data.train_batch_size"] == 8


def test_a_list_of_files_with_a_variable_is_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = 'train=$HOME/data/x.parquet\nfiles="[\'$train\']"\npython3 x data.train_files="$files" a.b=c'
    found = of_shell(tmp_path, text)
    assert found["data.train_files"] == ["$HOME/data/x.parquet"]
    assert converted(found).config.env.path == "/home/me/data/x.parquet"


def test_an_array_of_overrides_is_read_whole(tmp_path: Path) -> None:
    found = of_shell(tmp_path, "ARGS=(data.seed=1\n  data.train_batch_size=8)\npython3 x ${ARGS[@]}")
    assert found == {"data.seed": 1, "data.train_batch_size": 8}
