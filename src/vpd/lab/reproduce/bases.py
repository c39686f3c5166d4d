"""The bases that runs start from: shipped for seed 0, made on first use and kept for other seeds.

A base is only used if it is what its regime needs: told what is right, it must do much better than untold (or, cold,
much worse), else a "sparse reward" run would secretly be a cold start.  A warm-up that comes out wrong is repeated from
another seed (:data:`TRIES`, :data:`NEXT`), before any method has run on it.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.bundled import BUNDLED, check_hashes, load_bundled
from vpd.errors import ModelError, StorageError
from vpd.lab import tiny

ROWS = 512
TRIES, NEXT = 4, 1000  # warm-ups of a base, and how far apart their seeds are
#: name of the base -> (probe, lowest, highest): share of digits right, teachers' less the student's
BOUNDS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "tiny": {"student": (0.2, 0.4), "hint": (0.3, 1.0), "demonstration": (0.2, 1.0)},
    "tiny-mid": {"student": (0.45, 0.68), "hint": (0.05, 1.0), "demonstration": (0.05, 1.0), "silent": (-1.0, 0.1)},
    "tiny-cold": {"student": (0.45, 0.68), "hint": (-1.0, -0.25)},
    "tiny-long": {"student": (0.5, 0.75), "hint": (0.05, 1.0)},
    "tiny-expert": {"student": (0.85, 1.0)},
}


def cache_folder() -> Path:
    """Where bases are kept: $VPD_CACHE, else $XDG_CACHE_HOME/vpd, else ~/.cache/vpd."""
    chosen = os.environ.get("VPD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpd"


def find(name: str, seed: int) -> Path | None:
    """The folder of a base that is there already."""
    if seed == tiny.SEED and name in BUNDLED:
        return load_bundled(name)
    folder = cache_folder() / f"{name}-{tiny.recipe_hash(name)}-{seed}"
    if not folder.is_dir():
        return None
    return check_hashes(folder, f"the base {folder}", "Remove the folder; it is made anew.")


def ensure(name: str, seed: int) -> Path:
    """The folder of a base, made if it is not there yet (about a minute).  Raises ModelError if it never comes out."""
    found = find(name, seed)
    if found is not None:
        return found
    cache = cache_folder()
    folder = cache / f"{name}-{tiny.recipe_hash(name)}-{seed}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=cache))
    except OSError as error:
        raise StorageError(
            f"cannot keep bases in {cache}", got=error.strerror, do="Set VPD_CACHE to a folder that can be written."
        ) from error
    try:
        start = tiny.BASES[name].start
        origin = None if start is None else ensure(start, seed)
        for number in range(TRIES):
            tiny.build(draft, seed + NEXT * number, name, origin)
            try:
                require(name, seed, probe(draft, name))
                break
            except ModelError:
                if number == TRIES - 1:
                    raise
        if not folder.exists():
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def require(name: str, seed: int, shares: Mapping[str, float]) -> None:
    """Raise ModelError unless the base is what its regimes need."""
    for what, (low, high) in BOUNDS[name].items():
        value = shares[what] - (0.0 if what == "student" else shares["student"])
        if not low <= value <= high:
            raise ModelError(
                f"the warm-up of {name} (seed {seed}) came out wrong: {what}"
                + ("" if what == "student" else " less student"),
                got=f"{value:.2f}",
                expected=f"{low} to {high}",
                do="Use other seeds (--first_seed).",
            )


@torch.no_grad()
def probe(folder: Path, name: str) -> dict[str, float]:
    """Share of digits that are right, by prompt, when the answer itself (the truth) is read along."""
    base = tiny.BASES[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares = {}
    for what in ("student", "hint", "demonstration", "critic", "silent"):
        if what in ("critic", "silent") and not base.more_words:
            continue
        ids, answers = tiny.Drill(tokenizer, base, seed=77).exam(what, ROWS)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -answers.shape[1] :]
        right = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].exp()
        shares[what] = float((right[:, -1] if what == "critic" else right).mean())
    return shares
