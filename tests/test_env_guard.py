"""An environment that raises or returns nonsense: one EnvError line that names the call, wherever it is called."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import vpd_train

from vpd.cli import main
from vpd.config.sections import CustomEnv, announce, make_env
from vpd.envs import all_train_tasks, draw_tasks, grade_texts, held_out_tasks
from vpd.envs.dataset import Dataset
from vpd.envs.digits import Digits
from vpd.errors import ConfigError, EnvError
from vpd.types import Task

BROKEN = {
    "task": "def task(self, index, *, seed):\n        return {}[index]",
    "eval_tasks": "def eval_tasks(self, limit):\n        return {}[limit]",
    "train_tasks": "def train_tasks(self):\n        return {}['x']",
    "announce": "def announce(self):\n        return {}['x']",
    "later": "def task(self, index, *, seed):\n        return super().task(index, seed=seed) if index < 4 else {}[0]",
}


def custom(folder: Path, method: str) -> str:
    path = folder / "env.py"
    path.write_text(f"from vpd.envs.digits import Digits\n\n\nclass Mine(Digits):\n    {method}\n")
    return f"{path}:Mine"


@pytest.mark.parametrize("call", BROKEN)
def test_an_exception_in_training_is_one_line_and_exit_2(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"env__name": custom(tmp_path, BROKEN[call]), "run__eval_steps": 1, "run__max_steps": 2}
    assert vpd_train(tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err
    assert "KeyError" in error and "env.py:6" in error
    assert error.startswith("vpd: error: ") and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize("call", ["eval_tasks", "announce"])
def test_an_exception_in_evaluation_and_check_is_one_line(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = custom(tmp_path, BROKEN[call])
    for arguments in (["check", name], ["eval", "--env.name", name, "--model.name_or_path", "tiny"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "KeyError" in error and "env.py:6" in error and error.count("\n") == 1


class Returning:
    """Returns one value, whatever is asked for."""

    def __init__(self, value: Any):
        self.value = value

    def task(self, index: int, *, seed: int) -> Any:
        return self.value

    def eval_tasks(self, limit: int | None) -> Any:
        return self.value

    def train_tasks(self) -> Any:
        return self.value


GOOD: Any = ({"role": "user", "content": "2 + 2?"},)
MALFORMED: list[tuple[Any, str]] = [
    ({"prompt": "2 + 2?"}, "no Task; got {'prompt'"),
    (None, "no Task; got None"),
    (Task(id=3, messages=GOOD), "without an id; got 3"),  # type: ignore[arg-type]
    (Task(id="", messages=GOOD), "without an id; got ''"),
    (Task(id="x", messages=()), "malformed messages; got ()"),
    (Task(id="x", messages="2 + 2?"), "malformed messages; got '2 + 2?'"),  # type: ignore[arg-type]
    (Task(id="x", messages=(*GOOD, {"content": "?"})), "malformed messages"),  # type: ignore[typeddict-item]
    (Task(id="x", messages=({"role": "user", "content": None},)), "malformed messages"),  # type: ignore[typeddict-item]
]


@pytest.mark.parametrize(("value", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_what_is_no_valid_task_is_an_error_that_names_the_call(value: Any, message: str) -> None:
    good = Task(id="x", messages=GOOD)
    calls = {
        "task(7, seed=3)": lambda: draw_tasks(Returning(value), [7], seed=3),
        "eval_tasks(2), at position 1,": lambda: held_out_tasks(Returning([good, value]), 2),
        "train_tasks(), at position 1,": lambda: all_train_tasks(Returning([good, value])),
    }
    for call, run in calls.items():
        with pytest.raises(EnvError) as caught:
            run()
        assert str(caught.value).startswith(f"{call} returned ") and message in str(caught.value)


def test_valid_tasks_come_back_in_order() -> None:
    env = Digits()
    assert draw_tasks(env, [5, 2], seed=1) == [env.task(5, seed=1), env.task(2, seed=1)]
    assert held_out_tasks(env, 3) == list(env.eval_tasks(3))
    with pytest.raises(EnvError, match=r"eval_tasks\(None\) returned no list of tasks, at .*guard.py:.*; got 5"):
        held_out_tasks(Returning(5), None)


def test_a_generator_that_raises_on_the_way_is_an_error_too() -> None:
    class Lazy(Digits):
        def eval_tasks(self, limit: int | None) -> Sequence[Task]:
            return (self.task(1 // (1 - i), seed=0) for i in range(3))  # type: ignore[return-value]

    with pytest.raises(EnvError, match=r"eval_tasks\(None\) raised ZeroDivisionError at .*test_env_guard.py"):
        held_out_tasks(Lazy(), None)


def test_a_custom_environment_is_made_from_its_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = custom(tmp_path, "def announce(self):\n        return ['one', 2]")
    env: Any = make_env(CustomEnv(name=name, options={"length": 4}))
    with caplog.at_level(logging.INFO, "vpd"):
        announce(env)
        announce(Digits())
    assert env.length == 4 and caplog.messages == ["one", "2"]
    assert make_env(env) is env
    with pytest.raises(ConfigError, match=r"unknown key env.lenth for Mine. Did you mean 'length'"):
        make_env(CustomEnv(name=name, options={"lenth": 4}))
    with pytest.raises(ConfigError, match="LENGTH is not a class; got 6"):
        make_env(CustomEnv(name="vpd.envs.digits:LENGTH"))


def test_a_class_that_takes_any_keyword_gets_all_options(tmp_path: Path) -> None:
    name = custom(tmp_path, "def __init__(self, **options):\n        object.__setattr__(self, 'options', options)")
    env: Any = make_env(CustomEnv(name=name, options={"anything": 4}))
    assert env.options == {"anything": 4}


def test_checking_an_environment_needs_no_torch() -> None:
    code = "import sys, vpd.recipes.check, vpd.envs.record_tasks; print({'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


REFUSED = {
    "eval_tasks": ("def eval_tasks(self, limit):\n        pass", "returned no list of tasks, at {}:5; got None"),
    "train_tasks": ("def train_tasks(self):\n        pass", "returned no list of tasks, at {}:5; got None"),
    "array": (
        "def grade(self, tasks, texts):\n        import numpy, vpd\n"
        "        return [vpd.Grade(reward=numpy.ones(2)) for _ in tasks]",
        "the grader on a batch of 16 rows at {}:7: a grade's reward is not a finite number; got array([1., 1.])",
    ),
    "library": (
        "def task(self, index, *, seed):\n        import json\n        return json.loads('{')",
        "raised JSONDecodeError at {}:7; got ",
    ),
    "package": (
        "def eval_tasks(self, limit):\n        return Digits.eval_tasks(self, 'all')",
        "raised TypeError at {}:6; got ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_at_a_line_of_the_users_file(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, message = REFUSED[case]
    name = custom(tmp_path, method)
    assert vpd_train(tmp_path / "run", env__name=name, run__eval_steps=1, run__max_steps=1) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path / "env.py") in error and error.count("\n") == 1, error


def test_a_row_that_cannot_be_graded_is_named_with_the_function_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "from vpd import Grade\n\n\ndef none(completions):\n    return [Grade(reward=None) for _ in completions]\n"
    )
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2 + 2?"}\n')
    env = Dataset(path=str(data), reward=f"{tmp_path}/rewards.py:none", eval_share=0.0)
    with pytest.raises(EnvError) as caught:
        grade_texts(env, env.train_tasks(), ["4"])
    assert f"none on row 0 at {tmp_path}/rewards.py:5: a grade's reward is not a finite number" in str(caught.value)
