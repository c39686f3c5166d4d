"""One file of settings, checked whole before anything is made.

    model: {name_or_path: tiny}
    env: {name: digits}
    feedback: [environment]
    algorithm: {name: vpd, e_every: 5}
    optim: {learning_rate: 2.0e-4}
    run: {max_steps: 100, output_dir: out}

``--section.key value`` (and ``--feedback '[name, ...]'``) on the command line overrides the file.  Every section is a
frozen dataclass that lives beside the code that reads it; an unknown key is an error that names the nearest one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from vpd.algorithms.distill import GKDSettings, SDPOSettings
from vpd.algorithms.gated import GatedSettings
from vpd.algorithms.grpo import GRPOSettings
from vpd.algorithms.hybrid import HybridSettings
from vpd.algorithms.vpd import VPDSettings
from vpd.envs.adapters.verifiers import Verifiers
from vpd.envs.code import Code
from vpd.envs.dataset import Dataset
from vpd.envs.digits import Digits
from vpd.envs.instructions import Instructions
from vpd.envs.loading import CustomEnv
from vpd.envs.math import Math
from vpd.envs.reasoning_gym import ReasoningGym
from vpd.envs.science import Science
from vpd.envs.tooluse import ToolUse
from vpd.errors import ConfigError, nearest
from vpd.feedback import GraderFeedback, SiblingDemonstration
from vpd.feedback.critique import Critic, SelfCritique
from vpd.learners.accelerate_learner import OptimSettings
from vpd.model.lora import LoraSettings
from vpd.prompts import PromptSettings
from vpd.rollout import RolloutSettings

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is trained."""

    name_or_path: Annotated[str, "a Hub id, a local folder, or 'tiny' for the shipped base"] = "tiny"
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], "of the weights"] = "float32"
    lora: Annotated[LoraSettings | None, "train adapters of this kind; null: all weights"] = None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long, how often, and where."""

    max_steps: Annotated[int, "iterations"] = 100
    save_steps: Annotated[int, "a checkpoint every so many iterations; 0: none"] = 0
    save_total_limit: Annotated[int | None, "newest checkpoints to keep; null: all"] = None
    eval_steps: Annotated[int, "evaluate student and teacher every so many iterations; 0: never"] = 0
    eval_limit: Annotated[int | None, "held-out tasks per evaluation; null: all"] = 64
    eval_samples: Annotated[int, "answers per held-out task"] = 4
    seed: Annotated[int, "fixes tasks and samples"] = 0
    output_dir: Annotated[str, "the run folder"] = "out"
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], "where metrics go besides output_dir"
    ] = ()
    resume: Annotated[bool, "continue from the newest good checkpoint of output_dir"] = False

    def __post_init__(self) -> None:
        for name, low in (("max_steps", 1), ("save_steps", 0), ("eval_steps", 0), ("eval_samples", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"run.{name} is too small", got=getattr(self, name), expected=f"at least {low}")


ALGORITHMS: dict[str, type] = {
    "vpd": VPDSettings,
    "gated": GatedSettings,
    "sdpo": SDPOSettings,
    "gkd": GKDSettings,
    "grpo": GRPOSettings,
    "hybrid": HybridSettings,
}
ENVS: dict[str, type] = {
    "code": Code,
    "digits": Digits,
    "instructions": Instructions,
    "math": Math,
    "science": Science,
    "tooluse": ToolUse,
    "reasoning_gym": ReasoningGym,
    "dataset": Dataset,
    "verifiers": Verifiers,
}
SOURCES: dict[str, type] = {
    "environment": GraderFeedback,
    "sibling": SiblingDemonstration,
    "self_critique": SelfCritique,
    "critic": Critic,
}
PLAIN: dict[str, type] = {
    "model": ModelSettings,
    "prompts": PromptSettings,
    "rollout": RolloutSettings,
    "optim": OptimSettings,
    "run": RunSettings,
}
SECTIONS = ("model", "env", "feedback", "prompts", "rollout", "algorithm", "optim", "run")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of a run's settings, resolved."""

    model: ModelSettings
    env: Any
    feedback: tuple[Any, ...]
    prompts: PromptSettings | None
    rollout: RolloutSettings
    algorithm: VPDSettings | SDPOSettings | GKDSettings | GRPOSettings | HybridSettings
    optim: OptimSettings
    run: RunSettings

    def as_dict(self) -> dict[str, Any]:
        """Plain data that :func:`parse` takes back."""
        data: dict[str, Any] = {}
        for section in SECTIONS:
            value = getattr(self, section)
            if section == "feedback":
                data[section] = [dataclasses.asdict(source) for source in value]
            elif isinstance(value, CustomEnv):
                data[section] = {"name": value.name, **value.options}
            elif value is not None:
                data[section] = dataclasses.asdict(value)
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(self.as_dict()), sort_keys=False)


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """A file and ``--section.key value`` pairs as a checked Config.  Raises ConfigError."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text()) or {}
        except OSError as error:
            raise ConfigError(f"cannot read the configuration {path}", got=error.strerror) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML", got=" ".join(str(error).split())) from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds no sections", got=type(data).__name__, expected=f"a mapping of {SECTIONS}")
    for key, value in _pairs(overrides):
        _assign(data, key, value)
    return parse(data)


def parse(data: Mapping[str, Any]) -> Config:
    """Plain data as a checked Config.  Raises ConfigError."""
    for section in data:
        if section not in SECTIONS:
            raise ConfigError(f"unknown section {section!r}", do=nearest(str(section), SECTIONS))
        if section != "feedback" and not isinstance(data[section], Mapping):
            raise ConfigError(
                f"section {section!r} is not a mapping", got=repr(data[section]), expected="key: value pairs"
            )
    sections: dict[str, Any] = {name: build(kind, data.get(name, {}), name) for name, kind in PLAIN.items()}
    if "prompts" not in data:
        sections["prompts"] = None
    config = Config(
        env=_env(data.get("env", {"name": "digits"})),
        feedback=_feedback(data.get("feedback", ["environment"])),
        algorithm=_algorithm(data.get("algorithm", {})),
        **sections,
    )
    _check_together(config)
    return config


def build(kind: type[Settings], data: Mapping[str, Any], where: str) -> Settings:
    """One settings dataclass from plain data; unknown keys and wrong values are errors that say where."""
    known = {f.name for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ConfigError(f"unknown key {where}.{key}", do=nearest(str(key), known))
    data = {key: _nested(kind, key, value, where) for key, value in data.items()}
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        if first["type"] == "missing":
            raise ConfigError(f"{place} is missing", do=f"Set it in the file, or as --{place} VALUE.") from error
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise ConfigError(f"{place} has a wrong value", got=repr(first["input"]), expected=expected) from error


def _nested(kind: type, key: str, value: Any, where: str) -> Any:
    """A mapping as the settings dataclass that the field ``key`` takes, if it takes one; else the value itself."""
    inner = [option for option in get_args(get_type_hints(kind)[key]) if dataclasses.is_dataclass(option)]
    return build(inner[0], value, f"{where}.{key}") if inner and isinstance(value, Mapping) else value  # type: ignore[arg-type]


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """``--a.b value`` and ``--a.b=value`` as (key, parsed value)."""
    pairs: list[tuple[str, Any]] = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or not ("." in word or word.partition("=")[0] == "--feedback"):
            raise ConfigError(
                f"unexpected argument {word!r}", expected="--section.key value, or --feedback '[name, ...]'"
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key} has no value", expected="--section.key value")
            value = words.pop(0)
        try:
            parsed = yaml.safe_load(value)
            prose = isinstance(parsed, Mapping) and not value.lstrip().startswith("{")  # a text with a colon in it
            pairs.append((key, value if prose or not value else parsed))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} has a value that is not YAML", got=repr(value)) from error
    return pairs


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    section, _, rest = key.partition(".")
    if section not in SECTIONS:
        raise ConfigError(f"unknown section {section!r} in --{key}", do=nearest(section, SECTIONS))
    if section == "feedback":
        if rest:
            raise ConfigError(f"--{key}: feedback is a list", do="Write --feedback '[environment, sibling]'.")
        data["feedback"] = value
        return
    target = data.setdefault(section, {})
    if rest == "name" and isinstance(target, dict) and target.get("name") not in (None, value):
        target.clear()  # another algorithm or environment: the file's options belong to the old one
    *path, last = rest.split(".")
    for part in path:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[last] = value


def _env(data: Mapping[str, Any]) -> Any:
    name = data.get("name", "digits")
    if isinstance(name, str) and ".py:" in name:
        return CustomEnv(name=name, options={key: value for key, value in data.items() if key != "name"})
    if name not in ENVS:
        hint = nearest(str(name), ENVS)
        raise ConfigError(f"unknown environment {name!r}", do=f"{hint} Your own: env.name my_env.py:MyEnv.")
    return build(ENVS[name], data, "env")


def _feedback(entries: Any) -> tuple[Any, ...]:
    if isinstance(entries, (str, Mapping)):
        entries = [entries]
    if not isinstance(entries, list):
        raise ConfigError("feedback is not a list", got=repr(entries), expected="names such as [environment, sibling]")
    sources: list[Any] = []
    for entry in entries:
        options = entry if isinstance(entry, Mapping) else {"name": entry}
        name = options.get("name")
        if name not in SOURCES:
            raise ConfigError(f"unknown feedback source {name!r}", do=nearest(str(name), SOURCES))
        sources.append(build(SOURCES[name], options, f"feedback.{name}"))
    return tuple(sources)


def _algorithm(data: Mapping[str, Any]) -> Any:
    name = data.get("name", "vpd")
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}", do=nearest(str(name), ALGORITHMS))
    if data.get("preset") == "paper":
        data = {"distillation_alpha": 1.0, "teacher": "live", **data}
    return build(ALGORITHMS[name], data, "algorithm")


def _check_together(config: Config) -> None:
    """Combinations that make no sense, found before anything is made."""
    alone = config.rollout.num_generations == 1
    if alone and any(isinstance(source, SiblingDemonstration) for source in config.feedback):
        raise ConfigError(
            "the sibling source needs other attempts at the same task",
            got="rollout.num_generations 1",
            expected="at least 2",
            do="Raise it, or take 'sibling' out of feedback.",
        )
    if alone and isinstance(config.algorithm, (GRPOSettings, HybridSettings)):
        raise ConfigError(
            f"{config.algorithm.name} compares the attempts of a group",
            got="rollout.num_generations 1",
            expected="at least 2",
        )
    reads = isinstance(config.algorithm, (VPDSettings, SDPOSettings, HybridSettings))
    if reads and not config.feedback:
        raise ConfigError(
            f"{config.algorithm.name} needs feedback", got="feedback: []", do="Add 'environment' or 'sibling'."
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
