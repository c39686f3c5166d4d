"""A programming problem and its tests, whatever schema they come from."""

import ast
import datetime
from dataclasses import dataclass
from typing import Literal

from vpd.envs.code.asserts import Assertion, NotData, assertions
from vpd.envs.code.driver import encode
from vpd.errors import DataError
from vpd.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test.

    ``stdin``: a program reads ``input`` and must print ``expected``.  ``call``: the function is called and its value
    must meet ``assertion``.  ``inside``: ``input`` is test code that runs in the program's process, which can fake it.
    """

    kind: Literal["stdin", "call", "inside"]
    input: str
    expected: str
    assertion: Assertion | None = None

    @property
    def size(self) -> int:
        return len(self.input) + len(self.expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem.

    ``function`` is None for whole programs; ``weak`` says why its tests are of kind ``inside``;
    ``before`` are the messages before the text, and ``instructed`` says that the text names the form of the
    answer.
    """

    id: str
    text: str
    starter: str
    function: str | None
    public: tuple[Case, ...]
    private: tuple[Case, ...]
    date: datetime.date | None = None
    solution: str | None = None
    weak: str | None = None
    before: tuple[Message, ...] = ()
    instructed: bool = False


def asserted(
    source: str, name: str, place: str, *, setup: str = "", tail: str = ""
) -> tuple[tuple[Case, ...], str | None]:
    """Assertions as cases, and None; or one case that must run inside, and why."""
    try:
        if not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(setup).body):
            raise NotData("code that its tests need")
        return tuple(_case(assertion, name) for assertion in assertions(source, name)), None
    except SyntaxError as error:
        raise DataError(f"{place} is no Python", got=f"{error.msg} in its line {error.lineno}") from error
    except (NotData, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        code = f"{setup}\n{source}{tail}".lstrip("\n")
        return (Case(kind="inside", input=code, expected=""),), str(error)


def _case(assertion: Assertion, name: str) -> Case:
    encode(assertion.arguments)
    given = f"{name}({', '.join(map(repr, assertion.arguments))})"
    holds = repr(assertion.expected) if assertion.condition is None else f"assert {assertion.source}"
    return Case(kind="call", input=given, expected=holds, assertion=assertion)
