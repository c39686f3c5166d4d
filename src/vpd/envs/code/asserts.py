"""Assertions as data: which call is made, and what must hold of its value.

    assert f([2, 1]) == [1, 2]      ->  call f with ([2, 1],); the value must equal [1, 2]
    assert abs(f(3) - 0.5) < 1e-6   ->  call f with (3,); abs(value - 0.5) < 1e-6 must hold

An assertion that stands in the process of the program under test can be faked by that program.  As data it is checked
elsewhere, on the value alone.  Only a part of Python is understood: literals, a few functions and operators,
assignments and ``for`` loops, which is what HumanEval, MBPP and their EvalPlus forms are made of.  Nothing is executed;
what is not understood raises :class:`NotData`, which says what it was.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VALUE = "_value_"
MOST = 1_000_000  # items of one value
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (abs, all, any, bool, dict, enumerate, float, frozenset, int, len, list, max, min)},
    **{f.__name__: f for f in (reversed, round, set, sorted, str, sum, tuple, zip)},
    "math.isclose": math.isclose, "math.sqrt": math.sqrt, "math.fabs": math.fabs, "isclose": math.isclose,
}  # fmt: skip
TYPES = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set)}
CONSTANTS = {"math.pi": math.pi, "math.e": math.e, "math.inf": math.inf, "math.nan": math.nan} | {
    "inf": math.inf, "nan": math.nan,
}  # fmt: skip
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


class NotData(Exception):
    """An assertion that cannot be taken out of the program; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assertion:
    """``arguments`` of the call and the condition on its value.

    The condition is equality with ``expected`` or with one of ``also`` (numbers within ``tolerance``; ``loose``: a
    tuple may stand for a list) or, where ``condition`` is not None, that expression.
    """

    arguments: tuple[Any, ...]
    expected: Any = None
    tolerance: float = 0.0
    loose: bool = False
    also: tuple[Any, ...] = ()
    condition: ast.expr | None = None
    names: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def holds(self, value: Any) -> bool:
        """Whether a value meets the condition; an expression that fails on it (a wrong type, say) does not hold."""
        try:
            if self.condition is None:
                right = (self.expected, *self.also)
                return any(equal(one, value, self.tolerance, loose=self.loose) for one in right)
            return bool(evaluate(self.condition, {**self.names, VALUE: value}))
        except (NotData, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError):
            return False


def equal(a: Any, b: Any, tolerance: float = 0.0, *, loose: bool = False) -> bool:
    """Python's equality; ``tolerance``, relative or absolute, is for floats; ``loose``: a tuple equals a list."""
    if loose:
        a, b = (list(x) if isinstance(x, tuple) else x for x in (a, b))
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(equal(x, y, tolerance, loose=loose) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key], tolerance, loose=loose) for key in a)
    if a == b or not tolerance or not any(isinstance(x, float) for x in (a, b)):
        return bool(a == b)
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) or (a != a and b != b)
    except (TypeError, OverflowError):  # the other one is no number, or an integer that no float can be
        return False


def assertions(source: str, function: str) -> list[Assertion]:
    """The assertions of a test: plain ``assert`` lines, or a function ``check(candidate)``.

    Raises NotData for what cannot be understood, SyntaxError for what is no Python.
    """
    body = ast.parse(source).body
    checks = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    names: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.Assign) and checks:
            _assign_if_data(node, names)
    if checks:
        if len(checks[0].args.args) != 1:
            raise NotData("check takes another number of arguments than one")
        function, body = checks[0].args.args[0].arg, checks[0].body
    found = list(_walk(body, names, function))
    if not found:
        raise NotData("it holds no assertion about a call")
    return found


def _walk(body: Sequence[ast.stmt], names: dict[str, Any], function: str) -> Iterator[Assertion]:
    for node in body:
        if isinstance(node, ast.Assert):
            if not (isinstance(node.test, ast.Constant) and node.test.value):
                yield _assertion(node.test, names, function)
        elif isinstance(node, ast.Assign) and not _calls(node, function):
            value = evaluate(node.value, names)
            for target in node.targets:
                _bind(target, value, names)
        elif isinstance(node, ast.For) and not node.orelse:
            for item in evaluate(node.iter, names):
                _bind(node.target, item, names)
                yield from _walk(node.body, names, function)
        elif isinstance(node, ast.Expr) and _is_helper(node.value):
            yield _compared(node.value, names, function)  # type: ignore[arg-type]
        elif not isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass)) and not _has_no_effect(node):
            raise NotData(ast.unparse(node)[:80])


def _has_no_effect(node: ast.stmt) -> bool:
    """A docstring, a print, a name that stands alone."""
    if not isinstance(node, ast.Expr):
        return False
    name = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(node.value, (ast.Constant, ast.Name)) or (isinstance(name, ast.Name) and name.id == "print")


def _is_helper(node: ast.expr) -> bool:
    """EvalPlus' ``assertion(out, exp, atol)``: equal, or floats within the tolerance."""
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "assertion"
    return named and len(node.args) == 3  # type: ignore[attr-defined]


def _compared(node: ast.Call, names: Mapping[str, Any], function: str) -> Assertion:
    call, expected, tolerance = node.args
    if not _is_call(call, function):
        raise NotData(ast.unparse(node)[:80])
    return Assertion(
        arguments=_arguments(call, names),
        expected=evaluate(expected, names),
        tolerance=max(float(evaluate(tolerance, names)), 1e-6),
        source=ast.unparse(node),
    )


def _assertion(test: ast.expr, names: Mapping[str, Any], function: str) -> Assertion:
    calls = _calls(test, function)
    if len(calls) != 1:
        raise NotData(f"{len(calls)} calls in {ast.unparse(test)[:80]}")
    arguments, source = _arguments(calls[0], names), ast.unparse(test)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        sides = [test.left, test.comparators[0]]
        for one, other in (sides, sides[::-1]):
            if one is calls[0]:
                return Assertion(arguments=arguments, expected=evaluate(other, names), source=source)
    condition = _Replaced(calls[0]).visit(test)
    _understood(condition, names)
    return Assertion(arguments=arguments, condition=condition, names=dict(names), source=source)


class _Replaced(ast.NodeTransformer):
    """The expression with the call replaced by its value."""

    def __init__(self, call: ast.Call):
        self.call = call

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return ast.Name(id=VALUE) if node is self.call else self.generic_visit(node)


def _calls(node: ast.AST, function: str) -> list[ast.Call]:
    return [call for call in ast.walk(node) if _is_call(call, function)]  # type: ignore[misc]


def _is_call(node: ast.AST, function: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function


def _arguments(call: ast.expr, names: Mapping[str, Any]) -> tuple[Any, ...]:
    assert isinstance(call, ast.Call)
    if call.keywords:
        raise NotData(ast.unparse(call)[:80])
    return tuple(evaluate(ast.Tuple(elts=call.args), names))


def _assign_if_data(node: ast.Assign, names: dict[str, Any]) -> None:
    try:
        value = evaluate(node.value, names)
        for target in node.targets:
            _bind(target, value, names)
    except NotData:
        return  # a name that no assertion may use


def _bind(target: ast.expr, value: Any, names: dict[str, Any]) -> None:
    if isinstance(target, ast.Name):
        names[target.id] = value
    elif isinstance(target, (ast.Tuple, ast.List)) and len(target.elts) == len(value):
        for part, item in zip(target.elts, value, strict=True):
            _bind(part, item, names)
    else:
        raise NotData(ast.unparse(target)[:80])


def _understood(node: ast.expr, names: Mapping[str, Any]) -> None:
    """Raises NotData where :func:`evaluate` would, whatever the value is."""
    known = (ast.Call, ast.Constant, ast.Name, ast.Attribute, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp)
    more = (ast.BinOp, ast.Compare, ast.BoolOp, ast.Subscript, ast.Starred, ast.keyword, ast.expr_context)
    spoken = {*names, VALUE, "math", "isinstance", "range", *TYPES, *FUNCTIONS, *CONSTANTS}
    for part in ast.walk(node):
        bad = isinstance(part, ast.Call) and _dotted(part.func) not in (*FUNCTIONS, "isinstance", "range")
        bad = bad or (isinstance(part, (ast.Name, ast.Attribute)) and _dotted(part) not in spoken)
        if bad or not isinstance(part, (*known, *more, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)):
            raise NotData(ast.unparse(part)[:80])


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression, by walking it.  Raises NotData for what is not understood."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = _dotted(node)
        if name not in names and name not in CONSTANTS:
            raise NotData(f"the name {name or ast.unparse(node)[:80]}")
        return names[name] if name in names else CONSTANTS[name]
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        items: list[Any] = []
        for part in node.elts:
            if isinstance(part, ast.Starred):
                items += evaluate(part.value, names)
            else:
                items.append(evaluate(part, names))
        return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](items)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [evaluate(key, names) for key in node.keys if key is not None]
        return dict(zip(keys, (evaluate(value, names) for value in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.operand, names))
    if isinstance(node, ast.BinOp):
        return _combined(node, evaluate(node.left, names), evaluate(node.right, names))
    if isinstance(node, ast.BoolOp):
        values = [evaluate(part, names) for part in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare):
        sides = [evaluate(part, names) for part in (node.left, *node.comparators)]
        return all(OPERATORS[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
    if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice):
        return evaluate(node.value, names)[evaluate(node.slice, names)]
    if isinstance(node, ast.Call):
        return _called(node, names)
    raise NotData(ast.unparse(node)[:80])


def _combined(node: ast.BinOp, left: Any, right: Any) -> Any:
    if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        if abs(left) <= MOST and 0 <= right <= 64:
            return left**right
        raise NotData(ast.unparse(node)[:80])
    if type(node.op) not in OPERATORS or (isinstance(node.op, ast.Mod) and isinstance(left, (str, bytes))):
        raise NotData(ast.unparse(node)[:80])
    if isinstance(node.op, ast.Mult):
        for items, count in ((left, right), (right, left)):
            if isinstance(items, (str, bytes, list, tuple)) and isinstance(count, int) and len(items) * count > MOST:
                raise NotData(ast.unparse(node)[:80])
    return OPERATORS[type(node.op)](left, right)


def _called(node: ast.Call, names: Mapping[str, Any]) -> Any:
    name = _dotted(node.func)
    if name == "isinstance" and len(node.args) == 2 and _dotted(node.args[1]) in TYPES:
        return isinstance(evaluate(node.args[0], names), TYPES[_dotted(node.args[1])])
    if name == "range" and not node.keywords:
        numbers = range(*evaluate(ast.Tuple(elts=node.args), names))
        if len(numbers) > MOST:
            raise NotData(ast.unparse(node)[:80])
        return list(numbers)
    if name not in FUNCTIONS or any(keyword.arg is None for keyword in node.keywords):
        raise NotData(ast.unparse(node)[:80])
    arguments = evaluate(ast.Tuple(elts=node.args), names)
    keywords = {str(keyword.arg): evaluate(keyword.value, names) for keyword in node.keywords}
    value = FUNCTIONS[name](*arguments, **keywords)
    return list(value) if name in ("enumerate", "reversed", "zip") else value
