"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "src"
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text()
]


def test_every_type_of_the_loop_has_an_example() -> None:
    types = importlib.import_module("vpd.types")
    own = [
        t
        for t in vars(types).values()
        if isinstance(t, type) and t.__module__ == "vpd.types" and t.__name__ != "Message"
    ]
    assert len(own) >= 10 and all(">>> " in (t.__doc__ or "") for t in own)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
