"""``vpd convert``: other libraries' settings and data, and that what comes out trains."""

import ast
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from transformers import TrainingArguments

from vpd.cli import main
from vpd.config import load, parse
from vpd.config.convert import Converted, Foreign, Unread, convert, trl, verl
from vpd.config.convert.files import DIALECTS, read
from vpd.config.convert.reward_functions import Extracted, extracted, moved
from vpd.envs.data_conversion import convert_data
from vpd.envs.math import Math
from vpd.envs.recorded import RecordedAnswers
from vpd.errors import ConfigError, DataError

DOCS = Path(__file__).resolve().parent.parent / "docs"
TINY = ["--model.name_or_path", "tiny", "--rollout.prompts_per_step", "2", "--rollout.num_generations", "2",
        "--rollout.max_completion_length", "6", "--run.max_steps", "3", "--optim.mixed_precision", "no",
        "--engine.name", "embedded", "--run.report_to", "[]", "--prompts.max_prompt_length", "null",
        "--algorithm.distillation_topk", "9"]  # fmt: skip
#: names of the fields of TRL 1.16's classes beside those of transformers
SDPO_FIELDS = (
    "beta epsilon epsilon_high importance_sampling_level reward_weights scale_rewards distillation_weight"
    " distillation_alpha distillation_mode distillation_topk distillation_is_clip distillation_add_tail"
    " teacher_model_kind teacher_update_rate teacher_sync_steps use_successful_as_teacher success_reward_threshold"
    " dont_reprompt_on_self_success max_reprompt_len reprompt_template solution_template feedback_template"
    " include_environment_feedback environment_feedback_only_without_solution remove_thinking_from_demonstration"
    " diagnostics_warning_interval diagnostics_flat_tolerance max_prompt_length use_teacher_server"
)
ONLINE_FIELDS = (
    "model_init_kwargs trust_remote_code disable_dropout remove_unused_columns num_generations num_generations_eval"
    " max_completion_length ds3_gather_for_generation shuffle_dataset generation_batch_size steps_per_generation"
    " temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty cache_implementation"
    " use_vllm vllm_mode vllm_gpu_memory_utilization loss_type num_iterations mask_truncated_completions"
)
GRPO_FIELDS = (
    "router_aux_loss_coef cast_lm_head_to_fp32 pad_to_multiple_of delta sapo_temperature_neg vespo_k_pos"
    " multi_objective_aggregation sync_ref_model ref_model_mixup_alpha top_entropy_quantile entropy_coef"
    " use_adaptive_entropy entropy_target max_tool_calling_iterations off_policy_mask_threshold use_bias_correction_kl"
    " log_completions use_transformers_continuous_batching transformers_continuous_batching_config"
)
GKD_FIELDS = (
    "lmbda max_new_tokens teacher_model_name_or_path teacher_model_init_kwargs seq_kd max_length packing padding_free"
    " dataset_text_field dataset_kwargs eos_token pad_token truncation_mode completion_only_loss assistant_only_loss"
)
SCRIPT_FIELDS = (
    "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming datasets test_split_size"
    " reward_funcs reward_model_name_or_path model_name_or_path model_revision dtype attn_implementation use_peft"
    " lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type"
    " use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant"
)
FIELDS = {
    "trl-sdpo": f"{SDPO_FIELDS} {ONLINE_FIELDS}",
    "trl-grpo": f"{GRPO_FIELDS} {ONLINE_FIELDS}",
    "trl-gkd": GKD_FIELDS,
}


def converted(name: str, *overrides: str, tasks: int | None = None, processes: int = 1, **given: Any) -> Converted:
    dialect = DIALECTS[name]
    foreign = Foreign(given=given, defaults=dialect.defaults, tasks=tasks, num_processes=processes)
    data = [] if name in ("verl", "sdpo") else ["--env.path", "x.jsonl", "--env.reward", "r.py:f"]
    data += ["--model.name_or_path", "tiny"]
    return convert(dialect, foreign, [*data, *overrides])


def of_verl(name: str, given: dict[str, Any], *overrides: str, tasks: int | None = None) -> Converted:
    dialect = DIALECTS[name]
    foreign = Foreign(given=given, defaults=dialect.defaults, tasks=tasks)
    model = ["--model.name_or_path", "tiny"]
    return convert(dialect, foreign, ["--env.path", "x.parquet", "--rollout.num_generations", "2", *model, *overrides])


def fate(result: Converted, key: str) -> str:
    return next(line.outcome.verdict for line in result.lines if line.key == key)


@pytest.mark.parametrize("name", FIELDS)
def test_every_key_of_trl_is_known(name: str) -> None:
    dialect = DIALECTS[name]
    trained = {field.name for field in dataclasses.fields(TrainingArguments) if not field.name.startswith("_")}
    keys = trained | set(f"{FIELDS[name]} {SCRIPT_FIELDS}".split())
    assert not [key for key in keys if key not in dialect.rules and not key.startswith(tuple(dialect.prefixes))]


@pytest.mark.parametrize("name", DIALECTS)
def test_every_rule_answers_to_any_value(name: str) -> None:
    dialect = DIALECTS[name]
    foreign = Foreign(given={}, defaults=dialect.defaults)
    for key, rule in dialect.rules.items():
        value = dialect.defaults.get(key)
        if value is not None or key.endswith(("_steps", "_freq", "kwargs", "files", "path", "reward_funcs")):
            assert rule(value, foreign).verdict in ("mapped", "ignored", "impossible"), key


def test_a_step_of_trl_is_counted_in_iterations() -> None:
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
    config = converted("trl-grpo", processes=2, num_generations=8, max_steps=100, save_steps=10, **given).config
    assert config.rollout.prompts_per_step == 4 * 2 * 8 // 8
    assert dataclasses.asdict(config.algorithm)["updates_per_batch"] == 4  # type: ignore[call-overload]
    assert (config.run.max_steps, config.run.save_steps) == (25, 3)


def test_epochs_are_iterations_where_the_records_are_counted() -> None:
    result = converted("trl-grpo", tasks=100, num_train_epochs=2, per_device_train_batch_size=40, warmup_steps=0.1)
    assert result.config.run.max_steps == 40 and result.config.optim.warmup_steps == 4
    assert fate(converted("trl-grpo", num_train_epochs=2), "num_train_epochs") == "impossible"


@pytest.mark.parametrize("word", ["--env.path=$FOLDER/train.jsonl", "--env.path train.jsonl"])
def test_records_are_counted_wherever_the_path_stands(
    word: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDER", str(workplace))
    (workplace / "train.jsonl").write_text(f"{json.dumps(RECORD)}\n" * 40)
    (workplace / "trl.yaml").write_text(
        "model_name_or_path: m\nnum_generations: 8\nnum_train_epochs: 2\nreward_funcs: [r.f]\n"
    )
    words = ["--output", "run.yaml", "--rollout.prompts_per_step", "1", *word.split()]
    assert main(["convert", "trl.yaml", "--from", "trl-grpo", *words]) == 0
    assert load("run.yaml").run.max_steps == 80


SAME = [
    ("trl-sdpo", {"teacher_model_kind": "base"}, "algorithm", "teacher", "frozen"),
    ("trl-sdpo", {"teacher_update_rate": 0.2}, "algorithm", "teacher_ema_rate", 0.2),
    ("trl-sdpo", {"distillation_is_clip": None}, "algorithm", "importance_clip", None),
    ("trl-sdpo", {}, "algorithm", "distillation_estimator", "sampled"),
    ("trl-sdpo", {"distillation_weight": 0.0}, "algorithm", "name", "grpo"),
    ("trl-sdpo", {"reprompt_template": "{prompt}{solution}{feedback} Go on."}, "prompts", "closing", " Go on."),
    ("trl-sdpo", {"feedback_template": "Wrong: {feedback_raw}\n"}, "prompts", "feedback_header", "Wrong: "),
    ("trl-grpo", {"epsilon": 0.1}, "algorithm", "clip_high", 0.1),
    ("trl-grpo", {"epsilon": 0.1, "epsilon_high": 0.3}, "algorithm", "clip_high", 0.3),
    ("trl-grpo", {"loss_type": "grpo"}, "algorithm", "average", "seq_mean"),
    ("trl-grpo", {"scale_rewards": False}, "algorithm", "scale_rewards", "none"),
    ("trl-grpo", {}, "optim", "learning_rate", 1e-6),
    ("trl-grpo", {"save_strategy": "no"}, "run", "save_steps", 0),
    ("trl-grpo", {"use_vllm": True, "vllm_mode": "colocate"}, "engine", "name", "vllm"),
    ("trl-grpo", {"use_vllm": True}, "algorithm", "importance_reference", "sampler"),
    ("trl-grpo", {"use_vllm": True, "vllm_importance_sampling_correction": False}, "algorithm", "importance_reference",
     "own"),
    ("trl-grpo", {"use_vllm": True, "vllm_server_host": "0.0.0.0"}, "engine", "url", "http://127.0.0.1:8000"),
    ("trl-grpo", {"use_vllm": True, "vllm_server_base_url": "http://x:1"}, "engine", "url", "http://x:1"),
    ("trl-grpo", {"use_vllm": True, "vllm_max_model_length": 99}, "engine", "max_model_len", 99),
    ("trl-grpo", {"use_vllm": True, "vllm_tensor_parallel_size": 2, "vllm_gpu_memory_utilization": 0.3}, "engine",
     "server_args", ("--gpu-memory-utilization=0.3", "--tensor-parallel-size=2")),
    ("trl-grpo", {"use_vllm": False, "vllm_max_model_length": 99}, "engine", "name", "embedded"),
    ("trl-gkd", {"teacher_model_name_or_path": "t", "beta": 0.9}, "algorithm", "distillation_alpha", 0.9),
    ("trl-gkd", {"teacher_model_name_or_path": "t", "lmbda": 0.7}, "algorithm", "student_fraction", 0.7),
    ("trl-gkd", {"teacher_model_name_or_path": "t"}, "rollout", "prompts_per_step", 8),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "section", "key", "value"), SAME)
def test_a_key_is_the_setting_that_does_the_same(
    name: str, given: dict[str, Any], section: str, key: str, value: Any
) -> None:
    assert dataclasses.asdict(getattr(converted(name, **given).config, section))[key] == value


LOST = [
    ("beta", 0.04), ("top_p", 0.9), ("num_iterations", 2), ("optim", "adamw_8bit"), ("load_in_4bit", True),
    ("loss_type", "dr_grpo"), ("fp16", True), ("lr_scheduler_type", "warmup_stable_decay"), ("no_such_key", 1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), LOST)
def test_what_would_change_the_run_is_impossible_and_stands_in_the_file(key: str, value: Any) -> None:
    result = converted("trl-grpo", **{key: value})
    assert fate(result, key) == "impossible"
    text = result.to_yaml("trl.yaml")
    assert f"#   {key}: {value}" in text and parse(yaml.safe_load(text)) == result.config


@pytest.mark.parametrize("key", ["beta", "top_p", "num_iterations", "load_in_4bit"])
def test_a_key_that_asks_for_what_is_done_anyway_is_ignored(key: str) -> None:
    value = {"beta": 0.0, "top_p": 1.0, "num_iterations": 1, "load_in_4bit": False}[key]
    assert fate(converted("trl-grpo", **{key: value}), key) == "ignored"


def test_a_share_of_warmup_is_not_undone_by_the_steps_that_are_none() -> None:
    for given in ({"warmup_ratio": 0.1}, {"warmup_ratio": 0.1, "warmup_steps": 0}):
        result = converted("trl-grpo", max_steps=20, **given)
        assert result.config.optim.warmup_steps == 2
        assert not [x for x in result.lines if x.key == "warmup_steps" and x.outcome.verdict != "ignored"]
    result = converted("trl-grpo", max_steps=20, warmup_ratio=0.1, warmup_steps=5)
    assert result.config.optim.warmup_steps == 5 and fate(result, "warmup_ratio") == "ignored"


def test_a_mistyped_key_is_answered_with_the_nearest() -> None:
    lines = {line.key: line.outcome.why for line in converted("trl-grpo", learning_rat=1e-6, zzz=1).lines}
    assert lines["learning_rat"].endswith("is not known to have it. Did you mean 'learning_rate'?")
    assert lines["zzz"].endswith("is not known to have it")


def test_lora_is_taken_over_where_it_is_used() -> None:
    lora = converted(
        "trl-grpo", use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules=["q_proj"]
    ).config.model.lora
    assert lora is not None and (lora.r, lora.lora_alpha, lora.target_modules) == (4, 8, ("q_proj",))
    assert converted("trl-grpo", lora_r=4).config.model.lora is None


def test_reward_functions_are_named_by_their_places() -> None:
    dialect = trl.GRPO
    given = {
        "model_name_or_path": "m",
        "dataset_name": "x.jsonl",
        "reward_funcs": ["a.b.right", "think_format_reward"],
        "reward_weights": [1, 0.5],
    }
    config = convert(dialect, Foreign(given=given, defaults=dialect.defaults)).config
    assert config.env.reward == [
        {"function": "a.b:right", "weight": 1.0},
        {"function": "trl.rewards:think_format_reward", "weight": 0.5},
    ]


def test_verls_batches_clips_and_folder() -> None:
    given = {
        "data.train_batch_size": 64, "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "algorithm.adv_estimator": "grpo",
        "actor_rollout_ref.actor.clip_ratio": 0.1, "actor_rollout_ref.actor.clip_ratio_high": 0.3,
        "trainer.project_name": "p", "trainer.experiment_name": "e", "trainer.total_epochs": 2,
        "actor_rollout_ref.actor.clip_ratio_c": 3.0, "trainer.val_before_train": True,
    }  # fmt: skip
    result = of_verl("verl", given, tasks=640)
    settings = dataclasses.asdict(result.config.algorithm)  # type: ignore[call-overload]
    assert settings["updates_per_batch"] == 4 and (settings["clip_low"], settings["clip_high"]) == (0.2, 0.3)
    assert result.config.run.max_steps == 20 and result.config.run.output_dir == "checkpoints/p/e"
    assert fate(result, "actor_rollout_ref.actor.clip_ratio_c") == "impossible"
    assert fate(of_verl("verl", {}), "algorithm.adv_estimator") == "impossible"  # verl's default is a critic


def test_verls_rollouts_of_vllm_are_on_a_server() -> None:
    rollout, correction = "actor_rollout_ref.rollout", "algorithm.rollout_correction"
    given = {
        f"{rollout}.name": "vllm", f"{rollout}.tensor_model_parallel_size": 2, f"{rollout}.max_model_len": 99,
        f"{rollout}.dtype": "bfloat16", f"{rollout}.free_cache_engine": True, f"{correction}.rollout_is": "token",
        "algorithm.adv_estimator": "grpo",
    }  # fmt: skip
    result = of_verl("verl", given | {f"{correction}.rollout_is_threshold": 2.0})
    assert result.settings["engine"] == {
        "name": "vllm", "server_args": ["--tensor-parallel-size=2"], "max_model_len": 99, "dtype": "bfloat16",
    }  # fmt: skip
    assert dataclasses.asdict(result.config.algorithm)["importance_reference"] == "sampler"  # type: ignore[call-overload]
    assert [line.key for line in result.of("impossible") if not line.default] == [f"{correction}.rollout_is_threshold"]
    own = of_verl("verl", given | {f"{correction}.rollout_is": None})
    assert dataclasses.asdict(own.config.algorithm)["importance_reference"] == "own"  # type: ignore[call-overload]
    embedded = of_verl("verl", given | {f"{rollout}.name": "hf"})
    assert "engine" not in embedded.settings and fate(embedded, f"{correction}.rollout_is") == "ignored"


def test_sdpos_teacher_and_trust_region() -> None:
    own = "actor_rollout_ref.actor.self_distillation"
    result = of_verl("sdpo", {f"{own}.teacher_regularization": "trust-region", f"{own}.teacher_update_rate": 0.3})
    settings = dataclasses.asdict(result.config.algorithm)  # type: ignore[call-overload]
    assert (settings["name"], settings["teacher"], settings["teacher_trust_region_mix"]) == (
        "sdpo",
        "trust_region",
        0.3,
    )
    assert settings["denominator"] == "all" and [source.name for source in result.config.feedback] == [
        "environment",
        "sibling",
    ]


HYDRA = """
actor_rollout_ref:
  model: {path: "${model}"}
  actor:
    optim: {_target_: a.B, lr: 2e-6, betas: [0.9, 0.95]}
    ppo_mini_batch_size: ${data.train_batch_size}
  rollout: {n: 4, val_kwargs: {n: 3}, response_length: "${oc.select:data.max_response_length,7}"}
model: m
data:
  train_batch_size: 8
  train_files: ["${oc.env:DATA}/x.parquet"]
  apply_chat_template_kwargs: {enable_thinking: true}
algorithm: {adv_estimator: grpo}
"""


def test_hydras_references_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/d")
    (tmp_path / "v.yaml").write_text(HYDRA)
    dialect, flat = read(tmp_path / "v.yaml", None)
    config = convert(dialect, Foreign(given=flat, defaults=dialect.defaults)).config
    assert dialect is verl.VERL and config.model.name_or_path == "m" and config.env.path == "/d/x.parquet"
    assert config.optim.adam_beta2 == 0.95 and config.prompts is not None and config.prompts.enable_thinking
    assert config.run.eval_samples == 3 and dataclasses.asdict(config.algorithm)["updates_per_batch"] == 1  # type: ignore[call-overload]


SCRIPT = """
from trl import GRPOConfig, GRPOTrainer
LR = 3e-6
def right(prompts, completions, **columns): return [0.0]
args = GRPOConfig(output_dir="o", learning_rate=LR, beta=0.0, max_steps=compute(), num_generations=4)
trainer = GRPOTrainer(model="m", reward_funcs=[right], args=args, peft_config=LoraConfig(r=2))
raise SystemExit("a script is read and not run")
"""


def test_a_python_script_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    dialect, flat = read(tmp_path / "train.py", None)
    result = convert(dialect, Foreign(given=flat, defaults=dialect.defaults), ["--env.path", "x.jsonl"])
    assert result.config.optim.learning_rate == 3e-6 and result.config.env.reward == f"{tmp_path}/train.py:right"
    assert result.config.model.lora is not None and result.config.model.lora.r == 2
    assert fate(result, "max_steps") == "impossible"  # its value is an expression


ACTING = """
'''A script.'''
import re
try:
    import wandb
except ImportError:
    wandb = None
from trl import GRPOConfig, GRPOTrainer
NUMBER = re.compile("[0-9]+")
def exact(completions, answer, **columns): return [float(c == a) for c, a in zip(completions, answer)]
def brief(completions, **columns): return [-0.01 * len(NUMBER.findall(c)) for c in completions]
"""
TRAINING = """
args = GRPOConfig(num_generations=4, max_steps=2)
trainer = GRPOTrainer(model="tiny", reward_funcs=[exact, brief], args=args)
trainer.train()
"""


def test_functions_of_a_script_that_trains_are_written_to_a_file_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, guarded = tmp_path / "grpo.py", tmp_path / "guarded.py"
    script.write_text(ACTING + TRAINING)
    guarded.write_text(f"{ACTING}if __name__ == '__main__':{TRAINING.replace(chr(10), chr(10) + '    ')}")
    for path in (script, guarded):
        words = ["convert", str(path), "--env.path", "x.jsonl", "--output", str(path.with_suffix(".yaml"))]
        assert main(words) == 0
        lines = capsys.readouterr().out.rstrip().splitlines()
        assert lines[-1].endswith(f"vpd train --config {path.with_suffix('.yaml')}")
        beside = tmp_path / f"{path.stem}_rewards.py"
        assert beside.exists() == (path == script) == ("with what they need of grpo.py." in lines[-2])
        place = beside if path == script else path
        settings = yaml.safe_load(path.with_suffix(".yaml").read_text())
        assert [part["function"] for part in settings["env"]["reward"]] == [f"{place}:exact", f"{place}:brief"]
    text = (tmp_path / "grpo_rewards.py").read_text()
    assert "trl" not in text and "wandb" not in text and "'A script.'" not in text
    made: dict[str, Any] = {}
    exec(compile(text, "grpo_rewards.py", "exec"), made)
    assert made["exact"](["a", "b"], ["a", "c"]) == [1.0, 0.0] and made["brief"](["1 22"]) == [-0.02]
    (tmp_path / "grpo.yaml").unlink()
    assert main(["convert", str(script), "--env.path", "x.jsonl", "--output", str(tmp_path / "grpo.yaml")]) == 0
    (tmp_path / "grpo.yaml").unlink()
    (tmp_path / "grpo_rewards.py").write_text("mine = 1")
    capsys.readouterr()
    assert main(["convert", str(script), "--env.path", "x.jsonl", "--output", str(tmp_path / "grpo.yaml")]) == 2
    assert "grpo_rewards.py exists, where the reward functions of grpo.py" in capsys.readouterr().err
    assert (tmp_path / "grpo_rewards.py").read_text() == "mine = 1" and not (tmp_path / "grpo.yaml").exists()


NEEDED = """
from __future__ import annotations
import os, re; import json
from helpers import *
from math import log as ln, exp
WORDS = ["a"]
WORDS += ["b"]
TABLE: dict[str, float] = {}
TABLE["a"] = 2.0
UNUSED = json.dumps(3)
def cached(function):
    return function
class Scale:
    factor = 3.0
def helper(text):
    model = TABLE.get(text, 1.0)  # a local name, though the script has one too
    return model * Scale.factor
@cached
def right(completions, **columns) -> list[float]:
    return [helper(c) + ln(len(WORDS)) for c in completions]
model = AutoModel.from_pretrained("m")
print(WORDS)
GRPOTrainer(model=model, reward_funcs=[right], args=GRPOConfig()).train()
"""


def found_in(source: str, folder: Path, *functions: str) -> Extracted:
    (folder / "script.py").write_text(source)
    settings = {"env": {"reward": [f"{folder}/script.py:{name}" for name in functions]}}
    found = extracted(folder / "script.py", settings)
    assert found is not None
    return found


def test_a_reward_function_takes_along_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    text = found_in(NEEDED, tmp_path, "right").text
    assert text is not None
    assert ast.parse(text) is not None and text.index("from __future__") < text.index("import *") < text.index("WORDS")
    assert "from math import log as ln\n" in text and "@cached\ndef right" in text and "# a local name" in text
    for left in ("os", "json", "exp", "UNUSED", "AutoModel", "print(", "Trainer"):
        assert left not in text.replace("exec", "")
    made: dict[str, Any] = {}
    exec(compile(text.replace("from helpers import *", ""), "rewards.py", "exec"), made)
    assert made["right"](["a", "z"]) == pytest.approx([6.0 + math.log(2), 3.0 + math.log(2)])


@pytest.mark.parametrize(
    "line",
    [
        "WORDS.append('c')",
        "for word in open('words'): WORDS.append(word)",
        "TOKENIZER = AutoTokenizer.from_pretrained('m')",
        "WORDS = parser.parse_args().words",
        "(WORDS,) = HfArgumentParser(Words).parse_args_into_dataclasses()",
    ],
)
def test_what_only_running_a_script_makes_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "TOKENIZER" if "TOKENIZER" in line else "WORDS"
    source = f"WORDS = []\n{line}\ndef right(completions): return [len({name}) for c in completions]\n{TRAINING}"
    source = source.replace("[exact, brief]", "[right]")
    assert found_in(source, tmp_path, "right").missing == [name]
    output = tmp_path / "run.yaml"
    assert main(["convert", str(tmp_path / "script.py"), "--env.path", "x.jsonl", "--output", str(output)]) == 0
    *_, first, last = capsys.readouterr().out.rstrip().splitlines()
    for text in (first, output.read_text()):
        assert "First: move right out of script.py" in text and f"They use {name}, which only running" in text
    assert last == f"Then: vpd train --config {output}" and not (tmp_path / "script_rewards.py").exists()


def test_without_an_output_it_is_said_that_functions_would_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grpo.py").write_text(ACTING + TRAINING)
    assert main(["convert", str(tmp_path / "grpo.py"), "--env.path", "x.jsonl"]) == 0
    assert "# First: give --output; it writes exact, brief to a file too" in capsys.readouterr().out
    rewards = [f"{tmp_path}/mine.py:exact", "my_rewards:brief"]
    assert extracted(tmp_path / "grpo.py", {"env": {"reward": rewards}}) is None
    weighted = {"env": {"reward": [{"function": f"{tmp_path}/grpo.py:exact", "weight": 2.0}, "m:f"]}}
    assert moved(weighted, tmp_path / "grpo.py", Path("new.py")) == [{"function": "new.py:exact", "weight": 2.0}, "m:f"]


IMPORTING = """
import shaping, torch
from datasets import load_dataset
from my_rewards import right as correct, LR
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
args = SDPOConfig(output_dir="o", learning_rate=LR, beta=0.04, optim=compute(), max_steps=2, num_generations=4)
data = load_dataset("json", data_files=["train.jsonl"], split="train")
SDPOTrainer(model="tiny", reward_funcs=[correct, shaping.short, made()], args=args, train_dataset=data)
"""


def test_a_script_that_imports_its_rewards_is_read_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(IMPORTING)
    _, flat = read(tmp_path / "train.py", None)
    assert isinstance(flat["learning_rate"], Unread) and isinstance(flat["reward_funcs"], Unread)
    (tmp_path / "train.py").write_text(IMPORTING.replace(", made()", ""))
    _, flat = read(tmp_path / "train.py", None)
    assert flat["reward_funcs"] == ["my_rewards:right", "shaping:short"] and flat["dataset_name"] == "train.jsonl"
    assert main(["convert", str(tmp_path / "train.py"), "--output", str(tmp_path / "run.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "learning_rate: LR" in shown and "optim: compute()" in shown and "2 key(s) could not be taken over" in shown


def test_the_best_step_and_the_upload_are_taken_over() -> None:
    given = {"reward_funcs": "r.f", "dataset_name": "d.jsonl", "load_best_model_at_end": True}
    assert fate(of_trl(given), "load_best_model_at_end") == "impossible"  # nothing is evaluated
    result = of_trl(given | {"eval_strategy": "steps", "eval_steps": 5, "greater_is_better": False})
    assert result.config.run.metric_for_best_model == "eval/accuracy" and result.config.run.load_best_model_at_end
    assert fate(result, "greater_is_better") == "ignored"  # of a loss
    uploaded = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": False}
    run = of_trl(given | {"load_best_model_at_end": False} | uploaded).config.run
    assert run.push_to_hub and run.hub_model_id == "me/mine" and not run.hub_private_repo
    assert fate(of_trl(given | {"push_to_hub": True, "hub_model_id": "mine"}), "push_to_hub") == "impossible"


def of_trl(given: dict[str, Any]) -> Converted:
    return convert(trl.GRPO, Foreign(given={"model_name_or_path": "m"} | given, defaults=trl.GRPO.defaults))


def test_what_no_library_has_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n")
    assert main(["convert", str(tmp_path / "a.yaml")]) == 2
    assert "Give --from" in capsys.readouterr().err
    (tmp_path / "b.py").write_text("x = 1\n")
    assert main(["convert", str(tmp_path / "b.py")]) == 2
    assert "makes no such configuration" in capsys.readouterr().err


def test_what_is_missing_is_said_after_the_table_and_no_file_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text("model_name_or_path: m\nnum_generations: 4\nmax_steps: 5\nbeta: 0.1\n")
    words = ["convert", str(tmp_path / "t.yaml"), "--output", str(tmp_path / "run.yaml")]
    assert main([*words, "--env.path", "x.jsonl"]) == 2
    shown = capsys.readouterr()
    assert "impossible" in shown.out and "env.reward is missing" in shown.err and not (tmp_path / "run.yaml").exists()
    assert main([*words, "--env.path", "x.jsonl", "--env.reward", "r.py:f"]) == 0
    assert "1 key(s) could not be taken over" in capsys.readouterr().out
    assert load(str(tmp_path / "run.yaml")).env.reward == "r.py:f"
    assert main(words) == 2  # the file is there
    assert "run.yaml exists" in capsys.readouterr().err


def test_json_is_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.yaml").write_text(
        "model_name_or_path: m\nnum_generations: 4\nreward_funcs: [a.b]\ndataset_name: x.jsonl\n"
    )
    assert main(["convert", str(tmp_path / "t.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["rollout"]["num_generations"] == 4
    assert {key["verdict"] for key in found["keys"]} <= {"mapped", "ignored", "impossible"}


def before_and_after(document: str, language: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The other library's file, what it becomes, and the files of Python, as a document shows them."""
    text = (DOCS / document).read_text()
    blocks = {
        kind: re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for kind in (language, "yaml")
    }
    code = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return blocks[language][0], yaml.safe_load(blocks["yaml"][0]), dict(code)


RECORD = {"prompt": "apply rule D to 0 7 8", "answer": "8 7 0"}
VERL_RECORD = {
    "data_source": "mine",
    "prompt": [{"role": "user", "content": "apply rule D to 0 7 8"}],
    "reward_model": {"ground_truth": "8 7 0"},
    "extra_info": {"index": 0},
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(RECORD) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL_RECORD] * 3), tmp_path / "train.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("document", "language", "file"), [("from_trl.md", "yml", "trl.yaml"), ("from_verl.md", "sh", "run.sh")]
)
def test_the_run_in_the_guide_is_what_it_becomes_and_trains(
    document: str, language: str, file: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test may have imported its own
    before, after, code = before_and_after(document, language)
    (workplace / file).write_text(before)
    for name, text in code.items():
        (workplace / name).write_text(text)
    dialect, flat = read(workplace / file, None)
    assert convert(dialect, Foreign(given=flat, defaults=dialect.defaults)).config == parse(after)
    assert main(["convert", file, "--output", "run.yaml", *TINY]) == 0
    assert main(["train", "--config", "run.yaml", "--run.output_dir", "out"]) == 0
    metrics = [json.loads(line) for line in (workplace / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3] and metrics[-1]["m_step/rows"] > 0


def test_a_converted_distillation_from_another_model_trains(workplace: Path) -> None:
    (workplace / "gkd.yaml").write_text(
        "model_name_or_path: tiny\nteacher_model_name_or_path: tiny\nlmbda: 0.5\ndataset_name: train.jsonl\n"
    )
    assert main(["convert", "gkd.yaml", "--output", "run.yaml", *TINY]) == 0
    assert main(["train", "--config", "run.yaml"]) == 0


DATA = {
    "conversations": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "a"),
    "completions": ({"prompt": "q", "completion": "a"}, "a"),
    "preferences": (
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
        },
        "a",
    ),
}


@pytest.mark.parametrize("form", DATA)
def test_data_of_trl_becomes_prompts_with_answers(form: str, tmp_path: Path) -> None:
    record, answer = DATA[form]
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    data = convert_data(str(tmp_path / "d.jsonl"))
    [made] = data.records
    assert data.form == form and made["answer"] == answer and "rejected" not in made
    assert made["prompt"] in ("q", [{"role": "user", "content": "q"}])


def test_data_of_verl_is_read_as_it_is(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "train.parquet", "--output", "new.jsonl"]) == 0
    assert "env: {name: dataset, path: new.jsonl, reward: 'my_rewards.py:reward'}" in capsys.readouterr().out
    [first, *_] = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert first == {"id": "0", **VERL_RECORD}
    assert main(["convert", "train.parquet", "--run.seed", "1"]) == 2


@pytest.mark.parametrize(
    ("key", "value", "name"), [("dataset", "sciknoweval", "science"), ("data_source", "openai/gsm8k", "math")]
)
def test_the_environment_follows_from_where_the_data_is_from(key: str, value: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "q", key: value}) + "\n")
    assert convert_data(str(tmp_path / "d.jsonl")).env["name"] == name


def test_data_without_a_task_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"in no form of TRL's or verl's data; got the columns text"):
        convert_data(str(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="holds no conversation"):
        convert_data(str(tmp_path / "e.jsonl"))


def test_the_file_must_be_one_of_them() -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read(Path("/nowhere/x.yaml"), None)


def test_what_is_not_given_of_an_adapter_is_the_other_librarys_default() -> None:
    result = converted("trl-grpo", use_peft=True)
    assert result.settings["model"]["lora"] == {"r": 16, "lora_alpha": 32}
    assert fate(result, "lora_dropout") == "impossible"  # TRL's scripts take 0.05
    lora = of_verl("verl", {"actor_rollout_ref.model.lora_rank": 4}).settings["model"]["lora"]
    assert lora == {"lora_alpha": 16, "target_modules": "all-linear", "r": 4}
    assert "lora" not in of_verl("verl", {}).settings["model"]


def test_the_rest_of_gkds_answers_are_the_datas() -> None:
    settings = converted("trl-gkd", teacher_model_name_or_path="t").settings
    assert settings["algorithm"]["other_answers"] == "data" and settings["env"]["solution_column"] == "answer"
    assert settings["algorithm"]["student_fraction"] == 0.5
    settings = converted("trl-gkd", teacher_model_name_or_path="t", seq_kd=True).settings
    assert settings["algorithm"]["other_answers"] == "teacher" and "solution_column" not in settings["env"]
    assert "solution_column" not in converted("trl-gkd", teacher_model_name_or_path="t", lmbda=1.0).settings["env"]


def test_gkds_temperature_is_in_the_divergence_here_and_said_so() -> None:
    result = converted("trl-gkd", teacher_model_name_or_path="t")
    assert fate(result, "temperature") == "impossible" and result.config.rollout.temperature == 0.9
    assert fate(converted("trl-gkd", teacher_model_name_or_path="t", temperature=1.0), "temperature") == "mapped"


def test_a_prompt_that_is_a_text_is_read_otherwise_and_that_is_said() -> None:
    lines = converted("trl-grpo", dataset_name="x.jsonl").lines
    assert "chat template" in next(line.outcome.why for line in lines if line.key == "dataset_name")


def test_all_records_are_trained_on_where_nothing_is_held_out() -> None:
    for given in ({}, {"eval_strategy": "steps", "eval_steps": 5}):
        result = converted("trl-grpo", tasks=80, per_device_train_batch_size=8, num_train_epochs=1, **given)
        assert result.settings["env"]["eval_share"] == 0.0 and result.config.run.max_steps == 80
    assert fate(result, "eval_strategy") == "impossible" and result.config.run.eval_steps == 5
    given = {"eval_strategy": "steps", "eval_steps": 5, "eval_dataset": "test.jsonl"}
    result = converted("trl-grpo", **given)
    assert fate(result, "eval_strategy") == "ignored" and result.settings["env"]["eval_path"] == "test.jsonl"


def test_records_are_counted_without_those_that_are_held_out(workplace: Path) -> None:
    (workplace / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(400)))
    (workplace / "trl.yaml").write_text("model_name_or_path: m\nnum_train_epochs: 1\nreward_funcs: [r.f]\n")
    for share, steps in (("0.0", 400), ("0.5", 200)):
        words = ["--env.path", "train.jsonl", "--env.eval_share", share, "--output", f"{share}.yaml"]
        assert main(["convert", "trl.yaml", "--from", "trl-grpo", *words]) == 0
        assert load(f"{share}.yaml").run.max_steps == pytest.approx(steps, rel=0.1)


def test_a_constant_rate_has_no_warm_up_in_transformers() -> None:
    for given in ({"warmup_steps": 10}, {"warmup_ratio": 0.1}):
        result = converted("trl-grpo", lr_scheduler_type="constant", max_steps=100, **given)
        assert (result.config.optim.lr_scheduler_type, result.config.optim.warmup_steps) == ("constant", 0)
        assert "no effect" in next(line.outcome.why for line in result.lines if line.key in given)
    result = converted("trl-grpo", lr_scheduler_type="constant_with_warmup", max_steps=100, warmup_steps=10)
    assert (result.config.optim.lr_scheduler_type, result.config.optim.warmup_steps) == ("constant_with_warmup", 10)


def test_rewards_that_do_not_fit_their_weights_or_are_models_are_impossible() -> None:
    for given in (
        {"reward_funcs": ["m.a", "m.b"], "reward_weights": [0.5]},
        {"reward_funcs": ["weqweasdas/RM-Gemma-2B-v1.0"]},
        {"reward_funcs": ["m.a", "owner/model"]},
    ):
        assert fate(converted("trl-grpo", **given), "reward_funcs") == "impossible"


@pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "adafactor"])
def test_an_optimiser_that_is_not_here_is_impossible(name: str) -> None:
    assert fate(converted("trl-grpo", optim=name), "optim") == "impossible"
    assert fate(converted("trl-grpo", optim="adamw_torch_fused"), "optim") == "mapped"


def test_trls_own_number_type_is_written() -> None:
    assert converted("trl-grpo").config.optim.mixed_precision == "bf16"
    assert converted("trl-grpo", bf16=False).config.optim.mixed_precision == "no"
    assert converted("trl-grpo", fp16=True).config.optim.mixed_precision == "no"


def test_a_teacher_that_moves_with_each_step_moves_as_far_in_an_iteration() -> None:
    steps = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 4}
    result = converted("trl-sdpo", teacher_update_rate=0.1, **steps)
    assert result.settings["algorithm"]["updates_per_batch"] == 4
    assert result.settings["algorithm"]["teacher_ema_rate"] == pytest.approx(1 - 0.9**4, abs=1e-6)


UNPAIRED = {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}], "label": False, "by": "x"}


def test_unpaired_preferences_are_recorded_attempts(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(UNPAIRED | {"label": label}) + "\n" for label in (False, True, 1)))
    data = convert_data(str(path))
    assert data.env == {"name": "recorded"}
    assert data.records[0] == {"prompt": "q", "completion": "a", "success": False, "by": "x"}
    assert [record["success"] for record in data.records] == [False, True, True]
    assert {c.name: c.becomes for c in data.columns}["label"] == "success"
    assert main(["convert", str(path), "--output", str(tmp_path / "new.jsonl")]) == 0
    [task] = RecordedAnswers(path=str(tmp_path / "new.jsonl")).train_tasks()
    assert [answer.grade.success for answer in task.payload.answers] == [False, True, True]
    path.write_text(json.dumps(UNPAIRED | {"success": None}) + "\n")
    assert convert_data(str(path)).records[0]["success"] is False
    for other in ("positive", 3, None):  # a column of another meaning
        path.write_text(json.dumps(UNPAIRED | {"label": other, "answer": None}) + "\n")
        (record,) = convert_data(str(path)).records
        assert record["answer"] == "a" and record["label"] == other


@pytest.mark.parametrize("form", DATA)
def test_two_answers_in_one_record_are_an_error(form: str, tmp_path: Path) -> None:
    record = dict(DATA[form][0], answer="another")
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=r"line 1 has an answer, and .*Rename the column answer"):
        convert_data(str(tmp_path / "d.jsonl"))


def test_records_of_two_forms_are_one_clear_error(tmp_path: Path) -> None:
    lines = [DATA["preferences"][0], {"prompt": "q", "rejected": "b"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"d\.jsonl line 2 is of another form than .*line 1; got prompts"):
        convert_data(str(tmp_path / "d.jsonl"))


GSM8K = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": 'What is 3 + 5? Output the final answer after "####".'}],
    "reward_model": {"style": "rule", "ground_truth": "8"},
}


def test_mathematics_keeps_the_prompts_own_form_of_answer(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GSM8K]), tmp_path / "gsm8k.parquet")
    path = str(tmp_path / "gsm8k.parquet")
    settings = of_verl("verl", {"data.train_files": path}, "--env.path", path).settings["env"]
    assert settings | {"path": path} == {
        "name": "math", "path": path, "ask": "", "answer_form": "hashes", "eval_share": 0.0
    }  # fmt: skip
    data = convert_data(path).env
    assert data == {"name": "math", "ask": "", "answer_form": "hashes"}
    env = Math(**{**settings, "path": path})
    [task] = env.train_tasks()
    assert task.messages[-1]["content"] == GSM8K["prompt"][0]["content"]  # type: ignore[index]
    assert [grade.reward for grade in env.grade([task] * 3, ["5 and 3\n#### 8", "#### 9", r"\boxed{8}"])] == [
        1.0,
        0.0,
        0.0,
    ]
    line = next(x for x in of_verl("verl", {"data.train_files": path}).lines if x.key == "data.reward_fn_key")
    assert line.outcome.verdict == "impossible" and "data_source" in line.outcome.why


def test_a_frame_that_the_environment_takes_away_leaves_its_own_words(tmp_path: Path) -> None:
    assert "ask" not in of_verl("verl", {"data.train_files": "dapo-math-17k.parquet"}).settings["env"]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "q", "solution": "8"}) + "\n")
    assert convert_data(str(tmp_path / "d.jsonl")).env == {"name": "math"}  # nothing asks for the box yet
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": r"q in \\boxed{}", "solution": "8"}) + "\n")
    assert convert_data(str(tmp_path / "d.jsonl")).env == {"name": "math", "ask": ""}
    result = of_trl({"reward_funcs": "accuracy_reward", "dataset_name": "d.jsonl"})
    assert result.settings["env"]["ask"] == "" and r"\boxed{}" in result.of("impossible")[0].outcome.why


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "q", "completion": None}, "completion"),
        ({"prompt": "q", "completion": 3}, "completion"),
        ({"prompt": "q", "completion": None, "label": True}, "completion"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "chosen"),
    ],
)
def test_an_answer_that_is_none_is_one_line(
    record: Any, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["convert", str(tmp_path / "d.jsonl")]) == 2
    error = capsys.readouterr().err
    assert f"d.jsonl line 1: {field!r} holds no messages; got " in error and error.count("\n") == 1
