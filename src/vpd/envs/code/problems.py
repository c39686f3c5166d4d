"""Programming problems as read: LiveCodeBench, HumanEval and MBPP, with their EvalPlus forms, and inputs with outputs.

| schema | recognised by | tests |
|---|---|---|
| LiveCodeBench | ``question_content`` | ``public_test_cases`` and ``private_test_cases``: standard input, or a call |
| HumanEval | ``prompt``, ``test``, ``entry_point`` | ``check(candidate)``, all of it private |
| MBPP | ``test_list`` | its lines, the first of them public; EvalPlus' longer ``test`` is private |
| SDPO, APPS, TACO, verl, ... | ``tests``, ``input_output``, ... (:mod:`vpd.envs.code.in_out`) | all of them private |

A record may hold a right program in ``canonical_solution`` (HumanEval: the function's body) or ``code`` (MBPP).
"""

import ast
import base64
import binascii
import builtins
import datetime
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from vpd.envs import records
from vpd.envs.code.asserts import Assertion
from vpd.envs.code.cases import Case, Problem, asserted
from vpd.envs.code.in_out import has_tests, in_out_problem, read_call
from vpd.errors import DataError

LARGEST = 1 << 30  # bytes of unpacked tests
TEXT_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
OTHER_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def problem(record: Mapping[str, Any], where: str, number: int) -> Problem:
    """A record of any schema.  Raises DataError that says where."""
    if "question_content" in record:
        return _livecodebench(record, where)
    if "test_list" in record:
        return _mbpp(record, where, number)
    if "entry_point" in record:
        return _humaneval(record, where, number)
    if has_tests(record):
        return in_out_problem(record, where, number)
    raise DataError(
        f"{where} is no programming problem",
        got=f"the fields {', '.join(map(str, record))}"[:200],
        expected="question_content (LiveCodeBench), test_list (MBPP), prompt, test and entry_point (HumanEval), or"
        " tests, input_output, verification_info or reward_model.ground_truth",
    )


def _livecodebench(record: Mapping[str, Any], where: str) -> Problem:
    metadata = records.parsed(record.get("metadata") or "{}", f"{where}: 'metadata'")
    function = records.mapping(metadata, f"{where}: 'metadata'").get("func_name")
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise DataError(f"{where}: 'func_name' names no function", got=repr(function)[:80])
    public = _tests(record, "public_test_cases", function, where)
    private = _tests(record, "private_test_cases", function, where)
    if not public and not private:
        raise DataError(f"{where} has no tests", expected="public_test_cases or private_test_cases")
    starter = record.get("starter_code") or ""
    if not isinstance(starter, str):
        raise DataError(f"{where}: 'starter_code' is no text", got=repr(starter)[:80])
    return Problem(
        id=records.text(record, "question_id", where),
        text=records.text(record, "question_content", where).strip(),
        starter=starter.rstrip(),
        function=function,
        public=public,
        private=private,
        date=_date(record["contest_date"], where) if record.get("contest_date") else None,
        solution=records.optional_text(record, "canonical_solution", where),
    )


def _date(value: Any, where: str) -> datetime.date:
    if isinstance(value, datetime.datetime):
        return value.date()
    try:
        return datetime.date.fromisoformat(str(value)[:10])
    except ValueError as error:
        raise DataError(f"{where}: 'contest_date' is no date", got=repr(value)[:80], expected="2025-02-01") from error


def _tests(record: Mapping[str, Any], field: str, function: str | None, where: str) -> tuple[Case, ...]:
    found = record.get(field)
    if not found:
        return ()
    place = f"{where}: {field!r}"
    if isinstance(found, str):
        found = records.parsed(found if found.lstrip().startswith("[") else unpacked(found, place), place)
    if not isinstance(found, (list, tuple)):
        raise DataError(f"{place} is not a list", got=type(found).__name__, expected="a list of tests")
    return tuple(_test(test, function, f"{place}, test {number}") for number, test in enumerate(found))


def _test(test: Any, function: str | None, place: str) -> Case:
    test = records.mapping(test, place)
    given, wanted = test.get("input"), test.get("output")
    if not isinstance(given, str) or not isinstance(wanted, str):
        raise DataError(f"{place} lacks 'input' and 'output'", got=str(list(test))[:80], expected="two texts")
    kind = test.get("testtype", "stdin" if function is None else "functional")
    if kind == "stdin" and function is None:
        return Case(kind="stdin", input=given, expected=wanted)
    if kind != "functional" or function is None:
        expected = "stdin without a func_name in 'metadata', functional with one"
        raise DataError(f"{place} has the wrong type", got=f"{kind!r}, func_name {function!r}", expected=expected)
    arguments, value = read_call(given, wanted, place)
    judge = Assertion(arguments=arguments, expected=value, loose=True)
    return Case(kind="call", input=given, expected=repr(value), assertion=judge)


def unpacked(content: str, place: str) -> str:
    """The text in base64 of zlib of a pickled text.  The pickle is read, not executed: it may hold a text alone."""
    try:
        packed = base64.b64decode(content, validate=True)
        stream = zlib.decompressobj()
        data = stream.decompress(packed, LARGEST)
        if not stream.eof:
            raise ValueError("it is cut off or too large")
        texts = []
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in TEXT_OPCODES:
                texts.append(argument)
            elif opcode.name not in OTHER_OPCODES:
                raise ValueError(f"its pickle holds {opcode.name}")
        [text] = texts
    except (ValueError, binascii.Error, zlib.error) as error:
        raise DataError(
            f"{place} cannot be unpacked",
            got=" ".join(str(error).split())[:120],
            expected="JSON, or base64 of zlib of a pickled text",
        ) from error
    return str(text)


def _humaneval(record: Mapping[str, Any], where: str, number: int) -> Problem:
    prompt, name = records.text(record, "prompt", where), records.text(record, "entry_point", where)
    test = records.text(record, "test", where)
    body = records.optional_text(record, "canonical_solution", where)
    cases, weak = asserted(test, name, f"{where}: 'test'", tail=f"\ncheck({name})\n")
    return Problem(
        id=records.name_of(record, number, "task_id"),
        text="Complete this Python function. Write the whole of it, with what stands before it.",
        starter=prompt.rstrip(),
        function=name,
        public=(),
        private=cases,
        solution=None if body is None else prompt + body,
        weak=weak,
    )


def _mbpp(record: Mapping[str, Any], where: str, number: int) -> Problem:
    lines = record["test_list"]
    if not isinstance(lines, (list, tuple)) or not lines or not all(isinstance(line, str) for line in lines):
        raise DataError(f"{where}: 'test_list' holds no tests", got=repr(lines)[:80], expected="a list of assertions")
    name = _called(lines[0], where)
    more = record.get("challenge_test_list") or []
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    public, weak = asserted(lines[0], name, f"{where}: 'test_list'", setup=setup)
    rest, why = asserted("\n".join([*lines[1:], *more]) or lines[0], name, f"{where}: 'test_list'", setup=setup)
    if record.get("test"):
        rest, why = asserted(records.text(record, "test", where), name, f"{where}: 'test'")
    field = "text" if "text" in record else "prompt"
    return Problem(
        id=records.name_of(record, number, "task_id"),
        text=f"{records.text(record, field, where).strip()}\nYour code must pass this test: {lines[0].strip()}",
        starter="",
        function=name,
        public=public,
        private=rest,
        solution=records.optional_text(record, "code", where),
        weak=weak or why,
    )


def _called(line: str, where: str) -> str:
    """The function that an assertion is about: the first called name that is not Python's own."""
    try:
        calls = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    except SyntaxError as error:
        raise DataError(f"{where}: 'test_list' is no Python", got=repr(line)[:80]) from error
    names = [node.func.id for node in calls if isinstance(node.func, ast.Name)]
    found = next((name for name in names if name not in vars(builtins)), None)
    if found is None:
        raise DataError(f"{where}: 'test_list' calls no function", got=repr(line)[:80])
    return found
