"""Data sets as records: read from JSON lines, parquet or the Hub, checked field by field, split, walked in epochs.

Every error names the file and the line.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from vpd.errors import ConfigError, DataError
from vpd.types import Message

HUB = re.compile(r"[\w.-]+/[\w.-]+")
Item = TypeVar("Item")


def read(path: str, *, subset: str | None = None, split: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(where it stands, its number, record) of every record of a file of JSON lines, of a parquet file, or of
    ``owner/name`` on the Hub."""
    source = Path(path)
    if source.suffix == ".parquet":
        yield from ((f"{path} row {number}", number, record) for number, record in enumerate(_parquet(source)))
        return
    if source.exists() or source.suffix in (".json", ".jsonl") or not HUB.fullmatch(path):
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
    """The numbered lines of a file that are not blank."""
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
    """A field that must hold text."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        got = f"only {', '.join(map(str, record))}"[:200] if field not in record else repr(value)[:80]
        raise DataError(f"{where} lacks the text {field!r}", got=got, expected="a string that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: {field!r} holds half a surrogate pair", expected="text that UTF-8 can write")
    return value


def messages(value: Sequence[Any], field: str, where: str) -> tuple[Message, ...]:
    """Messages of which the last is the user's."""
    read: list[Message] = []
    for message in value:
        message = mapping(message, f"{where}: a message of {field!r}")
        read.append({"role": text(message, "role", where), "content": text(message, "content", where)})
    if not read or read[-1]["role"] != "user":
        raise DataError(f"{where}: {field!r} does not end with the user's message")
    return tuple(read)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A value that must be an object."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object", got=type(value).__name__, expected="a JSON object")
    return value


def check_share(eval_share: float) -> None:
    """Raises ConfigError for a share that leaves training or evaluation nothing."""
    if not 0 < eval_share < 1:
        raise ConfigError("env.eval_share is out of range", got=eval_share, expected="between 0 and 1")


def apart(
    load: Callable[[str], list[Item]],
    path: str,
    eval_path: str | None,
    eval_share: float,
    *,
    stem: Callable[[Item], str],
    whole: Callable[[Item], str],
    name: Callable[[Item], str],
) -> tuple[list[Item], list[Item]]:
    """Training and evaluation: two files that share no ``whole`` text, or one, of which a share is held out by a hash
    of the ``stem``, so that no stem stands on both sides."""
    everything = load(path)
    if eval_path is None or eval_path == path:
        train = [item for item in everything if fraction(stem(item)) >= eval_share]
        held_out = [item for item in everything if fraction(stem(item)) < eval_share]
    else:
        train, held_out = everything, load(eval_path)
        known = {whole(item) for item in train}
        shared = [name(item) for item in held_out if whole(item) in known]
        if shared:
            raise DataError(
                f"{path} and {eval_path} share {len(shared)} questions",
                got=f"record {shared[0]} of the latter in both",
                expected="evaluation apart from training",
                do="Take them out of one, or leave env.eval_path out: then a share of env.path is held out.",
            )
    for part, items in (("training", train), ("evaluation", held_out)):
        if not items:
            raise DataError(
                f"{path} leaves no question for {part}",
                got=f"{len(everything)} in all, env.eval_share {eval_share}",
                do="Give more questions, another env.eval_share, or env.eval_path.",
            )
    held_out.sort(key=lambda item: fraction(whole(item)))  # any first few are a fair sample
    return train, held_out


def walk(items: Sequence[Item], index: int, *, name: str, seed: int) -> Item:
    """Item ``index`` of an endless walk: each epoch goes through all in the order drawn by (name, seed, epoch)."""
    epoch, place = divmod(index, len(items))
    return items[_permutation(name, len(items), seed, epoch)[place]]


@functools.lru_cache(maxsize=8)
def _permutation(name: str, length: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(length))
    random.Random(f"{name}/{seed}/{epoch}").shuffle(order)
    return order


def fraction(content: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big") / 2**48


def shown(content: str) -> str:
    """At most 40 printable characters on one line, to be quoted in feedback."""
    line = " ".join("".join(c if c.isprintable() else " " for c in content[:200]).split())
    return line if len(line) <= 40 else f"{line[:40]}..."
