"""A hash of the source files that determine a run's results; a run is made again only if one of them changes."""

import ast
import functools
import hashlib
from pathlib import Path

import vpd
from vpd.config.sections import ALGORITHMS, ENVS

ROOT = Path(vpd.__file__).parent
COMMON = (
    "vpd.engines.torch_engine",
    "vpd.evaluation",
    "vpd.feedback.critique",
    "vpd.feedback.judge",
    "vpd.learners.accelerate_learner",
    "vpd.loop",
)
EXCLUDED = ("vpd.errors",)  # does not influence results


@functools.cache
def code_version(algorithm: str, env: str) -> str:
    """A hash (12 characters) of the sources of an algorithm, an environment, and of everything that runs them."""
    return _hash_of(*COMMON, ENVS[env].partition(":")[0], ALGORITHMS[algorithm].partition(":")[0])


@functools.cache
def maker_version() -> str:
    """A hash (12 characters) of the sources of what makes a run, measures it before and after, and saves it."""
    return _hash_of("vpd.lab.reproduce.run")


def _hash_of(*modules: str) -> str:
    digest = hashlib.sha256()
    for module in sorted(sources(*modules)):
        digest.update(_file(module).read_bytes())
    return digest.hexdigest()[:12]


def sources(*modules: str) -> set[str]:
    """These modules of vpd and all modules of vpd that they import, directly or not."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module in EXCLUDED:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_file(module).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vpd"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [name if _exists(name) else str(node.module) for name in names]
    return found - {"vpd"}


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _exists(module: str) -> bool:
    return _file(module).is_file()
