"""What the names in a Python script stand for where they are used.  The script is read, not executed.

A name stands for what the last plain assignment before its use gave it.  One that is bound in a branch or a loop, that
is augmented (``LR *= 10``) or changed in place (``cfg["a"] = 1``), or that a function binds as global, is computed: it
stands for nothing that could be read.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from vpd.config.convert import Unread

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, ast.ClassDef)
BRANCHES = (ast.If, ast.Try, ast.For, ast.AsyncFor, ast.While, ast.Match, ast.ExceptHandler)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
CHANGING = (
    "append",
    "extend",
    "insert",
    "update",
    "pop",
    "popitem",
    "remove",
    "clear",
    "setdefault",
    "sort",
    "reverse",
)
NUMBER_TYPES = ("bfloat16", "float16", "float32", "float64")  # of torch, which a name of it stands for
Position: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A place that gives a name a value; ``value`` is None where it cannot be read, ``end`` is where it is done.

    ``everywhere``: it may be done at any time, as a function does it.
    """

    end: Position
    value: ast.expr | None
    loop: ast.AST | None
    everywhere: bool = False


def called(node: ast.Call) -> str | None:
    """The name of what is called, without what it is an attribute of."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


class Script:
    """A script's tree, with the scope of each node and the bindings of each name."""

    def __init__(self, tree: ast.Module, path: Path):
        self.tree, self.path = tree, path
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.imported = _imported(tree)

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes that a node stands in, the nearest first."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def scope(self, node: ast.AST) -> ast.AST:
        """The function or class that a node stands in, or the script."""
        return next((one for one in self.above(node) if isinstance(one, SCOPES)), self.tree)

    def is_certain(self, node: ast.AST) -> bool:
        """Whether what runs the node's function runs the node, once."""
        for one in self.above(node):
            if isinstance(one, (*FUNCTIONS, ast.Lambda)):
                return True
            if isinstance(one, BRANCHES) and not _is_main(one):
                return False
        return True

    def value(self, name: ast.Name) -> ast.expr | None:
        """The expression that a name stands for; None where it is computed, an argument, or unknown."""
        binding = self._binding(name)
        return binding.value if binding else None

    def is_function(self, name: ast.Name) -> bool:
        """Whether a name is a function at the top of the script, which a file can be asked for by its name."""
        local = self.scope(name)
        if any((scope, name.id) in self._bindings for scope in (local, *self.above(local)) if scope is not self.tree):
            return False
        return any(isinstance(one, FUNCTIONS) and one.name == name.id for one in self.tree.body)

    def _binding(self, name: ast.Name) -> Binding | None:
        scope = own = self.scope(name)
        while (scope, name.id) not in self._bindings or (scope is not own and isinstance(scope, ast.ClassDef)):
            if scope is self.tree:
                return None
            scope = self.scope(scope)
        bindings = self._bindings[scope, name.id]
        if any(binding.everywhere for binding in bindings):
            return None
        if scope is not own:
            return bindings[0] if len(bindings) == 1 else None
        loops = {one for one in self.above(name) if isinstance(one, LOOPS)}
        if any(binding.loop in loops for binding in bindings):
            return None
        before = [binding for binding in bindings if binding.end <= (name.lineno, name.col_offset)]
        return max(before, key=lambda binding: binding.end, default=None)

    @cached_property
    def _bindings(self) -> Mapping[tuple[ast.AST, str], list[Binding]]:
        found: dict[tuple[ast.AST, str], list[Binding]] = {}
        for node in ast.walk(self.tree):
            for scope, name, value in self._bound(node):
                loop = next((one for one in self.above(node) if isinstance(one, LOOPS)), None)
                read = value if self.is_certain(node) else None
                found.setdefault((scope, name), []).append(Binding(end=_end(node), value=read, loop=loop))
                if isinstance(node, (ast.Global, ast.Subscript, ast.Call)) and scope is not self.tree:
                    changed = Binding(end=_end(node), value=None, loop=None, everywhere=True)
                    found.setdefault((self.tree, name), []).append(changed)
        return found

    def _bound(self, node: ast.AST) -> Iterator[tuple[ast.AST, str, ast.expr | None]]:
        """(scope, name, value) of what a node binds or changes; a value only of a plain assignment."""
        scope = self.scope(node)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield scope, target.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield scope, node.target.id, node.value
        elif isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if not self._is_plain(node):
                yield scope, node.id, None
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if isinstance(node.value, ast.Name):
                yield scope, node.value.id, None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            if isinstance(node.func.value, ast.Name):
                yield scope, node.func.value.id, None
        elif isinstance(node, ast.Global):
            yield from ((scope, name, None) for name in node.names)
        elif isinstance(node, ast.arg):
            yield self.scope(node), node.arg, None
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield scope, node.name, None

    def _is_plain(self, name: ast.Name) -> bool:
        parent = self.parents[name]
        return isinstance(parent, ast.Assign) or (isinstance(parent, ast.AnnAssign) and parent.target is name)

    def literal(self, node: ast.expr) -> Any:
        """A literal, a name that the script gives one, or a function of the script as ``script.py:function``."""
        if isinstance(node, ast.List):
            return self._whole([self.literal(entry) for entry in node.elts], node)
        if isinstance(node, ast.Dict) or (isinstance(node, ast.Call) and called(node) == "dict"):
            pairs = self.pairs(node)
            whole = pairs is not None and not any(isinstance(one, Unread) for one in pairs.values())
            return pairs if whole else Unread(ast.unparse(node))
        if isinstance(node, ast.Name):
            if self.is_function(node):
                return f"{self.path}:{node.id}"
            value = self.value(node)
            return Unread(node.id) if value is None else self._of_name(node, self.literal(value))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr if node.attr in NUMBER_TYPES else Unread(ast.unparse(node))
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            return Unread(ast.unparse(node))

    def _of_name(self, node: ast.Name, value: Any) -> Any:
        return Unread(node.id) if isinstance(value, Unread) else value

    def pairs(self, node: ast.expr) -> dict[str, Any] | None:
        """The keys and values of a dict literal, of ``dict(a=1)``, or of a name of one; None for anything else."""
        if isinstance(node, ast.Name):
            value = self.value(node)
            return None if value is None else self.pairs(value)
        if isinstance(node, ast.Dict):
            found = [(key, value) for key, value in zip(node.keys, node.values, strict=True)]
            if all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key, _ in found):
                return {key.value: self.literal(value) for key, value in found}  # type: ignore[union-attr]
        if not isinstance(node, ast.Call) or called(node) != "dict" or node.args:
            return None
        words = {word.arg: self.literal(word.value) for word in node.keywords}
        return None if None in words else {str(key): value for key, value in words.items()}

    def functions(self, node: ast.expr) -> Any:
        """Reward functions: those of the script itself, and those that it imports, as ``module:function``."""
        if isinstance(node, (ast.List, ast.Tuple)):
            return self._whole([self.functions(entry) for entry in node.elts], node)
        if isinstance(node, ast.Name) and not self.is_function(node):
            value = self.value(node)
            if value is not None:
                return self._of_name(node, self.functions(value))
            place = self.imported.get(node.id, "")
            return place if ":" in place else Unread(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.imported:
            return f"{self.imported[node.value.id].replace(':', '.')}:{node.attr}"
        return self.literal(node)

    @staticmethod
    def _whole(entries: list[Any], node: ast.expr) -> Any:
        """A list, unless one of its entries cannot be read."""
        return Unread(ast.unparse(node)) if any(isinstance(entry, Unread) for entry in entries) else entries


def _imported(tree: ast.Module) -> dict[str, str]:
    """What is imported at the top of a script, ``module:name``; of a whole module its name."""
    found: dict[str, str] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            found |= {one.asname or one.name: f"{statement.module}:{one.name}" for one in statement.names}
        elif isinstance(statement, ast.Import):
            found |= {one.asname: one.name for one in statement.names if one.asname}
            found |= {one.name: one.name for one in statement.names if not one.asname and "." not in one.name}
    return found


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _end(node: ast.AST) -> Position:
    return (getattr(node, "end_lineno", None) or 0, getattr(node, "end_col_offset", None) or 0)
