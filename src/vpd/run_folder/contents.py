"""What the files that settings name contain, in a few letters: a run is not continued on other data or another base."""

import hashlib
import os
from pathlib import Path

WHOLE = 64 * 2**20  # bytes; of a longer file, SPOTS pieces of PIECE bytes
SPOTS, PIECE = 64, 2**20
MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model"}


def content_hash(path: Path) -> str:
    """The beginning of a SHA-256 of a file, or of the model's files in a folder, with their names and sizes.

    Of a file of more than 64 MiB only 64 pieces of 1 MiB are read, at equal distances.
    """
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    for file in files:
        if file != path:
            digest.update(file.name.encode())
        _add(digest, file)
    return digest.hexdigest()[:16]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        pieces = (
            [(0, size)] if size <= WHOLE else [(spot * (size - PIECE) // (SPOTS - 1), PIECE) for spot in range(SPOTS)]
        )
        for start, length in pieces:
            file.seek(start)
            digest.update(file.read(length))
