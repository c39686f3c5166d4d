"""Whether a run may use a folder that is not empty: only to continue the run in it, under the same settings."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vpd.config import Config
from vpd.config.sections import Custom, Passed
from vpd.errors import StorageError
from vpd.run_folder import checkpoint
from vpd.run_folder import state as run_state
from vpd.run_folder.state import RunState

log = logging.getLogger("vpd")


def settings_of(config: Config) -> dict[str, Any]:
    """A config as the plain data that ``run.json`` keeps."""
    data: dict[str, Any] = json.loads(json.dumps(config.as_dict(), default=str))
    return data


def check_folder(output: Path, config: Config) -> RunState | None:
    """The state of the run in this folder, None if there is none.

    Raises StorageError: there is a run and ``run.resume`` is false, or the run had other settings.
    """
    metrics = output / "metrics.jsonl"
    if not checkpoint.checkpoints(output) and not (metrics.is_file() and metrics.stat().st_size > 0):
        return None
    if not config.run.resume:
        raise StorageError(
            f"{output} already holds a run",
            do="Continue it with --run.resume true, or choose another --run.output_dir.",
        )
    past = run_state.read(output) or _older(output)
    if past is None:
        log.warning("%s has neither run.json nor config.yaml: its settings are not compared with these", output)
        return None
    _compare(past, config, output)
    return past


def start_point(output: Path, past: RunState | None) -> Path | None:
    """The checkpoint to continue from, None: the start.  Raises StorageError for a finished run without one."""
    folder, faults = checkpoint.newest_good(output)
    for fault in faults:
        log.warning("passed over a damaged checkpoint: %s", fault)
    if folder is not None:
        log.info("continuing from %s", folder)
    elif past is not None and past.phase == "done":
        raise StorageError(
            f"the run in {output} is finished and has no checkpoint to continue from",
            got=f"{len(faults)} damaged ones" if faults else "none: run.save_steps was 0, or all were removed",
            do="Start in another run.output_dir with its model/ as model.name_or_path, and set run.save_steps there.",
        )
    else:
        log.info("no checkpoint in %s: starting from step 0", output)
    return folder


def _compare(past: RunState, config: Config, output: Path) -> None:
    """Refuse the changes that a continued run may not make, and log the others."""
    before = {section: _completed(value, config, section) for section, value in past.settings.items()}
    resolved = settings_of(config)
    for section in ("prompts", "engine"):
        before.setdefault(section, resolved[section])  # older versions left it to the model's folder, or had no choice
    found = run_state.changes(before, resolved)
    run_state.refuse_changes(found, output)
    allowed = [change for change in found if change.key != "run.resume"]
    if allowed:
        log.info("changed for this run: %s", "; ".join(map(str, allowed)))


def _completed(section: Any, config: Config, name: str) -> Any:
    """A section as an older version wrote it, with today's keys: a new key at its default, a removed one left out."""
    if name not in config.as_dict():
        return section
    now = getattr(config, name)
    if name == "feedback":
        names = [source.name for source in now]
        same = isinstance(section, list) and [entry.get("name") for entry in section] == names
        return [_with_defaults(a, b) for a, b in zip(section, now, strict=True)] if same else section
    return _with_defaults(section, now)


def _with_defaults(section: Any, now: Any) -> Any:
    """``section`` with the fields of the settings object ``now``, if it is of that kind; a user's own as it is."""
    own = isinstance(now, (Custom, Passed))
    if own or not isinstance(section, Mapping) or section.get("name") != _name(now):
        return section
    completed: dict[str, Any] = {}
    for field in dataclasses.fields(now):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = section.get(field.name, None if default is dataclasses.MISSING else default)
        inner = getattr(now, field.name)
        completed[field.name] = _with_defaults(value, inner) if dataclasses.is_dataclass(inner) else value
    plain: dict[str, Any] = json.loads(json.dumps(completed, default=str))
    return plain


def _name(settings: Any) -> Any:
    """The name of an environment's, algorithm's or source's settings; None for other sections."""
    return next((getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name == "name"), None)


def _older(output: Path) -> RunState | None:
    """The state of a run of a version without ``run.json``, from its ``config.yaml``; None without one."""
    path = output / "config.yaml"
    if not path.is_file():
        return None
    try:
        settings = json.loads(json.dumps(yaml.safe_load(path.read_text()), default=str))
        lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").is_file() else []
        step = max((json.loads(line)["step"] for line in lines[:-1] or lines), default=0)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise StorageError(
            f"cannot read the settings of the run in {output}", got=" ".join(str(error).split())[:160]
        ) from error
    if not isinstance(settings, dict):
        raise StorageError(f"{path} holds no sections", got=type(settings).__name__)
    return RunState(settings=settings, phase="done" if (output / "model").is_dir() else "training", step=step)
