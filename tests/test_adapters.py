"""Reward functions of TRL and verl, data sets with a prompt column, and a taskset of the package verifiers."""

import asyncio
import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import metrics_of, vpd_train

from vpd.cli import main
from vpd.config import parse
from vpd.envs import grade_texts
from vpd.envs.adapters import trl_verl, verifiers
from vpd.envs.adapters.callers import ProcessCaller
from vpd.envs.adapters.reward_functions import Row
from vpd.envs.check import check_env
from vpd.envs.dataset import Dataset
from vpd.envs.given import GivenTasks, as_task
from vpd.errors import ConfigError, DataError, EnvError
from vpd.types import Grade

SUMS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "level": i} for i in range(20)]


def written(folder: Path, records: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, records)))
    return str(folder / name)


def graded(folder: Path, reward: Any, texts: list[str], records: Any = SUMS, **settings: Any) -> list[Grade]:
    """Grades of the training tasks in order, one text for each."""
    env = Dataset(path=written(folder, records), reward=reward, **settings)
    return grade_texts(env, env.train_tasks()[: len(texts)], texts)


def accuracy(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    assert len(prompts) == len(completions) == len(answer) and set(columns) == {"level"}
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def right_texts(folder: Path, count: int) -> list[str]:
    env = Dataset(path=written(folder, SUMS), reward=accuracy)
    return [task.payload.columns["answer"] for task in env.train_tasks()[:count]]


def test_every_column_reaches_a_function_of_trl(tmp_path: Path) -> None:
    first, second = right_texts(tmp_path, 2)
    grades = graded(tmp_path, accuracy, [first, "x"])
    assert [grade.reward for grade in grades] == [1.0, 0.0] and grades[0].success is None
    assert grades[0].metrics == {"grader_failed": 0.0}

    def picky(completions: list[str], level: list[int]) -> list[float]:  # names what it wants, no **columns
        return [float(n) for n in level]

    assert graded(tmp_path, picky, ["", ""])[1].reward == int(second) / 2


def test_records_without_a_column_that_a_function_needs_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a row is often an oversight, and every attempt at it a failure; a function with a default allows for it."""
    rows = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?"}, {"prompt": "3 + 3?", "answer": None}]

    def lenient(completions: list[str], answer: Any = None) -> list[float]:
        return [0.0] * len(completions)

    def strict(completions: list[str], answer: Any) -> list[float]:
        return [0.0] * len(completions)

    with caplog.at_level(logging.WARNING, "vpd"):
        graded(tmp_path, lenient, [""], rows, eval_share=0.0)
        assert not caplog.text
        graded(tmp_path, strict, [""], rows, eval_share=0.0)
    assert "strict gets None for 'answer' where the data has none: in 2 of 3 records, first 2." in caplog.text


def test_completions_are_texts_or_messages_as_the_prompt_is(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(prompts: Any, completions: Any) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    chat = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}]
    graded(
        tmp_path, look, ["4"], [{"prompt": chat}, {"prompt": "3 + 3?"}], eval_path=written(tmp_path, SUMS, "e.jsonl")
    )
    graded(tmp_path, look, ["6"], [{"prompt": "3 + 3?"}], eval_path=str(tmp_path / "e.jsonl"))
    assert seen == [([chat], [[{"role": "assistant", "content": "4"}]]), (["3 + 3?"], ["6"])]


def test_what_a_function_may_say_about_a_row(tmp_path: Path) -> None:
    says: list[Any] = [
        1,
        True,
        np.float32(0.5),
        (0.25, "The sum is too small."),
        (0.0, None),
        {"score": 0.0, "acc": False, "pred": "7", "feedback": "Only digits.", "informative": False},
        {"reward": 1.0, "success": np.bool_(False), "digits": 3, "feedback": " \n"},
        Grade(reward=0.125, feedback="Mine."),
    ]
    grades = graded(tmp_path, lambda prompts, completions: says, [""] * len(says))
    assert [grade.reward for grade in grades] == [1, 1, 0.5, 0.25, 0, 0, 1, 0.125]
    assert [grade.feedback for grade in grades[3:6]] == ["The sum is too small.", None, "Only digits."]
    assert [grade.informative for grade in grades[3:6]] == [True, True, False]
    assert grades[5].metrics == {"grader_failed": 0.0, "acc": 0.0}
    assert (grades[6].success, grades[6].metrics["digits"], grades[7].feedback) == (False, 3.0, "Mine.")
    assert grades[6].feedback is None


def test_several_functions_are_a_weighted_sum_over_those_that_apply(tmp_path: Path) -> None:
    def short(completions: list[str]) -> list[tuple[float, str] | None]:
        return [None if not text else (float(len(text) < 3), f"{len(text)} characters.") for text in completions]

    [first] = right_texts(tmp_path, 1)
    both = [accuracy, {"function": short, "weight": 0.5}]
    good, none, long = graded(tmp_path, both, [first, "", "1 000 000"])
    assert (good.reward, none.reward, long.reward) == (1.5, 0.0, 0.0)
    assert (good.metrics["rewards/accuracy"], good.metrics["rewards/short"]) == (1.0, 1.0)
    assert "rewards/short" not in none.metrics and long.feedback == "9 characters."
    with pytest.raises(EnvError, match=r"1 of 1 rows.*first row 0 .*short returned None"):
        graded(tmp_path, short, [""])


def test_async_functions_share_one_loop(tmp_path: Path) -> None:
    loops = []

    async def slow(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return [1.0] * len(completions)

    async def compute_score(data_source: str, solution_str: str, ground_truth: str) -> float:
        loops.append(asyncio.get_running_loop())
        return float(solution_str == ground_truth)

    assert [grade.reward for grade in graded(tmp_path, slow, ["a", "b"])] == [1.0, 1.0]
    records = [verl(f"{i}?", "12") for i in range(20)]
    assert graded(tmp_path, [slow, compute_score], ["12"], records)[0].reward == 2.0
    assert len(loops) == 3 and len(set(loops)) == 1


def verl(problem: str, truth: str) -> dict[str, Any]:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": problem}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 7, "split": "train"},
    }


def test_compute_score_on_records_of_verl(tmp_path: Path) -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
        seven = extra_info.pop("index")  # what a function does to its arguments stays its own
        return {"score": float(solution_str == ground_truth), "acc": solution_str == ground_truth, "seven": seven}

    pq.write_table(pa.Table.from_pylist([verl(f"{i} + 1?", str(i + 1)) for i in range(9)]), tmp_path / "verl.parquet")
    env = Dataset(path=str(tmp_path / "verl.parquet"), reward=compute_score, eval_share=0.3)
    task = env.task(0, seed=0)
    truth = task.payload.columns["reward_model"]["ground_truth"]
    for _ in range(2):
        wrong, right = env.grade([task, task], ["x", truth])
        assert (wrong.reward, right.reward, right.metrics["acc"], right.metrics["seven"]) == (0.0, 1.0, 1.0, 7.0)
    with pytest.raises(ConfigError, match=r"verl's, and record 0 is not in its schema"):
        graded(tmp_path, compute_score, ["x"])


def failing(on: str, how: Callable[[], Any]) -> Callable[..., list[Any]]:
    def judge(completions: list[str]) -> list[Any]:
        return [how() if text == on else 1.0 for text in completions]

    return judge


def stumble() -> float:
    raise ZeroDivisionError("no such sum")


class Slow:
    def __float__(self) -> float:
        time.sleep(5)
        return 1.0


FAILURES: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (stumble, r"judge on row 1 raised ZeroDivisionError at .*test_adapters.py:\d+; got no such sum"),
    "is late": (lambda: time.sleep(5), r"judge on row 1 took too long; expected at most 0.2 s"),
    "is NaN": (lambda: math.nan, r"judge on row 1 returned no finite number; got nan"),
    "is too large to square": (
        lambda: 1e308,
        r"judge on row 1 returned a number too large to compute with; got 1e\+308",
    ),
    "is too large an integer": (lambda: 10**400, r"judge on row 1 raised OverflowError"),
    "is a text": (lambda: "0.5", r"judge on row 1 returned no number; got '0.5'"),
    "exits": (lambda: exec("exit()"), r"judge on row 1 raised SystemExit at"),
    "exits at once": (lambda: os._exit(0), r"judge on row 1 raised SystemExit at .*test_adapters.py.*os._exit\(0\)"),
    "is slow to be a number": (Slow, r"judge on row 1 took too long; expected at most 0.2 s"),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_row_that_cannot_be_graded_is_an_error_with_its_number(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how, told = FAILURES[fault]
    texts, reward = ["a", "bad", "c", "d"], failing("bad", how)
    with pytest.raises(EnvError, match=rf"1 of 4 rows could not be graded, first row 1 \(task 'train/.*{told}"):
        graded(tmp_path, reward, texts, seconds=0.2)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vpd"):
        grades = graded(tmp_path, reward, texts, seconds=0.2, max_failed=0.25)
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0, 1.0]
    assert (grades[1].success, grades[1].informative) == (False, False)
    assert [grade.metrics["grader_failed"] for grade in grades] == [0.0, 1.0, 0.0, 0.0]
    assert "row 1 (task" in caplog.records[-1].getMessage()
    with pytest.raises(EnvError, match="2 of 4 rows"):
        graded(tmp_path, reward, ["bad", "bad", "c", "d"], seconds=0.2, max_failed=0.25)


def test_a_late_coroutine_is_cancelled(tmp_path: Path) -> None:
    cancelled = threading.Event()

    async def judge(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1.0] * len(completions)

    with pytest.raises(EnvError, match="row 0 took too long"):
        graded(tmp_path, judge, ["a"], seconds=0.1)
    assert cancelled.wait(5)


HANGING = """
import os, re, signal, sys, time


def gil(completions):
    re.match(r"(a+)+b", "a" * 60)


def lazily(completions):
    for text in completions:
        time.sleep(60)
        yield 0.0


async def busy(completions):
    time.sleep(60)


async def leaving(completions):
    sys.exit(0)


def forks(completions):
    os.fork()
    return [1.0] * len(completions)


def alarmed(completions):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(60)
    return [(1.0, "Fine.") if text == "a" else None if text == "b" else 0.5 for text in completions]
"""


def test_in_a_process_of_its_own_every_function_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    for name, told in {
        "gil": "too long",
        "lazily": "too long",
        "busy": "too long",
        "leaving": "raised SystemExit",
    }.items():
        with pytest.raises(EnvError, match=rf"first row 0 .*{name} on row 0 .*{told}"):
            graded(tmp_path, f"{tmp_path}/hanging.py:{name}", ["a"], seconds=1.0)
    assert graded(tmp_path, f"{tmp_path}/hanging.py:forks", ["a"], seconds=20.0)[0].reward == 1.0
    first, _, other = graded(
        tmp_path, [f"{tmp_path}/hanging.py:alarmed", lambda completions: [0.0] * 3], ["a", "b", "c"], seconds=20.0
    )
    assert (first.reward, first.feedback, other.reward) == (1.0, "Fine.", 0.5)


def test_what_is_not_bounded_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text("def one(completions):\n    return [1.0]\n")
    env = {"path": written(tmp_path, SUMS), "reward": f"{tmp_path}/said.py:one"}
    said = {
        "without a limit of time": Dataset(**env),
        r"in a process of its own, which env.seconds \(1 s an answer\) ends": Dataset(**env, seconds=1.0),
        "in a thread, as env.process is false: .* cannot end C code": Dataset(**env, seconds=1.0, process=False),
        "as it is an object": Dataset(path=env["path"], reward=accuracy, seconds=1.0),
    }
    for told, dataset in said.items():
        [line] = dataset.announce()
        assert re.search(told, line)


def test_an_async_function_that_does_not_await_takes_the_loop_from_no_other(tmp_path: Path) -> None:
    async def busy(completions: list[str]) -> list[float]:
        time.sleep(3)
        return [1.0] * len(completions)

    async def stopping(completions: list[str]) -> list[float]:
        asyncio.get_running_loop().stop()
        return [1.0] * len(completions)

    async def leaving(completions: list[str]) -> list[float]:
        raise SystemExit

    async def fine(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    with pytest.raises(EnvError, match="took too long"):
        graded(tmp_path, busy, ["a"], seconds=0.1)
    assert graded(tmp_path, fine, ["a"], seconds=2.0)[0].reward == 1.0
    with pytest.raises(EnvError, match="raised SystemExit"):
        graded(tmp_path, leaving, ["a"])
    assert graded(tmp_path, stopping, ["a"])[0].reward == 1.0
    assert graded(tmp_path, fine, ["a"])[0].reward == 1.0


def test_the_wrong_number_of_rewards_is_fatal_whatever_may_fail(tmp_path: Path) -> None:
    for answers, told in (([1.0], "got 1; expected 2"), (1.0, "no list; got 1.0"), ("ab", "no list; got str")):
        with pytest.raises(EnvError, match=told):
            graded(tmp_path, lambda completions, a=answers: a, ["x", "y"], max_failed=1.0)


def test_a_row_that_failed_is_asked_again_only_if_it_is_set(tmp_path: Path) -> None:
    calls: list[int] = []

    def flaky(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [1.0 if len(calls) >= 3 else stumble()]

    with pytest.raises(EnvError, match="ZeroDivisionError"):
        graded(tmp_path, flaky, ["x"])
    assert calls == [1]
    assert graded(tmp_path, flaky, ["x"], retries=1)[0].reward == 1.0 and calls == [1, 1, 1]
    calls.clear()

    def unsure(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [math.nan if text == "bad" and len(calls) < 3 else 1.0 for text in completions]

    assert [g.reward for g in graded(tmp_path, unsure, ["a", "bad"], retries=2)] == [1.0, 1.0] and calls == [
        2,
        1,
        1,
    ]


def test_a_batch_that_fails_while_no_row_does_is_graded_row_by_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def alone(completions: list[str]) -> list[float]:
        return [1.0] if len(completions) == 1 else [stumble()]

    assert [grade.reward for grade in graded(tmp_path, alone, ["a", "b"])] == [1.0, 1.0]
    assert "on a batch of 2 rows raised ZeroDivisionError" in caplog.text and "graded alone" in caplog.text


def test_a_function_that_does_not_fit_the_data_is_an_error_before_the_first_task(tmp_path: Path) -> None:
    path = written(tmp_path, SUMS)
    misfits: dict[str, Callable[..., Any]] = {
        "needs 'solution'": lambda completions, solution: [],
        "trainer; give it a default": lambda completions, completion_ids: [],
        "got the parameters text": lambda text: 0.0,
    }
    for told, function in misfits.items():
        with pytest.raises(ConfigError, match=told):
            Dataset(path=path, reward=function).train_tasks()
    assert Dataset(path=path, reward=lambda completions, log_metric=None: []).train_tasks()


def test_functions_are_named_in_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def ones(completions):\n    return [1] * len(completions)\n")
    assert graded(tmp_path, f"{tmp_path}/json.py:ones", ["x"])[0].reward == 1.0
    assert json.loads("1") == 1  # the user's json.py does not stand in the way of another
    assert graded(tmp_path, "test_adapters:accuracy", ["x"])[0].reward == 0.0
    (tmp_path / "broken.py").write_text("import nothing_like_it\n")
    faults = {
        f"{tmp_path}/json.py:one": r"has no one. Did you mean 'ones'",
        f"{tmp_path}/none.py:ones": "no file",
        f"{tmp_path}/broken.py:ones": r"raised ModuleNotFoundError at .*broken.py:1",
        "nothing_like_it:ones": "no module 'nothing_like_it'",
        "ones": "names no object",
        "vpd.types:Grade": "is not a function",
    }
    for spec, told in faults.items():
        with pytest.raises((ConfigError, EnvError), match=told):
            graded(tmp_path, spec, ["x"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"reward": []}, "env.reward is empty"),
        ({"reward": {"weight": 1.0}}, "cannot be read"),
        ({"reward": {"function": "a.py:f", "wieght": 2}}, "cannot be read"),
        ({"reward": {"function": "a.py:f", "weight": 0}}, "wrong weight"),
        ({"reward": {"function": "a.py:f", "weight": math.inf}}, "wrong weight"),
        ({"reward": {"function": "a.py:f", "weight": math.nan}}, "wrong weight"),
        ({"reward": 3}, "cannot be read"),
        ({"seconds": 0}, "env.seconds"),
        ({"retries": -1}, "env.retries"),
        ({"max_failed": 2.0}, "env.max_failed"),
        ({"eval_share": 1.0}, "env.eval_share"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Dataset(**({"path": "unread.jsonl", "reward": "a.py:f"} | dict(settings)))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"answer": "4"}, "has no text 'prompt'"),
        ({"prompt": [{"role": "assistant", "content": "4"}]}, "the user's or the tool's message"),
        ({"prompt": []}, "the user's or the tool's message"),
        ({"prompt": "2 + 2?", "tools": "none"}, "'tools' is not JSON"),
        ({"prompt": "2 + 2?", "tools": ["3"]}, "'tools' is no list of objects"),
    ],
    ids=str,
)
def test_a_bad_record_is_named_by_its_line(record: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"line 21.*{told}"):
        graded(tmp_path, accuracy, [], [*SUMS, record])


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("{}")
    with pytest.raises(DataError, match=r"cannot read .*x.parquet"):
        Dataset(path=str(tmp_path / "x.parquet"), reward=accuracy).train_tasks()


def test_other_columns_and_the_system_message(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    records = [{"question": "2 + 2?", "id": "one", "tools": [tool]}, {"question": "3 + 3?"}]
    env = Dataset(
        path=written(tmp_path, records),
        reward=lambda completions: [0.0],
        prompt="question",
        system="Count.",
        eval_path=written(tmp_path, [{"question": "4 + 4?"}], "eval.jsonl"),
    )
    first, second = env.train_tasks()
    assert first.id == "train/one" and first.tools == (tool,) and second.id == "train/2" and second.tools == ()
    assert first.messages == ({"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"})
    assert [task.id for task in env.eval_tasks(None)] == ["eval/1"]


REWARDS = '''
def accuracy(completions, answer, **columns):
    """Says how long an answer is, and no more."""
    return [
        1.0 if text.strip() == right else (0.0, f"You wrote {len(text)} characters; write one number.")
        for text, right in zip(completions, answer, strict=True)
    ]


def short(completions, **columns):
    return [float(len(text) < 20) for text in completions]
'''


def test_vpd_check_and_vpd_train_need_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SUMS)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    function = f"{tmp_path}/my_rewards.py:accuracy"
    settings = ["--env.path", path, "--env.reward", function]
    assert main(["check", "dataset", *settings, "--env.solution_column", "answer"]) == 0
    shown = capsys.readouterr().out
    assert "32 solved" in shown and "write one number" in shown and "fault" not in shown
    digits = [{"prompt": f"apply rule A to {i // 10} {i % 10} 1 2 3 4", "answer": "x"} for i in range(40)]
    both = f"[{function}, {{function: '{tmp_path}/my_rewards.py:short', weight: 0.25}}]"
    changes = {"env__name": "dataset", "env__path": written(tmp_path, digits), "env__reward": both}
    assert vpd_train(tmp_path / "run", run__max_steps=2, run__eval_steps=2, **changes) == 0
    last = metrics_of(tmp_path / "run")[-1]
    assert (
        last["env/grader_failed"] == 0
        and last["reward"] == last["env/rewards/accuracy"] + 0.25 * last["env/rewards/short"]
    )
    assert last["teacher/rows_with_context"] > 0 and "eval/accuracy" in last


def test_the_functions_of_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = (Path(__file__).resolve().parent.parent / "docs" / "own_task.md").read_text()
    code = re.search(r"```python\n# my_rewards.py\n(.*?)```", docs, re.DOTALL)
    assert code is not None
    (tmp_path / "my_rewards.py").write_text(code[1])
    both = f"[{tmp_path}/my_rewards.py:accuracy, {{function: '{tmp_path}/my_rewards.py:short', weight: 0.1}}]"
    settings = ["--env.path", written(tmp_path, SUMS), "--env.reward", both, "--env.solution_column", "answer"]
    assert main(["check", "dataset", *settings]) == 0
    assert "32 solved" in capsys.readouterr().out


def test_the_settings_survive_a_round_trip(tmp_path: Path) -> None:
    env = {"name": "dataset", "path": "x.jsonl", "reward": ["a.py:f", {"function": "a.py:g", "weight": 0.5}]}
    config = parse({"env": env})
    assert parse(config.as_dict()) == config and "weight: 0.5" in config.to_yaml()


def test_a_leak_is_found_in_a_reward_function(tmp_path: Path) -> None:
    def tells(completions: list[str], answer: list[str]) -> list[Any]:
        return [
            1.0 if text == right else (0.0, f"It is {right}.")
            for text, right in zip(completions, answer, strict=True)
        ]  # fmt: skip

    data = [{"prompt": f"Name number {i}!", "answer": f"w{i}x"} for i in range(20)]
    env = Dataset(path=written(tmp_path, data), reward=tells, solution_column="answer")
    [fault] = check_env(env).of("fault")
    assert fault.name == "feedback does not contain the answer"
    env = Dataset(path=written(tmp_path, data), reward=tells, solution_column="answer", reveals_answer=True)
    assert not check_env(env).of("fault")


needs_verifiers = pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="needs the extra verifiers")
TASKSET = """
import verifiers.v1 as vf

class Sum(vf.TaskData):
    answer: str

class SumTask(vf.Task[Sum]):
    @vf.reward(weight=0.5)
    async def right(self, task, trace) -> float:
        text = trace.last_reply
        if text == "raise":
            raise ValueError("no")
        if text != task.answer:
            trace.info["feedback"] = f"You wrote {len(text)} characters; write one number."
        return float(text == task.answer)

    @vf.metric
    async def words(self, trace) -> float:
        return float(len(trace.last_reply.split()))

class Sums(vf.Taskset[SumTask]):
    INFINITE = True
    def load(self):
        i = 0
        while True:
            data = Sum(prompt=f"What is {i} + {i}?", system_prompt="Count.", answer=str(2 * i))
            yield SumTask(data, self.config.task)
            i += 1

class Boxed(SumTask):
    NEEDS_CONTAINER = True

class Boxes(vf.Taskset[Boxed]):
    def load(self):
        yield Boxed(Sum(prompt="?", answer=""), self.config.task)
"""


@needs_verifiers
def test_a_taskset_of_verifiers(tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text(TASKSET)
    env = verifiers.Verifiers(taskset=f"{tmp_path}/sums.py:Sums", limit=40)
    assert len(env.train_tasks()) + len(env.eval_tasks(None)) == 40
    task = env.task(0, seed=0)
    answer = task.payload.prompt.data.answer
    assert task.messages[0] == {"role": "system", "content": "Count."}
    right, wrong = env.grade([task, task], [answer, "x y"])
    assert (right.reward, right.feedback, right.metrics["rewards/right"]) == (0.5, None, 1.0)
    assert (wrong.reward, wrong.metrics["words"]) == (0.0, 2.0)
    assert wrong.feedback == "You wrote 3 characters; write one number."
    with pytest.raises(EnvError, match=r"row 1 .*ValueError: no"):
        env.grade([task, task], [answer, "raise"])
    assert not check_env(env).of("fault")
    with pytest.raises(ConfigError, match="needs a container"):
        verifiers.Verifiers(taskset=f"{tmp_path}/sums.py:Boxes").train_tasks()
    with pytest.raises(EnvError, match="config of"):
        verifiers.Verifiers(taskset=f"{tmp_path}/sums.py:Sums", config={"nothing": 1}).train_tasks()


def test_verifiers_missing_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"verifiers is missing.*vpd-rl\[verifiers\]"):
        verifiers.Verifiers(taskset="x")


def test_a_trace_as_a_grade() -> None:
    """The trace's documented fields, without the package."""
    reward = SimpleNamespace(score=0.5, value=0.25)
    trace = SimpleNamespace(rewards={"a": reward}, metrics={"m": 2, "n": None}, info={"feedback": "So."}, reward=0.25)
    grade = verifiers._read(trace, "verifiers on row 0")
    assert grade == Grade(reward=0.25, feedback="So.", metrics={"rewards/a": 0.5, "m": 2.0})
    with pytest.raises(EnvError, match="'b' was not given"):
        verifiers._read(SimpleNamespace(rewards={"b": None}), "verifiers on row 0")


def unjudged(completions: list[str], **columns: Any) -> list[Any]:
    """Grades an answer in words alone, and judges no other."""
    return [Grade(reward=0.0, feedback="Hm.", graded=False) if text.isdigit() else 1.0 for text in completions]


def test_an_answer_that_no_function_judges_is_not_graded(tmp_path: Path) -> None:
    [first] = right_texts(tmp_path, 1)
    alone = graded(tmp_path, unjudged, [first, "four"])
    assert [(grade.graded, grade.reward, grade.success, grade.feedback) for grade in alone] == [
        (False, 0.0, False, "Hm."),
        (True, 1.0, None, None),
    ]
    mapping = graded(tmp_path, lambda completions: [{"score": 0, "graded": False}], [first])
    assert not mapping[0].graded and "graded" not in mapping[0].metrics
    with pytest.raises(EnvError, match="a mapping with a wrong 'graded'"):
        graded(tmp_path, lambda completions: [{"score": 0, "graded": "no"}], [first])
    both, other = graded(tmp_path, [accuracy, {"function": unjudged, "weight": 0.5}], [first, "four"])
    assert (both.graded, both.reward, both.feedback) == (True, 1.0, "Hm.")
    assert "rewards/unjudged" not in both.metrics and other.metrics["rewards/unjudged"] == 1.0
    env = GivenTasks(tasks=("q",), grader=lambda text, task: Grade(reward=0.0, graded=False), eval_share=0.0)
    assert not grade_texts(env, [env.task(0, seed=0)], ["a"])[0].graded


def test_every_field_of_a_grade_comes_back_from_a_process_of_its_own(tmp_path: Path) -> None:
    given = Grade(reward=0.25, success=True, feedback="Hm.", informative=False, metrics={"digits": 3.0}, graded=False)
    assert all(getattr(given, name) != value for name, value in DEFAULTS.items())  # a new field is to be added here
    source = f"from vpd.types import Grade\n\n\ndef one(completions):\n    return [{given!r}]\n"
    (tmp_path / "whole.py").write_text(source)
    caller = ProcessCaller(name="one", batched=True, module=trl_verl.__name__, spec=f"{tmp_path}/whole.py:one")
    assert caller([Row(prompt="q", columns={})], ["a"], 0, 60.0) == [given]


DEFAULTS = {
    entry.name: entry.default_factory() if callable(entry.default_factory) else entry.default
    for entry in dataclasses.fields(Grade)
}


@pytest.mark.parametrize("null", [None, float("nan"), ""])
def test_an_id_that_is_null_is_none(null: Any) -> None:
    assert as_task({"prompt": "q", "id": null}, 3, "tasks").id == "3"
    assert as_task({"prompt": "q", "id": null, "extra_info": {"index": 7}}, 3, "tasks").id == "3"  # verl's may repeat
    assert as_task({"prompt": "q", "id": 0}, 3, "tasks").id == "0"


def test_messages_written_as_text_are_messages_for_every_reader(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    task = as_task({"prompt": json.dumps(messages)}, 0, "tasks")
    [read] = Dataset(path=written(tmp_path, [{"prompt": json.dumps(messages)}]), reward=unjudged).train_tasks()
    assert list(task.messages) == list(read.messages) == messages
    assert task.payload.prompt == read.payload.prompt == messages  # and TRL's functions get a list of messages back
