"""The base models that runs start from: shipped for seed 0, made on first use and cached for other seeds.

The pretrained base is converted from its package and is the same for all seeds.

Every base is checked before a method runs on it: with the right answer in its prompt it must do much better than
without (the cold base: much worse); otherwise a "sparse reward" run could in fact be a cold start.  A base that fails
the check is made again from another seed (:data:`TRIES`, :data:`SEED_STRIDE`).
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
from vpd.lab import packaged, tiny
from vpd.lab.reproduce.settings_table import PRETRAINED_BASE

PROBE_ROWS = 512
TRIES, SEED_STRIDE = 4, 1000  # attempts at a base, and the distance between their seeds
#: base -> kind of prompt -> (lowest, highest) share of right digits; all but "student" are differences to the student
BOUNDS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "tiny": {"student": (0.2, 0.4), "hint": (0.3, 1.0), "demonstration": (0.2, 1.0)},
    "tiny-mid": {"student": (0.45, 0.68), "hint": (0.05, 1.0), "demonstration": (0.05, 1.0), "silent": (-1.0, 0.1)},
    "tiny-cold": {"student": (0.45, 0.68), "hint": (-1.0, -0.25)},
    "tiny-long": {"student": (0.5, 0.75), "hint": (0.05, 1.0)},
    "tiny-expert": {"student": (0.85, 1.0)},
    "tiny-mid-expert": {"student": (0.85, 1.0)},
    "tiny-long-expert": {"student": (0.85, 1.0)},
}
#: GKD's teacher of each base: one that is good at the same task, with the same tokenizer.
EXPERTS = {
    "tiny": "tiny-expert",
    "tiny-mid": "tiny-mid-expert",
    "tiny-cold": "tiny-mid-expert",
    "tiny-long": "tiny-long-expert",
}


def cache_folder() -> Path:
    """The folder of cached bases: $VPD_CACHE, else $XDG_CACHE_HOME/vpd, else ~/.cache/vpd."""
    chosen = os.environ.get("VPD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpd"


def recipe_hash(name: str) -> str:
    """A hash of how a base is made."""
    return "package" if name == PRETRAINED_BASE else tiny.recipe_hash(name)


def seed_of(name: str, seed: int) -> int:
    """The seed of the base that a run with ``seed`` starts from."""
    return 0 if name == PRETRAINED_BASE else seed


def find(name: str, seed: int) -> Path | None:
    """The folder of a base, None if it has not been made yet.  Raises ModelError if its files are damaged."""
    if seed == tiny.SEED and name in BUNDLED:
        return load_bundled(name)
    folder = _cached(name, seed)
    if not folder.is_dir():
        return None
    if name == PRETRAINED_BASE:
        return folder
    return check_hashes(folder, f"the base {folder}", "Remove the folder; it is made anew.")


def ensure(name: str, seed: int) -> Path:
    """The folder of a base, made (about a minute) if there is none.  Raises ModelError if no attempt passes."""
    found = find(name, seed)
    if found is not None:
        return found
    cache, folder = cache_folder(), _cached(name, seed)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=cache))
    except OSError as error:
        raise StorageError(
            f"cannot keep bases in {cache}", got=error.strerror, do="Set VPD_CACHE to a folder that can be written."
        ) from error
    try:
        if name == PRETRAINED_BASE:
            packaged.build(PRETRAINED_BASE, draft)
        else:
            _build(draft, name, seed)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has made it meanwhile
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _cached(name: str, seed: int) -> Path:
    return cache_folder() / (name if name == PRETRAINED_BASE else f"{name}-{tiny.recipe_hash(name)}-{seed}")


def _build(folder: Path, name: str, seed: int) -> None:
    """Make a tiny base from the first seed whose base passes its check.  Raises ModelError if none does."""
    start = tiny.BASES[name].start
    origin = None if start is None else ensure(start, seed)
    for number in range(TRIES):
        tiny.build(folder, seed + SEED_STRIDE * number, name, origin)
        try:
            require(name, seed, probe(folder, name))
            return
        except ModelError:
            if number == TRIES - 1:
                raise


def require(name: str, seed: int, shares: Mapping[str, float]) -> None:
    """Check a base's :func:`probe` against :data:`BOUNDS`.  Raises ModelError."""
    for kind, (low, high) in BOUNDS[name].items():
        value = shares[kind] - (0.0 if kind == "student" else shares["student"])
        if not low <= value <= high:
            raise ModelError(
                f"the base {name} (seed {seed}) failed its check: {kind}"
                + ("" if kind == "student" else " less student"),
                got=f"{value:.2f}",
                expected=f"{low} to {high}",
                do="Use other seeds (--first_seed).",
            )


@torch.no_grad()
def probe(folder: Path, name: str) -> dict[str, float]:
    """Mean probability of the right next digit, by kind of prompt, given the right digits before it."""
    base = tiny.BASES[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shares = {}
    for kind in ("student", "hint", "demonstration", "critic", "silent"):
        if kind in ("critic", "silent") and not base.more_words:
            continue
        ids, answers = tiny.WarmUpData(tokenizer, base, seed=77).test_rows(kind, PROBE_ROWS)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -answers.shape[1] :]
        right = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].exp()
        shares[kind] = float((right[:, -1] if kind == "critic" else right).mean())
    return shares
