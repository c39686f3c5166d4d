"""Every setting with its meaning, range and default, as the dataclasses declare them."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

HEAD = """\
settings
  In the file, or as --section.key value (or --section.key=value), which wins over the file. Each line: the key, what it
  means, (its range), [its default]."""


def settings_help(sections: Sequence[str]) -> str:
    """Every setting of the sections with its meaning, range and default, as the dataclasses declare them."""
    from vpd.config import OPTIM_OF_SHIPPED_BASES
    from vpd.config.sections import BESIDE, CHOICES, PLAIN, settings_class

    lines = [HEAD]
    for section in sections:
        if section in CHOICES:
            lines += _choice_help(section)
            continue
        lines += _section_help(section, settings_class({**PLAIN, **BESIDE}[section]))
        if section == "model":
            lines += _section_help("model.lora", settings_class("vpd.model.settings:LoraSettings"))
        if section == "optim":
            changed = ", ".join(f"{key} {value}" for key, value in OPTIM_OF_SHIPPED_BASES.items())
            lines.append(f"    (where model.name_or_path is a shipped base such as tiny, the defaults are: {changed})")
    return "\n".join(lines)


def _choice_help(section: str) -> list[str]:
    from vpd.config.sections import CHOICES, settings_class

    choice = CHOICES[section]
    names = ", ".join(choice.table)
    lines = [f"\n  {section}.name: one of {names} (default {choice.default})."]
    if section == "feedback":
        lines = [f"\n  feedback: a list of names or {{name: ..., key: value}}; {names} (default [environment])."]
    own = f"Your own {choice.kind} ({choice.contract}): --{choice.example}; further keys are passed to it."
    lines += textwrap.wrap(own, 118, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    for name, place in choice.table.items():
        lines += _section_help(f"{section} {name}", settings_class(place))
    return lines


def about(kind: Any) -> str:
    """The first paragraph of a docstring, without what it raises."""
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].partition("  Raises ")[0].replace("``", "").split())


def _section_help(title: str, kind: Any) -> list[str]:
    from vpd.settings import declarations

    lines = ["", *textwrap.wrap(f"{title}: {about(kind)}", 118, initial_indent="  ", subsequent_indent="    ")]
    declared = declarations(kind)
    for field in dataclasses.fields(kind):
        if field.name == "name" or not field.init:
            continue
        declaration = declared[field.name]
        text = declaration.meaning + (f" ({declaration.range})" if declaration.range else "")
        text += _default(kind, field, declaration.optional)
        lines += textwrap.wrap(
            f"{field.name:<30}{text}", 118, initial_indent="    ", subsequent_indent=" " * 34, break_long_words=False
        )
    return lines


def _default(kind: Any, field: "dataclasses.Field[Any]", optional: bool) -> str:
    """`` [default]``; nothing for a setting that must be given."""
    shown = default_text(kind, field, optional)
    if shown is None:
        return ""
    return f" {shown}" if shown.startswith("[") else f" [{shown}]"


def default_text(kind: Any, field: "dataclasses.Field[Any]", optional: bool) -> str | None:
    """A setting's default as a configuration spells it; None for a setting that must be given."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif value is None and not optional:
        value = vars(kind())[field.name]  # decided when the object is made
    return None if value is dataclasses.MISSING else _show(value)


def _show(value: Any) -> str:
    """A value as a configuration spells it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_show, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)
