"""Data sets as records, checked field by field.

Every error names the file and the line.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from vpd.envs import data_files
from vpd.errors import DataError
from vpd.types import Message


def read(path: str, *, subset: str | None = None, split: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(place for error messages, number, record) of every record of a file, of a folder that ``datasets`` saved, or of
    ``owner/name`` on the Hub (:mod:`vpd.envs.data_files`).  Raises DataError."""
    for where, number, record in data_files.entries(path, subset=subset, split=split):
        yield where, number, mapping(record, where)


def text(record: Mapping[str, Any], field: str, where: str) -> str:
    """A field that must be a non-empty string.  Raises DataError."""
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        others = ", ".join(map(str, record)) or "nothing else"
        got = f"only {others}"[:200] if field not in record else repr(value)[:80]
        raise DataError(f"{where} has no text {field!r}", got=got, expected="a non-empty string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: {field!r} contains an unpaired surrogate", expected="text that can be encoded as UTF-8"
        )
    return value


def value_text(record: Mapping[str, Any], field: str, where: str) -> str:
    """A field that must be a non-empty string or a number; a number is written as a decimal.  Raises DataError."""
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return text(record, field, where)
    if not isinstance(value, int) and not math.isfinite(value):
        raise DataError(f"{where}: {field!r} is not finite", got=value, expected="a finite number or a text")
    return decimal_text(value)


def optional_text(record: Mapping[str, Any], field: str, where: str) -> str | None:
    """A field that may say nothing (None), and else must be a text.  Raises DataError."""
    return None if says_nothing(record.get(field)) else text(record, field, where)


def decimal_text(value: int | float | Decimal) -> str:
    """A finite number as a decimal without an exponent; a float of single precision with the digits that it has.

    >>> decimal_text(5e-05), decimal_text(1e20), decimal_text(0.10000000149011612), decimal_text(7)
    ('0.00005', '100000000000000000000', '0.1', '7')
    """
    if not isinstance(value, float):
        return format(value, "f") if isinstance(value, Decimal) else str(value)
    shown = repr(value)
    if len(shown) > 12 and not value.is_integer() and _single(value) == value:
        shown = next(short for digits in range(1, 10) if _single(float(short := f"{value:.{digits}g}")) == value)
    return format(Decimal(shown), "f")


def _single(value: float) -> float | None:
    """A float rounded to single precision; None where that is infinite."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return None
    return rounded


def messages(value: Any, field: str, where: str, *, ends: Sequence[str] = ("user",)) -> tuple[Message, ...]:
    """A list of messages whose last one has a role of ``ends``.

    Keys beyond ``role`` and ``content`` (``tool_calls``, ``reasoning_content``, ``name``, ...) are kept for the chat
    template, except where they are null, as parquet and the Hub fill up what a message lacks.  A content of text parts
    becomes one text.  Raises DataError.
    """
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: {field!r} holds no messages", got=repr(value)[:80], expected="a list of messages")
    read = tuple(_message(message, f"{where}: a message of {field!r}") for message in value)
    if not read or read[-1]["role"] not in ends:
        whose = " or ".join(f"the {role}'s" for role in ends)
        raise DataError(f"{where}: {field!r} does not end with {whose} message")
    return read


def prompt(
    record: Mapping[str, Any], field: str, where: str, ends: tuple[str, ...] = ("user", "tool")
) -> tuple[Message, ...]:
    """A prompt as :func:`messages`: a text is the user's message; messages may be JSON text.  Raises DataError."""
    found = listed(record.get(field), f"{where}: {field!r}")
    if isinstance(found, (list, tuple)):
        return messages(found, field, where, ends=ends)
    return ({"role": "user", "content": text(record, field, where)},)


def name_of(record: Mapping[str, Any], number: int, *fields: str) -> str:
    """A record's id: the first of the fields that says something, else its number.

    ``extra_info.index`` is verl's index, which need not be alone in a file: it is for data whose ids it holds.
    """
    extra = record.get("extra_info")
    flat = {**record, "extra_info.index": extra.get("index") if isinstance(extra, Mapping) else None}
    return next(str(name) for name in (*map(flat.get, fields), number) if not says_nothing(name))


def says_nothing(value: Any) -> bool:
    """Whether a value is null, or what a table has in its place: NaN, or no text."""
    return value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value)


def listed(value: Any, what: str) -> Any:
    """Messages that were written as JSON text as a list; anything else as it is.  Raises DataError."""
    written = isinstance(value, str) and MESSAGES.match(value)
    return parsed(value, f"{what} looks like messages, and") if written else value


MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")


def _message(message: Any, where: str) -> Message:
    read = {key: value for key, value in mapping(message, where).items() if value is not None}
    role = text(read, "role", where)
    content = read.get("content", "")
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, where) for part in content)
    if "tool_calls" in read:
        read["tool_calls"] = _calls(read["tool_calls"], where)
    if content != "" or not (read.get("tool_calls") or role in ("system", "tool")):
        text({**message, "content": content}, "content", where)
    whole: Any = {**read, "role": role, "content": content}
    return whole


def _part(part: Any, where: str) -> str:
    part = mapping(part, f"{where}, of which a part")
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        got = repr(part.get("type"))[:80]
        raise DataError(f"{where} has a part that is no text", got=got, expected="text: images and sound are not read")
    return str(part["text"])


def _calls(value: Any, where: str) -> list[Any]:
    """Calls of tools, with their arguments as objects, which is what chat templates take."""
    value = parsed(value, f"{where}: 'tool_calls'")
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: 'tool_calls' is no list", got=repr(value)[:80], expected="a list of calls")
    calls = []
    for entry in value:
        call = without_null(mapping(entry, f"{where}: a call in 'tool_calls'"))
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a call in 'tool_calls' names no function", got=repr(entry)[:80])
        place = f"{where}: 'arguments' of {function['name'][:40]!r}"
        found = mapping(without_null(parsed(function.get("arguments") or {}, place)), place)
        changed = {**function, "arguments": found}
        calls.append({**call, "function": changed} if "function" in call else changed)
    return calls


def tools(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """The descriptions of tools in the column ``tools``: a list of objects, which may be JSON text.

    Null values, which parquet and the Hub fill in, are left out.  Raises DataError.
    """
    found = parsed(record.get("tools") or [], f"{where}: 'tools'")
    if isinstance(found, (list, tuple)):
        found = [parsed(tool, f"{where}: a tool in 'tools'") for tool in found]
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise DataError(f"{where}: 'tools' is no list of objects", got=repr(record["tools"])[:80])
    return tuple(without_null(tool) for tool in found)


def without_null(value: Any) -> Any:
    """JSON's objects and lists, without the keys whose value is null."""
    if isinstance(value, Mapping):
        return {key: without_null(entry) for key, entry in value.items() if entry is not None}
    return [without_null(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def parsed(value: Any, what: str) -> Any:
    """JSON in text, or what is no text as it is.  Raises DataError."""
    if not isinstance(value, str):
        return value
    try:
        return data_files.DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON", got=str(error)[:200]) from error


def from_verl(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A record in verl's schema as the prepared one that it was made of; any other record as it is.

    ``reward_model.ground_truth`` becomes ``answer``, and the last of the messages in ``prompt`` the text of ``prompt``,
    with the first as ``system``.
    """
    model = record.get("reward_model")
    if not isinstance(model, Mapping) or record.get("answer") is not None:
        return record
    prompt = listed(record.get("prompt"), f"{where}: 'prompt'")
    if isinstance(prompt, str):
        return record
    read = messages(prompt, "prompt", where)
    if [message["role"] for message in read] not in (["user"], ["system", "user"]):
        raise DataError(f"{where}: 'prompt' is a conversation", expected="a system message, if any, and the user's")
    system = {"system": read[0]["content"]} if len(read) == 2 else {}
    return {**record, **system, "prompt": read[-1]["content"], "answer": model.get("ground_truth")}


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A value that must be a JSON object.  Raises DataError."""
    if not isinstance(value, Mapping):
        got = "null" if value is None else type(value).__name__
        raise DataError(f"{where} is not an object", got=got, expected="a JSON object")
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
