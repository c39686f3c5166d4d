"""Files of records, as they lie there: JSON lines, a JSON array, CSV, parquet, or what ``datasets`` saves.

The content decides: compressed (gzip, zstd, bzip2, xz) is read like plain, and parquet is known by its first bytes.
Only ``.csv`` and ``.tsv`` go by the name.  Every error names the file and, where it has lines, the line.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet

from vpd.errors import DataError

Entry: TypeAlias = tuple[str, int, Any]  # place for error messages, number, record
HUB = re.compile(r"[\w.-]+/[\w.-]+")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".bz2", ".xz")
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
FORMS = "a file of JSON lines, a JSON array, CSV, parquet, a folder of datasets.save_to_disk, or owner/name on the Hub"


def entries(path: str, *, subset: str | None, split: str) -> Iterator[Entry]:
    """All records of ``path``, a file, a folder or a data set on the Hub.  Raises DataError."""
    source = Path(path).expanduser()
    try:
        mode = source.stat().st_mode
    except FileNotFoundError as error:
        if HUB.fullmatch(path) and source.suffix not in SUFFIXES:
            return _from_hub(path, subset, split)
        raise DataError(f"cannot read {path}", got=error.strerror, expected=FORMS) from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path!r:.200}", got=str(error)[:200], expected=FORMS) from error
    if stat.S_ISDIR(mode):
        return _saved(source, split)
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is no file that can be read twice", got="a pipe or a device", expected=FORMS)
    return _from_file(source)


def _from_file(source: Path) -> Iterator[Entry]:
    try:
        with source.open("rb") as file:
            if source.suffix == ".parquet" or file.peek(4).startswith(b"PAR1"):
                return _parquet(source)
            content = file.read()
    except OSError as error:
        raise DataError(f"cannot read {source}", got=error.strerror, expected=FORMS) from error
    text = _text(_decompressed(content, source), source)
    suffix = next((s for s in reversed(source.suffixes) if s not in (".gz", ".zst", ".bz2", ".xz")), "")
    if not text.strip():
        do = "Write a record on each line, or name another file."
        raise DataError(f"{source} is empty", expected="a record for each task", do=do)
    if suffix.lower() in (".csv", ".tsv"):
        return _csv(text, source, "\t" if suffix.lower() == ".tsv" else ",")
    return _array(text, source) if text.lstrip().startswith("[") else _lines(text, source)


def _decompressed(content: bytes, source: Path) -> bytes:
    kind = next((kind for magic, kind in MAGIC.items() if content.startswith(magic)), None)
    try:
        match kind:
            case "gzip":
                return gzip.decompress(content)
            case "zstd":
                return pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read()
            case "bzip2":
                return bz2.decompress(content)
            case "xz":
                return lzma.decompress(content)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        got = " ".join(str(error).split())[:200]
        raise DataError(f"{source} is a damaged {kind} file", got=got, do="Fetch it again.") from error
    return content


def _text(content: bytes, source: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source} is not UTF-8", got=f"byte 0x{content[error.start]:02x} in line {line}", do="Save it as UTF-8."
        ) from error


def _lines(text: str, source: Path) -> Iterator[Entry]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source} line {number}"
            try:
                yield where, number, DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                expected = "one object a line, or a JSON array"
                raise DataError(f"{where} is not JSON", got=_fault(error), expected=expected) from error


def _array(text: str, source: Path) -> Iterator[Entry]:
    """The elements of a JSON array, numbered, each with the line where it begins."""
    position, line, counted, number = _after_space(text, text.index("[") + 1), 1, 0, 0
    if text[position : position + 1] == "]":
        raise DataError(f"{source} is empty", expected="a record for each task")
    while True:
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        where = f"{source} line {line}"
        try:
            record, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON", got=_fault(error), expected="an array of objects") from error
        yield where, number, record
        position = _after_space(text, position)
        if text[position : position + 1] == "]" and not text[position + 1 :].strip():
            return
        if text[position : position + 1] != ",":
            line += text.count("\n", counted, position)
            got = repr(text[position : position + 20])
            raise DataError(f"{source} line {line} is not JSON", got=got, expected="',' or the array's end")
        position = _after_space(text, position + 1)


def _after_space(text: str, position: int) -> int:
    return SPACE.match(text, position).end()  # type: ignore[union-attr]


SPACE = re.compile(r"[ \t\r\n]*")


def _finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{number[:40]} is too large a number")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        return f"{error.msg.removesuffix(' at')} at column {error.colno}{line}"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]


def _csv(text: str, source: Path, delimiter: str) -> Iterator[Entry]:
    """Rows by the names in the first line; every value is a text."""
    usual = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{source} line {reader.line_num} is not CSV", got=str(error)) from error
    finally:
        csv.field_size_limit(usual)
    (_, names), *found = rows
    if not all(names) or len(set(names)) < len(names):
        raise DataError(f"{source} line 1 names no columns", got=", ".join(names)[:200], expected="a name for each")
    if not found:
        raise DataError(f"{source} is empty", got="a header alone", expected="a row for each task")
    for line, row in found:
        if len(row) != len(names):
            got, expected = f"{len(row)} values", f"{len(names)}, as line 1 has names"
            raise DataError(f"{source} line {line} has another number of columns", got=got, expected=expected)
        yield f"{source} line {line}", line, dict(zip(names, row, strict=True))


def _parquet(source: Path) -> Iterator[Entry]:
    try:
        table = pyarrow.parquet.read_table(source)
    except (OSError, pyarrow.ArrowException) as error:
        got = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read {source}", got=got, expected="a parquet file") from error
    if not table.num_rows:
        raise DataError(f"{source} is empty", expected="a row for each task")
    rows = (record for batch in table.to_batches(max_chunksize=1024) for record in batch.to_pylist())
    yield from ((f"{source} row {number}", number, record) for number, record in enumerate(rows))


def _saved(source: Path, split: str) -> Iterator[Entry]:
    """A folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    if (source / "dataset_dict.json").is_file() and (source / split).is_dir():
        source = source / split
    if not (source / "state.json").is_file():
        inside = ", ".join(sorted(entry.name for entry in source.iterdir())[:6]) or "nothing"
        expected = f"{FORMS}; in a folder of several splits, env.split ({split}) is read"
        raise DataError(f"{source} is a folder", got=f"in it {inside}", expected=expected)
    datasets = _datasets(f"{source} was saved by the package datasets")
    try:
        rows = datasets.load_from_disk(str(source))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {source}", got=" ".join(str(error).split())[:300]) from error
    return _rows(rows, str(source))


def _from_hub(path: str, subset: str | None, split: str) -> Iterator[Entry]:
    datasets = _datasets(f"{path} is on the Hub")
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {path} from the Hub",
            got=" ".join(str(error).split())[:300],
            do="Check the name, env.subset and env.split, or give a file of JSON lines.",
        ) from error
    return _rows(rows, path)


def _rows(rows: Any, path: str) -> Iterator[Entry]:
    if not len(rows):
        raise DataError(f"{path} is empty", expected="a record for each task")
    return ((f"{path} record {number}", number, record) for number, record in enumerate(rows))


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{why}, which is missing", do="pip install 'vpd-rl[hub]'") from error
    return datasets
