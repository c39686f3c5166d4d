"""``vpd convert`` of a Python script: what the trainer is given is followed, and what is computed is named."""

from pathlib import Path
from typing import Any

import pytest

from vpd.cli import main
from vpd.config.convert import Converted, Foreign, convert
from vpd.config.convert.files import read
from vpd.errors import ConfigError

IMPORTS = """
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
def right(completions, **columns): return [0.0 for _ in completions]
"""
ENDED = '\nGRPOTrainer("m", right, args, train_dataset=load_dataset("json", data_files="t.jsonl", split="train"))\n'


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "train.py"


def converted(script: Path, text: str, *overrides: str) -> Converted:
    script.write_text(IMPORTS + text)
    dialect, flat = read(script, None)
    return convert(dialect, Foreign(given=flat, defaults=dialect.defaults), overrides)


def lost(result: Converted) -> dict[str, str]:
    return {line.key: line.outcome.why for line in result.of("impossible") if not line.default}


TWO = """
train = load_dataset("json", data_files="train.jsonl", split="train")
test = load_dataset("json", data_files="test.jsonl", split="train")
args = GRPOConfig("out", max_steps=2)
"""


def test_the_data_that_the_trainer_is_given_is_trained_on(script: Path) -> None:
    trainer = "GRPOTrainer(model='m', reward_funcs=right, args=args, train_dataset=train, eval_dataset=test)"
    result = converted(script, TWO + trainer)
    assert result.settings["env"]["path"] == "train.jsonl" and result.settings["env"]["eval_path"] == "test.jsonl"
    assert not lost(result) and result.config.run.output_dir == "out"
    result = converted(script, TWO + "GRPOTrainer('m', right, args, test)")
    assert result.settings["env"]["path"] == "test.jsonl" and "eval_path" not in result.settings["env"]


FOLLOWED = [
    ('d = load_dataset("json", data_files={"train": "a.jsonl", "test": "b.jsonl"})', 'd["train"]', 'd["test"]',
     {"path": "a.jsonl", "eval_path": "b.jsonl"}),
    ('d = load_dataset("owner/name", "main")', 'd["train"]', "None",
     {"path": "owner/name", "subset": "main", "split": "train"}),
    ('F = "a.jsonl"\nraw = load_dataset(path="json", data_files=[F])\nd = raw["train"]', "d", "None",
     {"path": "a.jsonl"}),
    ('d = load_from_disk("folder")', "d", "None", {"path": "folder"}),
    ('if __name__ == "__main__":\n    d = load_dataset("csv", data_files="a.csv", split="train")', "d", "None",
     {"path": "a.csv"}),
]  # fmt: skip


@pytest.mark.parametrize(("made", "train", "held_out", "expected"), FOLLOWED)
def test_data_is_followed_by_way_of_names_and_splits(
    made: str, train: str, held_out: str, expected: dict[str, str], script: Path
) -> None:
    result = converted(script, f"{made}\nGRPOTrainer('m', right, train_dataset={train}, eval_dataset={held_out})")
    env = {
        key: value for key, value in result.settings["env"].items() if key in ("path", "eval_path", "subset", "split")
    }
    assert env == expected and not lost(result)


CHANGED = [
    ('load_dataset("json", data_files="a.jsonl", split="train").filter(keep)', "train_dataset.filter"),
    ('load_dataset("json", data_files="a.jsonl", split="train").map(make)', "train_dataset.map"),
    ('load_dataset("json", data_files="a.jsonl", split="train").shuffle(seed=1).select(3)', "train_dataset.select"),
    ('load_dataset("json", data_files="a.jsonl", split="train[:50%]")', "dataset_train_split"),
    ('load_dataset("json", data_files="a.jsonl", split="train").train_test_split(0.1)["train"]',
     "train_dataset.train_test_split"),
    ('load_dataset("json", data_files="a.jsonl", data_dir="x", split="train")', "train_dataset.load_dataset(data_dir)"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "key"), CHANGED)
def test_what_is_done_to_the_records_is_named(data: str, key: str, script: Path) -> None:
    result = converted(script, f"d = {data}\nGRPOTrainer('m', right, train_dataset=d)")
    assert result.settings["env"]["path"] == "a.jsonl" and "--env.path" in lost(result)[key]
    result = converted(
        script, f"d = {data[: data.index(')') + 1]}\nd = d.map(f)\nGRPOTrainer('m', right, train_dataset=d)"
    )
    assert result.settings["env"]["path"] == "a.jsonl" and "--env.path" in lost(result)["train_dataset.map"]


UNTOLD = [
    "d = make_data()",
    "if fast:\n    d = load_dataset('a/b', split='train')\nelse:\n    d = load_dataset('c/d', split='train')",
    "d = concatenate_datasets([load_dataset('a/b', split='train'), load_dataset('c/d', split='train')])",
]


@pytest.mark.parametrize("made", UNTOLD)
def test_data_that_cannot_be_told_is_not_guessed(made: str, script: Path) -> None:
    text = f"{made}\ntest = load_dataset('e/f', split='train')\nGRPOTrainer('m', right, train_dataset=d)"
    with pytest.raises(ConfigError, match=r"env\.path"):
        converted(script, text)
    result = converted(script, text, "--env.path", "mine.jsonl")
    assert "give it as --env.path" in lost(result)["train_dataset"]


def test_evaluation_data_that_is_no_file_of_its_own_is_named(script: Path) -> None:
    parts = 'd = load_dataset("json", data_files="a.jsonl", split="train").train_test_split(test_size=0.1)\n'
    result = converted(script, parts + "GRPOTrainer('m', right, train_dataset=d['train'], eval_dataset=d['test'])")
    assert "env.eval_share" in lost(result)["eval_dataset"] and result.settings["env"]["path"] == "a.jsonl"
    hub = 'd = load_dataset("a/b")\n'
    result = converted(script, hub + "GRPOTrainer('m', right, train_dataset=d['train'], eval_dataset=d['test'])")
    assert "--env.eval_path" in lost(result)["eval_dataset"] and "eval_path" not in result.settings["env"]


def test_several_data_sets_without_a_trainer_are_named(script: Path) -> None:
    result = converted(script, TWO, "--env.path", "x.jsonl", "--env.reward", "r.py:f", "--model.name_or_path", "m")
    assert "cannot be told" in lost(result)["train_dataset"]


MODELS = [
    ('GRPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=right)', "Qwen/Qwen3-0.6B"),
    ('NAME = "a/b"\nm = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16, device_map="auto")\n'
     "GRPOTrainer(m, right)", "a/b"),
    ('SFTTrainer("sft/model", args=SFTConfig(learning_rate=1.0))\nGRPOTrainer(model="a/b", reward_funcs=[right])',
     "a/b"),
    ('from trl import GRPOTrainer as T\nT("a/b", right)', "a/b"),
    ('m = AutoModelForCausalLM.from_pretrained("a/b", attn_implementation="sdpa").to("cuda")\nGRPOTrainer(m, right)',
     "a/b"),
    ('class Mine(GRPOTrainer):\n    pass\nMine("a/b", right)', "a/b"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "model"), MODELS)
def test_the_model_is_the_trainers_also_by_its_position(text: str, model: str, script: Path) -> None:
    result = converted(script, text, "--env.path", "x.jsonl")
    assert result.config.model.name_or_path == model and result.config.env.reward == f"{script}:right"
    assert result.config.model.dtype == ("bfloat16" if "bfloat16" in text else "float32")
    assert result.config.optim.learning_rate == 1e-6


@pytest.mark.parametrize("model", ["make_model()", "model", "sys.argv[1]"])
def test_a_model_that_cannot_be_read_is_an_error_and_never_the_shipped_one(
    model: str, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(f"{IMPORTS}GRPOTrainer({model}, right)\n")
    words = ["convert", str(script), "--env.path", "x.jsonl", "--output", str(script.with_suffix(".yaml"))]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "Give --model.name_or_path" in shown.err and "--model.name_or_path" in " ".join(shown.out.split())
    assert not script.with_suffix(".yaml").exists()
    assert main([*words, "--model.name_or_path", "tiny"]) == 0


def test_gkds_positions_are_its_own(script: Path) -> None:
    text = (
        "from trl.experimental.gkd import GKDConfig, GKDTrainer\n"
        "GKDTrainer('s', 't', GKDConfig(lmbda=1.0), collate, load_dataset('a/b', split='train'))"
    )
    result = converted(script, text)
    settings = result.settings
    assert settings["model"]["name_or_path"] == "s" and settings["algorithm"]["teacher_model"] == "t"
    assert settings["env"]["path"] == "a/b" and settings["algorithm"]["student_fraction"] == 1.0


def flat_of(script: Path, text: str) -> dict[str, Any]:
    script.write_text(IMPORTS + text)
    return read(script, None)[1]


def test_two_stars_and_positions_of_a_configuration(script: Path) -> None:
    for kept in ("dict(temperature=0.7, max_steps=50)", "{'temperature': 0.7, 'max_steps': 50}", "KEPT"):
        text = f"KEPT = dict(temperature=0.7, max_steps=50)\nargs = GRPOConfig('outdir', **{kept})"
        result = converted(script, text + ENDED)
        assert (result.config.run.output_dir, result.config.run.max_steps) == ("outdir", 50)
        assert result.config.rollout.temperature == 0.7 and not lost(result)
    for kept in ("load()", "KEPT"):
        text = f"KEPT = dict(beta=0.1)\nKEPT['max_steps'] = 3\nargs = GRPOConfig(**{kept})"
        assert lost(converted(script, text + ENDED))[f"**{kept}"] == "what it holds is not read"
    assert "**more" in lost(converted(script, "GRPOTrainer('m', right, **more)", "--env.path", "x.jsonl"))


def test_a_setting_that_is_changed_after_the_call_is_taken(script: Path) -> None:
    text = "args = GRPOConfig(temperature=1.0)\nargs.temperature = 0.7\nargs.max_steps = 9\n"
    result = converted(script, text + ENDED)
    assert result.config.rollout.temperature == 0.7 and result.config.run.max_steps == 9
    for later in ("if fast:\n    args.max_steps = 2\n", "args.max_steps *= 2\n"):
        result = converted(script, text + later + ENDED)
        assert "max_steps" in lost(result) and result.config.rollout.temperature == 0.7
    result = converted(script, text + "t = " + ENDED.strip() + "\nt.args.max_steps = 2\n")
    assert "max_steps" in lost(result)


COMPUTED = [
    "LR = 1e-5\nLR *= 10",
    "LR = 1e-5\nif fast:\n    LR = 1e-4",
    "if fast:\n    LR = 1e-4",
    "for LR in (1e-5, 1e-4):\n    pass",
    "LR = 1e-5\ndef change():\n    global LR\n    LR = 1e-4",
    "LR = float(sys.argv[1])",
    "LR, OTHER = 1e-5, 2",
]


@pytest.mark.parametrize("bound", COMPUTED)
def test_a_name_that_is_computed_is_not_taken(bound: str, script: Path) -> None:
    result = converted(script, f"{bound}\nargs = GRPOConfig(learning_rate=LR)" + ENDED)
    assert "learning_rate" in lost(result)
    assert (
        converted(script, "LR = 1\nLR = 2e-5\nargs = GRPOConfig(learning_rate=LR)" + ENDED).config.optim.learning_rate
        == 2e-5
    )


def test_arguments_that_have_no_counterpart_have_a_line_each(script: Path) -> None:
    text = (
        "lora = LoraConfig(use_rslora=True, modules_to_save=['head'], bias='all', r=4, layers_pattern='x')\n"
        "GRPOTrainer('m', right, peft_config=lora, optimizers=(mine, None), rollout_func=roll, callbacks=[Mine()],"
        " no_such=1)"
    )
    result = converted(script, text, "--env.path", "x.jsonl")
    keys = {"use_rslora", "lora_modules_to_save", "LoraConfig.bias", "LoraConfig.layers_pattern", "optimizers",
            "rollout_func", "callbacks", "no_such"}  # fmt: skip
    assert keys <= lost(result).keys()
    harmless = text.replace(
        "use_rslora=True, modules_to_save=['head'], bias='all', r=4, layers_pattern='x'", "bias='none'"
    )
    harmless = harmless.replace("(mine, None)", "(None, None)").replace("roll,", "None,").replace(", no_such=1", "")
    harmless = harmless.replace("Mine()", "EarlyStoppingCallback(early_stopping_patience=3)")
    best = ["--run.metric_for_best_model", "eval/accuracy", "--run.eval_steps", "1"]
    result = converted(script, harmless, "--env.path", "x.jsonl", *best)
    assert not lost(result) and result.config.run.early_stopping_patience == 3


def test_the_configuration_is_the_one_that_the_trainer_is_given(script: Path) -> None:
    debug = "args = GRPOConfig('real', max_steps=100)\ndef debug():\n    return GRPOConfig('debug', max_steps=1)\n"
    assert converted(script, debug + ENDED).config.run.output_dir == "real"
    inside = f"def debug():\n    GRPOTrainer('d', right, GRPOConfig('debug'))\nargs = GRPOConfig('real')\n{ENDED}"
    assert converted(script, inside).config.run.output_dir == "real"
    made = "def make():\n    return GRPOConfig('made')\ndef debug():\n    return GRPOConfig('debug')\nargs = make()\n"
    made += ENDED
    assert converted(script, made).config.run.output_dir == "made"
    branch = f"if fast:\n    args = GRPOConfig('a')\nelse:\n    args = GRPOConfig('b')\n{ENDED}"
    result = converted(script, branch)
    assert "cannot be told" in lost(result)["args"] and "output_dir" not in result.settings["run"]
    one = f"args = load(GRPOConfig('only'))\n{ENDED}"
    result = converted(script, one)
    assert "line 6 is taken" in lost(result)["args"] and result.config.run.output_dir == "only"


def test_a_value_that_cannot_be_read_is_no_loss_where_any_is_ignored(script: Path) -> None:
    text = "args = GRPOConfig(logging_steps=often())\nGRPOTrainer('m', right, args, processing_class=tokenizer)"
    assert not lost(converted(script, text, "--env.path", "x.jsonl"))


def test_several_trainers_are_an_error(script: Path) -> None:
    with pytest.raises(ConfigError, match=r"several of GRPOTrainer; got line 6, line 7"):
        converted(script, "GRPOTrainer('a', right)\nGRPOTrainer('b', right)\n")


def test_pefts_own_defaults_are_written(script: Path) -> None:
    result = converted(script, "GRPOTrainer('m', right, peft_config=LoraConfig())", "--env.path", "x.jsonl")
    assert result.settings["model"]["lora"] == {"r": 8, "lora_alpha": 8}
    alone = converted(script, "GRPOTrainer('m', right)\nLoraConfig(r=4)", "--env.path", "x.jsonl")
    assert alone.config.model.lora is None
