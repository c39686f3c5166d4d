"""Runs a program on its tests: in batches, in the sandbox, with the results compared outside of it.

A program that reads standard input runs once for each test.  A function is called for several tests in one process; if
that process ends early, the first test without a result starts a new process, so that every test has all its time and
memory, and fails by an error of the process only if it was the first in it.
"""

import dataclasses
import itertools
import json
import math
import re
import secrets
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vpd.envs.code.cases import Case
from vpd.envs.code.driver import decode, encode
from vpd.sandbox import Limits, Outcome, Program, Sandbox

Kind: TypeAlias = Literal[
    "syntax", "error", "missing", "ended", "odd", "timeout", "memory", "output", "killed", "wrong"
]
DRIVER = Path(__file__).with_name("driver.py").read_text()
FRAME = re.compile(
    r'^  File "(?:[^"\n]*/)?solution\.py", line (\d+)(, in (.+))?\n(?:    (?! *[~^]+\n)(.*)\n)?', re.MULTILINE
)
NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d{1,4})?", re.ASCII)  # in linear time
MAX_BATCH = 64
EXTRA_SECONDS = 2.0  # of wall-clock time, for a program that waits
MAX_EXPENSIVE_FAULTS = 3  # limits reached or crashes, after which the remaining tests count as failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a test failed.  ``text``: the error message, or the wrong output.  ``lines``: the solution's lines in the
    traceback.  ``loading``: it happened before the first call, so every test fails by it."""

    kind: Kind
    text: str = ""
    lines: tuple[str, ...] = ()
    loading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseLimits:
    """What one test may use, and whether all tests are run after a failure (``thorough``).

    ``seconds`` is processor time, so that a busy machine fails no program; a program that only waits ends after
    2 * ``seconds`` + ``EXTRA_SECONDS`` of wall-clock time.
    """

    seconds: float
    memory_mb: int
    thorough: bool

    def sandbox_limits(self, *, given: int, wanted: int) -> Limits:
        """The sandbox's limits for so many characters of input and of expected output."""
        return Limits(
            seconds=2 * self.seconds + EXTRA_SECONDS,
            cpu_seconds=math.ceil(self.seconds),
            memory_mb=self.memory_mb,
            file_mb=32 + (given >> 19),
            output_kb=64 + (wanted >> 8),
        )


#: Yields programs to run and is sent their outcomes; returns a fault or None (passed) for each test it ran.
SuiteRun: TypeAlias = Generator[list[Program], list[Outcome], list[Fault | None]]


def run_suites(runs: Sequence[SuiteRun], sandbox: Sandbox) -> list[list[Fault | None]]:
    """Drive several runs at once, so that the sandbox always has the programs of all of them."""
    results: dict[int, list[Fault | None]] = {}
    requested: dict[int, list[Program]] = {}
    answers: dict[int, list[Outcome] | None] = dict.fromkeys(range(len(runs)))
    while answers:
        requested.clear()
        for number, outcomes in answers.items():
            try:
                programs = next(runs[number]) if outcomes is None else runs[number].send(outcomes)
            except StopIteration as stop:
                results[number] = stop.value
            else:
                requested[number] = programs
        ran = iter(sandbox.run([program for programs in requested.values() for program in programs]))
        answers = {number: [next(ran) for _ in programs] for number, programs in requested.items()}
    return [results[number] for number in range(len(runs))]


def run_cases(code: str, function: str | None, cases: Sequence[Case], limits: CaseLimits) -> SuiteRun:
    """Run a program on its tests in order.

    Without ``thorough`` it ends after two wrong answers or one fault of another kind; the result lacks the
    tests that were not run.
    """
    faults: list[Fault | None] = []
    batch = 1 if function is None else 4
    while len(faults) < len(cases) and not _settled(faults, limits.thorough):
        following = cases[len(faults) : len(faults) + batch]
        if following[0].kind == "stdin":
            outcomes = yield [_stdin_program(code, case, limits) for case in following]
            faults += [_check_output(case, outcome) for case, outcome in zip(following, outcomes, strict=True)]
        elif following[0].kind == "inside":
            nonce = secrets.token_hex(8)
            [outcome] = yield [_call_program(code, function, (), nonce, limits, test=following[0].input)]
            faults.append(None if _answers(outcome, nonce, 1) else _failed_inside(following[0], outcome))
        else:
            together = list(itertools.takewhile(lambda case: case.kind == "call", following))
            nonce = secrets.token_hex(8)
            [outcome] = yield [_call_program(code, function, together, nonce, limits)]
            found = _answers(outcome, nonce, len(together))
            faults += [_check_value(case, answer) for case, answer in zip(together, found, strict=False)]
            if not found:
                ready = f"{nonce} ready\n" in outcome.stdout
                faults.append(dataclasses.replace(_process_fault(outcome), loading=not ready))
        batch = min(4 * batch, MAX_BATCH)
    return faults


def try_loading(code: str, function: str | None, limits: CaseLimits) -> SuiteRun:
    """Without tests: only whether the code of a function can be loaded."""
    if function is None:
        return []
    nonce = secrets.token_hex(8)
    [outcome] = yield [_call_program(code, function, (), nonce, limits)]
    return [None if outcome.status == "ok" else _process_fault(outcome)]


def _settled(faults: Sequence[Fault | None], thorough: bool) -> bool:
    kinds = [fault.kind for fault in faults if fault is not None]
    if "syntax" in kinds or "missing" in kinds or any(fault is not None and fault.loading for fault in faults):
        return True
    if thorough:
        return sum(kind in ("timeout", "memory", "output", "killed") for kind in kinds) >= MAX_EXPENSIVE_FAULTS
    return len(kinds) >= 2 or any(kind != "wrong" for kind in kinds)


def _stdin_program(code: str, case: Case, limits: CaseLimits) -> Program:
    files = {"solution.py": code, "order.json": json.dumps({"function": None})}
    sandbox_limits = limits.sandbox_limits(given=len(case.input), wanted=len(case.expected))
    return Program(source=DRIVER, stdin=case.input, files=files, limits=sandbox_limits)


def _call_program(
    code: str, function: str | None, cases: Sequence[Case], nonce: str, limits: CaseLimits, *, test: str = ""
) -> Program:
    calls = [encode(case.assertion.arguments) for case in cases if case.assertion is not None]
    order = json.dumps({"function": function, "calls": calls, "nonce": nonce, "test": test})
    sandbox_limits = limits.sandbox_limits(given=len(order), wanted=sum(len(case.expected) + 8192 for case in cases))
    return Program(source=DRIVER, files={"solution.py": code, "order.json": order}, limits=sandbox_limits)


def _answers(outcome: Outcome, nonce: str, most: int) -> list[dict[str, Any]]:
    """The driver's results of the first calls, up to the first call without a readable result."""
    found: list[dict[str, Any]] = []
    for line in outcome.stdout.split("\n")[:-1]:
        if len(found) == most or not line.startswith(f"{nonce} {len(found)} "):
            continue
        try:
            answer = json.loads(line.split(" ", 2)[2])
        except (ValueError, RecursionError):
            answer = {"odd": "a value that is too large to be read"}
        found.append(answer if isinstance(answer, dict) else {"odd": "no answer"})
    return found


def _check_value(case: Case, answer: dict[str, Any]) -> Fault | None:
    assert case.assertion is not None
    if "raised" in answer:
        return _raised(str(answer["raised"]))
    if "missing" in answer:
        return Fault(kind="missing")
    if "value" not in answer:
        return Fault(kind="odd", text=str(answer.get("odd", "nothing")))
    try:
        value = decode(answer["value"])
        text = repr(value)
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return Fault(kind="odd", text="a value that cannot be read")
    return None if case.assertion.holds(value) else Fault(kind="wrong", text=text)


def _check_output(case: Case, outcome: Outcome) -> Fault | None:
    if outcome.status != "ok":
        return _process_fault(outcome)
    return None if same_output(case.expected, outcome.stdout) else Fault(kind="wrong", text=outcome.stdout)


def same_output(expected: str, given: str) -> bool:
    """Whether two outputs agree line by line, less outer space; a line of numbers also where they are equal numbers.

    >>> same_output("1.50 2\\n", "  1.5 2.0"), same_output("1 2", "1\\n2")
    (True, False)
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (expected, given))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    ours, theirs = a.split(), b.split()
    if len(ours) != len(theirs) or not all(map(NUMBER.fullmatch, (*ours, *theirs))):
        return False
    return all(Decimal(x) == Decimal(y) for x, y in zip(ours, theirs, strict=True))


def _process_fault(outcome: Outcome) -> Fault:
    """Why a process ended without a result."""
    if outcome.status == "error":
        if "Traceback (most recent call last):" in outcome.stderr:
            return _raised(outcome.stderr)
        return Fault(kind="ended", text=f"exit code {outcome.exit_code}")
    if outcome.status == "killed":
        code = outcome.exit_code
        known = code is not None and -code in {int(s) for s in signal.Signals}
        return Fault(kind="killed", text=signal.Signals(-code).name if known and code is not None else "")
    if outcome.status == "ok":
        return Fault(kind="ended", text="exit code 0")
    return Fault(kind=outcome.status)


def _raised(text: str) -> Fault:
    """The last error of a traceback, with the last three lines of the solution that led to it."""
    block = text[text.rfind("Traceback (most recent call last):") :]
    frames = list(FRAME.finditer(block))
    last = max((match.end() for match in re.finditer(r"^ .*$", block, re.MULTILINE)), default=0)
    message = block[last:].strip() or block.strip().rpartition("\n")[2]
    message = re.sub(r"0x[0-9a-f]{6,}", "0x...", message)
    name = re.split(r"[:\s]", message, maxsplit=1)[0]
    if frames and frames[-1][2] is None and name in ("SyntaxError", "IndentationError", "TabError"):
        return Fault(kind="syntax", text=message, lines=(_line(frames[-1]),))
    if re.fullmatch(r"[\w.]*MemoryError", name):
        return Fault(kind="memory")
    if name == "SystemExit":
        return Fault(kind="ended", text=message)
    return Fault(kind="error", text=message, lines=tuple(map(_line, frames[-3:])))


def _line(frame: re.Match[str]) -> str:
    place = f"line {frame[1]}" + (f", in {frame[3]}" if frame[3] and frame[3] != "<module>" else "")
    return f"{place}: {frame[4].strip()}" if frame[4] else place


def _failed_inside(case: Case, outcome: Outcome) -> Fault:
    """A failed assertion of test code is a wrong answer; any other fault stays as it is."""
    fault = _process_fault(outcome)
    places = re.findall(r'^  File "test\.py", line (\d+)', outcome.stderr, re.MULTILINE)
    lines = case.input.split("\n")
    if fault.kind == "error" and fault.text.startswith("AssertionError") and places and int(places[-1]) <= len(lines):
        return Fault(kind="wrong", lines=(lines[int(places[-1]) - 1].strip(),))
    return fault
