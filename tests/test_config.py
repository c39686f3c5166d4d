"""Settings from files, words and Python: ranges, defaults, presets, what goes together, and what is left out."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpd.algorithms import AlgorithmSettings
from vpd.algorithms.gated import GatedSettings
from vpd.algorithms.vpd import VPDSettings
from vpd.config import Config, load, load_env, parse
from vpd.config.sections import ALGORITHMS, CHOICES, PLAIN, settings_class
from vpd.errors import ConfigError
from vpd.learners.accelerate_learner import OptimSettings
from vpd.rollout import RolloutSettings
from vpd.settings import declarations

GIVEN: dict[str, dict[str, Any]] = {"gkd": {"teacher_model": "tiny"}}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_says_what_it_needs_and_survives_a_round_trip(name: str) -> None:
    config = parse({"algorithm": {"name": name, **GIVEN.get(name, {})}})
    assert isinstance(config.algorithm, AlgorithmSettings)
    assert parse(yaml.safe_load(config.to_yaml())) == config
    assert config.algorithm.build(None) is not None  # type: ignore[arg-type]
    needs = config.algorithm.needs
    assert needs.group == (name in ("gated", "grpo", "hybrid"))
    assert needs.feedback == (name in ("vpd", "gated", "sdpo", "hybrid"))
    assert (needs.external_model, needs.teacher is None) == ("tiny" if name == "gkd" else None, name == "grpo")


@pytest.mark.parametrize("name", ["gated", "grpo", "hybrid"])
def test_a_method_that_compares_answers_refuses_one_answer_per_task(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} compares .*num_generations 1; expected at least 2"):
        parse({"algorithm": {"name": name}, "rollout": {"num_generations": 1}})


def test_a_method_that_reads_feedback_refuses_to_run_without() -> None:
    for name in ("vpd", "gated", "sdpo", "hybrid"):
        with pytest.raises(ConfigError, match=f"{name} needs feedback"):
            parse({"algorithm": {"name": name}, "feedback": []})


def test_the_preset_holds_in_python_and_in_a_file() -> None:
    paper = VPDSettings(preset="paper")
    assert (paper.distillation_alpha, paper.teacher) == (1.0, "live")
    assert parse({"algorithm": {"preset": "paper"}}).algorithm == paper
    assert (VPDSettings().distillation_alpha, VPDSettings().teacher) == (0.5, "ema")
    assert GatedSettings(preset="paper").teacher == "live"
    mixed = VPDSettings(preset="paper", distillation_alpha=0.25)
    assert (mixed.distillation_alpha, mixed.teacher) == (0.25, "live")
    assert dataclasses.asdict(paper)["distillation_alpha"] == 1.0  # what config.yaml records
    with pytest.raises(ConfigError, match=r"algorithm\.distillation_alpha"):
        parse({"algorithm": {"preset": "paper", "distillation_alpha": None}})


FILE = """
env: {name: digits, length: 5, hint: verdict}
algorithm: {name: vpd, teacher_ema_rate: 0.2, distillation_topk: 7, e_every: 3}
"""


def test_another_algorithm_over_a_file_keeps_what_both_have_and_names_what_it_drops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    with caplog.at_level(logging.WARNING, "vpd"):
        config = load(str(tmp_path / "run.yaml"), ["--algorithm.name", "sdpo", "--algorithm.average", "token_mean"])
    kept = dataclasses.asdict(config.algorithm)  # type: ignore[call-overload]
    assert kept["teacher_ema_rate"] == 0.2 and kept["distillation_topk"] == 7 and kept["average"] == "token_mean"
    assert len(caplog.messages) == 1
    assert "distillation_topk, teacher_ema_rate stay; sdpo has no e_every" in caplog.messages[0]
    with pytest.raises(ConfigError, match=r"unknown key algorithm\.e_every"):  # asked for by name: an error as always
        load(str(tmp_path / "run.yaml"), ["--algorithm.name", "sdpo", "--algorithm.e_every", "2"])


def test_the_same_name_again_drops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(FILE.replace("name: vpd, ", ""))
    config = load(str(tmp_path / "run.yaml"), ["--algorithm.name", "vpd", "--env.name", "digits"])
    assert dataclasses.asdict(config.algorithm)["e_every"] == 3 and not caplog.messages  # type: ignore[call-overload]


def test_another_environment_over_a_file_names_what_it_drops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, length=1): ...\n")
    with caplog.at_level(logging.WARNING, "vpd"):
        config = load(str(tmp_path / "run.yaml"), ["--env.name", f"{tmp_path}/mine.py:Mine"])
    assert config.env.options == {"length": 5} and "has no hint, left out" in caplog.messages[0]


OUT_OF_RANGE = [
    ("optim.learning_rate", -1), ("optim.adam_beta1", 1.0), ("optim.max_grad_norm", 0), ("optim.chunk_tokens", 0),
    ("optim.max_tokens_per_microbatch", 0), ("optim.micro_batch_size", 0), ("optim.warmup_steps", -1),
    ("rollout.num_generations", 0), ("rollout.temperature", 0), ("rollout.max_completion_length", 0),
    ("prompts.max_prompt_length", 0), ("prompts.max_feedback_length", 0),
    ("run.max_steps", 0), ("run.eval_limit", 0), ("run.save_total_limit", 0), ("run.save_steps", -1),
    ("algorithm.e_every", 0), ("algorithm.importance_clip", 0), ("algorithm.shift_momentum", 1.0),
    ("algorithm.teacher_ema_rate", 1.5), ("algorithm.distillation_topk", 0), ("model.lora.r", 0),
    ("algorithm.teacher", "external"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_its_range_is_an_error_that_names_its_place(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} (is out of range|has a wrong value); got .*expected"):
        load(None, [f"--{key}", str(value)])


def test_null_is_within_the_range_of_what_may_be_null() -> None:
    words = ["max_grad_norm", "max_tokens_per_microbatch", "chunk_tokens"]
    config = load(None, [word for name in words for word in (f"--optim.{name}", "null")])
    assert config.optim.max_grad_norm is None and config.optim.max_tokens_per_microbatch is None


def test_a_shipped_base_has_a_learning_rate_that_moves_it() -> None:
    assert parse({}).optim.learning_rate == 2e-4
    assert parse({"optim": {"learning_rate": 1e-6}}).optim.learning_rate == 1e-6
    real = parse({"model": {"name_or_path": "somebody/model"}})
    assert real.optim == OptimSettings()


def test_every_setting_has_a_meaning() -> None:
    places = [*PLAIN.values(), *(place for choice in CHOICES.values() for place in choice.table.values())]
    for place in places:
        silent = [n for n, d in declarations(settings_class(place)).items() if n != "name" and not d.meaning]
        assert not silent, place


def test_sampling_before_the_length_is_decided_is_an_error() -> None:
    with pytest.raises(ConfigError, match="max_completion_length is not decided"):
        RolloutSettings().sampling  # noqa: B018
    assert RolloutSettings(max_completion_length=3).sampling.max_completion_length == 3


def test_the_environment_alone_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FILE + "nonsense: {a: 1}\n")
    assert load_env(str(tmp_path / "run.yaml"), ["--env.length", "4"]).length == 4
    with pytest.raises(ConfigError, match=r"--run.seed is of no use here"):
        load_env(None, ["--run.seed", "1"])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "section": ({"algorithms": {}}, "unknown section 'algorithms'. Did you mean 'algorithm'?"),
    "key": ({"engine": {"nam": "embedded"}}, "unknown key engine.nam. Did you mean 'name'?"),
    "engine": ({"engine": {"name": "embeded"}}, "unknown engine 'embeded'. Did you mean 'embedded'?"),
    "source": ({"feedback": ["sibbling"]}, "unknown feedback source 'sibbling'. Did you mean 'sibling'?"),
    "nested": ({"model": {"lora": {"rank": 3}}}, "unknown key model.lora.rank"),
    "no mapping": ({"optim": 3}, "section 'optim' is not a mapping"),
    "missing": ({"env": {"name": "dataset"}}, "env.path is missing. Set it in the file, or as --env.path VALUE."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_the_nearest(mistake: str) -> None:
    data, said = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        parse(data)
    assert said in str(error.value)


def test_a_config_is_the_same_from_python_and_from_a_file() -> None:
    config = parse({})
    assert isinstance(config, Config) and parse(config.as_dict()) == config
