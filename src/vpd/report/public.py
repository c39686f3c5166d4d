"""What is shared with others, a report or a model card, names no folder of the machine it was made on."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def public(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """Plain data with the last part of every absolute path in the place of the path, or what ``names`` says.

    Numbers that are not finite become texts.
    """
    if isinstance(value, Mapping):
        return {str(key): public(part, names) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [public(part, names) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return (names or {}).get(value, Path(value).name) if _is_absolute(value) else value


def short_names(values: Iterable[Any]) -> dict[str, str]:
    """Each absolute path in the data, by its last part, or as many parts as tell it from the others."""
    paths = dict.fromkeys(path for value in values for path in _paths_in(value))
    return {path: _shortest(path, paths) for path in paths}


def _shortest(path: str, paths: Iterable[str]) -> str:
    parts = Path(path).parts
    tails = ("/".join(parts[-count:]) for count in range(1, len(parts)))
    others = [f"/{'/'.join(Path(other).parts[1:])}" for other in paths if Path(other) != Path(path)]
    return next((tail for tail in tails if not any(other.endswith(f"/{tail}") for other in others)), Path(path).name)


def _paths_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _paths_in(part)
    elif _is_absolute(value):
        yield value


def _is_absolute(value: Any) -> bool:
    """Whether it is a path that names a folder; ``/no_think`` is none, nor is a text of several lines."""
    if not isinstance(value, str) or "\n" in value:
        return False
    return value.startswith("~") or (value.startswith("/") and len(Path(value).parts) > 2)
