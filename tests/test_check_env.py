"""``check_env`` and ``vpd check``: what is found, and what is not held against an environment."""

import dataclasses
import inspect
import random
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vpd.cli import main
from vpd.envs import check, per_row
from vpd.envs.check import ADVICE, Report, check_env, reference_answers
from vpd.envs.digits import Digits
from vpd.envs.instructions import FAMILIES, Instructions
from vpd.errors import ConfigError, EnvError
from vpd.types import Grade, Message, Task

ROOT = Path(__file__).resolve().parent.parent


class Sums:
    """A sound environment; each subclass below breaks one thing."""

    def task(self, index: int, *, seed: int) -> Task:
        return self.ask(random.Random(f"{seed}/{index}"), 0)

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return [self.ask(random.Random(f"eval/{index}"), 1) for index in range(20)][:limit]

    def ask(self, draw: random.Random, parity: int) -> Task:
        a, b = draw.randrange(10**6), 2 * draw.randrange(10**6) + parity
        content = f"What is {a} + {b}?"
        return Task(id=f"{a}+{b}", messages=({"role": "user", "content": content},), payload=a + b)

    def solution(self, task: Task) -> str:
        return str(task.payload)

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        if text.strip() == str(task.payload):
            return Grade(reward=1.0, feedback="Right.", informative=False)
        return Grade(reward=0.0, feedback=self.why(task, text))

    def why(self, task: Task, text: str) -> str:
        return f"Your answer has {len(text)} characters; write one number."


def found(report: Report, status: str) -> list[str]:
    return [check.name for check in report.checks if check.status == status]


def test_a_sound_environment_passes() -> None:
    report = check_env(Sums())
    assert not found(report, "fault") + found(report, "warning"), report.checks
    kinds = {attempt.kind for attempt in report.attempts}
    assert kinds == {"right", "wrong", "empty", "huge", "garbled", "another task's"}
    assert max(len(attempt.text) for attempt in report.attempts) == 10**6
    report.require()


EVERY = Instructions(constraints=tuple(FAMILIES), per_prompt=2)


@pytest.mark.parametrize("env", [Digits(), Instructions(), Instructions(reward="share"), EVERY], ids=str)
def test_the_shipped_environments_pass(env: Any) -> None:
    report = check_env(env)
    assert not found(report, "fault") + found(report, "warning"), report.checks


class Forgetful(Sums):
    def task(self, index: int, *, seed: int) -> Task:
        return self.ask(random.Random(), 0)


class Unordered(Sums):
    calls = 0

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        self.calls += 1
        return list(super().eval_tasks(limit))[:: 1 if self.calls % 2 else -1]


class NoLimit(Sums):
    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return super().eval_tasks(None)


class Overlap(Sums):
    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return [self.task(400, seed=0), *super().eval_tasks(None)][:limit]


class FiniteOverlap(Overlap):
    def train_tasks(self) -> Sequence[Task]:
        return [self.task(index, seed=0) for index in range(401)]


class NotATask(Sums):
    def task(self, index: int, *, seed: int) -> Any:
        return {"prompt": "What is 1 + 1?"}


class NoRole(Sums):
    def ask(self, draw: random.Random, parity: int) -> Task:
        message: Any = {"content": "What is 1 + 1?"}
        return Task(id="x", messages=(message,))


class Garbled(Sums):
    def ask(self, draw: random.Random, parity: int) -> Task:
        message: Message = {"role": "user", "content": "\ud800"}
        return Task(id="x", messages=(message,))


class Answered(Sums):
    def ask(self, draw: random.Random, parity: int) -> Task:
        task = super().ask(draw, parity)
        return dataclasses.replace(task, messages=(*task.messages, {"role": "assistant", "content": "2"}))


class TaskRaises(Sums):
    def task(self, index: int, *, seed: int) -> Task:
        raise FileNotFoundError("sums.json")


class EmptyRaises(Sums):
    def why(self, task: Task, text: str) -> str:
        return text.split()[0]


class Moody(Sums):
    def why(self, task: Task, text: str) -> str:
        return str(random.random())


class Shuffled(Sums):
    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return super().grade(tasks, texts)[::-1]


class TextMetric(Sums):
    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        return Grade(reward=float(text == str(task.payload)), feedback=text[:3], metrics={"length": float("inf")})


class WrongSolution(Sums):
    def solution(self, task: Task) -> str:
        return str(task.payload + 1)


class Echo(Sums):
    def why(self, task: Task, text: str) -> str:
        return f"You wrote {text[:20]}, which is wrong."


class Tells(Sums):
    def why(self, task: Task, text: str) -> str:
        return f"You wrote {len(text)} characters, but the sum is {task.payload}."


class Whispers(Sums):
    """Its answers are words, and its feedback has them in capitals."""

    def ask(self, draw: random.Random, parity: int) -> Task:
        task, name = super().ask(draw, parity), "".join(draw.choices("bcdfg", k=9))
        return dataclasses.replace(task, payload=name)

    def why(self, task: Task, text: str) -> str:
        return f"You wrote {len(text)} characters, but it is {task.payload.upper()}."


class OtherTools(Sums):
    def ask(self, draw: random.Random, parity: int) -> Task:
        return dataclasses.replace(super().ask(draw, parity), tools=({"name": f"f{random.random()}"},))


FAULTS = {
    Whispers: ("feedback does not contain the answer", "reveals_answer"),
    OtherTools: ("the same index and seed give the same task", "task 0 changed"),
    Forgetful: ("the same index and seed give the same task", "task 0 changed"),
    Unordered: ("held-out tasks keep their order", "changed between two calls"),
    NoLimit: ("eval_tasks respects its limit", "eval_tasks(1)"),
    Overlap: ("held-out tasks are not trained on", "1 of 21"),
    FiniteOverlap: ("held-out tasks are not trained on", "1 of 21"),
    NotATask: ("tasks can be drawn", "task(0, seed=0) returned no Task; got {'prompt'"),
    NoRole: ("tasks can be drawn", "malformed messages"),
    Garbled: ("tasks are well formed", "cannot be encoded as UTF-8"),
    Answered: ("tasks are well formed", "the last message is the assistant's"),
    TaskRaises: ("tasks can be drawn", "task(0, seed=0) raised FileNotFoundError"),
    EmptyRaises: ("answers can be graded", "raised IndexError"),
    Moody: ("grades are the same again, and in one batch", "the wrong answer"),
    Shuffled: ("grades are the same again, and in one batch", "another grade"),
    TextMetric: ("answers can be graded", "a grade's metric 'length' is not a finite number; got inf"),
    WrongSolution: ("its own solution is a success", "fails"),
    Echo: ("feedback can be written as UTF-8", "garbled"),
    Tells: ("feedback does not contain the answer", "reveals_answer"),
}


@pytest.mark.parametrize("broken", FAULTS, ids=lambda kind: kind.__name__)
def test_a_broken_contract_is_a_fault(broken: type[Sums]) -> None:
    report = check_env(broken(), tasks=8)
    name, message = FAULTS[broken]
    fault, *_ = report.of("fault")
    assert fault.name == name and message in fault.detail, fault
    with pytest.raises(EnvError, match=re.escape(name)) as raised:
        report.require()
    assert ADVICE.get(name, "") in str(raised.value)


def test_advice_is_about_promises_that_are_checked() -> None:
    source = inspect.getsource(check)
    assert not [name for name in ADVICE if source.count(f'"{name}"') < 2]


class Same(Sums):
    def task(self, index: int, *, seed: int) -> Task:
        return super().task(index, seed=0)


class Silent(Sums):
    def why(self, task: Task, text: str) -> str:
        return ""


class Monotonous(Sums):
    def why(self, task: Task, text: str) -> str:
        return "Try again."


class Generous(Sums):
    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        return Grade(reward=1.0, feedback=f"{len(text)} characters.")


class NothingHeldOut(Sums):
    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return []


class Repeats(Sums):
    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return [*super().eval_tasks(None)] * 2 if limit is None else list(super().eval_tasks(None))[:limit]


class Respelt(Sums):
    """Asks a question of training in capitals, and with other white space."""

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        task = self.task(3, seed=0)
        content = task.messages[0]["content"].upper().replace(" ", "\n ")
        return [dataclasses.replace(task, messages=({"role": "user", "content": content},))][:limit]


class OtherSystem(Sums):
    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        task = self.task(3, seed=0)
        return [dataclasses.replace(task, messages=({"role": "system", "content": "Be brief."}, *task.messages))][
            :limit
        ]


class OneId(Sums):
    def ask(self, draw: random.Random, parity: int) -> Task:
        return dataclasses.replace(super().ask(draw, parity), id="sum")


class OtherPayload(Sums):
    def ask(self, draw: random.Random, parity: int) -> Task:
        task = super().ask(draw, parity)
        return dataclasses.replace(task, payload=task.payload + random.random())


class Overpays(Sums):
    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        right = [text == str(task.payload) for task, text in zip(tasks, texts, strict=True)]
        return [Grade(reward=1.0, success=one, feedback=f"{len(text)}") for one, text in zip(right, texts, strict=True)]


WARNINGS = {
    Respelt: "held-out tasks are not trained on",
    OtherSystem: "held-out tasks are not trained on",
    OneId: "tasks have ids of their own",
    OtherPayload: "the same index and seed give the same task",
    Overpays: "failures earn less than successes",
    Same: "another seed gives other tasks",
    Silent: "the teacher has something to read",
    Monotonous: "the teacher has something to read",
    Generous: "bad answers can fail",
    NothingHeldOut: "there are held-out tasks",
    Repeats: "held-out tasks differ",
}


@pytest.mark.parametrize("odd", WARNINGS, ids=lambda kind: kind.__name__)
def test_what_is_allowed_and_rarely_intended_is_a_warning(odd: type[Sums]) -> None:
    report = check_env(odd(), tasks=8)
    assert not report.of("fault") and WARNINGS[odd] in found(report, "warning"), report.checks


class Blank:
    """A payload that equals itself alone, and, if it has a lock, cannot be pickled."""

    def __init__(self, value: int, lock: Any = None):
        self.value, self.lock = value, lock

    def __str__(self) -> str:
        return str(self.value)


@pytest.mark.parametrize("wrap", [Blank, lambda value: Blank(value, threading.Lock()), np.atleast_2d, lambda _: np.nan])
def test_a_payload_that_is_hard_to_compare_is_not_held_against_an_environment(wrap: Any) -> None:
    class Wrapped(Sums):
        solution: Any = None

        def ask(self, draw: random.Random, parity: int) -> Task:
            task = super().ask(draw, parity)
            return dataclasses.replace(task, payload=wrap(task.payload))

    assert "the same index and seed give the same task" in found(check_env(Wrapped(), tasks=8), "ok")


def test_tasks_that_differ_in_the_system_message_alone_are_different() -> None:
    class Documents(Sums):
        def ask(self, draw: random.Random, parity: int) -> Task:
            task = super().ask(draw, parity)
            asked: Message = {"role": "user", "content": "Compute it."}
            return dataclasses.replace(task, messages=({**task.messages[0], "role": "system"}, asked))

    assert "held-out tasks are not trained on" in found(check_env(Documents(), tasks=8), "ok")


def test_a_metric_of_numpy_is_no_fault() -> None:
    class Counts(Sums):
        @per_row
        def grade(self, task: Task, text: str) -> Grade:
            grade = super().grade([task], [text])[0]
            counted: Any = {"words": np.int64(3)}
            return dataclasses.replace(grade, metrics=counted)

    assert not check_env(Counts(), tasks=8).of("fault")


def test_a_declared_answer_is_no_fault() -> None:
    class Declared(Tells):
        reveals_answer = True

    assert not check_env(Declared(), tasks=8).of("fault")


def test_without_a_solution_it_says_what_is_not_known() -> None:
    class Unsolved(Tells):
        solution: Any = None

    report = check_env(Unsolved(), tasks=8)
    unknown = [check.name for check in report.of("warning") if check.detail.startswith("not known")]
    assert unknown == ["its own solution is a success", "feedback does not contain the answer"]


def test_the_part_of_a_solution_that_differs_between_tasks() -> None:
    assert reference_answers({"1": "It is 12.", "2": "It is 72."}) == {"1": "12", "2": "72"}
    assert reference_answers({"1": "<answer>A</answer>", "2": "<answer>D</answer>"}) == {"1": "A", "2": "D"}
    assert reference_answers({"1": "a b", "2": "c d"}) == {"1": "a b", "2": "c d"}
    assert reference_answers({"1": "alone"}) == {"1": "alone"} and reference_answers({}) == {}


def test_the_command_shows_a_table_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "digits", "--env.hint", "verdict", "--tasks", "4"]) == 0
    shown = capsys.readouterr().out
    assert "Right answer" in shown and "the teacher does not read it" in shown and "warning" in shown
    assert "\x1b[31m" not in shown and "\\x1b[31m" in shown  # the garbled answer reaches no terminal as it is


def test_the_readme_environment_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n# my_env.py\n(.*?)```", (ROOT / "docs/own_task.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "my_env.py").write_text(code[1])
    assert main(["check", f"{tmp_path}/my_env.py:Capitals"]) == 0
    assert "fault" not in capsys.readouterr().out


def test_a_fault_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "env.py").write_text(
        "from vpd.envs.digits import Digits\n\n"
        "class Late(Digits):\n    def eval_tasks(self, limit):\n        return 1 / 0\n"
    )
    assert main(["check", f"{tmp_path}/env.py:Late"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vpd: error: ") and error.count("\n") == 1
    assert "ZeroDivisionError" in error and "env.py:5" in error


@pytest.mark.parametrize("line", ["check {}", "train --env.name {} --run.output_dir {}.out"])
def test_a_class_that_is_no_environment_is_one_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noth.py").write_text("class A:\n    def grade(self, tasks, texts):\n        return []\n")
    assert main(line.replace("{}", f"{tmp_path}/noth.py:A").split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "A is no environment; got A without task and eval_tasks" in error
    with pytest.raises(ConfigError, match="A is no environment"):
        check_env(type("A", (), {})())


def test_a_fault_says_what_to_do() -> None:
    class Same(Sums):
        def eval_tasks(self, limit: int | None) -> list[Task]:
            return [self.task(number, seed=0) for number in range(4)][:limit]

    with pytest.raises(
        EnvError, match=r"not trained on; got 4 of 4 are.*Leave the questions of eval_tasks out of task"
    ):
        check_env(Same()).require()
