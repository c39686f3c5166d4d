"""``vpd init``: a file with comments that our reader takes, for each environment, and that trains."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import metrics_of
from test_env_code import livecodebench
from test_env_tooluse import record as tool_record

from vpd.cli import main
from vpd.commands import init
from vpd.config import load, pairs_of
from vpd.config.sections import CHOICES
from vpd.config.starter import questions, starter
from vpd.errors import ConfigError

OPTIONS = "\n".join(("Which gas is lighter?", "A: helium", "B: argon"))
TOOLS = """Tools:
getWeather: Weather.
Parameters: {"city": "Required. string."}
Action: a tool
Begin!
Question: """
RECORDS: dict[str, list[dict[str, Any]]] = {
    "math": [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(24)],
    "science": [{"prompt": f"{n}. {OPTIONS}", "answer": "A", "idx": n} for n in range(24)],
    "tooluse": [tool_record(n) | {"prompt": f"{TOOLS}{n}?"} for n in range(60)],
    "code": [livecodebench(n) for n in range(24)],
    "dataset": [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(24)],
}
REWARD = """
def right(prompts, completions, answer, **columns):
    return [(float(a in c), f"It has {len(c)} letters.") for a, c in zip(answer, completions)]
"""
MINE = """
from vpd import Grade, Task, per_row

class Mine:
    def task(self, index, *, seed):
        return Task(id=str(index), messages=({"role": "user", "content": f"apply rule A to {index % 9}"},))
    def eval_tasks(self, limit):
        return [Task(id="e", messages=({"role": "user", "content": "apply rule B to 3"},))][:limit]
    @per_row
    def grade(self, task, text):
        return Grade(reward=0.0, feedback=f"{len(text)} letters are too many")
"""
#: small enough for a test; the recommended numbers stay in the file
SMALL = ["--model.name_or_path", "tiny", "--run.max_steps", "2", "--rollout.prompts_per_step", "2",
         "--rollout.num_generations", "2", "--rollout.max_completion_length", "6", "--run.eval_limit", "2",
         "--run.eval_samples", "1"]  # fmt: skip
OFFERED = [name for name in CHOICES["env"].table if name not in ("verifiers", "recorded")] + ["mine.py:Mine"]


REQUIRED = {"dataset": ["--env.reward", "my_rewards.py:right"], "reasoning_gym": ["--env.tasks", "[leg_counting]"]}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "mine.py").write_text(MINE)
    for name, records in RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def words(name: str) -> list[str]:
    """What ``vpd init`` needs to know of an environment."""
    data = ["--env.path", f"{name}.jsonl"] if name in RECORDS else []
    return ["--env.name", name, *data, *REQUIRED.get(name, [])]


@pytest.mark.parametrize("name", OFFERED)
def test_the_file_trains_for_each_environment_that_is_offered(name: str, workplace: Path) -> None:
    if name == "reasoning_gym" and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    assert main(["init", "--yes", *words(name), "--output", "new/run.yaml"]) == 0
    assert main(["train", "--config", "new/run.yaml", *SMALL]) == 0
    steps = metrics_of(workplace / "out")
    assert [line["step"] for line in steps] == [0, 1, 2] and "eval/accuracy" in steps[-1]


def test_every_line_says_what_it_means_and_the_settings_are_the_recommended_ones() -> None:
    text = starter()
    lines = [line for line in text.splitlines() if line]
    for number, line in enumerate(lines):
        if line.startswith("  ") and "#" not in line and "name:" not in line.split("_")[0]:
            assert lines[number - 1].startswith("  #"), line
    assert max(map(len, lines)) <= 120


def test_what_is_given_stands_in_the_file(workplace: Path) -> None:
    given = ["--algorithm.name", "grpo", "--optim.learning_rate", "3e-6", "--run.output_dir", "a b: c"]
    Path("run.yaml").write_text(starter([*words("math"), *given, "--model.lora", "{r: 4}"]))
    config = load("run.yaml")
    assert config.method == "grpo" and not config.feedback and config.optim.learning_rate == 3e-6
    assert config.run.output_dir == "a b: c" and config.model.lora is not None and config.model.lora.r == 4
    assert config.model.name_or_path == "Qwen/Qwen3-0.6B" and config.env.path == "math.jsonl"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--env.name", "math"], "env.path is missing"),
        (["--env.name", "dataset", "--env.path", "x"], "env.reward is missing"),
        (["--algorithm.name", "gkd"], "algorithm.teacher_model is missing"),
        (["--run.max_stps", "3"], "unknown key run.max_stps"),
        (["--env.name", "digit"], "unknown environment 'digit'. Did you mean 'digits'"),
    ],
)
def test_what_is_missing_or_wrong_is_one_error_and_no_file(
    given: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        starter(given)
    assert main(["init", "--yes", *given]) == 2
    assert not Path("run.yaml").exists()


def test_the_readme_s_first_file_needs_no_extra(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    commands = re.findall(r"^    vpd init (.*?) *#", readme, re.MULTILINE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for number, command in enumerate(commands):
        assert main(["init", "--yes", *shlex.split(command), "--output", f"{number}.yaml"]) == 0
    assert Path("0.yaml").is_file()


def test_a_file_s_name_alone_is_answered_with_the_option_for_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--yes", "mine.yaml"]) == 2
    assert "Write --output mine.yaml." in capsys.readouterr().err and not Path("run.yaml").exists()


def test_a_file_that_is_there_stays(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    assert main(["init", "--yes"]) == 2
    assert "run.yaml exists. Choose another --output." in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine"


def answers(*texts: str) -> Iterator[str]:
    yield from texts


def test_questions_are_asked_for_what_is_not_given() -> None:
    asked: list[str] = []
    replies = answers("dataset", "", "train.jsonl", "r.py:f", "", "", "30")

    def ask(text: str) -> str:
        asked.append(text)
        return next(replies)

    found = dict(pairs_of(init.asked([], ask)))
    assert found == {
        "env.name": "dataset", "env.path": "train.jsonl", "env.reward": "r.py:f",
        "model.name_or_path": "Qwen/Qwen3-0.6B", "algorithm.name": "gated", "run.max_steps": 30,
    }  # fmt: skip
    assert len(asked) == 7 and asked[1] == asked[2]  # a question without a default is asked again
    assert init.asked([f"--{key}={value}" for key, value in found.items()], ask) == []


def test_an_environment_of_ones_own_needs_no_data() -> None:
    assert [question.key for question in questions({"env.name": "my_env.py:Mine"})] == [
        "model.name_or_path",
        "algorithm.name",
        "run.max_steps",
    ]
    keys = [question.key for question in questions({"env.name": "reasoning_gym", "algorithm.name": "gkd"})]
    assert keys == ["env.tasks", "model.name_or_path", "algorithm.teacher_model", "run.max_steps"]
