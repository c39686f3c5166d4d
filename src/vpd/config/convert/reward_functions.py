"""Reward functions of a script that trains when it is loaded, as a file of their own with all that they need.

The script is read, not executed.  A function needs the names that it mentions and that statements at the top of the
script bind or change: imports, constants, other functions, and what these need in turn.
"""

import ast
import re
import symtable
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.config.convert.script import MAKING
from vpd.config.convert.script_names import called

HARMLESS = ("print",)  # calls that change nothing of what they are given
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
#: calls that load a model, train, or read the words of the command line
ACTING = re.compile(r"Trainer$|_pretrained$|^parse_(known_)?args|^Accelerator$")
FIXED = (*DEFINITIONS, *IMPORTS)  # what these bind is not changed by a statement that mentions it


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """``text``: the file, None where the functions need what only running the script makes: ``missing``."""

    functions: Sequence[str]
    text: str | None
    missing: Sequence[str]


def extracted(path: Path, settings: Mapping[str, Any]) -> Extracted | None:
    """The reward functions that stand in a script which does more than define things; None where there are none."""
    functions = [place.partition(":")[2] for place in _places(settings) if place.startswith(f"{path}:")]
    if not functions:
        return None
    source = path.read_text()
    tree = ast.parse(source)
    return _extract(source, tree, functions, path.name) if any(map(acts, tree.body)) else None


def moved(settings: Mapping[str, Any], old: Path, new: Path) -> Any:
    """The setting ``env.reward`` with the functions of one file taken from another."""

    def of(entry: Any) -> Any:
        if isinstance(entry, list):
            return [of(one) for one in entry]
        if isinstance(entry, Mapping):
            return {**entry, "function": of(entry["function"])} if "function" in entry else entry
        return f"{new}{str(entry).removeprefix(str(old))}" if str(entry).startswith(f"{old}:") else entry

    return of(settings["env"]["reward"])


def _places(settings: Mapping[str, Any]) -> list[str]:
    reward = settings.get("env", {}).get("reward")
    entries = reward if isinstance(reward, list) else [reward]
    return [str(entry.get("function") if isinstance(entry, Mapping) else entry) for entry in entries]


def _extract(source: str, tree: ast.Module, functions: Sequence[str], name: str) -> Extracted:
    """The statements that the functions need, in the script's order; those of ``__future__`` first."""
    needed, chosen, missing = set(functions), set[int](), set[str]()
    waiting = True
    while waiting:
        waiting = False
        for number, statement in enumerate(tree.body):
            names = needed & _bound(statement) or needed & _changed(statement, tree)
            if number in chosen or not (names or _is_always(statement)):
                continue
            if acts(statement):
                missing |= names
                continue
            chosen.add(number)
            needed |= _mentioned(_segment(source, statement))
            waiting = True
    if missing:
        return Extracted(functions=functions, text=None, missing=sorted(missing))
    head = f'"""Reward functions of {name}, with what they need of it; vpd convert took them out."""'
    text, before = f"{head}\n", None
    for number in sorted(chosen):
        statement = tree.body[number]
        text += (
            "\n" * _blank_lines(before, statement) + _segment(source, statement, _needed_of(statement, needed)) + "\n"
        )
        before = statement
    return Extracted(functions=functions, text=text, missing=[])


def _blank_lines(before: ast.stmt | None, statement: ast.stmt) -> int:
    if isinstance(before, DEFINITIONS) or isinstance(statement, DEFINITIONS):
        return 2
    return int(before is None or isinstance(before, IMPORTS) != isinstance(statement, IMPORTS))


def acts(statement: ast.AST) -> bool:
    """Whether a statement at the top of a script makes, loads or runs something, beside what it defines."""
    if isinstance(statement, FIXED):
        return False
    if _is_main(statement):
        return False
    if isinstance(statement, (ast.If, ast.Try, ast.ExceptHandler)):
        return any(
            acts(part) for part in ast.iter_child_nodes(statement) if isinstance(part, (ast.stmt, ast.ExceptHandler))
        )
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        calls = [called(node) or "" for node in ast.walk(statement) if isinstance(node, ast.Call)]
        return any(name in MAKING or ACTING.search(name) for name in calls)
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not is_text and not isinstance(statement, ast.Pass)


def _bound(statement: ast.stmt) -> set[str]:
    """The names at the top of the script that a statement gives a value, or a part of one (``table["a"] = 1``)."""
    if _is_main(statement):
        return set()
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    if isinstance(statement, IMPORTS):
        return {_alias(one) for one in statement.names}
    found = {node.id for node in _outside(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in _outside(statement):
        if isinstance(node, FIXED):
            found |= _bound(node)
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found |= {root.id for root in ast.walk(node.value) if isinstance(root, ast.Name)}
    return found


def _changed(statement: ast.stmt, tree: ast.Module) -> set[str]:
    """The variables that a statement which binds nothing may change: those that it mentions (``words.append(x)``)."""
    if not isinstance(statement, (ast.Expr, ast.For, ast.While, ast.With, ast.Delete)):
        return set()
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        if isinstance(function, ast.Name) and function.id in HARMLESS:
            return set()
    fixed = {name for one in tree.body if isinstance(one, FIXED) for name in _bound(one)}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - fixed


def _mentioned(segment: str) -> set[str]:
    """The names that a statement reads from the top of its script, its own local ones left out."""
    found: set[str] = set()
    waiting = [symtable.symtable(segment, "script", "exec")]
    while waiting:
        table = waiting.pop()
        is_top = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if (s.is_referenced() if is_top else s.is_global())}
        waiting += table.get_children()
    return found


def _needed_of(statement: ast.stmt, needed: set[str]) -> set[str] | None:
    """Of an import of several names those that are needed; None for any other statement."""
    if not isinstance(statement, IMPORTS) or _is_always(statement):
        return None
    return {_alias(one) for one in statement.names} & needed


def _segment(source: str, statement: ast.stmt, names: set[str] | None = None) -> str:
    """A statement as it is written, with its decorators; an import with these names alone."""
    if names is not None and isinstance(statement, IMPORTS):
        kept = [one for one in statement.names if _alias(one) in names]
        if isinstance(statement, ast.ImportFrom):
            return ast.unparse(ast.ImportFrom(statement.module, kept, statement.level))
        return ast.unparse(ast.Import(kept))
    if decorators := getattr(statement, "decorator_list", []):
        return "\n".join(source.splitlines()[decorators[0].lineno - 1 : statement.end_lineno])
    return str(ast.get_source_segment(source, statement))


def _outside(statement: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement that are not inside a function or class of it."""
    yield statement
    for node in ast.iter_child_nodes(statement):
        if isinstance(node, DEFINITIONS):
            yield node
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            yield from _outside(node)


def _alias(name: ast.alias) -> str:
    return name.asname or name.name.partition(".")[0]


def _is_main(statement: ast.AST) -> bool:
    """Whether it is run only where the script itself is run."""
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _is_always(statement: ast.stmt) -> bool:
    """Whether any code of the script may need it: what is imported from ``__future__``, or as a whole (``*``)."""
    return isinstance(statement, ast.ImportFrom) and (
        statement.module == "__future__" or any(one.name == "*" for one in statement.names)
    )
