"""Running a program on its tests: in waves, in the sandbox, judged outside of it.

A program of whole input and output runs once a test.  A function is called a few tests in one process; where that
process is ended before all have answered, the first that has not answers in a process of its own, so that every test
has all its time and memory, and fails by a fault of the process only when it was the first in it.
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

from vpd.envs.code.driver import decode, encode
from vpd.envs.code.problems import Case
from vpd.sandbox import Limits, Outcome, Program, Sandbox

Kind: TypeAlias = Literal[
    "syntax", "error", "missing", "ended", "odd", "timeout", "memory", "output", "killed", "wrong"
]
DRIVER = Path(__file__).with_name("driver.py").read_text()
FRAME = re.compile(
    r'^  File "(?:[^"\n]*/)?solution\.py", line (\d+)(, in (.+))?\n(?:    (?! *[~^]+\n)(.*)\n)?', re.MULTILINE
)
NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d{1,4})?", re.ASCII)  # in linear time
LARGEST_WAVE = 64
PATIENCE = 2.0
GIVE_UP = 3  # limits reached and crashes, after which the tests not yet run count as failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a test failed.  ``text``: the error, or what was given instead of what was expected.
    ``lines`` of the solution led to it.  ``loading``: it came before the first call, so every test fails by it."""

    kind: Kind
    text: str = ""
    lines: tuple[str, ...] = ()
    loading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one test may use, and whether the rest is run after a failure.  ``seconds`` are of the processor, so that a
    busy machine fails no program; one that only waits is ended by the clock, at twice that and ``PATIENCE``."""

    seconds: float
    memory_mb: int
    thorough: bool

    def limits(self, *, given: int, wanted: int) -> Limits:
        """For so many characters of input and of expected output."""
        return Limits(
            seconds=2 * self.seconds + PATIENCE,
            cpu_seconds=math.ceil(self.seconds),
            memory_mb=self.memory_mb,
            file_mb=32 + (given >> 19),
            output_kb=64 + (wanted >> 8),
        )


#: Asks for programs to be run and is sent their outcomes; returns a fault or None (passed) for each test it ran.
Examination: TypeAlias = Generator[list[Program], list[Outcome], list[Fault | None]]


def conduct(examinations: Sequence[Examination], sandbox: Sandbox) -> list[list[Fault | None]]:
    """Run examinations side by side, so that the sandbox always has the programs of all of them."""
    results: dict[int, list[Fault | None]] = {}
    wanted: dict[int, list[Program]] = {}
    answers: dict[int, list[Outcome] | None] = dict.fromkeys(range(len(examinations)))
    while answers:
        wanted.clear()
        for number, outcomes in answers.items():
            try:
                programs = next(examinations[number]) if outcomes is None else examinations[number].send(outcomes)
            except StopIteration as stop:
                results[number] = stop.value
            else:
                wanted[number] = programs
        ran = iter(sandbox.run([program for programs in wanted.values() for program in programs]))
        answers = {number: [next(ran) for _ in programs] for number, programs in wanted.items()}
    return [results[number] for number in range(len(examinations))]


def examine(code: str, function: str | None, cases: Sequence[Case], bounds: Bounds) -> Examination:
    """Run a program on its tests in order.  Without ``thorough`` it ends once it is known why the program fails: at
    two wrong answers, or one fault of another kind; the tests that it has not run are missing in the result."""
    faults: list[Fault | None] = []
    wave = 1 if function is None else 4
    while len(faults) < len(cases) and not _settled(faults, bounds.thorough):
        following = cases[len(faults) : len(faults) + wave]
        if following[0].kind == "stdin":
            outcomes = yield [_reading(code, case, bounds) for case in following]
            faults += [_judged(case, outcome) for case, outcome in zip(following, outcomes, strict=True)]
        elif following[0].kind == "inside":
            nonce = secrets.token_hex(8)
            [outcome] = yield [_calling(code, function, (), nonce, bounds, test=following[0].input)]
            faults.append(None if _answers(outcome, nonce, 1) else _failed_inside(following[0], outcome))
        else:
            together = list(itertools.takewhile(lambda case: case.kind == "call", following))
            nonce = secrets.token_hex(8)
            [outcome] = yield [_calling(code, function, together, nonce, bounds)]
            found = _answers(outcome, nonce, len(together))
            faults += [_judged_value(case, answer) for case, answer in zip(together, found, strict=False)]
            if not found:
                ready = f"{nonce} ready\n" in outcome.stdout
                faults.append(dataclasses.replace(_process_fault(outcome), loading=not ready))
        wave = min(4 * wave, LARGEST_WAVE)
    return faults


def load(code: str, function: str | None, bounds: Bounds) -> Examination:
    """No test: only see whether the code of a function can be loaded."""
    if function is None:
        return []
    nonce = secrets.token_hex(8)
    [outcome] = yield [_calling(code, function, (), nonce, bounds)]
    return [None if outcome.status == "ok" else _process_fault(outcome)]


def _settled(faults: Sequence[Fault | None], thorough: bool) -> bool:
    kinds = [fault.kind for fault in faults if fault is not None]
    if "syntax" in kinds or "missing" in kinds or any(fault is not None and fault.loading for fault in faults):
        return True
    if thorough:
        return sum(kind in ("timeout", "memory", "output", "killed") for kind in kinds) >= GIVE_UP
    return len(kinds) >= 2 or any(kind != "wrong" for kind in kinds)


def _reading(code: str, case: Case, bounds: Bounds) -> Program:
    files = {"solution.py": code, "order.json": json.dumps({"function": None})}
    limits = bounds.limits(given=len(case.input), wanted=len(case.expected))
    return Program(source=DRIVER, stdin=case.input, files=files, limits=limits)


def _calling(
    code: str, function: str | None, cases: Sequence[Case], nonce: str, bounds: Bounds, *, test: str = ""
) -> Program:
    calls = [encode(case.assertion.arguments) for case in cases if case.assertion is not None]
    order = json.dumps({"function": function, "calls": calls, "nonce": nonce, "test": test})
    limits = bounds.limits(given=len(order), wanted=sum(len(case.expected) + 8192 for case in cases))
    return Program(source=DRIVER, files={"solution.py": code, "order.json": order}, limits=limits)


def _answers(outcome: Outcome, nonce: str, most: int) -> list[dict[str, Any]]:
    """What the driver wrote about the first calls, up to the first that it wrote nothing readable about."""
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


def _judged_value(case: Case, answer: dict[str, Any]) -> Fault | None:
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


def _judged(case: Case, outcome: Outcome) -> Fault | None:
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
    """Why a process ended without an answer."""
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
    """A failed assertion of test code is a wrong answer; anything else is what it is."""
    fault = _process_fault(outcome)
    places = re.findall(r'^  File "test\.py", line (\d+)', outcome.stderr, re.MULTILINE)
    lines = case.input.split("\n")
    if fault.kind == "error" and fault.text.startswith("AssertionError") and places and int(places[-1]) <= len(lines):
        return Fault(kind="wrong", lines=(lines[int(places[-1]) - 1].strip(),))
    return fault
