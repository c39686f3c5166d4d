"""What a run left behind, and how it differs from what another left: all but times."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from torture.runs import digest, is_users

TIMES = ("time/", "memory/")


def left_by(run: Path) -> dict[str, Any]:
    """Everything in a run folder that a run is for, by name; the user's files are not looked at."""
    found: dict[str, Any] = {}
    if not run.is_dir():
        return found
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if is_users(name) or name == ".lock" or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            found[name] = _content(path)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            found[name] = f"unreadable: {type(error).__name__}"
    return found


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """A line for each file that is missing, too many, or of other content."""
    lines = []
    for name in sorted(expected.keys() | got.keys()):
        if name not in got:
            lines.append(f"{name} is missing")
        elif name not in expected:
            lines.append(f"{name} is left over")
        elif expected[name] != got[name]:
            lines.append(f"{name} differs{_where(expected[name], got[name])}")
    return lines


def _content(path: Path) -> Any:
    if path.is_symlink() or not path.is_file():
        return f"special: {stat.S_IFMT(path.lstat().st_mode):o}"
    if path.name == "metrics.jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "trainer.json":
        data = _untimed(json.loads(path.read_text()))
        return {key: value for key, value in data.items() if key not in ("files", "sha256")}  # hashes, also of times
    if path.name == "adapter_config.json":  # peft writes a set: its order is that of the process
        data = json.loads(path.read_text())
        return {**data, "target_modules": sorted(data["target_modules"])}
    if path.name == "run.json":
        data = json.loads(path.read_text())
        return {"phase": data["phase"], "step": data["step"], "settings": _unresumed(data["settings"])}
    if path.name == "config.yaml":
        return _unresumed(yaml.safe_load(path.read_text()))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return digest(path)


def _untimed(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _untimed(value) for key, value in data.items() if not str(key).startswith(TIMES)}
    return [_untimed(value) for value in data] if isinstance(data, list) else data


def _unresumed(settings: Any) -> Any:
    return {**settings, "run": {key: value for key, value in settings["run"].items() if key != "resume"}}


def _where(expected: Any, got: Any) -> str:
    if isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            return f" ({len(got)} entries, not {len(expected)})"
        return f" from entry {next(n for n, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])}"
    return f" ({got})" if isinstance(got, str) and got.startswith("unreadable") else ""


def raw(folder: Path) -> dict[str, str]:
    """Every path under a folder with its kind and content, the lock's apart."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".lock":
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = digest(path)
        else:
            found[name] = f"{stat.S_IFMT(path.lstat().st_mode):o}"
    return found
