"""Checkpoints that are whole or not there.

``checkpoint-N/`` holds the learner's files (the model in ``from_pretrained`` form, with LoRA the adapter alone in
peft's, and ``state.pt``: optimiser, scheduler, teacher weights), the tokenizer with ``vpd_prompts.json``, and
``trainer.json``: step, the algorithm's and the observers' state, the best step so far, the size and SHA-256 of every
other file, and a SHA-256 of all this.  With ``rollout.overlap`` it also holds ``groups.json``, the next step's
rollouts.  With ``optim.sharding`` weights, optimiser and teacher weights lie in ``shards/`` instead, in torch's form
for distributed checkpoints, which any number of processes reads.

No file of weights or states is executed when it is read: they are safetensors, or read with ``weights_only``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from vpd.errors import StorageError
from vpd.learners import TrainedLearner, weights
from vpd.ranks import Ranks, on_first, together
from vpd.run_folder.files import ALONE, FileSystem, storage_errors

NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
DATA, TENSORS = "trainer.json", "state.pt"
KEYS = {"step", "algorithm", "observers", "best", "owes_evaluation", "files", "sha256"}
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, SafetensorError, UnpicklingError)


def save(
    output_dir: Path,
    step: int,
    learner: TrainedLearner,
    progress: Mapping[str, Any],
    *,
    save_rest: Callable[[Path], None],
    keep: int | None,
    files: FileSystem,
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``checkpoint-{step}``, then remove all but the best and the newest ``keep`` (None, or below 1: keep all).

    All ``ranks`` call it; ``progress`` and what ``save_rest`` adds (the tokenizer) are the first one's.
    Raises StorageError, leaving earlier checkpoints untouched.
    """
    final = output_dir / f"checkpoint-{step}"

    def finish(folder: Path) -> None:
        save_rest(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in paths}
        data = {"step": step, **progress, "files": listed}
        (folder / DATA).write_text(json.dumps(data | {"sha256": _digest(data)}, indent=1))

    def fill(folder: Path) -> None:
        together(ranks, "files of the learner", lambda: learner.save(folder))  # all have written
        on_first(ranks, "end of a checkpoint", lambda: finish(folder))

    files.write_folder(final, fill, ranks)
    best = progress.get("best", {}).get("step", -1)
    on_first(ranks, "old checkpoints", lambda: remove_old(output_dir, step, keep=keep, files=files, best=best))
    return final


def remove_old(output_dir: Path, step: int, *, keep: int | None, files: FileSystem, best: int = -1) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step`` (None, or below 1: keep all), and step ``best``'s.

    A later one was passed over when the run was continued, and what vpd has not written is the user's: these count for
    nothing.  Raises StorageError.
    """
    if keep is not None and keep >= 1:
        for old in [path for path in checkpoints(output_dir) if step_of(path) <= step and written_by_vpd(path)][:-keep]:
            if step_of(old) != best:
                files.remove(old)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer, loadable with ``from_pretrained``.  Raises StorageError."""
    with storage_errors(folder):
        weights.save(model, folder)
        tokenizer.save_pretrained(folder)


def checkpoints(output_dir: Path) -> list[Path]:
    """All paths ``checkpoint-N``, whatever they are, and none with another name, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)


def written_by_vpd(path: Path) -> bool:
    """Whether this is a checkpoint of ours, damaged or not: no link, no file, no folder of another program."""
    ours = any(os.path.lexists(path / name) for name in (DATA, TENSORS))
    return path.is_dir() and not path.is_symlink() and ours


def newest_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there and unchanged, and why newer ones were passed over."""
    faults: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        fault = _fault(folder)
        if fault is None:
            return folder, faults
        faults.append(f"{folder.name}: {fault}")
    return None, faults


def fault_of(output_dir: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of a step, None if nothing is."""
    folder = output_dir / f"checkpoint-{step}"
    return _fault(folder) if folder.is_dir() else "it is not there"


def load(folder: Path, learner: Any) -> dict[str, Any]:
    """Restore a learner and give back the progress that was saved with it.  Raises StorageError: it does not fit."""
    progress: dict[str, Any] = json.loads((folder / DATA).read_text())
    try:
        learner.load(folder)
    except UNREADABLE as error:
        raise StorageError(
            f"{folder} does not fit this run",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            do="Was it copied from another run? Remove it to continue from an older one.",
        ) from error
    return progress


def step_of(folder: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(folder.name.removeprefix("checkpoint-"))


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    if not (folder / DATA).is_file():
        return "incomplete (no trainer.json)"
    try:
        progress = json.loads((folder / DATA).read_text())
        return _fault_of_data(progress, folder.name) or _fault_of_files(folder, progress["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"incomplete ({type(error).__name__}: {error})"


def _fault_of_data(progress: Any, name: str) -> str | None:
    """What is wrong with the content of ``trainer.json``, None if nothing is."""
    if f"checkpoint-{progress['step']}" != name or not isinstance(progress["step"], int):
        return f"trainer.json is of step {progress['step']!r}"
    if TENSORS not in progress["files"]:
        return "trainer.json lists no state.pt"
    unknown = progress.keys() - KEYS
    digest = _digest({key: value for key, value in progress.items() if key != "sha256"})
    if unknown or progress.get("sha256") != digest:
        return "trainer.json has changed"
    dicts = [progress["algorithm"], progress.get("best", {}), *progress["observers"].values()]
    if not all(isinstance(state, dict) for state in dicts):
        return "trainer.json holds no state of the algorithm and the observers"
    return None


def _fault_of_files(folder: Path, listed: Mapping[str, Any]) -> str | None:
    for name, (size, digest) in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has the wrong size"
        if _sha256(folder / name) != digest:
            return f"{name} has changed"
    try:
        torch.load(folder / TENSORS, map_location="cpu", mmap=True, weights_only=True)
    except UNREADABLE as error:
        return f"{TENSORS} is no file of tensors ({' '.join(str(error).split())[:80]})"
    return None


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
