"""The pages about settings, written from the dataclasses each time the site is built."""

import ast
import dataclasses
import datetime
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vpd.commands import SECTIONS
from vpd.commands.settings_help import about, default_text
from vpd.config import OPTIM_OF_SHIPPED_BASES, check_together
from vpd.config.sections import BESIDE, CHOICES, PLAIN, settings_class
from vpd.settings import declarations

LORA = "vpd.model.settings:LoraSettings"
ORDER = (*SECTIONS, *BESIDE)
WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    datetime.date: "date",
    type(None): "null",
    Any: "anything",
}
#: What a section is about, in a sentence; the words for all of it are in the tables of this page.
CHOSEN = {
    "env": "Which tasks are asked, and how answers are graded.",
    "feedback": "Where the text comes from that the teacher reads: a list of sources, joined in order.",
    "algorithm": "Which method trains the model.",
    "engine": "Which engine samples the answers.",
}


def pages() -> dict[str, str]:
    """Markdown of every page, by its path in the site."""
    return {"settings/index.md": _index()} | {f"settings/{section}.md": _section(section) for section in ORDER}


def navigation() -> list[str | dict[str, str]]:
    """The entries of the navigation."""
    return ["settings/index.md", *({section: f"settings/{section}.md"} for section in ORDER)]


def anchors() -> dict[str, str]:
    """The place ``page#anchor`` of every ``section.key``; of a key that several parts have, the first part's."""
    found: dict[str, str] = {}
    for section in ORDER:
        for title, kind in _kinds(section):
            for field in _fields(kind):
                found.setdefault(f"{section}.{field.name}", f"settings/{section}.html#{title}.{field.name}")
        if section in CHOICES:
            found[f"{section}.name"] = f"settings/{section}.html"
    for field in _fields(settings_class(LORA)):
        found[f"model.lora.{field.name}"] = f"settings/model.html#model.lora.{field.name}"
    return found


def _kinds(section: str) -> list[tuple[str, Any]]:
    """The dataclasses of a section, with what their anchors begin with."""
    if section in CHOICES:
        return [(f"{section}.{name}", settings_class(place)) for name, place in CHOICES[section].table.items()]
    kinds = [(section, settings_class({**PLAIN, **BESIDE}[section]))]
    return [*kinds, ("model.lora", settings_class(LORA))] if section == "model" else kinds


def _fields(kind: Any) -> list["dataclasses.Field[Any]"]:
    return [field for field in dataclasses.fields(kind) if field.init and field.name != "name"]


def _index() -> str:
    rows = [f"| [{section}]({section}.md) | {_about_section(section)} |" for section in ORDER]
    rules = "\n".join(f"* {rule}" for rule in _rules_of(check_together))
    return f"""# Settings

A file has these sections; each setting may also stand on the command line, as `--section.key value`, and wins there
over the file. In Python a section is an argument of `vpd.train`. [Runs](../running.md#settings) says how values are
read. What is listed here is made from the code when this site is built; `vpd train --help` shows the same.

| section | |
|---|---|
{chr(10).join(rows)}

## Rules between sections

These are refused before anything is made:

{rules}
"""


def _about_section(section: str) -> str:
    return CHOSEN[section] if section in CHOSEN else about(settings_class({**PLAIN, **BESIDE}[section]))


def _section(section: str) -> str:
    parts = [f"# Settings: {section}", _about_section(section)]
    if section in CHOICES:
        parts += [_choice(section)]
    for title, kind in _kinds(section):
        if section in CHOICES:
            parts += [f"## {title.partition('.')[2]} {{ #{title} }}", _prose(_about_part(section, kind))]
        elif title != section:
            parts += [f"## {title} {{ #{title.rpartition('.')[2]} }}", _prose(about(kind))]
        parts += [_setting(title, kind, field) for field in _fields(kind)] or ["It has no settings."]
        parts += _rules(kind)
    if section == "optim":
        changed = ", ".join(f"`{key}` {value}" for key, value in OPTIM_OF_SHIPPED_BASES.items())
        parts += [f"Where `model.name_or_path` is a shipped base such as tiny, other defaults hold: {changed}."]
    return "\n\n".join(parts) + "\n"


def _about_part(section: str, kind: Any) -> str:
    """Of an environment, what its module says: the class says the same of all of them."""
    return about(importlib.import_module(kind.__module__)) if section == "env" else about(kind)


def _choice(section: str) -> str:
    choice = CHOICES[section]
    names = ", ".join(f"[{name}](#{section}.{name})" for name in choice.table)
    first = f"`{section}.name` is one of {names}; default `{choice.default}`."
    if section == "feedback":
        first = (
            f"An entry is a name or a mapping `{{name: ..., key: value}}`; names are {names}. Default `[environment]`."
        )
    return f"{first} Your own {choice.kind} is {choice.contract}: `--{choice.example}`; further keys are passed to it."


def _setting(title: str, kind: Any, field: "dataclasses.Field[Any]") -> str:
    declared = declarations(kind)[field.name]
    default = default_text(kind, field, declared.optional)
    facts = [_words(get_type_hints(kind)[field.name])]
    facts += [declared.range.removesuffix(", or null")] if declared.range and not declared.choices else []
    facts += ["must be given" if default is None else f"default `` {default} ``"]
    heading = f"### `{field.name}` {{ #{title}.{field.name} data-toc-label='{field.name}' }}"
    return f"{heading}\n\n{' · '.join(facts)}\n{{ .setting }}\n\n{_prose(declared.meaning)}"


def _words(hint: Any) -> str:
    """A type in words, as a file spells its values."""
    if hint in WORDS:
        return WORDS[hint]
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_words(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint) or get_origin(hint) in (Mapping, dict):
        return "mapping"
    return " or ".join(_words(option) for option in get_args(hint)).replace("true or false or", "true, false or")


def _rules(kind: Any) -> list[str]:
    found = [rule for method in _checks(kind) for rule in _rules_of(method)]
    return ["Refused:\n\n" + "\n".join(f"* {rule}" for rule in dict.fromkeys(found))] if found else []


def _checks(kind: Any) -> Iterator[Any]:
    """The methods of a settings class, and of those above it, that hold rules between fields."""
    for owner in reversed(kind.__mro__):
        if owner.__module__.startswith("vpd."):
            yield from (f for name, f in vars(owner).items() if name.strip("_").startswith("check") and callable(f))


def _rules_of(function: Any) -> Iterator[str]:
    """What a function refuses: every ConfigError in it, in the words of its message."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ConfigError"):
            continue
        parts = {keyword.arg: _text(keyword.value) for keyword in node.keywords}
        line = _text(node.args[0])
        line += f"; expected {parts['expected']}" if parts.get("expected") else ""
        line += f" (as with {parts['got']})" if "…" not in parts.get("got", "…") else ""
        yield _prose(f"{line}. {parts.get('do', '')}".rstrip())


def _text(node: ast.expr) -> str:
    """A text in the source as it reads, with … for what is only known when it is made."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return "…"


def _prose(text: str) -> str:
    """Plain text as Markdown that shows it unchanged."""
    for character in "\\`*[]<{":
        text = text.replace(character, {"<": "&lt;", "{": "&#123;"}.get(character, f"\\{character}"))
    return text
