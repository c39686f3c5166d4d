"""``run.json``: the settings and the progress of the run in a folder.

``settings`` and their hash, ``contents`` (a hash of each file and folder that the settings name), ``phase``
(``training``, then ``exporting`` while ``model/`` is written, then ``done``) and ``step`` (of the newest checkpoint, or
the last one).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from vpd.errors import StorageError
from vpd.run_folder.files import FileSystem

Phase: TypeAlias = Literal["training", "exporting", "done"]

FILE = "run.json"
CONTENT = "content of "  # begins the key of a change of a file that a setting names
MAY_CHANGE = (
    "run.max_steps",
    "run.save_steps",
    "run.save_total_limit",
    "run.eval_*",
    "run.early_stopping_*",
    "run.load_best_model_at_end",
    "run.report_to",
    "run.log_completions",
    "run.push_to_hub",
    "run.hub_*",
    "run.record_*",
    "run.output_dir",
    "run.resume",
    "run.rank_timeout",
    "rollout.max_rows",
    "engine.url",
    "engine.sync_dir",
    "engine.api_key_env",
    "engine.timeout",
    "engine.python",
    "engine.server_args",
    "engine.start_timeout",
    "optim.micro_batch_size",
    "optim.max_tokens_per_microbatch",
    "optim.chunk_tokens",
    "optim.share_prefixes",
    "optim.gradient_checkpointing",
    "optim.cpu_offload",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How far a run is, and its settings (plain data, one mapping or list for each section)."""

    settings: Mapping[str, Any]
    phase: Phase
    step: int
    contents: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """Whether there is more of it than its settings."""
        return self.phase != "training" or self.step > 0


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs between the run in the folder and the run that is asked to continue it."""

    key: str
    old: Any
    new: Any

    @property
    def allowed(self) -> bool:
        """Whether a run may be continued with it."""
        return any(fnmatch(self.key, pattern) for pattern in MAY_CHANGE)

    def __str__(self) -> str:
        return f"{self.key} {_show(self.old)} -> {_show(self.new)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Writes ``run.json`` as a run goes on; its settings stay."""

    folder: Path
    files: FileSystem
    settings: Mapping[str, Any]
    contents: Mapping[str, str] = field(default_factory=dict)

    def record(self, phase: Phase, step: int) -> None:
        """Raises StorageError."""
        data = {
            "phase": phase,
            "step": step,
            "settings_hash": _hash(self.settings),
            "settings": self.settings,
            "contents": self.contents,
        }
        self.files.write_atomically(self.folder / FILE, (json.dumps(data, indent=1) + "\n").encode())


def read(folder: Path) -> RunState | None:
    """The content of ``run.json``; None if there is no such file.  Raises StorageError for a damaged one."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        state = RunState(
            settings=data["settings"],
            phase=data["phase"],
            step=int(data["step"]),
            contents=dict(data["contents"]),
        )
        intact = data["settings_hash"] == _hash(state.settings) and state.phase in get_args(Phase)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not intact:
        raise _damaged(path, "settings that do not fit settings_hash, or an unknown phase")
    return state


def refuse_begun(folder: Path) -> None:
    """Raise StorageError where ``run.json`` says that a run has begun in the folder, or cannot be read."""
    past = read(folder)
    if past is not None and past.has_begun:
        raise another_run(folder)


def another_run(folder: Path) -> StorageError:
    """The error for a folder in which another run was to begin."""
    return StorageError(
        f"{folder} already holds a run", do="Continue it with --run.resume true, or choose another --run.output_dir."
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs, in the order of ``new``; of a section with another name, that name alone."""
    found: list[Change] = []
    for section, now in new.items():
        before = old.get(section)
        if not isinstance(now, Mapping) or not isinstance(before, Mapping):
            pairs = [(section, before, now)]
        elif before.get("name") != now.get("name"):
            pairs = [(f"{section}.name", _label(before), _label(now))]
        else:
            pairs = _pairs(section, before, now)
        found += [Change(key, was, value) for key, was, value in pairs if was != value]
    return found


def _pairs(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*new, *old]):
        was, now, key = old.get(name), new.get(name), f"{prefix}.{name}"
        both = isinstance(was, Mapping) and isinstance(now, Mapping)
        pairs += _pairs(key, was, now) if both else [(key, was, now)]  # type: ignore[arg-type]
    return pairs


def refuse_changes(found: Sequence[Change], folder: Path) -> None:
    """Raise a StorageError that names every change that a continued run may not make."""
    refused = [change for change in found if not change.allowed]
    if not refused:
        return
    hint = "Set them to what they were, or start a new run in another run.output_dir."
    if any(change.key.startswith(CONTENT) for change in refused):
        hint += f" If that content makes no difference, delete its entry in 'contents' of {FILE}."
    if any(change.key == "model.name_or_path" for change in refused):
        hint += " A model that was moved needs a link at its old place."
    raise StorageError(
        f"{folder} holds a run with other settings", got="; ".join(map(str, refused)).rstrip("."), do=hint
    )


def _label(section: Mapping[str, Any]) -> Any:
    """The name of a section's part, or the class of the object that was passed for it."""
    return section.get("name", section.get("object"))


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:116]} ..."


def _damaged(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"{path} is damaged",
        got=" ".join(reason.split())[:160],
        do=f"To go on without it, remove it and run: vpd train --config {path.parent}/config.yaml --run.resume true",
    )
