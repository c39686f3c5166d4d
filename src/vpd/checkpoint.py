"""Checkpoints that are whole or not there, and a resume that continues as if nothing had happened.

``checkpoint-N/`` holds the model in ``from_pretrained`` form (with LoRA the adapter alone, in peft's), ``state.pt``
(optimiser, scheduler, teacher weights) and ``trainer.json`` (step, data cursor, algorithm, and the size and SHA-256 of
every other file).  It is written to a temporary folder and renamed, so a full disk or a kill leaves no half checkpoint
under that name.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from vpd.errors import StorageError
from vpd.model import lora


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model and tokenizer, loadable with ``from_pretrained``; of a model with LoRA the adapter, loadable with peft."""
    try:
        if lora.is_attached(model):
            lora.save(model, folder)
        else:
            model.save_pretrained(folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error


def save(
    output_dir: Path, step: int, learner: Any, tokenizer: Any, progress: dict[str, Any], *, keep: int | None
) -> Path:
    """Write ``checkpoint-{step}`` atomically, then remove all but the newest ``keep`` (None: keep all).

    Raises StorageError, leaving earlier checkpoints untouched.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(learner.model, tokenizer, partial)
        state = {name: part for name, part in learner.state().items() if name != "model"}
        torch.save(state, partial / "state.pt")
        files = {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(partial.iterdir())}
        (partial / "trainer.json").write_text(json.dumps({"step": step, **progress, "files": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_write(final, error) from error
    except StorageError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(output_dir)[: -keep if keep else None] if keep else []:
        shutil.rmtree(old)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


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
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    learner.restore({"model": _weights(folder, learner.model), **state})
    return progress


def _weights(folder: Path, live: Any) -> dict[str, Tensor]:
    """The saved weights as ``learner.restore`` takes them.  Raises StorageError if ``live`` is of the other kind."""
    adapted = (folder / lora.WEIGHTS_FILE).exists()
    if adapted != lora.is_attached(live):
        raise StorageError(
            f"{folder} was not saved with this model.lora",
            got="an adapter" if adapted else "a whole model",
            do="Set model.lora to what it was, or start anew in another run.output_dir.",
        )
    if adapted:
        trained_on = json.loads((folder / lora.CONFIG_FILE).read_text())["base_model_name_or_path"]
        if trained_on != live.name_or_path:
            warnings.warn(
                f"the adapter of {folder} was trained on {trained_on!r} and goes on with {live.name_or_path!r}",
                stacklevel=2,
            )
        return lora.read(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=live.dtype)
    return dict(saved.state_dict())


def _fault(folder: Path) -> str | None:
    try:
        files = json.loads((folder / "trainer.json").read_text())["files"]
        for name, (size, digest) in files.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has the wrong size"
            if _sha256(folder / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_write(folder: Path, error: Exception) -> StorageError:
    return StorageError(
        f"cannot write {folder}", got=str(error)[:200], do="Free space or choose another run.output_dir."
    )
