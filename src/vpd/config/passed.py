"""What a config holds in the place of a Python object that was passed: the object's name, which no file can load.

``config.yaml`` then has ``{object: module.Class}``.  A config that is read from such a file needs the objects again.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from vpd.envs import RecordedAs, wrap_user_errors
from vpd.errors import ConfigError
from vpd.printable import shown

if TYPE_CHECKING:
    from vpd.algorithms import Algorithm, Needs
    from vpd.engines import Engine
    from vpd.engines.settings import EngineParts
    from vpd.feedback import Writer
    from vpd.prompts import Prompter
    from vpd.types import Group


@dataclass(frozen=True, kw_only=True)
class Passed:
    """The name of the class of an object that was passed, or of a function."""

    object: str

    @classmethod
    def of(cls, part: Any, **more: Any) -> Self:
        if isinstance(part, RecordedAs):
            return cls(object=part.recorded_as, **more)
        kind = part if inspect.isroutine(part) else type(part)
        return cls(object=f"{kind.__module__}.{kind.__qualname__}", **more)


@dataclass(frozen=True, kw_only=True)
class PassedAlgorithm(Passed):
    """Settings of a method that were passed: an object with ``needs`` and ``build(prompter)``; None: from a file."""

    settings: Any = field(default=None, compare=False)

    @property
    def needs(self) -> "Needs":
        return needs_of(self._present, self.object)

    def build(self, prompter: "Prompter") -> "Algorithm":
        return call_user(lambda: self._present.build(prompter), f"{self.object}.build")

    @property
    def _present(self) -> Any:
        if self.settings is None:
            raise missing("the algorithm", self.object, "algorithm=")
        return self.settings


@dataclass(frozen=True, kw_only=True)
class PassedEngine(Passed):
    """An engine that was passed, or settings with ``build(parts)``; None: from a file."""

    engine: Any = field(default=None, compare=False)

    def build(self, parts: "EngineParts") -> "Engine":
        if self.engine is None:
            raise missing("the engine", self.object, "engine=")
        made = self.engine
        if hasattr(made, "build"):
            made = call_user(lambda: self.engine.build(parts), f"{self.object}.build")
        require(made, ("load", "generate"), f"{self.object} is no engine")
        engine: Engine = made
        return engine


@dataclass(frozen=True, kw_only=True)
class PassedSource(Passed):
    """A feedback source that was passed: a function of (groups, writer)."""

    source: Any = field(compare=False)

    def __call__(self, groups: "Sequence[Group]", writer: "Writer") -> "list[Group]":
        return groups_of(self.source, self.object, groups, writer)


def missing(what: str, name: str, argument: str) -> ConfigError:
    """The error for an object that a config names and nobody passed."""
    return ConfigError(
        f"{what} was passed as an object ({name}) that no file can name", do=f"Pass {argument} again, from Python."
    )


def needs_of(settings: Any, name: str) -> "Needs":
    """``settings.needs``.  Raises ConfigError unless it is a Needs."""
    from vpd.algorithms import Needs

    needs = call_user(lambda: settings.needs, f"{name}.needs")
    if not isinstance(needs, Needs):
        raise ConfigError(f"{name}.needs has the wrong type", got=shown(needs), expected="vpd.algorithms.Needs")
    return needs


def groups_of(source: Any, name: str, groups: "Sequence[Group]", writer: "Writer") -> "list[Group]":
    """``source(groups, writer)``.  Raises ConfigError unless it is as many groups, EnvError if it raises."""
    made: Any = call_user(lambda: source(groups, writer), f"the feedback source {name}", loading=False)
    if not isinstance(made, list) or len(made) != len(groups):
        got = f"{len(made)} groups" if isinstance(made, list) else type(made).__name__
        raise ConfigError(
            f"the feedback source {name} returned something else", got=got, expected=f"{len(groups)} groups"
        )
    return made


def require(part: Any, attributes: Sequence[str], what: str) -> None:
    """Raise ConfigError unless an object has these attributes."""
    absent = [name for name in attributes if not hasattr(part, name)]
    if absent:
        raise ConfigError(
            what, got=f"{type(part).__name__} without {' and '.join(absent)}", expected=", ".join(attributes)
        )


def call_user(call: Any, what: str, *, loading: bool = True) -> Any:
    """A call of a user's code; what it raises is an EnvError."""
    return wrap_user_errors(call, what, do="Correct that file.", loading=loading)
