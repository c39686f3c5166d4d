"""Checkpoints that are whole or not there.

``checkpoint-N/`` holds the learner's files (the model in ``from_pretrained`` form, with LoRA the adapter alone in
peft's, and ``state.pt``: optimiser, scheduler, teacher weights), the tokenizer with ``vpd_prompts.json``, and
``trainer.json``: step, the algorithm's and the observers' state, and the size and SHA-256 of every other
file.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpd.learners import Learner, weights
from vpd.run_folder.files import FileSystem, storage_errors

NAME = re.compile(r"checkpoint-[0-9]+")


def save(
    output_dir: Path,
    step: int,
    learner: Learner,
    progress: Mapping[str, Any],
    *,
    save_tokenizer: Callable[[Path], None],
    keep: int | None,
    files: FileSystem,
) -> Path:
    """Write ``checkpoint-{step}``, then remove all but the newest ``keep`` (None, or below 1: keep all).

    Raises StorageError, leaving earlier checkpoints untouched.
    """
    final = output_dir / f"checkpoint-{step}"

    def fill(folder: Path) -> None:
        learner.save(folder)
        save_tokenizer(folder)
        listed = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(folder.iterdir())}
        (folder / "trainer.json").write_text(json.dumps({"step": step, **progress, "files": listed}, indent=1))

    files.write_folder(final, fill)
    remove_old(output_dir, step, keep=keep, files=files)
    return final


def remove_old(output_dir: Path, step: int, *, keep: int | None, files: FileSystem) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step`` (None, or below 1: keep all).

    A later one was passed over when the run was continued: it counts for nothing.  Raises StorageError.
    """
    if keep is not None and keep >= 1:
        for old in [path for path in checkpoints(output_dir) if _step(path) <= step][:-keep]:
            files.remove(old)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer, loadable with ``from_pretrained``.  Raises StorageError."""
    with storage_errors(folder):
        weights.save(model, folder)
        tokenizer.save_pretrained(folder)


def checkpoints(output_dir: Path) -> list[Path]:
    """All folders ``checkpoint-N``, and none with another name, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=_step)


def newest_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there and unchanged, and why newer ones were passed over."""
    faults: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        fault = _fault(folder)
        if fault is None:
            return folder, faults
        faults.append(f"{folder.name}: {fault}")
    return None, faults


def load(folder: Path, learner: Any) -> dict[str, Any]:
    """Restore a learner and give back the progress that was saved with it."""
    progress: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
    learner.load(folder)
    return progress


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    if not (folder / "trainer.json").is_file():
        return "incomplete (no trainer.json)"
    try:
        progress = json.loads((folder / "trainer.json").read_text())
        if f"checkpoint-{progress['step']}" != folder.name:
            return f"trainer.json is of step {progress['step']!r}"
        if not {"state.pt"} <= progress["files"].keys():
            return "trainer.json lists no state.pt"
        for name, (size, digest) in progress["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has the wrong size"
            if _sha256(folder / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
