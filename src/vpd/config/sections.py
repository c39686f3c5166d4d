"""The sections of a configuration: which class a name means, and plain data made into an object of that class.

Four sections are chosen by name: ``env``, ``algorithm``, ``engine`` and the entries of ``feedback``.  The tables map
names to ``module:Class``; a module is imported when it is named.  A name with a colon is a class of the user's:
``path/to/file.py:Name`` or ``package.module:Name``.
"""

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vpd.config.elsewhere import elsewhere
from vpd.config.passed import (
    Passed,
    PassedAlgorithm,
    PassedEngine,
    call_user,
    groups_of,
    missing,
    needs_of,
    require,
)
from vpd.engines.settings import ChangesDefaults
from vpd.envs import Announcing, BesideAnother, Env, wrap_user_errors
from vpd.envs.loading import load_object
from vpd.errors import ConfigError, nearest
from vpd.printable import shown
from vpd.settings import Settings, declarations

if TYPE_CHECKING:
    from vpd.algorithms import Algorithm, Needs
    from vpd.engines import Engine
    from vpd.engines.settings import EngineParts
    from vpd.feedback import Writer
    from vpd.prompts import Prompter
    from vpd.types import Group

Part = TypeVar("Part")
Data = Mapping[str, Any]

LOG = logging.getLogger("vpd")

ALGORITHMS: Mapping[str, str] = {
    "vpd": "vpd.algorithms.vpd:VPDSettings",
    "gated": "vpd.algorithms.gated:GatedSettings",
    "sdpo": "vpd.algorithms.distill:SDPOSettings",
    "gkd": "vpd.algorithms.distill:GKDSettings",
    "grpo": "vpd.algorithms.grpo:GRPOSettings",
    "hybrid": "vpd.algorithms.hybrid:HybridSettings",
    "plare": "vpd.algorithms.plare:PLARESettings",
    "sft": "vpd.algorithms.sft:SFTSettings",
    "ldd": "vpd.algorithms.ldd:LDDSettings",
}
ENVS: Mapping[str, str] = {
    "code": "vpd.envs.code:Code",
    "conventions": "vpd.envs.conventions:Conventions",
    "digits": "vpd.envs.digits:Digits",
    "instructions": "vpd.envs.instructions:Instructions",
    "math": "vpd.envs.math:Math",
    "science": "vpd.envs.science:Science",
    "tooluse": "vpd.envs.tooluse:ToolUse",
    "reasoning_gym": "vpd.envs.reasoning_gym:ReasoningGym",
    "dataset": "vpd.envs.dataset:Dataset",
    "verifiers": "vpd.envs.adapters.verifiers:Verifiers",
    "recorded": "vpd.envs.recorded:RecordedAnswers",
}
SOURCES: Mapping[str, str] = {
    "environment": "vpd.feedback:GraderFeedback",
    "sibling": "vpd.feedback:SiblingDemonstration",
    "self_critique": "vpd.feedback.critique:SelfCritique",
    "critic": "vpd.feedback.critique:Critic",
    "judge": "vpd.feedback.judge:Judge",
}
ENGINES: Mapping[str, str] = {
    "embedded": "vpd.engines.settings:EmbeddedEngineSettings",
    "vllm": "vpd.engines.settings:VLLMSettings",
}
PLAIN: Mapping[str, str] = {
    "model": "vpd.model.settings:ModelSettings",
    "prompts": "vpd.prompts.settings:PromptSettings",
    "rollout": "vpd.rollout:RolloutSettings",
    "optim": "vpd.learners.settings:OptimSettings",
    "dynamics": "vpd.algorithms.dynamics:DynamicsSettings",
    "run": "vpd.config.run_settings:RunSettings",
}
#: Sections that a file may hold beside a run's settings, and that are no part of them.
BESIDE: Mapping[str, str] = {"dry_run": "vpd.estimate.settings:DryRunSettings"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A section that is chosen by name.

    ``kind`` is the word for it in messages, ``table`` maps names to ``module:Class``, ``default`` is the name that is
    taken where none is given, ``example`` how to choose a user's own on the command line, ``contract`` what it must
    have.
    """

    kind: str
    table: Mapping[str, str]
    default: str | None
    example: str
    contract: str


CHOICES: Mapping[str, Choice] = {
    "env": Choice("environment", ENVS, "digits", "env.name my_env.py:MyEnv", "a class with task, eval_tasks and grade"),
    "feedback": Choice(
        "feedback source", SOURCES, None, "feedback '[my_source.py:MySource]'", "called with (groups, writer)"
    ),
    "algorithm": Choice(
        "algorithm",
        ALGORITHMS,
        "gated",
        "algorithm.name my_algorithm.py:MySettings",
        "a dataclass with needs and build",
    ),
    "engine": Choice(
        "engine",
        ENGINES,
        "embedded",
        "engine.name my_engine.py:MyEngine",
        "a class with load and generate, or with build",
    ),
}


#: What stands for an object that was passed, where the config itself asks something of it.
PASSED: Mapping[str, type[Passed]] = {"algorithm": PassedAlgorithm, "engine": PassedEngine}


@dataclass(frozen=True, kw_only=True)
class Custom:
    """A class of the user's, ``name`` (``file.py:Name`` or ``module:Name``), and its options as they were written."""

    name: str
    options: Data = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CustomEnv(Custom):
    """An environment of the user's; it is made when the run is assembled."""

    def build(self) -> Env:
        kind = load_object(self.name, "env.name")
        env: Env = construct(kind, self.options, self.name, "env")
        require(env, ("task", "eval_tasks", "grade"), f"{self.name.rpartition(':')[2]} is no environment")
        return env


@dataclass(frozen=True, kw_only=True)
class CustomAlgorithm(Custom):
    """Settings of the user's method: an object with ``needs`` and ``build(prompter)``."""

    settings: Any = field(compare=False)

    @property
    def needs(self) -> "Needs":
        return needs_of(self.settings, self.name)

    def build(self, prompter: "Prompter") -> "Algorithm":
        return call_user(lambda: self.settings.build(prompter), f"{self.name}.build")


@dataclass(frozen=True, kw_only=True)
class CustomSource(Custom):
    """A feedback source of the user's: anything that can be called with ``(groups, writer)``."""

    source: Any = field(compare=False)

    def __call__(self, groups: "Sequence[Group]", writer: "Writer") -> "list[Group]":
        return groups_of(self.source, self.name, groups, writer)


@dataclass(frozen=True, kw_only=True)
class CustomEngine(Custom):
    """An engine of the user's: ``make`` takes :class:`vpd.engines.settings.EngineParts`."""

    make: Callable[["EngineParts"], Any] = field(compare=False)

    def build(self, parts: "EngineParts") -> "Engine":
        engine: Engine = call_user(lambda: self.make(parts), f"{self.name}.build")
        require(engine, ("load", "generate"), f"{self.name} is no engine")
        return engine


def named_or_passed(section: str, part: Any) -> Any:
    """What the config holds for an object that was passed: a shipped one is its own settings, else its class's name."""
    place = f"{type(part).__module__}:{type(part).__qualname__}"
    of_a_config = isinstance(part, (Custom, Passed)) or place in CHOICES[section].table.values()
    return part if of_a_config else Passed.of(part)


def settings_class(place: str) -> Any:
    """The class that a table's entry ``module:Class`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def named(section: str, data: Data, prefix: str) -> Any:
    """The part that ``data["name"]`` chooses, made of the other keys.  Raises ConfigError."""
    choice = CHOICES[section]
    if set(data) == {"object"}:
        return PASSED.get(section, Passed)(object=str(data["object"]))
    name = data.get("name", choice.default)
    if not isinstance(name, str):
        raise ConfigError(f"{prefix}.name is no text", got=repr(name), expected=f"the name of one {choice.kind}")
    options = {key: value for key, value in data.items() if key != "name"}
    if is_place(name):
        return _custom(section, name, options, prefix)
    if name not in choice.table:
        near = nearest(name, choice.table)
        raise ConfigError(f"unknown {choice.kind} {name!r}", do=f"{near} Your own: --{choice.example}.")
    return build(settings_class(choice.table[name]), data, prefix)


def defaults_for_samples(given: Mapping[str, Mapping[str, Any]], *, recorded: bool = False) -> Mapping[str, Any]:
    """What the engine that is named declares of the defaults of the method that is named, where this has the choice.

    With ``rollout.overlap`` any engine's samples are of older weights, and recorded answers are of others: the
    importance ratio is then taken against their log-probs.
    """
    engine, algorithm = _class_of("engine", given["engine"]), _class_of("algorithm", given["algorithm"])
    changes = dict(engine.algorithm_defaults) if isinstance(engine, ChangesDefaults) else {}
    if given["rollout"].get("overlap") is True or recorded or given["env"].get("name") == "recorded":
        changes["importance_reference"] = "sampler"
    if not changes or not _has_declarations(algorithm):
        return {}
    declared = declarations(algorithm)
    return {
        key: value
        for key, value in changes.items()
        if key in declared and (not declared[key].choices or value in declared[key].choices)
    }


def _class_of(section: str, data: Data) -> Any:
    """The class that a section names, a user's own too; None for an object that was passed, and for an unknown name."""
    name = data.get("name", CHOICES[section].default)
    if "object" in data or not isinstance(name, str):
        return None
    if is_place(name):
        return load_object(name, f"{section}.name")
    return settings_class(CHOICES[section].table[name]) if name in CHOICES[section].table else None


def _has_declarations(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Settings) and dataclasses.is_dataclass(kind)


def known_keys(section: str, name: Any) -> set[str] | None:
    """The settings that the named part has besides its name; None if there is no such part."""
    table = CHOICES[section].table
    if is_place(name):
        return set(_options_of(load_object(name, f"{section}.name")))
    return set(_options_of(settings_class(table[name]))) if isinstance(name, str) and name in table else None


def advice(key: str, known: Iterable[str], section: str = "") -> str | None:
    """What to do about an unknown key of a section: where a setting of that name is, what another library's is here,
    the nearest."""
    methods = _methods_with(key)
    if section == "algorithm" and methods:
        return f"Only algorithm.name {' or '.join(methods)} has it."
    places = _places_of(key)
    if places:
        return f"That is {' or '.join(places)} here."
    known = tuple(known)
    return elsewhere(key) or (nearest(key, known) if known else None)


def _places_of(key: str) -> list[str]:
    """Every section with a setting of that name, whatever is chosen there (environments and feedback left out)."""
    places = {**PLAIN, "model.lora": "vpd.model.settings:LoraSettings"}
    found = [name for name, place in places.items() if key in _options_of(settings_class(place))]
    methods = _methods_with(key)
    return [f"{name}.{key}" for name in found] + ([f"algorithm.{key} ({', '.join(methods)})"] if methods else [])


def _methods_with(key: str) -> list[str]:
    return [name for name, place in ALGORITHMS.items() if key in _options_of(settings_class(place))]


def is_place(name: Any) -> bool:
    """Whether a name is ``file.py:Name`` or ``module:Name``, a class of the user's."""
    return isinstance(name, str) and ":" in name


def build(kind: type[Part], data: Data, prefix: str) -> Part:
    """One settings dataclass from plain data; unknown keys and wrong values are errors that name ``prefix.key``."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}.{key}", do=advice(str(key), fields, prefix))
    for name, one in fields.items():
        if name not in data and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}.{name} is missing", do=f"Set it in the file, or as --{prefix}.{name} VALUE.")
    return kind(**{key: _typed(hints[key], value, f"{prefix}.{key}") for key, value in data.items()})


def construct(kind: Any, options: Data, name: str, prefix: str) -> Any:
    """An object of a user's class.  Raises ConfigError for an unknown option, EnvError if the class raises."""
    short = name.rpartition(":")[2]
    if not callable(kind):
        raise ConfigError(f"{prefix}.name: {short} is not a class", got=shown(kind), expected="a class")
    parameters = inspect.signature(kind).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return call_user(partial(kind, **options), f"{name}(...)")
    known = _options_of(kind)
    for key in options:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}.{key} for {short}", do=nearest(key, known))
    if dataclasses.is_dataclass(kind):
        return call_user(partial(build, kind, options, prefix), f"{name}(...)")  # type: ignore[arg-type]
    return call_user(partial(kind, **options), f"{name}(...)")


def make_env(spec: Any) -> Env:
    """The environment of the section ``env``; a user's own is made here.  Raises ConfigError for an object's name.

    One that names another beside it gets that, of the same table.
    """
    if isinstance(spec, Passed):
        raise missing("the environment", spec.object, "env= (or tasks= and grader=)")
    if isinstance(spec, BesideAnother) and spec.fresh is not None:
        return spec.beside(make_env(named("env", spec.fresh, "env.fresh")))
    return spec.build() if isinstance(spec, CustomEnv) else spec


def announce(env: Env) -> None:
    """Log the environment's announcements, such as which sandbox it uses, a line each.  Raises EnvError."""
    if isinstance(env, Announcing):
        for line in wrap_user_errors(lambda: list(map(str, env.announce())), "announce()"):
            LOG.info(line)


def _custom(section: str, name: str, options: Data, prefix: str) -> Custom:
    if section == "env":
        return CustomEnv(name=name, options=options)
    kind = load_object(name, prefix if section == "feedback" else f"{section}.name")
    if section == "engine":
        is_settings = hasattr(kind, "build")
        made = construct(kind, options, name, prefix) if is_settings else None
        check = made.build if made is not None else lambda parts: construct(kind, options, name, prefix)
        return CustomEngine(name=name, options=options, make=check)
    is_source = section == "feedback" and inspect.isfunction(kind) and not options
    part = kind if is_source else construct(kind, options, name, prefix)
    if section == "feedback":
        if not callable(part):
            raise ConfigError(
                f"{name} is no feedback source", expected="something that is called with (groups, writer)"
            )
        return CustomSource(name=name, options=options, source=part)
    require(part, ("needs", "build"), f"{name} is no algorithm")
    return CustomAlgorithm(name=name, options=options, settings=part)


def _options_of(kind: Any) -> Sequence[str]:
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind) if f.init and f.name != "name"]
    return list(inspect.signature(kind).parameters)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """A value as its field's type; a mapping as the settings dataclass that the field takes, if it takes one."""
    inner = [option for option in get_args(hint) if dataclasses.is_dataclass(option)]
    if inner and isinstance(value, Mapping):
        return build(inner[0], value, key)  # type: ignore[arg-type]
    made, wrong = _validated(hint, value)
    if wrong is None:
        return made
    if isinstance(value, str) and any(get_origin(option) is tuple for option in (hint, *get_args(hint))):
        made, wrong = _validated(hint, [value])  # one word stands for a list of one
        if wrong is None:
            return made
    free = _validated(hint, "any text")[1] is None
    for word in WORDS_OF_TRUTH.get(value, ()) if isinstance(value, bool) and not free else ():
        made, other = _validated(hint, word)
        if other is None and made == word:
            return made
    do = "Write such a word in quotes." if free and isinstance(value, bool) else wrong.do
    raise ConfigError(f"{key}{wrong.place} has a wrong value", got=shown(wrong.got), expected=wrong.expected, do=do)


#: What YAML makes a truth value of where a word is meant, as in ``mixed_precision: no``.
WORDS_OF_TRUTH: Mapping[bool, Sequence[str]] = {False: ("no", "off", "false"), True: ("yes", "on", "true")}


@dataclass(frozen=True, slots=True)
class _Wrong:
    """Why a value does not fit its type."""

    got: Any
    expected: str
    place: str = ""
    do: str | None = None


#: What pydantic calls a type -> what we do.
TYPES = {"a valid tuple": "a list", "a valid integer": "an integer", "a valid number": "a number",
         "a valid string": "a text", "a valid boolean": "true or false"}  # fmt: skip


def _expected(message: str) -> str:
    """What pydantic's message says is expected, without how it tried to read what it got."""
    words = (
        message.removeprefix("Input should be ")
        .removeprefix("Value error, ")
        .split(", unable to ")[0]
        .split(", got ")[0]
    )
    return next((words.replace(theirs, ours) for theirs, ours in TYPES.items() if theirs in words), words)


def _validated(hint: Any, value: Any) -> tuple[Any, _Wrong | None]:
    """The value as the type asks for, or what is wrong with it; a number is no truth value's and no date's stand-in."""
    try:
        made = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        found = error.errors()
        words = [_expected(e["msg"]) for e in found]
        expected = " or ".join(dict.fromkeys(words))
        if found[0]["type"] == "dataclass_type":
            expected = "a mapping of its settings, {} for their defaults"
        place = "".join(f".{part}" for part in found[0]["loc"] if isinstance(part, int))
        quote = any(e["type"] == "string_type" for e in found) and isinstance(value, (bool, int, float))
        return None, _Wrong(found[0]["input"], expected, place, "A text needs quotes." if quote else None)
    if isinstance(value, bool) and not isinstance(made, bool):
        return None, _Wrong(value, "a number" if isinstance(made, (int, float)) else "no truth value")
    if isinstance(value, (int, float)) and not isinstance(made, (int, float)):
        return None, _Wrong(value, "no number", do="A text needs quotes.")
    return made, None
