"""Data sets as records: read from JSON lines, parquet or the Hub, and checked field by field.

Every error names the file and the line.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vpd.errors import DataError
from vpd.types import Message

HUB = re.compile(r"[\w.-]+/[\w.-]+")


def read(path: str, *, subset: str | None = None, split: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(place for error messages, number, record) of every record of a file of JSON lines, of a parquet file, or of
    ``owner/name`` on the Hub.  Raises DataError."""
    source = Path(path)
    there = _is_there(source)
    if source.suffix == ".parquet":
        yield from ((f"{path} row {number}", number, record) for number, record in enumerate(_parquet(source)))
        return
    if there or source.suffix in (".json", ".jsonl") or not HUB.fullmatch(path):
        for number, line in _lines(source):
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON", got=str(error)[:200], expected="one object a line") from error
            yield where, number, mapping(record, where)
        return
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is on the Hub, and the package datasets is missing", do="pip install 'vpd-rl[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {path} from the Hub",
            got=" ".join(str(error).split())[:300],
            do="Check the name, env.subset and env.split, or give a file of JSON lines.",
        ) from error
    for number, record in enumerate(rows):
        yield f"{path} record {number}", number, record


def _is_there(source: Path) -> bool:
    """Whether there is such a file or folder.  Raises DataError for a pipe or a device, which may never end."""
    try:
        mode = source.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DataError(f"cannot read {source}", got=error.strerror) from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{source} is no file", got="a pipe, a device or a socket", do="Write its content to a file.")
    return True


def _parquet(source: Path) -> Iterator[Mapping[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(source)
    except (OSError, pyarrow.ArrowException) as error:
        got = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read {source}", got=got, expected="a parquet file") from error
    if not table.num_rows:
        raise DataError(f"{source} is empty", expected="a row for each task")
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that are not blank."""
    try:
        raw = source.read_bytes()
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{source} is not UTF-8", got=f"byte 0x{raw[error.start]:02x} in line {line}") from error
    except OSError as error:
        expected = "a file of JSON lines, or owner/name on the Hub"
        raise DataError(f"cannot read {source}", got=error.strerror, expected=expected) from error
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{source} is empty", expected="one JSON object a line")
    yield from lines


def text(record: Mapping[str, Any], field: str, where: str) -> str:
    """A field that must be a non-empty string.  Raises DataError."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        got = f"only {', '.join(map(str, record))}"[:200] if field not in record else repr(value)[:80]
        raise DataError(f"{where} has no text {field!r}", got=got, expected="a non-empty string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: {field!r} contains an unpaired surrogate", expected="text that can be encoded as UTF-8"
        )
    return value


def messages(value: Sequence[Any], field: str, where: str) -> tuple[Message, ...]:
    """A list of messages, the last of them the user's.  Raises DataError."""
    read: list[Message] = []
    for message in value:
        message = mapping(message, f"{where}: a message of {field!r}")
        read.append({"role": text(message, "role", where), "content": text(message, "content", where)})
    if not read or read[-1]["role"] != "user":
        raise DataError(f"{where}: {field!r} does not end with the user's message")
    return tuple(read)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A value that must be a JSON object.  Raises DataError."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object", got=type(value).__name__, expected="a JSON object")
    return value


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The messages with ``system`` as the only system message; None or empty: unchanged."""
    if not system:
        return messages
    return ({"role": "system", "content": system}, *(m for m in messages if m["role"] != "system"))


def excerpt(content: str) -> str:
    """At most 40 printable characters on one line, to be quoted in feedback."""
    line = " ".join("".join(c if c.isprintable() else " " for c in content[:200]).split())
    return line if len(line) <= 40 else f"{line[:40]}..."
