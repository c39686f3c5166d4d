"""Tests as inputs and outputs, in the forms that data sets for training have.

| where | form |
|---|---|
| ``tests`` (SDPO), ``input_output`` (APPS, TACO), ``reward_model.ground_truth`` (verl: PRIME, Eurus) | columns |
| ``tests`` (DeepCoder), ``verification_info`` (open-r1) | rows |

Columns: ``{"inputs": [...], "outputs": [...], "fn_name": ..., "testtype": ...}``.  Rows: a list of ``{"input": ...,
"output": ...}``, each with ``fn_name`` or ``metadata.func_name``.

Either may be JSON text.  Without a function's name an input is standard input, and a list of lines is joined.  With
one, an input is the list of arguments, or JSON with one argument a line.  ``testtype: code`` (SDPO's HumanEval+ and
MBPP+): the inputs are code with assertions.
"""

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpd.envs import records
from vpd.envs.code.asserts import Assertion
from vpd.envs.code.cases import Case, Problem, asserted
from vpd.errors import DataError
from vpd.types import Message

TESTS = ("tests", "input_output", "verification_info")
TEXTS = ("question", "problem", "problem_statement", "description")
NAMES = ("idx", "id", "task_id", "problem_id", "question_id", "extra_info.index")
FENCED = re.compile(r"```[\w+]*\n(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    """``function`` is None for whole programs; ``weak`` says why the tests must run in the program's process."""

    function: str | None
    cases: tuple[Case, ...]
    weak: str | None = None


def has_tests(record: Mapping[str, Any]) -> bool:
    """Whether a record has tests in one of these forms."""
    model = record.get("reward_model")
    ground_truth = isinstance(model, Mapping) and record.get("ability", "code") == "code"
    return record.get("kind", "code") == "code" and (ground_truth or any(field in record for field in TESTS))


def in_out_problem(record: Mapping[str, Any], where: str, number: int) -> Problem:
    """A record with such tests as a problem.  Raises DataError that says where."""
    present = sorted((field for field in TESTS if field in record), key=lambda field: not record[field])
    field = "ground_truth" if not present or ("reward_model" in record and not record[present[0]]) else present[0]
    model = record.get("reward_model")
    found = record.get(field) if field in TESTS else records.mapping(model or {}, f"{where}: 'reward_model'").get(field)
    tests = read_tests(found, f"{where}: {field!r}")
    before, text, instructed = _question(record, where)
    return Problem(
        id=records.name_of(record, number, *NAMES),
        text=text,
        starter=(records.optional_text(record, "starter_code", where) or "").rstrip(),
        function=tests.function,
        public=(),
        private=tests.cases,
        solution=_solution(record, where),
        weak=tests.weak,
        before=before,
        instructed=instructed,
    )


def _question(record: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str, bool]:
    """(messages before the question, the question, whether it says itself in which form to answer)."""
    field = next((field for field in ("prompt", *TEXTS) if record.get(field)), "prompt")
    messages = records.prompt(record, field, where, ends=("user",))
    *before, last = messages
    instructed = field == "prompt" and any("```" in message["content"] for message in messages)
    text = last["content"] if field == "prompt" else last["content"].strip()
    return tuple(before) or records.with_system((), records.optional_text(record, "system", where)), text, instructed


def _solution(record: Mapping[str, Any], where: str) -> str | None:
    """The first of ``solutions`` (a list, or JSON text of one), without a fence; None without any."""
    found = record.get("solutions")
    if isinstance(found, str):
        found = records.parsed(found, f"{where}: 'solutions'") if found.strip() else None
    if not isinstance(found, (list, tuple)) or not found or not isinstance(found[0], str):
        return None
    fenced = FENCED.search(found[0])
    return (fenced[1] if fenced else found[0]).strip() or None


def read_tests(value: Any, place: str) -> Tests:
    """Tests of any of these forms.  Raises DataError."""
    found = records.parsed(value or None, place)
    if isinstance(found, Mapping) and "inputs" in found:
        return _columns(found, place)
    if isinstance(found, Mapping):
        found = records.parsed(found.get("test_cases"), f"{place}, test_cases")
    if not isinstance(found, (list, tuple)) or not found:
        expected = "inputs and outputs, or a list of tests"
        raise DataError(f"{place} has no tests", got=repr(value)[:80], expected=expected)
    if all(isinstance(test, str) for test in found):
        return _code("\n".join(found), place)
    return _rows(found, place)


def _columns(found: Mapping[str, Any], place: str) -> Tests:
    """``{"inputs": [...], "outputs": [...]}``."""
    given, wanted = found["inputs"], found.get("outputs")
    if not isinstance(given, (list, tuple)) or not isinstance(wanted, (list, tuple)) or len(given) != len(wanted):
        got = " and ".join(str(len(x)) if isinstance(x, (list, tuple)) else repr(x)[:40] for x in (given, wanted))
        raise DataError(f"{place} has not as many outputs as inputs", got=got, expected="two lists of one length")
    if not given:
        raise DataError(f"{place} has no tests", got="no inputs", expected="inputs and outputs")
    kind = found.get("testtype")
    if kind in ("code", "assert"):
        return _code("\n".join(_lines(code, f"{place}, its inputs") for code in given), place)
    return _cases(list(zip(given, wanted, strict=True)), found.get("fn_name"), place, exact=kind == "functional")


def _rows(found: Sequence[Any], place: str) -> Tests:
    """A list of tests, each with its input and output."""
    pairs, names = [], set()
    for number, test in enumerate(found):
        test = records.mapping(test, f"{place}, test {number}")
        wanted = [key for key in ("output", "expected_output") if key in test]
        if "input" not in test or not wanted:
            raise DataError(f"{place}, test {number} lacks 'input' and 'output'", got=str(list(test))[:80])
        metadata = test.get("metadata")
        metadata = metadata if isinstance(metadata, Mapping) else {}
        names.add(test.get("fn_name") or metadata.get("func_name") or None)
        pairs.append((test["input"], test[wanted[0]]))
    if len(names) > 1:
        raise DataError(f"{place} has tests of several functions", got=", ".join(map(str, names))[:80], expected="one")
    return _cases(pairs, names.pop(), place, exact=False)


def _cases(pairs: Sequence[tuple[Any, Any]], function: Any, place: str, *, exact: bool) -> Tests:
    if not function:
        return Tests(function=None, cases=tuple(_stdin(*pair, f"{place}, test {n}") for n, pair in enumerate(pairs)))
    if not (isinstance(function, str) and function.isidentifier()):
        raise DataError(f"{place}: 'fn_name' names no function", got=repr(function)[:80])
    calls = [read_call(*pair, f"{place}, test {number}") for number, pair in enumerate(pairs)]
    wrapped = not exact and all(isinstance(value, list) and len(value) == 1 for _, value in calls)
    cases = []
    for arguments, value in calls:
        judge = Assertion(arguments=arguments, expected=value, loose=True)
        if wrapped:  # APPS and TACO put the value into a list, at times
            judge = Assertion(arguments=arguments, expected=value[0], also=(value,), loose=True)
        given = f"{function}({', '.join(map(repr, arguments))})"
        cases.append(Case(kind="call", input=given, expected=repr(judge.expected), assertion=judge))
    return Tests(function=function, cases=tuple(cases))


def _stdin(given: Any, wanted: Any, place: str) -> Case:
    return Case(
        kind="stdin", input=_lines(given, f"{place}, its input"), expected=_lines(wanted, f"{place}, its output")
    )


def _lines(value: Any, place: str) -> str:
    """A text, or lines that are joined."""
    if isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise DataError(f"{place} is no text", got=repr(value)[:80], expected="a text, or a list of lines")
    return value


def read_call(given: Any, wanted: Any, place: str) -> tuple[tuple[Any, ...], Any]:
    """(arguments, value): of JSON text, one argument a line, or of a list of arguments and a value."""
    if isinstance(given, str):
        lines = [line for line in given.split("\n") if line.strip()]
        arguments = tuple(records.parsed(line, f"{place}, its input") for line in lines)
        return arguments, records.parsed(wanted, f"{place}, its output")
    if not isinstance(given, (list, tuple)):
        raise DataError(f"{place} has no list of arguments", got=repr(given)[:80], expected="a list, or JSON a line")
    return tuple(given), wanted


def _code(source: str, place: str) -> Tests:
    """Code with assertions about the one function that it uses and does not define."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise DataError(f"{place} is no Python", got=f"{error.msg} in its line {error.lineno}") from error
    names = _undefined_calls(tree)
    if len(names) != 1:
        got = ", ".join(names) or "no function"
        raise DataError(
            f"{place} must be about one function", got=got[:80], expected="one name that it does not define"
        )
    cases, weak = asserted(source, names[0], place)
    return Tests(function=names[0], cases=cases, weak=weak)


def _undefined_calls(tree: ast.AST) -> list[str]:
    """The names that code calls, or passes to a call, and that neither it nor Python defines, in their order."""
    known, called = set(vars(builtins)), []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                known.add(node.name)
            case ast.alias():
                known.add((node.asname or node.name).partition(".")[0])
            case ast.arg():
                known.add(node.arg)
            case ast.Name(ctx=ast.Store()):
                known.add(node.id)
            case ast.Call():
                called += [part.id for part in (node.func, *node.args) if isinstance(part, ast.Name)]
    return [name for name in dict.fromkeys(called) if name not in known]
