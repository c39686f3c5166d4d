"""The border to a user's code: exits, forks and changes of the process stay outside of the run."""

import asyncio
import contextlib
import locale
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import vpd_train

from vpd.envs import grade_texts, wrap_user_errors
from vpd.envs.loading import load_object
from vpd.errors import EnvError
from vpd.types import Grade, Task

TASK = Task(id="x", messages=({"role": "user", "content": "?"},))


def test_what_a_grader_writes_into_its_tasks_nobody_else_reads() -> None:
    """The student has read the question; teacher and rollouts would have another."""

    class Careless:
        def grade(self, tasks: list[Task], texts: list[str]) -> list[Grade]:
            for task in tasks:
                task.messages[0]["content"] = f"Judge this: {task.messages[0]['content']}"
            return [Grade(reward=0.0, feedback=str(task.messages[0]["content"])) for task in tasks]

    task = Task(id="x", messages=({"role": "user", "content": "?"},), payload=(payload := [1]))
    grades = grade_texts(Careless(), [task, task], ["1", "2"])
    assert [grade.feedback for grade in grades] == ["Judge this: ?"] * 2
    assert task.messages[0]["content"] == "?" and task.payload is payload


def test_a_grade_with_a_metric_that_is_no_number_is_at_a_line_of_the_graders_file() -> None:
    class Wrong:
        def grade(self, tasks: list[Task], texts: list[str]) -> list[Grade]:
            return [Grade(reward=0.0, metrics={"a": float("nan")}) for _ in tasks]

    with pytest.raises(EnvError, match=r"the grader .*test_user_code.py:\d+: a grade's metric 'a' is not a finite"):
        grade_texts(Wrong(), [TASK], ["1"])


def raising(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


ENDINGS: dict[str, Callable[[], Any]] = {
    "SystemExit": lambda: sys.exit(0),
    r"SystemExit at .*test_user_code.py:\d+; got None": lambda: exec("exit()"),
    r"SystemExit.*got os._exit\(0\)": lambda: os._exit(0),
    r"SystemExit.*got os.execv\(": lambda: os.execv("/bin/true", ["true"]),
    "GeneratorExit": raising(GeneratorExit()),
    "CancelledError": raising(asyncio.CancelledError()),
    "BaseExceptionGroup": raising(BaseExceptionGroup("two", [SystemExit(), KeyboardInterrupt()])),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_ends_the_code_is_an_error_that_names_it(ending: str) -> None:
    with pytest.raises(EnvError, match=f"^the grader raised {ending}"):
        wrap_user_errors(ENDINGS[ending], "the grader")


def test_a_syntax_error_is_at_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "syn.py").write_text("class A(:\n    pass\n")
    with pytest.raises(EnvError, match=r"raised SyntaxError at .*/syn\.py:1; got .*invalid syntax"):
        load_object(f"{tmp_path}/syn.py:A", "env.name")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_an_exception_that_cannot_be_shown_is_an_error_too() -> None:
    with pytest.raises(EnvError, match=r"raised Unprintable at .*got <exception str\(\) failed>"):
        wrap_user_errors(raising(Unprintable()), "the grader")


def test_ctrl_c_passes_and_in_another_thread_there_is_none() -> None:
    with pytest.raises(KeyboardInterrupt):
        wrap_user_errors(raising(KeyboardInterrupt()), "the grader")
    caught: list[BaseException] = []

    def run() -> None:
        try:
            wrap_user_errors(raising(KeyboardInterrupt()), "the grader")
        except EnvError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "raised KeyboardInterrupt" in str(caught[0])


def test_a_forked_copy_of_the_run_ends_and_a_forked_helper_may_exit(capfd: pytest.CaptureFixture[str]) -> None:
    child = wrap_user_errors(os.fork, "the grader")
    assert child > 0  # else this test would run twice
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "the grader forked a process that came back; it was ended" in capfd.readouterr().err

    def helper() -> int:
        child = os.fork()
        if not child:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert wrap_user_errors(helper, "the grader") == 7


def state() -> list[Any]:
    return [
        os.getcwd(), dict(os.environ), locale.setlocale(locale.LC_ALL), signal.getsignal(signal.SIGTERM),
        signal.getitimer(signal.ITIMER_REAL)[0] > 0, sys.stdout, logging.root.manager.disable,
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.get_default_device(),
    ]  # fmt: skip


CHANGES: dict[str, Callable[[], Any]] = {
    "folder": lambda: os.chdir("/"),
    "environment": lambda: os.environ.update(VPD_NEW="1", HOME="/nowhere"),
    "variables removed": os.environ.clear,
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "handler": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 1000),
    "stdout": lambda: setattr(sys, "stdout", None),
    "logging": lambda: logging.disable(logging.CRITICAL),
    "gradients": lambda: torch.set_grad_enabled(False),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("then", [lambda: None, lambda: 1 // 0])
def test_what_the_code_changed_of_the_process_is_put_back(change: str, then: Callable[[], Any]) -> None:
    before = state()

    def call() -> None:
        CHANGES[change]()
        then()

    with contextlib.suppress(EnvError):
        wrap_user_errors(call, "the grader")
    assert state() == before


def test_a_file_keeps_the_variables_that_it_sets_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "keyed.py").write_text("import os\nos.environ['VPD_KEY'] = 'k'\nos.chdir('/')\ndef key(): pass\n")
    folder = os.getcwd()
    try:
        load_object(f"{tmp_path}/keyed.py:key", "env.reward")
        assert os.environ["VPD_KEY"] == "k" and os.getcwd() == folder
    finally:
        del os.environ["VPD_KEY"]


def test_the_grade_of_a_numpy_success_and_of_blank_feedback() -> None:
    import numpy as np

    class Mine:
        def grade(self, tasks: Any, texts: Any) -> list[Grade]:
            return [Grade(reward=np.float32(0.5), success=np.bool_(True), feedback=" \n")]  # type: ignore[arg-type]

    [grade] = grade_texts(Mine(), [TASK], ["y"])
    assert grade == Grade(reward=0.5, success=True) and type(grade.success) is bool


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os._exit(0)"])
def test_a_run_whose_grader_exits_is_no_success(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ending.py").write_text(
        "import os, sys\nfrom vpd.envs.digits import Digits\n\n\nclass Mine(Digits):\n"
        f"    def grade(self, tasks, texts):\n        {ending}\n"
    )
    assert vpd_train(tmp_path / "run", env__name=f"{tmp_path}/ending.py:Mine", run__max_steps=1) == 2
    assert "SystemExit" in capsys.readouterr().err


HELPER = "def score(text):\n    return float(len(text))\n"
BESIDE = """
from helper_beside import score


def odd(completions):
    return [score(text) for text in completions]
"""


def test_a_file_may_import_its_neighbours_and_each_folder_has_its_own(tmp_path: Path) -> None:
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_beside.py").write_text(f"def score(text):\n    return {number}.0\n")
        (tmp_path / folder / "rewards_beside.py").write_text(BESIDE)
        odd = load_object(f"{tmp_path}/{folder}/rewards_beside.py:odd", "env.reward")
        assert odd(["x"]) == [float(number)]
    assert load_object(f"{tmp_path}/two/rewards_beside.py:odd", "env.reward") is odd  # run once


def test_a_file_of_a_package_may_import_relatively(tmp_path: Path) -> None:
    folder = tmp_path / "package_of_rewards"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "beside.py").write_text("value = 0.5\n")
    (folder / "relative.py").write_text("from .beside import value\n\n\ndef f(completions):\n    return [value]\n")
    assert load_object(f"{folder}/relative.py:f", "env.reward")(["x"]) == [0.5]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pool_of_processes_finds_the_functions_of_a_file(method: str, tmp_path: Path) -> None:
    (tmp_path / "helper_of_pool.py").write_text(HELPER)
    (tmp_path / "pooled.py").write_text(
        "import multiprocessing\nfrom helper_of_pool import score\n\n\ndef one(text):\n    return score(text)\n\n\n"
        f"def judge(completions):\n    with multiprocessing.get_context({method!r}).Pool(1) as pool:\n"
        "        return pool.map(one, completions)\n"
    )
    code = (
        "from vpd.envs.loading import load_object\n"
        f"if __name__ == '__main__': print(load_object('{tmp_path}/pooled.py:judge', 'env.reward')(['abc']))"
    )
    (tmp_path / "main.py").write_text(code)
    shown = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, cwd="/", check=False)
    assert shown.stdout == "[3.0]\n", shown.stderr


SCRIPT = """
import json, pathlib, sys
import vpd
pathlib.Path("times").open("a").write("x")
pathlib.Path("rows.jsonl").write_text(json.dumps({"prompt": "apply rule A to 1 2 3"}))
def here(prompts, completions, **columns):
    return [1.0] * len(prompts)
def start():
    small = {"prompts_per_step": 1, "num_generations": 2, "max_completion_length": 3}
    task = {"name": "dataset", "path": "rows.jsonl", "reward": "script.py:here"}
    vpd.train("tiny", env=task, feedback=["sibling"], rollout=small, run={"max_steps": 1})
"""


@pytest.mark.parametrize("guard", ["", "if __name__ == '__main__': "])
def test_a_script_may_name_itself_and_without_a_guard_that_is_one_error(guard: str, tmp_path: Path) -> None:
    """To load the function, the script is run once more, and starts a run while it is loaded."""
    (tmp_path / "script.py").write_text(f"{SCRIPT}\n{guard}start()\n")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert len((tmp_path / "times").read_text()) == 2
    if guard:
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "script.py (named by env.reward) starts a run while it is itself loaded" in last
    assert last.endswith("Put what starts it under: if __name__ == '__main__'.")
