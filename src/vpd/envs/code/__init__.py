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

Schemas: :mod:`vpd.envs.code.problems`.  A training task is graded by its public tests and half of the private ones, an
evaluation task by all.  Expected outputs never enter the sandbox: a program gets inputs, and its results are compared
outside, so that only right answers pass (:mod:`vpd.envs.code.run`).  A test that is code and must run in the program's
own process can be faked by the program; ``asserts`` decides what happens to such records.

Feedback quotes up to two failing tests with their expected outputs.  That is not a program, so the environment does not
declare ``reveals_answer``; but a program could hard-code what it was shown, so the half of the private tests that only
evaluation uses is never quoted (``quote: public``: no private test is), and "wrong on a hidden test" is a bare verdict.
"""

import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge

from vpd.envs import Reply, records
from vpd.envs.code.cases import Case, Problem
from vpd.envs.code.feedback import describe_faults, read_code
from vpd.envs.code.problems import problem
from vpd.envs.code.run import CaseLimits, Fault, run_cases, run_suites, try_loading
from vpd.envs.record_tasks import FileTasks, Part
from vpd.errors import ConfigError, DataError
from vpd.printable import shown
from vpd.sandbox import Sandbox, strongest
from vpd.sandbox.remote import RemoteSandbox
from vpd.settings import IsPath
from vpd.types import Grade, Message, Task

LOG = logging.getLogger("vpd")
FAULTS = (
    "no_code", "cut", "syntax", "error", "missing", "ended", "odd", "timeout", "memory", "output", "killed", "wrong",
)  # fmt: skip
READ = "Read from standard input and print to standard output. Put the whole program in one ```python block."
WRITE = "Put the whole code in one ```python block."
REPAIR = "Mend your program. Answer with the whole of it in one ```python block."


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSuite:
    """A problem with the tests that grade it, the shortest first, and whether feedback may quote each (``shown``)."""

    problem: Problem
    cases: tuple[Case, ...]
    shown: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Code(FileTasks[Problem]):
    """The environment; files are read and the sandbox is chosen when first needed.

    Raises DataError for data that cannot be used, ConfigError for settings and if no safe sandbox is available.
    """

    name: Literal["code"] = "code"
    start_date: Annotated[str | datetime.date | None, "first contest_date, such as 2025-02-01; null: any"] = None
    end_date: Annotated[str | datetime.date | None, "last contest_date; null: any"] = None
    reward: Annotated[Literal["all", "share"], "1 if all tests pass else 0, or the share that does"] = "all"
    quote: Annotated[
        Literal["graded", "public"], "tests that feedback may quote: all that training uses, or the public ones"
    ] = "graded"
    asserts: Annotated[
        Literal["outside", "skip", "inside"],
        "records whose tests must run in the program's process: an error, left out, or trusted",
    ] = "outside"
    max_repairs: Annotated[
        int, Ge(0), "how often the model reads the results of the public tests and may answer again"
    ] = 0
    seconds: Annotated[float, Ge(0.1), "processor seconds for one test, rounded up to whole seconds"] = 6.0
    memory_mb: Annotated[int, Ge(64), "memory for one test, in MB"] = 1024
    workers: Annotated[int | None, Ge(1), "programs that run at the same time; null: one per processor"] = None
    packages: Annotated[
        tuple[str, ...], IsPath(), "folders that programs may import from, besides the standard library"
    ] = ()
    insist: Annotated[bool, "run programs UNPROTECTED if no safe sandbox is available"] = False
    sandbox_url: Annotated[
        str | None, "URL of a SandboxFusion service, e.g. http://127.0.0.1:8080; null: local sandbox"
    ] = None
    system: Annotated[str | None, "a system message"] = None

    def check(self) -> None:
        super().check()
        if self.sandbox_url is not None and (self.insist or self.packages):
            raise ConfigError("env.insist and env.packages are for the local sandbox", got="env.sandbox_url too")
        first, last = self._window
        if first and last and first > last:
            raise ConfigError("env.start_date is after env.end_date", got=f"{first} and {last}")

    def solution(self, task: Task) -> str | None:
        program = task.payload.problem.solution
        return None if program is None else f"```python\n{program.strip()}\n```"

    def announce(self) -> list[str]:
        """Which sandbox runs the programs, and how many problems are in both files."""
        lines = [self.sandbox.describe()]
        if self._trained:
            lines.append(
                f"code: {len(self._trained)} problems are in both files; evaluation grades them with the tests that"
                " training lacks, too"
            )
        return lines

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        """All rows at once.  A program that hangs, crashes or exceeds its memory is a failed row, not an error."""
        read = [read_code(text) for text in texts]
        suites = {
            (id(task.payload), code): task.payload for task, (code, _, _) in zip(tasks, read, strict=True) if code
        }
        faults = dict(zip(suites, self._run([(suite, code) for (_, code), suite in suites.items()]), strict=True))
        return [
            self._grade(task.payload, faults[id(task.payload), code]) if code else _failed(kind, words)
            for task, (code, kind, words) in zip(tasks, read, strict=True)
        ]

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        """The results of the public tests, until they pass or ``max_repairs`` is reached."""
        replies: list[Reply] = [None] * len(tasks)
        rows = [
            row
            for row, (task, messages) in enumerate(zip(tasks, conversations, strict=True))
            if sum(message["role"] == "assistant" for message in messages[len(task.messages) :]) <= self.max_repairs
        ]
        programs: list[tuple[CaseSuite, str]] = []
        owners = []
        for row in rows:
            code, _, words = read_code(conversations[row][-1]["content"])
            if code is None:
                replies[row] = f"{words}\n{REPAIR}"
            else:
                programs.append((_public(tasks[row].payload.problem), code))
                owners.append(row)
        for row, (suite, _), faults in zip(owners, programs, self._run(programs), strict=True):
            if any(faults):
                replies[row] = f"{self._feedback(suite, faults)[0]}\n{REPAIR}"
        return replies

    @cached_property
    def sandbox(self) -> Sandbox:
        """Where programs run."""
        if self.sandbox_url is not None:
            return RemoteSandbox(url=self.sandbox_url, workers=self.workers or 8)
        return strongest(workers=self.workers, packages=self.packages, insist=self.insist)

    def _run(self, programs: Sequence[tuple[CaseSuite, str]]) -> list[list[Fault | None]]:
        """For each program the result of each test (None: passed); without tests, the result of loading it."""
        limits = CaseLimits(seconds=self.seconds, memory_mb=self.memory_mb, thorough=self.reward == "share")
        runs = [
            run_cases(code, suite.problem.function, suite.cases, limits)
            if suite.cases
            else try_loading(code, suite.problem.function, limits)
            for suite, code in programs
        ]
        return run_suites(runs, self.sandbox) if runs else []

    def _grade(self, suite: CaseSuite, faults: Sequence[Fault | None]) -> Grade:
        passed = sum(fault is None for fault in faults)
        right = passed == len(suite.cases)
        if right:
            verdict = f"All {passed} tests pass."
            return Grade(reward=1.0, success=True, feedback=verdict, informative=False, metrics=_metrics(None))
        first = next(fault for fault in faults if fault is not None)
        feedback, informative = self._feedback(suite, faults)
        return Grade(
            reward=passed / len(suite.cases) if self.reward == "share" else 0.0,
            success=False,
            feedback=feedback,
            informative=informative,
            metrics=_metrics(first.kind),
        )

    def _feedback(self, suite: CaseSuite, faults: Sequence[Fault | None]) -> tuple[str, bool]:
        limits = f"{self.seconds:g} seconds, {self.memory_mb} MB"
        return describe_faults(suite.cases, suite.shown, faults, suite.problem.function, limits)

    @property
    def _window(self) -> tuple[datetime.date | None, datetime.date | None]:
        found = []
        for setting, value in (("start_date", self.start_date), ("end_date", self.end_date)):
            try:
                found.append(None if value is None else datetime.date.fromisoformat(str(value)))
            except ValueError as error:
                raise ConfigError(f"env.{setting} is no date", got=shown(value), expected="2025-02-01") from error
        return found[0], found[1]

    def split_key(self, item: Problem) -> str:
        return _question(item)

    @cached_property
    def _trained(self) -> dict[str, set[tuple[str, str]]]:
        """The tests that training has of the questions that are in both files."""
        return {} if self.eval_path in (None, self.path) else _tests_of_shared(*self._items)

    def shared_is_meant(self, train: Sequence[Problem], held_out: Sequence[Problem]) -> bool:
        """Where evaluation has tests that training lacks: the tests are split, not the questions, as SDPO does it."""
        tests = _tests_of_shared(train, held_out)
        return any(set(map(_key, item.private)) > tests[_question(item)] for item in held_out)

    @property
    def shares_questions(self) -> bool:
        """Whether evaluation asks questions of training, with further tests."""
        return bool(self._trained)

    def read_items(self, path: str) -> list[Problem]:
        first, last = self._window
        found, weak = [], 0
        for where, number, record in records.read(path, subset=self.subset, split=self.split):
            one = problem(record, where, number)
            if (first or last) and one.date is None:
                raise DataError(f"{where} has no 'contest_date'", do="Leave out env.start_date and env.end_date.")
            if one.date is not None and ((first and one.date < first) or (last and one.date > last)):
                continue
            if one.weak is not None:
                weak += 1
                if self.asserts == "outside":
                    raise DataError(
                        f"{where}: its tests must run in the program's process, which could then fake a pass",
                        got=one.weak,
                        do="Set env.asserts to skip (leave such records out) or inside (trust the programs).",
                    )
                if self.asserts == "skip":
                    continue
            found.append(one)
        if weak:
            action = "left out" if self.asserts == "skip" else "trusted: a program can fake a pass"
            LOG.info("%s: %d problems whose tests must run in the program's process are %s", path, weak, action)
        return found

    def make_task(self, part: Part, item: Problem) -> Task:
        trained = self._trained.get(_question(item))
        graded, hidden = item.private[::2], item.private[1::2]  # only evaluation uses the second half
        if trained is not None:  # the files have split the tests
            graded = tuple(case for case in item.private if _key(case) in trained)
            hidden = tuple(case for case in item.private if _key(case) not in trained)
        cases = [(case, True) for case in item.public]
        cases += [(case, self.quote == "graded") for case in graded]
        cases += [(case, False) for case in hidden if part == "eval"]
        cases.sort(key=lambda entry: entry[0].size)
        suite = CaseSuite(problem=item, cases=tuple(case for case, _ in cases), shown=tuple(see for _, see in cases))
        messages: tuple[Message, ...] = (*item.before, {"role": "user", "content": _question(item)})
        messages = records.with_system(messages, self.system)
        return Task(id=f"{part}/{item.id}", messages=messages, payload=suite)


def _tests_of_shared(train: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, set[tuple[str, str]]]:
    """Training's tests of each question that evaluation asks too."""
    asked = {_question(item) for item in held_out}
    return {_question(item): set(map(_key, item.private)) for item in train if _question(item) in asked}


def _key(case: Case) -> tuple[str, str]:
    return case.input, case.expected


def _question(found: Problem) -> str:
    if found.instructed:
        return found.text
    parts = [found.text]
    if found.starter:
        parts += [f"```python\n{found.starter}\n```"]
    return "\n\n".join([*parts, READ if found.function is None else WRITE])


def _public(found: Problem) -> CaseSuite:
    cases = tuple(sorted(found.public, key=lambda case: case.size))
    return CaseSuite(problem=found, cases=cases, shown=(True,) * len(cases))


def _failed(kind: str, words: str) -> Grade:
    return Grade(reward=0.0, success=False, feedback=words, metrics=_metrics(kind))


def _metrics(kind: str | None) -> dict[str, float]:
    return {f"code_{name}": float(name == kind) for name in FAULTS}
