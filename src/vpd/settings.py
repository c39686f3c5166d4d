"""Settings declare their ranges once: one check reads them, and so does ``--help``.

    @dataclass(frozen=True, kw_only=True)
    class MySettings(Settings, section="algorithm"):
        temperature: Annotated[float, Gt(0), "sampling temperature"] = 1.0
        share: Annotated[float, Share, "share of the rows"] = 0.5

        def check(self) -> None:      # rules between fields, if there are any
            ...

A value out of its range is a :class:`ConfigError` that names ``section.field``, whether the object is made in Python or
from a file.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from vpd.errors import ConfigError
from vpd.printable import shown

Share = Interval(ge=0.0, le=1.0)  # a number from 0 to 1, both included


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by ``section.key``.

    >>> flat({"run": {"seed": 0}, "model": {"lora": {"r": 8}}})
    {'run.seed': 0, 'model.lora.r': 8}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@dataclass(frozen=True, slots=True)
class IsPath:
    """Marks a setting, or a list of them, as a path: ``~`` and ``${VAR}`` are replaced when the object is made.

    ``read``: a run reads what is there, if it is a path at all, so that a continued run can see whether it changed.
    """

    read: bool = True


class Settings:
    """Base of all settings dataclasses: construction checks every declared range, then :meth:`check`."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if section is not None:
            cls.section = section

    def __post_init__(self) -> None:
        for name, declared in declarations(type(self)).items():
            key = f"{self.section}.{name}" if self.section else name
            if declared.path is not None:
                object.__setattr__(self, name, _expanded(getattr(self, name), key))
            declared.check(getattr(self, name), key)
        self.check()

    def check(self) -> None:
        """Rules between fields.  Raises ConfigError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What an annotation says of a field: its meaning, its range as words, and the values it may take."""

    meaning: str
    bounds: tuple[Ge | Gt | Le | Lt, ...]
    choices: tuple[Any, ...]
    optional: bool
    path: IsPath | None = None

    @property
    def range(self) -> str:
        """``at least 1``, ``from 0 to 1``, ``'sum' or 'mean'``; empty where anything goes."""
        if self.choices:
            return " or ".join(map(repr, self.choices)) + (" or null" if self.optional else "")
        low = next((b for b in self.bounds if isinstance(b, (Ge, Gt))), None)
        high = next((b for b in self.bounds if isinstance(b, (Le, Lt))), None)
        words = ""
        if low and high:
            words = f"{_edge(low)} to {_edge(high)}"
        elif low:
            words = f"at least {low.ge!s}" if isinstance(low, Ge) else f"above {low.gt!s}"
        elif high:
            words = f"at most {high.le!s}" if isinstance(high, Le) else f"below {high.lt!s}"
        return f"{words}, or null" if words and self.optional else words

    def check(self, value: Any, key: str) -> None:
        """Raise ConfigError unless ``value`` is one of the choices and within the bounds."""
        if value is None and self.optional:
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} is out of range", got=repr(value), expected=self.range or "a finite number")
        if self.choices:
            holds = any(value == choice for choice in self.choices)
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            holds = not self.bounds or (number and all(_within(value, bound) for bound in self.bounds))
        if not holds:
            raise ConfigError(f"{key} is out of range", got=shown(value), expected=self.range)


def split_words(words: Sequence[str], is_setting: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Words of a command line in two: ``--key value`` or ``--key=value`` where ``is_setting("--key")``, and all others.

    >>> split_words(["a", "--run.seed", "3", "--tasks", "4", "--env.name=code"], lambda key: "." in key)
    (['--run.seed', '3', '--env.name=code'], ['a', '--tasks', '4'])
    """
    chosen: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, _ = word.partition("=")
        if not key.startswith("--") or not is_setting(key):
            others.append(word)
            continue
        chosen.append(word)
        if not equals and rest and not rest[0].startswith("--"):
            chosen.append(rest.pop(0))
    return chosen, others


def expand_path(text: str, key: str) -> str:
    """``text`` with ``~`` at its beginning and every ``$VAR`` or ``${VAR}`` replaced; ``key`` is the setting's name.

    Raises ConfigError: there is no such user or variable.
    """
    home = os.path.expanduser(text)
    if text.startswith("~") and home == text:
        raise ConfigError(f"{key}: there is no such user", got=text, do=f"A folder of that name is ./{text}.")

    def value(match: re.Match[str]) -> str:
        name = match["braced"] or match["plain"]
        if name not in os.environ:
            raise ConfigError(f"{key}: the environment has no variable {name}", got=text)
        return os.environ[name]

    return re.sub(r"\$(?:\{(?P<braced>\w+)\}|(?P<plain>[A-Za-z_]\w*))", value, home)


def _expanded(value: Any, key: str) -> Any:
    if isinstance(value, str):
        return expand_path(value, key)
    return tuple(_expanded(entry, key) for entry in value) if isinstance(value, tuple) else value


def declarations(kind: Any) -> Mapping[str, Declaration]:
    """What the annotations of a settings dataclass declare, by field."""
    return _declarations(kind)


@functools.cache
def _declarations(kind: Any) -> Mapping[str, Declaration]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _declared(hints[field.name]) for field in dataclasses.fields(kind) if field.init}


def _declared(hint: Any) -> Declaration:
    annotated = get_origin(hint) is Annotated
    plain, *metadata = get_args(hint) if annotated else (hint,)
    optional = type(None) in get_args(plain)
    alternatives = get_args(plain) if optional else (plain,)
    literal = [a for a in alternatives if get_origin(a) is Literal]
    others = [a for a in alternatives if a is not type(None) and get_origin(a) is not Literal]
    bounds: list[Ge | Gt | Le | Lt] = []
    for entry in metadata:
        if isinstance(entry, Interval):
            bounds += [bound for bound in entry if isinstance(bound, (Ge, Gt, Le, Lt))]
        elif isinstance(entry, (Ge, Gt, Le, Lt)):
            bounds.append(entry)
    return Declaration(
        meaning=next((entry for entry in metadata if isinstance(entry, str)), ""),
        bounds=tuple(bounds),
        choices=tuple(value for a in literal for value in get_args(a)) if not others else (),
        optional=optional,
        path=next((entry for entry in metadata if isinstance(entry, IsPath)), None),
    )


def _edge(bound: Ge | Gt | Le | Lt) -> str:
    match bound:
        case Ge():
            return f"from {bound.ge}"
        case Gt():
            return f"above {bound.gt}"
        case Le():
            return str(bound.le)
        case Lt():
            return f"below {bound.lt}"


def _within(value: Any, bound: Ge | Gt | Le | Lt) -> bool:
    match bound:
        case Ge():
            return bool(value >= bound.ge)
        case Gt():
            return bool(value > bound.gt)
        case Le():
            return bool(value <= bound.le)
        case Lt():
            return bool(value < bound.lt)
