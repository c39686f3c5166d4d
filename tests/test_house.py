"""Imports only go down, and the four rules about who may touch what."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "src" / "vpd"
FLOORS = {
    "__main__": 10, "cli": 9, "commands": 8, "api": 7, "lab": 7, "recipes": 6, "config": 6, "loop": 5,
    "estimate": 4, "evaluation": 4, "solving": 4, "monitor": 4, "report": 4, "run_folder": 4,
    "algorithms": 3, "feedback": 3, "rollout": 3, "overlap": 3, "learners": 2, "engines": 2,
    "envs": 1, "losses": 1, "model": 1, "policy": 1, "prompts": 1, "quoting": 1, "ranks": 1, "sandbox": 1, "bundled": 1,
    "settings": 0, "types": 0, "errors": 0, "control_tokens": 0, "tool_messages": 0, "printable": 0,
    "scalars": 0,
}  # fmt: skip
SAME_FLOOR = {
    ("recipes", "config"),
    ("rollout", "feedback"),
    ("overlap", "rollout"),
    ("model", "policy"),
    ("report", "monitor"),
    ("report", "run_folder"),
    ("monitor", "run_folder"),
    ("envs", "sandbox"),
    ("model", "losses"),
    ("settings", "errors"),
    ("types", "errors"),
    ("control_tokens", "errors"),
    ("tool_messages", "errors"),
    ("tool_messages", "types"),
    ("errors", "printable"),
    ("types", "printable"),
    ("types", "scalars"),
    ("scalars", "errors"),
    ("scalars", "printable"),
    ("settings", "printable"),
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def place(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    here = place(path)
    for name in imports(path):
        if not name.startswith("vpd."):
            continue
        there = name.split(".")[1]
        allowed = here == there or FLOORS[there] < FLOORS[here] or (here, there) in SAME_FLOOR
        assert allowed, f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"


def of(folder: str) -> set[str]:
    return {name for path in FILES if place(path) == folder for name in imports(path)}


def test_nothing_heavy_on_the_ground_floor() -> None:
    for folder in ("types", "errors", "envs", "sandbox", "prompts"):
        assert not [
            name for name in of(folder) if name.split(".")[0] in ("torch", "transformers", "numpy", "accelerate")
        ]


def test_losses_import_only_torch() -> None:
    assert {name.split(".")[0] for name in of("losses")} == {"math", "torch", "typing"}


def test_the_loop_imports_no_method() -> None:
    assert {n for n in of("loop") if n.startswith("vpd.algorithms")} == {"vpd.algorithms.Algorithm"}


def test_algorithms_import_no_environment_engine_or_optimiser() -> None:
    banned = ("vpd.envs", "vpd.engines", "torch.optim", "accelerate", "transformers")
    assert not [name for name in of("algorithms") if name.startswith(banned)]


def test_only_learners_differentiate() -> None:
    callers = {
        place(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "backward"
    }
    assert callers == {
        "learners",
        "lab",
        "estimate",
    }  # estimate: tensors without data; lab/tiny.py: the warm-up that makes the shipped base
    assert [p.name for p in FILES if place(p) == "lab" and ".backward(" in p.read_text()] == ["tiny.py"]


#: packages that are installed under another name than they are imported by
INSTALLED_AS = {"mlflow": "mlflow-skinny", "yaml": "pyyaml"}


def packages(nodes: list[ast.stmt]) -> set[str]:
    """Other packages that the statements import, by the names that they are installed by."""
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {module.partition(".")[0] for module in modules} - {*sys.stdlib_module_names, "vpd"}
    return {INSTALLED_AS.get(name, name).replace("_", "-") for name in names}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", line)[0].replace("_", "-").lower() for line in requirements}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_imported_is_declared(path: Path) -> None:
    """At the top of a file only what every installation has; what an extra brings, where it is used."""
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    tree = ast.parse(path.read_text())
    everywhere = declared(project["dependencies"])
    extras = {
        name for key, lines in project["optional-dependencies"].items() if key != "dev" for name in declared(lines)
    }
    assert not packages(tree.body) - everywhere
    assert not packages([node for node in ast.walk(tree) if isinstance(node, ast.stmt)]) - everywhere - extras
