"""Whether a run may use a folder that is not empty: only to continue the run in it, under the same settings."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpd.bundled import BUNDLED
from vpd.config import SECTIONS, Config
from vpd.config.passed import Passed
from vpd.config.sections import Custom
from vpd.errors import StorageError
from vpd.run_folder import checkpoint
from vpd.run_folder import state as run_state
from vpd.run_folder.contents import content_hash
from vpd.run_folder.state import Change, RunState
from vpd.settings import Settings, declarations

log = logging.getLogger("vpd")

#: what a run writes besides checkpoints
OUTPUTS = ("config.yaml", "metrics.jsonl", "alarms.jsonl", "rollouts", "tokens", "model", "adapter")


def settings_of(config: Config) -> dict[str, Any]:
    """A config as the plain data that ``run.json`` keeps."""
    data: dict[str, Any] = json.loads(json.dumps(config.as_dict(), default=str))
    return data


def contents_of(config: Config) -> dict[str, str]:
    """A hash of each file and folder that a setting names, by the setting's key.  Raises StorageError."""
    found: dict[str, str] = {}
    for key, name in _named_files(config):
        if name not in BUNDLED and Path(name).exists():
            try:
                found[key] = content_hash(Path(name))
            except OSError as error:
                raise StorageError(f"{key}: cannot read {name}", got=error.strerror) from error
    return found


def check_folder(output: Path, config: Config, contents: Mapping[str, str]) -> RunState | None:
    """The state of the run in this folder, None if there is none.

    Raises StorageError: there is a run and ``run.resume`` is false, the run had other settings or read other
    ``contents``, or there are files of the user's where a run would write.
    """
    metrics, past = output / "metrics.jsonl", run_state.read(output)
    begun = past is not None and past.has_begun
    if not begun and not checkpoint.checkpoints(output) and not (metrics.is_file() and metrics.stat().st_size > 0):
        if past is None:
            _check_free(output)
        return None
    if not config.run.resume:
        raise run_state.another_run(output)
    if past is None:
        log.warning("%s has no run.json: its settings are not compared with these", output)
        return None
    run_state.refuse_changes(_changes(past, config, contents), output)
    return past


def log_changes(past: RunState, config: Config, contents: Mapping[str, str]) -> None:
    """Log the settings that a continued run changes."""
    found = [change for change in _changes(past, config, contents) if change.key != "run.resume"]
    if found:
        log.info("changed for this run: %s", "; ".join(map(str, found)))
    if config.optim.decays and any(change.key == "run.max_steps" for change in found):
        log.warning(
            "optim.lr_scheduler_type %s spreads over all of run.max_steps: the learning rate goes on where it is after"
            " as many steps of %d, not where it was",
            *(config.optim.lr_scheduler_type, config.run.max_steps),
        )


def start_point(output: Path, past: RunState | None, max_steps: int) -> Path | None:
    """The checkpoint to continue from, None: the start.

    Raises StorageError: there are checkpoints and none is good, the run is finished and has none, or something else has
    the name of a checkpoint that is still to be written.
    """
    folder, faults = checkpoint.newest_good(output)
    if folder is None:
        _check_start(output, past, faults)
    for fault in faults:
        log.warning("passed over a damaged checkpoint: %s", fault)
    reached = -1 if folder is None else checkpoint.step_of(folder)
    for path in checkpoint.checkpoints(output):
        if reached < checkpoint.step_of(path) <= max_steps and not checkpoint.written_by_vpd(path):
            raise StorageError(
                f"{path} is no checkpoint of vpd, and one of this name is to be written",
                do="Move it out of the run folder.",
            )
    if folder is None:
        log.info("no checkpoint in %s: starting from step 0", output)
    else:
        log.info("continuing from %s", folder)
    return folder


def _check_start(output: Path, past: RunState | None, faults: list[str]) -> None:
    """Raise StorageError where a start from step 0 would throw away what is there."""
    if faults:
        raise StorageError(
            f"no checkpoint in {output} can be read",
            got="; ".join(faults)[:400],
            do="Restore one, or start a new run in another run.output_dir; nothing was changed.",
        )
    if (output / "model").is_dir() if past is None else past.phase == "done":
        raise StorageError(
            f"the run in {output} is finished and has no checkpoint to continue from",
            got="none: run.save_steps was 0, or all were removed",
            do="Start in another run.output_dir with its model/ as model.name_or_path, and set run.save_steps there.",
        )


def _check_free(output: Path) -> None:
    """Raise StorageError where a new run would replace what no run has written."""
    present = [name for name in OUTPUTS if (output / name).exists()]
    if present:
        raise StorageError(
            f"{output} holds what no run wrote and this one would replace",
            got=", ".join(present),
            do="Move them, or choose another --run.output_dir.",
        )


def _changes(past: RunState, config: Config, contents: Mapping[str, str]) -> list[Change]:
    """The settings, and the files that they name, that differ from those of the run in the folder."""
    before = {section: _completed(value, config, section) for section, value in past.settings.items()}
    found = run_state.changes(before, settings_of(config))
    named = {change.key for change in found}
    return found + [
        Change(f"{run_state.CONTENT}{key}", was, contents[key])
        for key, was in past.contents.items()
        if key not in named and contents.get(key, was) != was
    ]


def _named_files(config: Config) -> Iterator[tuple[str, str]]:
    """Keys and values of the settings that may name a file or folder; of a user's own part, all that name a file."""
    for section in SECTIONS:
        value = getattr(config, section)
        parts = {f"{section}.{n}": part for n, part in enumerate(value)} if section == "feedback" else {section: value}
        for prefix, part in parts.items():
            if isinstance(part, Custom):
                pairs = [(key, name) for key, name in part.options.items() if isinstance(name, str)]
                yield from ((f"{prefix}.{key}", name) for key, name in pairs if name and Path(name).is_file())
            elif isinstance(part, Settings):
                for key, declared in declarations(type(part)).items():
                    name = getattr(part, key) if declared.path is not None and declared.path.read else None
                    if isinstance(name, str) and name:
                        yield f"{prefix}.{key}", name


def _completed(section: Any, config: Config, name: str) -> Any:
    """A recorded section with the keys of this version: a new one at its default, one that is gone left out."""
    if name not in config.as_dict():
        return section
    now = getattr(config, name)
    if name == "feedback":
        names = [source.object if isinstance(source, Passed) else source.name for source in now]
        same = isinstance(section, list) and [entry.get("name", entry.get("object")) for entry in section] == names
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
