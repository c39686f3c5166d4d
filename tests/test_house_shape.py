"""The shape of the code: short functions, few parameters, no circles, no inheritance among methods, plain names."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "src" / "vpd"
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
#: words that this project once had for things that have names (docs/glossary.md)
PRIVATE = {
    "cast",
    "told",
    "heard",
    "worn",
    "stems",
    "explain",
    "converse",
    "foreseen",
    "announced",
    "opinion",
    "drill",
    "regime",
    "untold",
    "whoever",
    "who",
    "said",
    "spoke",
    "speaks",
    "listens",
    "weigh",
    "apart",
    "panel",
    "panels",
}
#: peft's own function; the parts of a figure
KNOWN = {"cast_adapter_dtype"}
FIGURES = {ROOT / "report" / "curves.py", ROOT / "lab" / "reproduce" / "pictures.py"}
#: broad handlers where code of others runs: the border around it, and the driver, which runs alone in a sandbox
BROAD = {"envs/user_code.py": 1, "envs/code/driver.py": 1, "overlap.py": 1}  # the last hands it to another thread


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTION):
                yield path, node


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_nine_functions_in_ten_fit_twenty_five_lines() -> None:
    lengths = [lines_of(node) for _, node in functions()]
    assert len(lengths) > 500 and statistics.quantiles(lengths, n=10)[-1] <= 25


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_450_lines_and_no_function_takes_more_than_8_parameters(path: Path) -> None:
    assert path.read_text().count("\n") <= 450
    for node in ast.walk(TREES[path]):
        if isinstance(node, FUNCTION):
            assert len(parameters_of(node)) <= 8, f"{node.name} takes {parameters_of(node)}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Our modules that a module imports when it is loaded."""
    found = set()
    for node in TREES[path].body:
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES and MODULES[name] != path}


def test_no_module_imports_itself_by_way_of_others() -> None:
    reaches = {name: imported(path) for name, path in MODULES.items()}
    for _ in MODULES:
        reaches = {name: near.union(*(reaches[other] for other in near)) for name, near in reaches.items()}
    assert not {name for name, near in reaches.items() if name in near}


def classes_of(path: Path) -> list[ast.ClassDef]:
    return [node for node in TREES[path].body if isinstance(node, ast.ClassDef)]


ALGORITHM_FILES = [path for path in FILES if path.parent.name == "algorithms"]
METHODS = {
    node.name
    for path in ALGORITHM_FILES
    for node in classes_of(path)
    if {"step", "state", "restore"} <= {f.name for f in node.body if isinstance(f, FUNCTION)}
}
SETTINGS = {node.name for path in ALGORITHM_FILES for node in classes_of(path) if node.name.endswith("Settings")}


def last_names(node: ast.AST) -> set[str]:
    """``Name`` and ``module.Name`` in an expression, without the module."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def test_no_method_inherits_from_another() -> None:
    assert {"VPD", "GatedVPD", "Distill", "GRPO", "Hybrid"} <= METHODS
    for path in ALGORITHM_FILES:
        for node in classes_of(path):
            bases = {name for base in node.bases for name in last_names(base)}
            assert not bases & METHODS, f"{node.name} inherits from {bases & METHODS}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_asks_which_method_it_is(path: Path) -> None:
    own = {node.name for node in classes_of(path)}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            assert not (last_names(node.args[1]) & (METHODS | SETTINGS)) - own


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_code_around_the_users_catches_everything(path: Path) -> None:
    broad = [
        node.lineno
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or last_names(node.type) & {"Exception", "BaseException"})
        and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)  # cleans up and raises again
    ]
    assert len(broad) <= BROAD.get(str(path.relative_to(ROOT)), 0), f"broad except in lines {broad}"


def is_command_line(path: Path) -> bool:
    return path.relative_to(ROOT).parts[0] in ("cli.py", "commands")


@pytest.mark.parametrize("path", [p for p in FILES if not is_command_line(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_library_prints_nothing(path: Path) -> None:
    calls = [n.func.id for n in ast.walk(TREES[path]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "print" not in calls


def test_everything_is_shown_through_one_terminal() -> None:
    """What a person sees passes ``for_terminal``: rich's console only as its subclass, print only around it."""
    consoles = {p for p in FILES if "rich.console import Console" in p.read_text() or "rich.print" in p.read_text()}
    assert consoles == {ROOT / "report" / "console.py"}
    for path, node in ((p, n) for p in FILES if is_command_line(p) for n in ast.walk(TREES[p])):
        if isinstance(node, ast.Call) and last_names(node.func) == {"print"}:
            shown = node.args[0]
            safe = isinstance(shown, ast.Call) and last_names(shown.func) == {"for_terminal"}
            assert safe or isinstance(shown, ast.Constant), f"{path} prints in line {node.lineno}"


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_are_not_private_words(path: Path) -> None:
    private = PRIVATE - {"panel", "panels"} if path in FIGURES else PRIVATE
    found = {name for name in identifiers(TREES[path]) if set(name.lower().split("_")) & private}
    assert not found - KNOWN
