"""Text of a settings file or of the command line as plain data, where nothing can be read in two ways.

It is YAML 1.1 with the numbers of 1.2 (``1e-5`` is one) and without what surprises: a key that stands twice, a tag,
and what only looks like a number or date (``010``, ``1:40``, ``0b_``, ``2025-13-45``) are errors, a date is a text.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from vpd.errors import ConfigError

LONGEST_FILE = 1 << 20  # bytes
MOST_VALUES = 10_000  # in one text, each as often as its aliases repeat it
INDENTATION = "Indent by spaces, the keys of a section alike, and put a value that holds ': ' in quotes."
#: part of what the parser says -> what it means for whoever wrote the file
PLAIN_REASONS = {
    "found character '\\t'": "a tab",
    "mapping values are not allowed here": "a second ': ' on a line, or a line that is indented too far",
    "expected <block end>": "an indentation that fits nothing above it",
    "expected ',' or '}'": "a { } that is not closed, or in which a ',' is missing",
    "expected ',' or ']'": "a [ ] that is not closed, or in which a ',' is missing",
    "unexpected end of stream": "a quote that is not closed",
    "could not find expected ':'": "a line that is no 'key: value'",
}
NULLS = ("null", "Null", "NULL", "~")

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*|0x[0-9a-fA-F]+)")


class _Refused(yaml.YAMLError):
    """Something that YAML allows and settings do not."""

    def __init__(self, problem: str, node: yaml.Node | yaml.Event):
        super().__init__(problem)
        self.problem, self.problem_mark = problem, node.start_mark


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if not isinstance(event, yaml.AliasEvent) and event.tag is not None:
            raise _Refused(f"a tag ({event.tag.replace(_TAG, '!!')}) has no meaning here", event)
        return super().compose_node(parent, index)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if "\0" in node.value or any("\ud800" <= c <= "\udfff" for c in node.value):
            raise _Refused("a text holds a null character or an unpaired surrogate", node)
        return str(node.value)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        if not _INTEGER.fullmatch(node.value) or len(node.value) > 80:
            raise _ambiguous(node)
        return super().construct_yaml_int(node)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value:
            raise _ambiguous(node)
        return super().construct_yaml_float(node)

    def construct_date(self, node: yaml.ScalarNode) -> str:
        try:
            super().construct_yaml_timestamp(node)
        except ValueError as error:
            raise _ambiguous(node) from error
        return str(node.value)


_Loader.add_constructor(f"{_TAG}str", _Loader.construct_text)
_Loader.add_constructor(f"{_TAG}value", _Loader.construct_text)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)
_Loader.add_constructor(f"{_TAG}timestamp", _Loader.construct_date)
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?([0-9]+|[0-9]*\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Writes every kind of text as a text."""


_Dumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str(text)))


def read_file(path: str) -> dict[str, Any]:
    """The sections of a settings file.  Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        do = "Write one with vpd init, or correct the path." if isinstance(error, FileNotFoundError) else None
        raise ConfigError(f"cannot read the configuration {path}", got=reason, do=do) from error
    if len(content) > LONGEST_FILE:
        raise ConfigError(f"{path} is no settings file", got=f"more than {LONGEST_FILE} bytes")
    return read_sections(content, path)


def read_sections(content: bytes, path: str) -> dict[str, Any]:
    """The sections in the content of the file ``path``.  Raises ConfigError."""
    do = "Inside of { } a value with ${VAR} needs quotes." if b"${" in content else INDENTATION
    data = _read(content, f"{path} is not valid YAML", do) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no sections", got=type(data).__name__, expected="section: {key: value}")
    return data


def read_value(text: str, key: str) -> Any:
    """A word of the command line: a number, a truth value, null, or what stands in quotes or brackets; else itself.

    Raises ConfigError.
    """
    data = _read(text, f"--{key} has a value that is not YAML", "As a text: in quotes, '\"...\"'.")
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        return data
    plain = isinstance(data, (str, list, Mapping)) or (data is None and text.strip() not in NULLS)
    return text if plain else data


def inline(value: Any) -> str:
    """A value on one line, as YAML spells it."""
    options: dict[str, Any] = {"default_flow_style": True, "width": 10_000, "sort_keys": False, "allow_unicode": True}
    text = yaml.dump(value, Dumper=_Dumper, **options)
    return text.removesuffix("\n").removesuffix("\n...")


def _read(content: str | bytes, what: str, do: str | None = None) -> Any:
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(node, {}, set())
        return loader.construct_document(node)
    except RecursionError as error:
        raise ConfigError(what, got="brackets in brackets, too deep to read") from error
    except yaml.YAMLError as error:
        raise ConfigError(what, got=_reason(error), do=None if isinstance(error, _Refused) else do) from error


def _prepare(node: yaml.Node, sizes: dict[yaml.Node, int], inside: set[yaml.Node]) -> int:
    """Make every key a text, and count the values.  Raises for a key that stands twice and for endless aliases."""
    if node in inside:
        raise _Refused("an alias stands inside of what it names", node)
    if node in sizes:
        return sizes[node]
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    sizes[node] = 1 + sum(_prepare(part, sizes, inside | {node}) for part in parts)
    if sizes[node] > MOST_VALUES:
        raise _Refused(f"it holds more than {MOST_VALUES} values", node)
    return sizes[node]


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Refused("a key is no text", key)
        if key.tag == f"{_TAG}merge":
            continue
        if key.value in seen:
            raise _Refused(f"the key {key.value!r} stands twice", key)
        seen.add(key.value)
        key.tag = f"{_TAG}str"


def _ambiguous(node: yaml.ScalarNode) -> _Refused:
    shown = node.value if len(node.value) <= 40 else f"{node.value[:36]} ..."
    return _Refused(f"{shown} is no plain number or date; a text needs quotes", node)


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong and where, on one line."""
    if isinstance(error, (_Refused, yaml.MarkedYAMLError)) and error.problem and error.problem_mark:
        plain = next((plain for part, plain in PLAIN_REASONS.items() if part in error.problem), error.problem)
        return f"{plain} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split())
