"""Settings from files, words and Python: ranges, defaults, presets, what goes together, and what is left out."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpd.algorithms import AlgorithmSettings
from vpd.algorithms.gated import GatedSettings
from vpd.algorithms.vpd import VPDSettings
from vpd.api.arguments import read_arguments
from vpd.config import Config, RunSettings, load, load_env, of_another, parse
from vpd.config.elsewhere import ABSENT, RENAMED
from vpd.config.sections import ALGORITHMS, CHOICES, PLAIN, settings_class
from vpd.config.sft import load_sft
from vpd.config.starter import starter
from vpd.errors import ConfigError
from vpd.learners.accelerate_learner import OptimSettings
from vpd.rollout import RolloutSettings
from vpd.run_folder.files import FileSystem
from vpd.run_folder.state import Recorder
from vpd.settings import declarations

GIVEN: dict[str, dict[str, Any]] = {"gkd": {"teacher_model": "tiny"}}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_says_what_it_needs_and_survives_a_round_trip(name: str) -> None:
    judge = {"feedback": [{"name": "judge"}]} if name == "plare" else {}
    config = parse({"algorithm": {"name": name, **GIVEN.get(name, {})}, **judge})
    assert isinstance(config.algorithm, AlgorithmSettings)
    assert parse(yaml.safe_load(config.to_yaml())) == config
    assert config.algorithm.build(None) is not None  # type: ignore[arg-type]
    needs = config.algorithm.needs
    assert needs.group == (name in ("gated", "grpo", "hybrid", "plare"))
    assert needs.feedback == (name in ("vpd", "gated", "sdpo", "hybrid"))
    assert (needs.external_model, needs.teacher is None) == (
        "tiny" if name == "gkd" else None,
        name in ("grpo", "plare", "sft", "ldd"),
    )
    assert needs.preferences == (name == "plare")


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
    assert parse({"algorithm": {"name": "vpd", "preset": "paper"}}).algorithm == paper
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
    assert caplog.messages[0] == (
        "algorithm.name is sdpo instead of vpd; kept: distillation_topk, teacher_ema_rate;"
        " dropped, as sdpo has no such setting: e_every"
    )
    with pytest.raises(ConfigError, match=r"unknown key algorithm\.e_every"):  # asked for by name: an error as always
        load(str(tmp_path / "run.yaml"), ["--algorithm.name", "sdpo", "--algorithm.e_every", "2"])


def test_what_is_kept_or_dropped_is_said_where_there_is_something(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vpd"):
        of_another("engine", {"name": "vllm", "url": "http://localhost:1"}, "embedded")
        of_another("algorithm", {"name": "vpd", "distillation_topk": 7}, "sdpo")
    assert caplog.messages == [
        "engine.name is embedded instead of vllm; dropped, as embedded has no such setting: url",
        "algorithm.name is sdpo instead of vpd; kept: distillation_topk",
    ]


def test_the_same_name_again_drops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(FILE.replace("name: vpd, ", ""))
    config = load(str(tmp_path / "run.yaml"), ["--algorithm.name", "gated", "--env.name", "digits"])
    assert dataclasses.asdict(config.algorithm)["e_every"] == 3 and not caplog.messages  # type: ignore[call-overload]


def test_the_default_method_is_the_one_that_is_recommended(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FILE.replace("name: vpd, ", ""))
    unnamed = load(str(tmp_path / "run.yaml"), ["--algorithm.e_every", "4"]).algorithm
    assert unnamed == GatedSettings(e_every=4, teacher_ema_rate=0.2, distillation_topk=7)
    assert parse({}).algorithm == parse(yaml.safe_load(starter())).algorithm == GatedSettings()


def test_another_environment_over_a_file_names_what_it_drops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, length=1): ...\n")
    with caplog.at_level(logging.WARNING, "vpd"):
        config = load(str(tmp_path / "run.yaml"), ["--env.name", f"{tmp_path}/mine.py:Mine"])
    assert config.env.options == {"length": 5} and "has no such setting: hint" in caplog.messages[0]


def test_a_config_lays_only_what_was_given_under_other_parts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vpd"):
        plain = parse({"env": {"name": "digits"}}).as_given()
        for name in ("sdpo", "grpo", "hybrid"):
            assert parse({**plain, "algorithm": of_another("algorithm", plain.get("algorithm", {}), name)})
    assert plain == {"env": {"name": "digits"}} and not caplog.messages
    written = {"algorithm": {"e_every": 5}, "model": {"name_or_path": "tiny"}, "feedback": "sibling"}
    config = parse(written)
    assert config.as_given() == written and parse(config.as_given()) == config
    replaced = dataclasses.replace(config, algorithm=parse({"algorithm": {"name": "grpo"}}).algorithm)
    assert replaced.as_given() == written | {"algorithm": replaced.as_dict()["algorithm"]}


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


def test_an_empty_section_is_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run:\n# max_steps: 3\nprompts:\nenv: {name: digits}\n")
    config = load(str(tmp_path / "run.yaml"), ["--run.seed", "7"])
    assert config.run.seed == 7 and config.prompts is None
    with pytest.raises(ConfigError, match=r"feedback is empty. Write \[\] for none"):
        parse({"feedback": None})


def test_a_setting_is_not_put_into_what_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {lora: 16}\n")
    with pytest.raises(ConfigError, match=r"--model.lora.r: model.lora is not a mapping in the file; got 16"):
        load(str(tmp_path / "run.yaml"), ["--model.lora.r", "8"])


@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "inf", "-.inf", "-inf", "1e999"])
@pytest.mark.parametrize("key", ["optim.learning_rate", "rollout.temperature", "rollout.success_threshold"])
def test_a_number_is_finite(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is out of range; got .*expected"):
        load(None, [f"--{key}", value])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("run.max_steps", True, "expected a number"),
        ("optim.learning_rate", True, "expected a number"),
        ("run.output_dir", 2025, "expected a text. A text needs quotes."),
        ("run.max_steps", "ten", "got 'ten'; expected an integer"),
        ("run.max_steps", 1.5, "got 1.5; expected an integer"),
        ("optim.learning_rate", "small", "got 'small'; expected a number"),
        ("run.eval_control", "maybe", "got 'maybe'; expected true or false"),
        ("env.start_date", 0, "A text needs quotes."),
        ("run.report_to", "none", "got 'none'; expected 'tensorboard', 'wandb', 'trackio' or 'mlflow'"),
        ("optim.lr_scheduler_type", "cosin", "'cosine'"),
        ("model.lora", True, "expected a mapping of its settings, {} for their defaults"),
        ("model.lora.target_modules", 3, "expected a list or 'all-linear'"),
    ],
)
def test_a_value_of_another_kind_is_an_error(key: str, value: Any, said: str) -> None:
    data: dict[str, Any] = {"env": {"name": "code", "path": "x.jsonl"}}
    *path, last = key.split(".")
    inner = data
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = value
    with pytest.raises(ConfigError, match=rf"^{key}[.0-9]* has a wrong value") as error:
        parse(data)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:\n  max_steps: 2\n   eval_steps: 1\n", "a line that is indented too far (line 3). Indent by spaces"),
        ("run:\n  max_steps: 2\n eval_steps: 1\n", "an indentation that fits nothing above it (line 3). Indent"),
        ("run:\n\tmax_steps: 2\n", "got a tab (line 2). Indent by spaces"),
        ("run: max_steps: 2\n", "got a second ': ' on a line, or"),
        ("run: {max_steps: 2\nenv: {name: digits}\n", "got a { } that is not closed, or"),
        ("feedback: [sibling\nenv: {name: digits}\n", "got a [ ] that is not closed, or"),
        ('run: {output_dir: "a}\n', "got a quote that is not closed (line 2)"),
        ("run:\n  max_steps: 2\nenv\noptim: {}\n", "got a line that is no 'key: value'"),
    ],
)
def test_a_file_that_is_no_yaml_is_an_error_in_plain_words(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML; got ") as error:
        load(str(tmp_path / "run.yaml"))
    assert said in str(error.value)


@pytest.mark.parametrize("more", [[], ["--run.max_steps", "3"]])
def test_a_resume_of_nothing_that_says_nothing_is_an_error(more: list[str], tmp_path: Path) -> None:
    """A mistyped folder would begin a run of the defaults; with a task of its own, a resume may be the first start."""
    words = ["--run.resume", "true", "--run.output_dir", str(tmp_path / "nosuch"), *more]
    with pytest.raises(ConfigError, match=r"nosuch holds no run to continue.*Correct run\.output_dir"):
        load(None, words).require_something_to_train()
    load(None, [*words, "--env.name", "digits"]).require_something_to_train()


WAYS_TO_LOAD: dict[str, Any] = {
    "a file": lambda data, path: load(path),
    "of vpd sft": lambda data, path: load_sft(f"{Path(path).parent}/answers.jsonl", path, []),
    "Python": lambda data, path: (
        read_arguments(None, None, None, tokenizer=None, algorithm=None, feedback=None, more=data).config
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_LOAD)
@pytest.mark.parametrize("word", [True, "true", "yes", "on"])
def test_every_way_to_say_resume_starts_from_the_settings_of_the_run(way: str, word: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    settings = {"optim": {"learning_rate": 0.25}, "run": {"seed": 7}}
    Recorder(folder=tmp_path / "out", files=FileSystem(), settings=settings).record("training", 1)
    data = {"run": {"resume": word, "output_dir": str(tmp_path / "out")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    found = WAYS_TO_LOAD[way](data, str(tmp_path / "run.yaml"))
    assert found.run.resume is True and found.run.seed == 7 and found.optim.learning_rate == 0.25
    fresh = {"run": {**data["run"], "resume": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fresh))
    assert WAYS_TO_LOAD[way](fresh, str(tmp_path / "run.yaml")).run.seed == 0


def test_a_word_stands_for_a_list_of_one() -> None:
    assert parse({"run": {"report_to": "tensorboard"}}).run.report_to == ("tensorboard",)
    lora = parse({"model": {"lora": {"target_modules": "q_proj"}}}).model.lora
    assert lora is not None and lora.target_modules == ("q_proj",)
    whole = parse({"model": {"lora": {"target_modules": "all-linear"}}}).model.lora
    assert whole is not None and whole.target_modules == "all-linear"


def test_no_is_a_word_where_a_word_is_meant(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim: {mixed_precision: no}\nrun: {resume: no}\n")
    config = load(str(tmp_path / "run.yaml"), ["--optim.mixed_precision", "no"])
    assert config.optim.mixed_precision == "no" and config.run.resume is False


def test_a_word_of_truth_where_any_text_may_stand_is_not_guessed(tmp_path: Path) -> None:
    """``output_dir: on`` made the folder ``yes``."""
    (tmp_path / "run.yaml").write_text("run: {output_dir: on}\n")
    with pytest.raises(
        ConfigError, match=r"run.output_dir has a wrong value; got True; .* Write such a word in quotes"
    ):
        load(str(tmp_path / "run.yaml"))


def test_mixed_precision_of_float64_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fewer bits than weights of 32; got model.dtype float64"):
        load(None, ["--model.dtype", "float64", "--optim.mixed_precision", "bf16"])


def test_a_name_is_a_text() -> None:
    for data in ({"algorithm": {"name": ["vpd"]}}, {"env": {"name": {}}}, {"engine": {"name": None}}):
        with pytest.raises(ConfigError, match="name is no text"):
            parse(data)
    for sources in ([["environment"]], [{"name": ["environment"]}], [None]):
        with pytest.raises(ConfigError, match="name is no text"):
            parse({"feedback": sources})
    with pytest.raises(ConfigError, match=r"Write env: \{name: digits\}"):
        parse({"env": "digits"})


ELSEWHERE = [
    ("learning_rate", "That is optim.learning_rate here."),
    ("num_generations", "That is rollout.num_generations here."),
    ("per_device_train_batch_size", "That is rollout.prompts_per_step (tasks) times"),
    ("num_train_epochs", "That is run.max_steps, which counts iterations"),
    ("clip_high", "That is algorithm.clip_high (grpo, hybrid) here."),
    ("lora_alpha", "That is model.lora.lora_alpha here."),
    ("model_name_or_path", "That is model.name_or_path here."),
    ("beta", "beta has no counterpart here: there is no KL penalty"),
    ("num_iterations", "has no counterpart here: a batch is learned from once"),
    ("vllm_mode", "has no counterpart here: a vLLM server is named in engine.url"),
    ("vllm_gpu_memory_utilization", "That is engine.server_args, [--gpu-memory-utilization=SHARE]"),
]


@pytest.mark.parametrize(("key", "said"), ELSEWHERE)
def test_a_setting_of_another_library_is_named_as_it_is_here(key: str, said: str) -> None:
    for call in (lambda: parse({key: 1}), lambda: load(None, [f"--{key}", "1"]), lambda: load(None, [f"--{key}=1"])):
        with pytest.raises(ConfigError) as error:
            call()
        assert said in str(error.value)


def test_an_unknown_key_is_first_looked_for_in_the_other_sections() -> None:
    for data, said in (
        ({"algorithm": {"distillation_is_clip": 2}}, "That is algorithm.importance_clip here."),
        ({"optim": {"max_steps": 2}}, "unknown key optim.max_steps. That is run.max_steps here."),
        (
            {"algorithm": {"name": "grpo", "e_every": 2}},
            "unknown key algorithm.e_every. Only algorithm.name vpd or gated has it.",
        ),
        ({"optim": "adamw_torch"}, "That is optim.optimizer (adamw or sgd"),
    ):
        with pytest.raises(ConfigError) as error:
            parse(data)
        assert said in str(error.value)


def test_every_place_that_another_librarys_key_is_sent_to_exists() -> None:
    places = {name: set(declarations(settings_class(place))) for name, place in PLAIN.items()}
    for section, choice in CHOICES.items():
        places[section] = {key for place in choice.table.values() for key in declarations(settings_class(place))}
    for key, place in {**RENAMED, **{key: why for key, why in ABSENT.items()}}.items():
        for section, name in re.findall(r"\b(model|env|prompts|rollout|engine|algorithm|optim|run)\.(\w+)", place):
            assert name in places[section], (key, f"{section}.{name}")
    assert not set(RENAMED) & set(ABSENT)


def test_a_path_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/runs/$x")
    data = {
        "run": {"output_dir": "~/a/${RUNS}/$RUNS"},
        "model": {"name_or_path": "~/m"},
        "env": {"name": "code", "path": "$RUNS/x.jsonl", "eval_path": "a~b$", "packages": ["~/p", "q"]},
        "algorithm": {"name": "gkd", "teacher_model": "${HOME}/t"},
    }
    config = parse(data)
    assert config.run.output_dir == f"{tmp_path}/a//runs/$x//runs/$x"
    assert config.model.name_or_path == f"{tmp_path}/m"
    assert config.env.path == "/runs/$x/x.jsonl" and config.env.eval_path == "a~b$"
    assert config.env.packages == (f"{tmp_path}/p", "q")
    assert config.algorithm.needs.external_model == f"{tmp_path}/t"
    assert RunSettings(output_dir="~/a").output_dir == f"{tmp_path}/a"
    (tmp_path / "mine.py").write_text("class Mine:\n    task = eval_tasks = grade = None\n")
    assert parse({"env": {"name": "~/mine.py:Mine"}}).env.build() is not None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("${NO_SUCH}/x", "the environment has no variable NO_SUCH"),
        ("~nobody-of-this-name/x", "there is no such user"),
        ("", "run.output_dir is empty"),
        ("a" * 300, "got 300 bytes; expected at most 255"),
    ],
)
def test_a_path_that_cannot_be_is_an_error(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunSettings(output_dir=path)
