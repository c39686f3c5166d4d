"""The tiny bases that ship with the package, and the hashes that prove a base's folder is whole.

``vpd.lab.tiny`` makes them; loading one needs only this file.
"""

import hashlib
from pathlib import Path

from vpd.errors import ModelError

ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED = ("tiny", "tiny-mid", "tiny-cold")
HASHES = "SHA256"


def load_bundled(name: str = "tiny") -> Path:
    """A shipped base's folder, after checking its hashes.  Raises ModelError if a file is missing or changed."""
    return check_hashes(ASSETS / name, f"the shipped base model {name}", "Install the package again.")


def source_of(name: str) -> str:
    """Where a model is loaded from: a Hub id or folder as it is, a shipped base's folder.  Raises ModelError."""
    return str(load_bundled(name)) if name in BUNDLED else name


def check_hashes(folder: Path, what: str, do: str) -> Path:
    """The folder of a base, after checking its hashes.  Raises ModelError if a file is missing or changed."""
    try:
        for line in (folder / HASHES).read_text().splitlines():
            digest, name = line.split()
            if sha256(folder / name) != digest:
                raise ModelError(f"{what} is damaged: {name} has changed", do=do)
    except OSError as error:
        raise ModelError(f"{what} is incomplete: {error}", do=do) from error
    return folder


def write_hashes(folder: Path) -> None:
    """Write the hashes of all files of a base's folder into it."""
    files = sorted(path for path in folder.iterdir() if path.name != HASHES)
    (folder / HASHES).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
