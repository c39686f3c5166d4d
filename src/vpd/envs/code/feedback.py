"""Reads the code out of an answer, and describes the faults of a program as feedback."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from vpd.envs.code.cases import Case
from vpd.envs.code.run import Fault

FORM = "the whole program must stand in one ```python block"
FENCE = re.compile(r"^([ \t]*+)(`{3,}+|~{3,}+)[ \t]*+([\w+#.-]*+)[^\n`]*+$", re.MULTILINE)
PYTHON = ("python", "python3", "py")
LONGEST = 2000  # characters of one feedback
PART = 300  # of one input, output or message


def read_code(text: str) -> tuple[str | None, str, str]:
    """(code, "", "") of the last fenced block marked as Python; if there is none, of the last without a language, or of
    the last of all; or (None, kind of fault, feedback), where the kind is ``no_code`` or ``cut``."""
    blocks = list(_blocks(text))
    marked = [block for block in blocks if block[0] in PYTHON] or [block for block in blocks if not block[0]]
    if not blocks:
        empty = "is empty" if not text.strip() else "has no code block"
        return None, "no_code", f"Your answer {empty}; {FORM}."
    _, code = (marked or blocks)[-1]
    if code is None:
        return None, "cut", f"Your answer is cut off: its last code block is not closed. Be shorter; {FORM}."
    if not code.strip():
        return None, "no_code", f"Your last code block is empty; {FORM}."
    return code, "", ""


def _blocks(text: str) -> Iterator[tuple[str, str | None]]:
    """(language, content) of every fenced block; the content is None where the block is not closed."""
    opened: re.Match[str] | None = None
    for fence in FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[2][0] == opened[2][0] and len(fence[2]) >= len(opened[2]) and not fence[3]:
            yield opened[3].lower(), _dedented(text[opened.end() + 1 : fence.start()], opened[1])
            opened = None
        elif fence[2] == opened[2] and fence[3].lower() in PYTHON:
            yield opened[3].lower(), None  # and the next one begins
            opened = fence
    if opened is not None:
        yield opened[3].lower(), None


def _dedented(content: str, indent: str) -> str:
    """The content of a block, each line without as much of the fence's indent as it begins with (as in CommonMark);
    without a byte-order mark."""
    taken = re.compile("".join(f"(?:{re.escape(space)}" for space in indent) + ")?" * len(indent))
    lines = [line[taken.match(line).end() :] for line in content.split("\n")]  # type: ignore[union-attr]
    return "\n".join(lines).removeprefix("\ufeff")


def describe_faults(
    cases: Sequence[Case], shown: Sequence[bool], faults: Sequence[Fault | None], function: str | None, limits: str
) -> tuple[str, bool]:
    """Feedback on the failed tests, and whether it is informative.

    ``faults`` are in the order of ``cases`` and at least one is not None.  A test that is not ``shown`` is not quoted,
    nor is what the program made of it: the message of an error, or a result, may repeat the input.
    """
    failed = [(case, see, fault) for case, see, fault in zip(cases, shown, faults, strict=False) if fault is not None]
    failed.sort(key=lambda one: not one[1])  # those that may be quoted come first
    see = bool(failed) and failed[0][1]
    first = failed[0][2] if failed else next(fault for fault in faults if fault is not None)
    if first.kind == "wrong":
        wrong = [(case, fault) for case, see, fault in failed if fault.kind == "wrong" and see][:2]
        if not wrong:
            return "Your program gives a wrong answer to a test that is not shown.", False
        parts = [_wrong(case, fault, number) for number, (case, fault) in enumerate(wrong, start=1)]
        return clean("\n".join(["Your program gives a wrong answer.", *parts])), True
    from_the_input = first.kind not in ("syntax", "missing") and not first.loading
    if from_the_input and not see:
        words = {"error": first.text.partition(":")[0], "odd": "something else"}
        first = dataclasses.replace(first, text=words.get(first.kind, ""))
    parts = [_describe(first, function, limits), *map(cut, first.lines)]
    if from_the_input and see and (case := failed[0][0]).kind != "inside":
        parts.append(f"Input:\n{cut(case.input)}")
    return clean("\n".join(parts)), True


def _describe(fault: Fault, function: str | None, limits: str) -> str:
    if fault.kind == "syntax":
        return f"Your code is not valid Python. {cut(fault.text)}"
    if fault.kind == "error":
        return f"Your program raised an error{' while it was loaded' * fault.loading}. {cut(fault.text)}"
    if fault.kind == "killed":
        return f"Your program crashed{f' ({fault.text})' if fault.text else ''}, or started too many processes."
    return {
        "missing": f"Your code defines no function {function}, and no class Solution that has it.",
        "ended": f"Your program ended itself before it gave an answer{f' ({cut(fault.text)})' if fault.text else ''}.",
        "odd": f"Your function returned {cut(fault.text)}; it must return plain values (numbers, text, lists, ...).",
        "timeout": f"Your program reached the time limit ({limits}).",
        "memory": f"Your program reached the memory limit ({limits}).",
        "output": "Your program wrote too much output.",
    }[fault.kind]


def _wrong(case: Case, fault: Fault, number: int) -> str:
    if case.kind == "inside":
        return "\n".join([f"Test {number}", *map(cut, fault.lines)])
    printed = cut(fault.text) or "(nothing)"
    return f"Test {number}\nInput:\n{cut(case.input)}\nYour output:\n{printed}\nExpected:\n{cut(case.expected)}"


def cut(text: str) -> str:
    """At most PART characters; the middle of a longer text is left out."""
    text = text.strip("\n")
    return text if len(text) <= PART else f"{text[: PART - 105]} [...] {text[-98:]}"


def clean(text: str) -> str:
    """At most LONGEST printable characters."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 6] + " [...]"
