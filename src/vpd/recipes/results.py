"""The numbers of an evaluation as a JSON file: whether it can be written is known before the work."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from vpd.errors import ConfigError, StorageError
from vpd.run_folder.files import require_writable, write_text
from vpd.types import Metrics


def check_output(path: Path) -> None:
    """Raise ConfigError unless :func:`write_results` can write there.  Nothing is made."""
    what, do = f"--output {path} cannot be written", "Give a file in a folder of yours."
    try:
        if path.is_dir():
            raise ConfigError(what, got="a folder", expected="a file", do=do)
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():  # else: a pipe or device
            require_writable(path)
    except (OSError, StorageError) as error:
        raise ConfigError(what, got=getattr(error.__cause__ or error, "strerror", None), do=do) from error


def as_json(parts: Mapping[str, Metrics]) -> str:
    """The metrics of every part that has some; a number that is not finite is null."""
    numbers = {name: {key: _finite(value) for key, value in part.items()} for name, part in parts.items() if part}
    return json.dumps(numbers, indent=1, allow_nan=False)


def write_results(path: Path, parts: Mapping[str, Metrics]) -> None:
    """Write the metrics of every part that has some; a number that is not finite is null.  Raises StorageError."""
    write_text(path, as_json(parts) + "\n")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
