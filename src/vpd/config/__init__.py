"""A file of settings, or several, checked whole before anything is made.

    model: {name_or_path: tiny}
    env: {name: digits}
    feedback: [environment]
    algorithm: {name: gated, e_every: 5}
    optim: {learning_rate: 2.0e-4}
    run: {max_steps: 100, output_dir: out}

Of several files a later one wins, key by key; ``--section.key value`` (and ``--feedback '[name, ...]'``) on the command
line overrides them all.  Every section is a
frozen dataclass in the module that reads it (:mod:`vpd.config.sections` has the tables); an unknown key is
an error that names the nearest one, or where a setting of TRL or verl is found here (:mod:`vpd.config.elsewhere`).

A section without keys is one that is not there.  A path, in the file too, is taken from the folder where the command is
given; ``~`` and ``${VAR}`` in it are replaced once, when the settings are made.
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from vpd.bundled import BUNDLED
from vpd.config.passed import Passed
from vpd.config.reading import read_file, read_value
from vpd.config.recorded import over_recorded
from vpd.config.run_settings import RunSettings
from vpd.config.sections import (
    BESIDE,
    CHOICES,
    PLAIN,
    Custom,
    advice,
    build,
    defaults_for_samples,
    known_keys,
    named,
    settings_class,
)
from vpd.engines.settings import EmbeddedEngineSettings, VLLMSettings, check_url
from vpd.envs import BesideAnother
from vpd.errors import ConfigError
from vpd.feedback import SiblingDemonstration
from vpd.feedback.judge import Judge
from vpd.model.settings import ModelSettings
from vpd.printable import shown
from vpd.prompts.settings import PromptSettings, with_layout
from vpd.rollout import RolloutSettings

if TYPE_CHECKING:
    from vpd.algorithms import Algorithm, AlgorithmSettings, Needs
    from vpd.algorithms.dynamics import DynamicsSettings
    from vpd.engines.settings import EngineSettings
    from vpd.learners.settings import OptimSettings
    from vpd.prompts import Prompter

LOG = logging.getLogger("vpd")

SECTIONS = ("model", "env", "feedback", "prompts", "rollout", "engine", "algorithm", "dynamics", "optim", "run")

#: Defaults of the section optim for a shipped base, which the learning rate of a real model would hardly move.
OPTIM_OF_SHIPPED_BASES: Mapping[str, Any] = {"learning_rate": 2e-4, "micro_batch_size": 128}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of a run's settings, resolved.

    ``for_shipped_base`` names the settings of ``optim`` that nobody gave and that are a shipped base's defaults;
    ``given`` has for each section the plain data that it was made of, and what was made.
    """

    model: ModelSettings
    env: Any
    feedback: tuple[Any, ...]
    prompts: PromptSettings | None
    rollout: RolloutSettings
    engine: "EngineSettings"
    algorithm: "AlgorithmSettings"
    dynamics: "DynamicsSettings"
    optim: "OptimSettings"
    run: RunSettings
    for_shipped_base: tuple[str, ...] = field(default=(), compare=False)
    given: Mapping[str, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def method(self) -> str:
        """The name of the algorithm, or the place or class of the user's own."""
        section = _plain_section(self.algorithm)
        return str(section.get("name") or section["object"])

    @property
    def needs(self) -> "Needs":
        """What the method needs, with what the auxiliary term and recorded answers do: the initial weights."""
        needs = self.algorithm.needs
        off_policy = needs.on_policy and isinstance(self.env, BesideAnother)
        return dataclasses.replace(needs, initial_copy=True) if self.dynamics.weight or off_policy else needs

    def build_algorithm(self, prompter: "Prompter") -> "Algorithm":
        """The method, with what recorded answers need, and with the auxiliary term where it has weight."""
        from vpd.algorithms.dynamics import Tied
        from vpd.algorithms.off_policy import OffPolicy

        method = self.algorithm.build(prompter)
        method = OffPolicy(method) if self.algorithm.needs.on_policy else method
        return Tied(method, self.dynamics, prompter) if self.dynamics.weight else method

    def as_dict(self) -> dict[str, Any]:
        """Plain data that :func:`parse` takes back; an object that was passed to ``train`` is named by its class."""
        data: dict[str, Any] = {}
        for section in SECTIONS:
            value = getattr(self, section)
            if section == "feedback":
                data[section] = [_plain_section(source) for source in value]
            elif value is not None:
                data[section] = _plain_section(value)
        return data

    def as_given(self) -> dict[str, Any]:
        """As :meth:`as_dict`, without what nobody gave; a section that was replaced since is there whole."""
        data = self.as_dict()
        for section, (given, made) in self.given.items():
            if made is getattr(self, section):
                data[section] = copy.deepcopy(given)
        return {section: part for section, part in data.items() if part is not None}

    def require_something_to_train(self) -> None:
        """Raise ConfigError for a resume of a folder without a run where nobody has said what else to train."""
        if self.run.resume and not any(given for name, (given, _) in self.given.items() if name != "run"):
            raise ConfigError(
                f"run.resume: {self.run.output_dir} holds no run to continue, and nothing says what else to train",
                do="Correct run.output_dir, or give the settings of a new run (--config).",
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(self.as_dict()), sort_keys=False)


def load(path: str | Sequence[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Files, of which a later one wins over those before, and ``--section.key value`` pairs as a checked Config.

    With ``run.resume`` what neither says is as the run in ``run.output_dir`` has it.  Raises ConfigError, and
    StorageError for a run whose settings cannot be read.
    """
    return parse(over_recorded(merged_data(path, pairs_of(overrides))))


def load_over(data: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """Plain data with ``--section.key value`` pairs over it, as a checked Config and as plain data.

    Raises ConfigError.
    """
    merged = _with_pairs(copy.deepcopy(dict(data)), pairs_of(overrides))
    return parse(merged), merged


def load_env(path: str | Sequence[str] | None = None, overrides: Sequence[str] = ()) -> Any:
    """The section ``env`` alone, without a look at the others.  Raises ConfigError."""
    pairs = pairs_of(overrides)
    for key, _ in pairs:
        if not key.startswith("env."):
            raise ConfigError(f"--{key} is of no use here", expected="settings of the environment, --env.key value")
    return named("env", mapping(merged_data(path, pairs), "env"), "env")


def load_to_sample(path: str | Sequence[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """As :func:`load`, where nothing is trained: the algorithm plays no part, so it refuses nothing."""
    return parse_sections(merged_data(path, pairs_of(overrides)))


def parse(data: Mapping[str, Any]) -> Config:
    """Plain data as a checked Config.  Raises ConfigError."""
    config = parse_sections(data)
    check_together(config)
    return config


def parse_sections(data: Mapping[str, Any], *, recorded: bool = False) -> Config:
    """Plain data as a Config whose sections are checked, each for itself.  Raises ConfigError.

    ``recorded``: an environment that was passed has recorded answers.
    """
    for section in data:
        if section not in SECTIONS:
            raise _unknown_section(str(section))
    given = {section: mapping(data, section) for section in SECTIONS if section != "feedback"}
    for_base: dict[str, Any] = {}
    if given["model"].get("name_or_path", ModelSettings.name_or_path) in BUNDLED:
        for_base = {key: value for key, value in OPTIM_OF_SHIPPED_BASES.items() if key not in given["optim"]}
    given["optim"] = {**given["optim"], **for_base}
    given["prompts"] = with_layout(given["prompts"])
    given["algorithm"] = {**defaults_for_samples(given, recorded=recorded), **given["algorithm"]}
    sections: dict[str, Any] = {name: build(settings_class(place), given[name], name) for name, place in PLAIN.items()}
    if data.get("prompts") is None:
        sections["prompts"] = None
    sections |= {name: named(name, given[name], name) for name in ("env", "algorithm", "engine")}
    sections["feedback"] = _feedback(data.get("feedback", ["environment"]))
    originals = {name: (copy.deepcopy(data.get(name)), made) for name, made in sections.items()}
    return Config(for_shipped_base=tuple(for_base), given=originals, **sections)


def check_together(config: Config) -> None:
    """Combinations that make no sense, found before anything is made.  Raises ConfigError."""
    needs = config.algorithm.needs
    alone = config.rollout.num_generations == 1
    if alone and any(isinstance(source, SiblingDemonstration) for source in config.feedback):
        raise ConfigError(
            "the sibling source needs other attempts at the same task",
            got="rollout.num_generations 1",
            expected="at least 2",
            do="Raise it, or take 'sibling' out of feedback.",
        )
    if alone and needs.group:
        raise ConfigError(
            f"{config.method} compares the attempts of a group",
            got="rollout.num_generations 1",
            expected="at least 2",
            do="Raise it, or take a method that compares none, such as vpd or sdpo.",
        )
    if needs.feedback and not config.feedback:
        raise ConfigError(f"{config.method} needs feedback", got="feedback: []", do="Add 'environment' or 'sibling'.")
    _check_judges(config)
    if needs.remote_teacher is not None:
        check_url(needs.remote_teacher.url, "algorithm.teacher_url")
        same = isinstance(config.engine, VLLMSettings) and config.engine.is_at(needs.remote_teacher.url)
        if same and config.model.lora is None:
            raise ConfigError(
                "algorithm.teacher_url: the server at engine.url gets the student's weights, a teacher keeps its own",
                got=needs.remote_teacher.url,
                do="Start another server for the teacher, or train adapters (model.lora): the base then never changes.",
            )
        if config.rollout.temperature != 1:
            raise ConfigError(
                "a remote teacher's log-probs are at temperature 1",
                got=f"rollout.temperature {config.rollout.temperature}",
                do="Set it to 1, or load the teacher here (algorithm.teacher_url: null).",
            )
    if config.rollout.retries and not needs.learns_from_retries:
        raise ConfigError(
            f"{config.method} does not learn from retries",
            got=f"rollout.retries {config.rollout.retries}",
            do="Set rollout.retries to 0, or take sdpo, vpd or gated.",
        )
    if config.rollout.overlap and isinstance(config.engine, EmbeddedEngineSettings):
        raise ConfigError(
            "rollout.overlap: the embedded engine samples on the very weights that the learner is changing",
            expected="an engine with weights of its own",
            do="Set engine.name to vllm (docs/vllm.md), or rollout.overlap to false.",
        )
    if config.model.dtype == "float64" and config.optim.mixed_precision != "no":
        raise ConfigError(
            "optim.mixed_precision computes in fewer bits than weights of 32",
            got="model.dtype float64",
            do="Set optim.mixed_precision: no, or model.dtype: float32.",
        )
    if config.model.lora is None:
        teacher = None if needs.teacher is None else needs.teacher.dtype
        config.optim.check_types({config.model.dtype, teacher or config.model.dtype})


def _check_judges(config: Config) -> None:
    """Preferences come from a judge, and are learned from."""
    judges = [source for source in config.feedback if isinstance(source, Judge)]
    labels = any(source.use != "context" for source in judges)
    own = any(isinstance(source, (Custom, Passed)) for source in config.feedback)
    learns = config.algorithm.needs.preferences
    if learns and not labels and not own:
        raise ConfigError(
            f"{config.method} learns from preferences between attempts, and no feedback source gives any",
            got=f"feedback: [{', '.join(source.name for source in config.feedback)}]",
            do="Add a judge: --feedback '[{name: judge}]'.",
        )
    if labels and not learns and any(source.use == "label" for source in judges):
        raise ConfigError(
            f"{config.method} learns from no preferences, and the judge gives nothing else",
            got="use: label",
            do="Set use: context, so that the teacher reads what the judge wrote, or take the algorithm plare.",
        )
    if config.rollout.num_generations == 1 and judges:
        raise ConfigError(
            "the judge compares the attempts at a task", got="rollout.num_generations 1", expected="at least 2"
        )


def mapping(data: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    value = data.get(section)
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    do = None
    if isinstance(value, str):
        do = f"Write {section}: {{name: {value}}}." if section in CHOICES else advice(section, ())
    raise ConfigError(f"section {section!r} is not a mapping", got=shown(value), expected="key: value pairs", do=do)


def _unknown_section(name: str, where: str = "") -> ConfigError:
    return ConfigError(f"unknown section {name!r}{where}", do=advice(name, SECTIONS))


def read_files(path: str | Sequence[str] | None) -> dict[str, Any]:
    """The sections of the files, key by key: a later file wins, and what it does not say stays as it was."""
    paths = [] if path is None else [path] if isinstance(path, str) else path
    data: dict[str, Any] = {}
    for one in paths:
        for section, above in read_file(one).items():
            below = data.get(section)
            if isinstance(above, dict) and isinstance(below, dict):
                if section in CHOICES and "name" in above:
                    below = of_another(section, below, above["name"])
                data[section] = {**below, **above}
            elif above is not None or section not in data:
                data[section] = above
    return data


def merged_data(path: str | Sequence[str] | None, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The files' data with the pairs in their places, without the sections that are no part of a run."""
    data = {section: value for section, value in read_files(path).items() if section not in BESIDE}
    return _with_pairs(data, pairs)


def _with_pairs(data: dict[str, Any], pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The data with the pairs in their places."""
    for section in ("env", "algorithm", "engine"):
        chosen = [value for key, value in pairs if key == f"{section}.name"]
        if chosen and isinstance(data.get(section), dict):
            data[section] = of_another(section, data[section], chosen[-1])
    for key, value in pairs:
        _assign(data, key, value)
    return data


def of_another(section: str, settings: dict[str, Any], name: Any) -> dict[str, Any]:
    """The settings given of one part, for another that was named instead: what both have stays, the rest is logged."""
    old = settings.get("name", CHOICES[section].default)
    known = known_keys(section, name)
    options = {key: value for key, value in settings.items() if key != "name"}
    if name == old or known is None:
        return settings
    kept = {key: value for key, value in options.items() if key in known}
    dropped = sorted(options.keys() - kept.keys())
    if options:
        parts = [f"{section}.name is {name} instead of {old}"]
        parts += [f"kept: {', '.join(sorted(kept))}"] if kept else []
        parts += [f"dropped, as {name} has no such setting: {', '.join(dropped)}"] if dropped else []
        LOG.warning("%s", "; ".join(parts))
    return kept


def pairs_of(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """``--a.b value`` and ``--a.b=value`` as (key, parsed value)."""
    pairs: list[tuple[str, Any]] = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        key, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not ("." in key or key == "feedback"):
            raise _unexpected(word)
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(
                    f"--{key} has no value", expected="--section.key value, or --section.key=value for one with dashes"
                )
            value = words.pop(0)
        pairs.append((key, read_value(value, key)))
    return pairs


def _unexpected(word: str) -> ConfigError:
    """The error for a word that is no setting; one of another library is named as it is here."""
    name = word.lstrip("-+").partition("=")[0]
    if word.endswith((".yaml", ".yml")) and "=" not in word:
        do: str | None = f"Write --config {word}."
    else:
        dotted = not word.startswith("-") and name.partition(".")[0] in SECTIONS
        do = f"Write --{word}." if dotted else advice(name, ())
    expected = "--section.key value, --feedback '[name, ...]', or an option that the command's --help names"
    return ConfigError(f"unexpected argument {word!r}", expected=expected, do=do)


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    section, _, rest = key.partition(".")
    if section not in SECTIONS:
        raise _unknown_section(section, f" in --{key}")
    if section == "feedback":
        if rest:
            raise ConfigError(f"--{key}: feedback is a list", do="Write --feedback '[environment, sibling]'.")
        data["feedback"] = value
        return
    *path, last = key.split(".")
    target, place = data, ""
    for part in path:
        place = f"{place}.{part}" if place else part
        if target.get(part) is None:
            target[part] = {}
        if not isinstance(target[part], dict):
            raise ConfigError(f"--{key}: {place} is not a mapping in the file", got=repr(target[part]))
        target = target[part]
    target[last] = value


def _feedback(entries: Any) -> tuple[Any, ...]:
    if isinstance(entries, (str, Mapping)):
        entries = [entries]
    if entries is None:
        raise ConfigError("feedback is empty", do="Write [] for none, or [environment] for what the environment says.")
    if not isinstance(entries, (list, tuple)):
        raise ConfigError("feedback is not a list", got=shown(entries), expected="names such as [environment, sibling]")
    sources = []
    for entry in entries:
        options = entry if isinstance(entry, Mapping) else {"name": entry}
        sources.append(named("feedback", options, f"feedback.{options.get('name')}"))
    return tuple(sources)


def _plain_section(value: Any) -> dict[str, Any]:
    if isinstance(value, Passed):
        return {"object": value.object}
    return {"name": value.name, **value.options} if isinstance(value, Custom) else dataclasses.asdict(value)


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


__all__ = ["Config", "ModelSettings", "Passed", "RunSettings", "check_together", "load", "load_env", "parse"]
