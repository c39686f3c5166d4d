"""Settings of another library as settings of this one: every key is mapped, ignored or impossible, with the reason.

``mapped``: there is a setting that does the same, or what the remark says.  ``ignored``: the key changes nothing of
what is learned, or asks for what is done here anyway.  ``impossible``: it changes what is learned, and there is nothing
like it here; the run goes without it.

The rules are in :mod:`vpd.config.convert.trl`, :mod:`vpd.config.convert.verl` and the modules that these import.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from vpd.config import SECTIONS, Config, load_over
from vpd.config.elsewhere import ABSENT, elsewhere
from vpd.errors import ConfigError, DataError, near
from vpd.settings import expand_path

Verdict: TypeAlias = Literal["mapped", "ignored", "impossible"]


class Unread(str):
    """A value that is no text but an expression, or a variable that its file does not set; ``why`` it is not taken."""

    why: str

    def __new__(cls, text: str, why: str = "") -> "Unread":
        made = super().__new__(cls, text)
        made.why = why
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """Settings of another library by their flat keys (``a.b`` for a nested one), and what it takes where none is given.

    ``tasks``: how many records there are to train on, None where that is unknown.
    """

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    num_processes: int = 1
    tasks: int | None = None

    def __getitem__(self, key: str) -> Any:
        value = self.given.get(key)
        return self.defaults.get(key) if key not in self.given or isinstance(value, Unread) else value

    def number(self, key: str, otherwise: float = 0) -> float:
        """A setting as a number; ``otherwise`` where it is none."""
        value = self[key]
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What becomes of one key: settings here (by ``section.key``), and the reason or a remark."""

    verdict: Verdict
    why: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


Rule: TypeAlias = Callable[[Any, Foreign], Outcome]


def mapped(why: str = "", /, **settings: Any) -> Outcome:
    """Settings are written ``section__key=value``."""
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return Outcome(verdict="mapped", why=why, settings=named)


def ignored(why: str) -> Outcome:
    return Outcome(verdict="ignored", why=why)


def impossible(why: str, /, **settings: Any) -> Outcome:
    return Outcome(verdict="impossible", why=why, settings=mapped(**settings).settings)


NO_VALUE = impossible("its value is not in the file; give it as --section.key VALUE")


def same(place: str, why: str = "") -> Rule:
    """The value as it is, at this place."""
    return lambda value, foreign: Outcome(verdict="mapped", why=why, settings={place: value})


@dataclass(frozen=True, slots=True)
class Ignoring:
    """The rule of a key that is ignored whatever its value is, also one that cannot be read."""

    why: str

    def __call__(self, value: Any, foreign: Foreign) -> Outcome:
        return ignored(self.why)


def always_ignored(why: str) -> Rule:
    return Ignoring(why)


def only(harmless: Collection[Any], why: str) -> Rule:
    """Impossible, but for the values that ask for what is done here anyway."""
    return lambda value, foreign: ignored(f"as here: {why}") if value in harmless else impossible(why)


def only_where(condition: Callable[[Foreign], bool], why: str, rule: Rule) -> Rule:
    """A rule for a key that has an effect where other keys ask for it; elsewhere it is ignored."""
    return lambda value, foreign: rule(value, foreign) if condition(foreign) else ignored(why)


def absent(key: str, harmless: Collection[Any]) -> Rule:
    """:func:`only`, with the reason that the hint for an unknown key gives."""
    return only(harmless, ABSENT[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What became of one key; ``default``: nobody gave it, the other library takes this value."""

    key: str
    value: Any
    outcome: Outcome
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Another library's settings: what it takes by default, and a rule for each key, or for all that begin alike.

    ``implied`` are settings here that follow from the library and not from a key.
    """

    name: str
    defaults: Mapping[str, Any]
    rules: Mapping[str, Rule]
    prefixes: Mapping[str, Rule]
    implied: Callable[[Foreign], Mapping[str, Any]]

    def rule(self, key: str) -> Rule:
        if key in self.rules:
            return self.rules[key]
        beginning = max((start for start in self.prefixes if key.startswith(start)), key=len, default=None)
        if beginning is not None:
            return self.prefixes[beginning]
        hint = elsewhere(key.rpartition(".")[2])
        unknown = [f"{self.name} is not known to have it", near(key, self.rules)]
        return lambda value, foreign: impossible(hint or ". ".join(filter(None, unknown)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """The settings, checked, and a line for each key."""

    dialect: str
    config: Config
    settings: Mapping[str, Any]
    lines: Sequence[Line]

    def of(self, verdict: Verdict) -> list[Line]:
        return [line for line in self.lines if line.outcome.verdict == verdict]

    def to_yaml(self, origin: str, first: str | None = None) -> str:
        """The settings as a file; what could not be taken over stands above them, and what is to be done ``first``."""
        head = [f"# Converted from {origin} ({self.dialect})."]
        head += [f"# {first}"] if first else []
        missing = self.of("impossible")
        if missing:
            head.append("# Not taken over, and the run differs in it:")
        head += [f"#   {line.key}: {_one_line(line.value)} ({line.outcome.why})" for line in missing]
        return "\n".join(head) + "\n" + yaml.safe_dump(dict(self.settings), sort_keys=False, width=110)


def lines_of(dialect: Dialect, foreign: Foreign) -> list[Line]:
    """What becomes of every given key, and of the defaults that are settings here or impossible."""
    found = [
        Line(key=key, value=value, outcome=_outcome(dialect, key, value, foreign))
        for key, value in foreign.given.items()
    ]
    for key, value in foreign.defaults.items():
        if key not in foreign.given:
            outcome = dialect.rule(key)(value, foreign)
            if outcome.settings or outcome.verdict == "impossible":
                found.append(Line(key=key, value=value, outcome=outcome, default=True))
    return found


def _outcome(dialect: Dialect, key: str, value: Any, foreign: Foreign) -> Outcome:
    rule = dialect.rule(key)
    if isinstance(value, Unread) and not isinstance(rule, Ignoring):
        return impossible(value.why) if value.why else NO_VALUE
    return rule(value, foreign)


def settings_of(dialect: Dialect, foreign: Foreign, lines: Sequence[Line]) -> dict[str, Any]:
    """The settings of all lines by section; a given key wins over a default, and any over what is implied."""
    flat = dict(dialect.implied(foreign))
    for line in sorted(lines, key=lambda line: not line.default):
        flat |= line.outcome.settings
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    ordered = {section: nested[section] for section in SECTIONS if section in nested}
    for section in {"env", "engine", "algorithm"} & ordered.keys():
        ordered[section] = {"name": ordered[section]["name"], **ordered[section]}
    return ordered


def convert(dialect: Dialect, foreign: Foreign, overrides: Sequence[str] = ()) -> Converted:
    """The other library's settings as checked ones; ``--section.key value`` in ``overrides`` wins.

    Raises ConfigError where the result is not complete, such as without data or a reward function.
    """
    lines = lines_of(dialect, foreign)
    config, settings = load_over(settings_of(dialect, foreign, lines), overrides)
    if "name_or_path" not in settings.get("model", {}):
        raise ConfigError(
            "model.name_or_path is missing: which model is trained cannot be read from the file",
            expected="a Hub id or a folder",
            do="Give --model.name_or_path.",
        )
    return Converted(dialect=dialect.name, config=config, settings=settings, lines=lines)


def count_records(path: Any, *, subset: str | None = None, split: str = "train") -> int | None:
    """How many records a file or folder holds; None for one that is not here or cannot be read."""
    try:
        here = expand_path(path, "env.path") if isinstance(path, str) else None
        if here is None or not Path(here).exists():
            return None
        from vpd.envs import data_files  # which loads pyarrow

        return sum(1 for _ in data_files.entries(here, subset=subset, split=split))
    except (ConfigError, DataError):
        return None


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:76]} ..."
