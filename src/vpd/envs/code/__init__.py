"""Programming: write a program, or a function, that passes its tests in a sandbox.

    Read n numbers and print their mean. ...                                         <- the task
    ```python
    n, *numbers = map(int, input().split())
    print(sum(numbers) / n)
    ```                                                                              <- an attempt
    Your program raised an error. ZeroDivisionError: division by zero                <- feedback
    line 2: print(sum(numbers) / n)
    Input:
    0

    env = Code(path="test6.jsonl", start_date="2025-02-01", end_date="2025-05-01")

Schemas and halves: :mod:`vpd.envs.code.problems`.  A training task is graded by its public tests and half of the
private ones, an evaluation task by all.  Expected outputs never enter the sandbox: a program is sent inputs, and what
it returns is compared here, so that a pass takes the right answers (:mod:`vpd.envs.code.run`).  Where tests are code
that must run beside the program, it could fake a pass; ``asserts`` says what becomes of such records.

Feedback quotes up to two failing tests with their expected outputs.  That is no program, so the environment does not
declare ``reveals_answer``; but a program could hard-code what it was shown, so the half of the private tests that only
evaluation uses is never quoted (``quote: public``: no private test is), and "wrong on a hidden test" is a bare verdict.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from vpd.envs import Reply, records
from vpd.envs.code.feedback import add_feedback, read_code
from vpd.envs.code.problems import Case, Problem, problem
from vpd.envs.code.run import Bounds, Fault, conduct, examine, load
from vpd.errors import ConfigError, DataError
from vpd.sandbox import Sandbox, strongest
from vpd.sandbox.remote import RemoteSandbox
from vpd.types import Grade, Message, Task

FAULTS = (
    "no_code", "cut", "syntax", "error", "missing", "ended", "odd", "timeout", "memory", "output", "killed", "wrong",
)  # fmt: skip
READ = "Read from standard input and print to standard output. Put the whole program in one ```python block."
WRITE = "Put the whole code in one ```python block."
MEND = "Mend your program. Answer with the whole of it in one ```python block."


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """A problem with the tests that grade it here, the shortest first, and whether feedback may quote them."""

    problem: Problem
    cases: tuple[Case, ...]
    shown: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Code:
    """The environment; files are read and the sandbox is chosen when first needed.

    Raises DataError for data that cannot be used, ConfigError for settings and where no safe sandbox can be had.
    """

    name: Literal["code"] = "code"
    path: Annotated[str, "a file of JSON lines, or a data set of the Hub: owner/name"]
    eval_path: Annotated[str | None, "held-out problems; null: a share of path, chosen by a hash"] = None
    eval_share: Annotated[float, "that share"] = 0.1
    start_date: Annotated[str | datetime.date | None, "no earlier contest_date, such as 2025-02-01"] = None
    end_date: Annotated[str | datetime.date | None, "no later contest_date"] = None
    reward: Annotated[Literal["all", "share"], "1 if all tests pass else 0, or the share that does"] = "all"
    quote: Annotated[Literal["graded", "public"], "what feedback may quote: training's tests, or public ones"] = (
        "graded"
    )
    asserts: Annotated[
        Literal["outside", "skip", "inside"], "tests that only run beside the program: an error, left out, or trusted"
    ] = "outside"
    max_repairs: Annotated[int, "times the model reads how the public tests went and may answer again"] = 0
    seconds: Annotated[float, "processor time for one test, rounded up to whole seconds"] = 6.0
    memory_mb: Annotated[int, "memory for one test"] = 1024
    workers: Annotated[int | None, "programs that run at once; null: one for each processor"] = None
    packages: Annotated[tuple[str, ...], "folders that programs may import from, besides the standard library"] = ()
    insist: Annotated[bool, "run programs UNPROTECTED where no safe sandbox can be had"] = False
    sandbox_url: Annotated[str | None, "a service like SandboxFusion, e.g. http://127.0.0.1:8080; null: local"] = None
    system: Annotated[str | None, "a system message"] = None
    subset: Annotated[str | None, "configuration of the Hub's data set"] = None
    split: Annotated[str, "split of the Hub's data set"] = "train"

    def __post_init__(self) -> None:
        records.check_share(self.eval_share)
        for setting, value, known in (
            ("reward", self.reward, ("all", "share")),
            ("quote", self.quote, ("graded", "public")),
            ("asserts", self.asserts, ("outside", "skip", "inside")),
        ):
            if value not in known:
                raise ConfigError(f"env.{setting} is unknown", got=repr(value), expected=" or ".join(map(repr, known)))
        low = (("max_repairs", 0), ("seconds", 0.1), ("memory_mb", 64), ("workers", 1))
        for setting, least in low:
            value = getattr(self, setting)
            if value is not None and not value >= least:
                raise ConfigError(f"env.{setting} is too small", got=value, expected=f"at least {least}")
        if self.sandbox_url is not None and (self.insist or self.packages):
            raise ConfigError("env.insist and env.packages are for the local sandbox", got="env.sandbox_url too")
        first, last = self._window
        if first and last and first > last:
            raise ConfigError("env.start_date is after env.end_date", got=f"{first} and {last}")

    def task(self, index: int, *, seed: int) -> Task:
        return records.walk(self.train_tasks(), index, name=self.name, seed=seed)

    def train_tasks(self) -> Sequence[Task]:
        return self._tasks[0]

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self._tasks[1][:limit]

    def solution(self, task: Task) -> str | None:
        program = task.payload.problem.solution
        return None if program is None else f"```python\n{program.strip()}\n```"

    def announce(self) -> list[str]:
        """What people should know at the start: which sandbox is in force, and which tests are weak or left out."""
        lines = [self.sandbox.describe()]
        _ = self._tasks
        if self._weak:
            deed = "left out" if self.asserts == "skip" else "trusted: a program that looks for it can fake a pass"
            lines.append(f"code: {len(self._weak)} problems whose tests must run beside the program are {deed}")
        return lines

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        """All rows at once; a program that hangs, crashes or grows is a failed row, never a stopped trainer."""
        read = [read_code(text) for text in texts]
        asked = {(id(task.payload), code): task.payload for task, (code, _, _) in zip(tasks, read, strict=True) if code}
        found = dict(zip(asked, self._faults([(exam, code) for (_, code), exam in asked.items()]), strict=True))
        return [
            self._grade(task.payload, found[id(task.payload), code]) if code else _failed(kind, words)
            for task, (code, kind, words) in zip(tasks, read, strict=True)
        ]

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        """How the public tests went, until they pass or ``max_repairs`` are used up."""
        replies: list[Reply] = [None] * len(tasks)
        rows = [
            row
            for row, (task, said) in enumerate(zip(tasks, conversations, strict=True))
            if sum(message["role"] == "assistant" for message in said[len(task.messages) :]) <= self.max_repairs
        ]
        programs: list[tuple[Exam, str]] = []
        owners = []
        for row in rows:
            code, _, words = read_code(conversations[row][-1]["content"])
            if code is None:
                replies[row] = f"{words}\n{MEND}"
            else:
                programs.append((_public(tasks[row].payload.problem), code))
                owners.append(row)
        for row, (exam, _), faults in zip(owners, programs, self._faults(programs), strict=True):
            if any(faults):
                replies[row] = f"{self._explained(exam, faults)[0]}\n{MEND}"
        return replies

    @cached_property
    def sandbox(self) -> Sandbox:
        """Where programs run."""
        if self.sandbox_url is not None:
            return RemoteSandbox(url=self.sandbox_url, workers=self.workers or 8)
        return strongest(workers=self.workers, packages=self.packages, insist=self.insist)

    def _faults(self, programs: Sequence[tuple[Exam, str]]) -> list[list[Fault | None]]:
        """For each program what became of its tests; without tests, of loading it."""
        bounds = Bounds(seconds=self.seconds, memory_mb=self.memory_mb, thorough=self.reward == "share")
        work = [
            examine(code, exam.problem.function, exam.cases, bounds)
            if exam.cases
            else load(code, exam.problem.function, bounds)
            for exam, code in programs
        ]
        return conduct(work, self.sandbox) if work else []

    def _grade(self, exam: Exam, faults: Sequence[Fault | None]) -> Grade:
        passed = sum(fault is None for fault in faults)
        right = passed == len(exam.cases)
        if right:
            told = f"All {passed} tests pass."
            return Grade(reward=1.0, success=True, feedback=told, informative=False, metrics=_metrics(None))
        first = next(fault for fault in faults if fault is not None)
        feedback, informative = self._explained(exam, faults)
        return Grade(
            reward=passed / len(exam.cases) if self.reward == "share" else 0.0,
            success=False,
            feedback=feedback,
            informative=informative,
            metrics=_metrics(first.kind),
        )

    def _explained(self, exam: Exam, faults: Sequence[Fault | None]) -> tuple[str, bool]:
        limits = f"{self.seconds:g} seconds, {self.memory_mb} MB"
        return add_feedback(exam.cases, exam.shown, faults, exam.problem.function, limits)

    @property
    def _window(self) -> tuple[datetime.date | None, datetime.date | None]:
        found = []
        for setting, value in (("start_date", self.start_date), ("end_date", self.end_date)):
            try:
                found.append(None if value is None else datetime.date.fromisoformat(str(value)))
            except ValueError as error:
                raise ConfigError(f"env.{setting} is no date", got=repr(value), expected="2025-02-01") from error
        return found[0], found[1]

    @cached_property
    def _weak(self) -> list[str]:
        """Names of the problems whose tests must run inside; filled as files are read."""
        return []

    @cached_property
    def _tasks(self) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        """Training and evaluation, apart."""
        train, held_out = records.apart(
            self._problems,
            self.path,
            self.eval_path,
            self.eval_share,
            stem=_asked,
            whole=_asked,
            name=lambda found: found.id,
        )
        return tuple(self._task("train", p) for p in train), tuple(self._task("eval", p) for p in held_out)

    def _problems(self, path: str) -> list[Problem]:
        first, last = self._window
        found = []
        for where, number, record in records.read(path, subset=self.subset, split=self.split):
            one = problem(record, where, number)
            if (first or last) and one.date is None:
                raise DataError(f"{where} has no 'contest_date'", do="Leave out env.start_date and env.end_date.")
            if one.date is not None and ((first and one.date < first) or (last and one.date > last)):
                continue
            if one.weak is not None:
                self._weak.append(one.id)
                if self.asserts == "outside":
                    raise DataError(
                        f"{where}: its tests must run beside the program, which could then fake a pass",
                        got=one.weak,
                        do="Set env.asserts to skip (leave such records out) or inside (trust the programs).",
                    )
                if self.asserts == "skip":
                    continue
            found.append(one)
        return found

    def _task(self, part: str, found: Problem) -> Task:
        graded, hidden = (
            found.private[::2],
            found.private[1::2],
        )  # the half that training uses, and the other one
        cases = [(case, True) for case in found.public]
        cases += [(case, self.quote == "graded") for case in graded]
        cases += [(case, False) for case in hidden if part == "eval"]
        cases.sort(key=lambda entry: entry[0].size)
        exam = Exam(problem=found, cases=tuple(case for case, _ in cases), shown=tuple(see for _, see in cases))
        messages: tuple[Message, ...] = ({"role": "user", "content": _asked(found)},)
        if self.system:
            messages = ({"role": "system", "content": self.system}, *messages)
        return Task(id=f"{part}/{found.id}", messages=messages, payload=exam)


def _asked(found: Problem) -> str:
    parts = [found.text]
    if found.starter:
        parts += [f"```python\n{found.starter}\n```"]
    return "\n\n".join([*parts, READ if found.function is None else WRITE])


def _public(found: Problem) -> Exam:
    cases = tuple(sorted(found.public, key=lambda case: case.size))
    return Exam(problem=found, cases=cases, shown=(True,) * len(cases))


def _failed(kind: str, words: str) -> Grade:
    return Grade(reward=0.0, success=False, feedback=words, metrics=_metrics(kind))


def _metrics(kind: str | None) -> dict[str, float]:
    return {f"code_{name}": float(name == kind) for name in FAULTS}
