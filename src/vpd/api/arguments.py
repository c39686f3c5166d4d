"""The arguments of ``vpd.train`` and its like as a :class:`~vpd.config.Config` and the objects beside it.

A section of the settings is a keyword, with the keys of the file: ``optim={"learning_rate": 1e-5}`` is ``optim:
{learning_rate: 1.0e-5}``.  What can be written into ``config.yaml`` goes into the config; an object takes the place of
its section, and the config has its name.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

from vpd.api.recorded import recorded
from vpd.api.runs import Run
from vpd.config import Config, of_another, parse_sections
from vpd.config.passed import Passed, PassedAlgorithm, PassedEngine, PassedSource, require
from vpd.config.recorded import over, over_recorded
from vpd.config.sections import CHOICES, Custom, advice, build, make_env, named
from vpd.envs import Env, RecordedTasks
from vpd.envs.adapters.reward_functions import GradedByFunctions
from vpd.envs.given import AllHeldOut, GivenTasks, read_entries
from vpd.errors import ConfigError, nearest
from vpd.feedback import Feedback
from vpd.printable import shown
from vpd.settings import Settings

GRADING = {entry.name for entry in dataclasses.fields(GradedByFunctions)}  # settings of env that a grader has, too
Options = TypeVar("Options", bound=Settings)
Section: TypeAlias = Mapping[str, Any] | Settings
#: A Hub id, a folder, 'tiny', a :class:`vpd.Run`, a model of transformers, or the section ``model``, whose name_or_path
#: may be any of these.
ModelLike: TypeAlias = Any
#: A list, a generator, a ``datasets.Dataset``, a table, or a file of records.
Tasks: TypeAlias = Iterable[Any] | str | Path
#: A function (text, task), a reward function of TRL or verl, the place of one, or a list of such.
GraderLike: TypeAlias = Callable[..., Any] | str | Sequence[Any]
FeedbackLike: TypeAlias = str | Mapping[str, Any] | Feedback
KEYWORDS = ("eval_tasks", "config", "env", "prompts", "rollout", "engine", "dynamics", "optim", "run")
RENAMED = {"observers": "callbacks", "reward_funcs": "grader", "train_dataset": "tasks", "eval_dataset": "eval_tasks"}


class More(TypedDict, total=False):
    """The other arguments of ``train`` and ``evaluate``: held-out tasks, and the sections of the settings.

    ``eval_tasks``: tasks to evaluate on, or a share of ``tasks`` that is held out; ``config``: settings from
    ``load_config`` or ``parse_config``, over which the other arguments are laid; ``env``: an environment in the place
    of tasks and grader (an object, a name, or a mapping), or recorded answers beside them (``{"name": "recorded",
    "path": ...}``, where the path may be records or a run), or what may go wrong in grading them
    (``{"max_failed": 0.05, "retries": 1, "seconds": 5.0}``); ``engine`` an object, a name or a mapping; ``prompts``,
    ``rollout``, ``dynamics``, ``optim`` and ``run`` mappings, or their settings objects.
    """

    eval_tasks: Tasks | float
    config: Config
    env: Env | str | Section
    prompts: Section
    rollout: Section
    engine: Any
    dynamics: Section
    optim: Section
    run: Section


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A config, and what :func:`vpd.assemble` takes beside it."""

    config: Config
    objects: Mapping[str, Any] = field(default_factory=dict)


def read_arguments(
    model: ModelLike,
    tasks: Tasks | Config | None,
    grader: GraderLike | None,
    *,
    tokenizer: Any,
    algorithm: Any,
    feedback: FeedbackLike | Sequence[FeedbackLike] | None,
    more: Mapping[str, Any],
    all_held_out: bool = False,
) -> Arguments:
    """Everything as a config and objects.  Raises ConfigError; DataError for tasks that cannot be used."""
    _check_names(more)
    if tokenizer is not None:
        require(tokenizer, ("chat_template", "get_vocab"), "tokenizer= is no tokenizer")
    base: Config | None = more.get("config")
    if isinstance(model, Config):
        if base is not None:
            raise ConfigError("two configs were passed", got="one in the first place and config=", expected="one")
        model, base = None, model
    data = {} if base is None else base.as_given()
    objects: dict[str, Any] = {"tokenizer": tokenizer}
    _add_model(data, objects, model)
    for name in ("prompts", "rollout", "dynamics", "optim", "run"):
        if more.get(name) is not None:
            data[name] = over(data.get(name), _plain(more[name], name))
    parts = {
        name: part for name, part in (("algorithm", algorithm), ("engine", more.get("engine"))) if part is not None
    }
    kept = {name: _add_part(data, name, part) for name, part in parts.items()}
    env = _environment(tasks, grader, more, data, all_held_out=all_held_out)
    if env is not None:
        objects["env"] = _add_environment(data, env)
    if feedback is not None:
        data["feedback"] = []
        objects["feedback"] = _sources(feedback)
    data = over_recorded(data)
    if tasks is not None and base is None and not ("model" in data or "model" in objects):
        raise ConfigError(
            "no model was passed",
            expected='a Hub id, a folder, a model of transformers, or "tiny", which ships with vpd',
        )
    config = _config(data, objects, {name: part for name, part in kept.items() if part is not None})
    return Arguments(config=config, objects={name: part for name, part in objects.items() if part is not None})


def read_options(kind: type[Options], options: Any) -> Options:
    """``options=`` as settings of this kind; None: their defaults.  Raises ConfigError."""
    if isinstance(options, kind):
        return options
    if options is not None and not isinstance(options, Mapping):
        known = ", ".join(entry.name for entry in dataclasses.fields(kind))  # type: ignore[arg-type]
        raise ConfigError("options cannot be used", got=shown(options), expected=f"a mapping of {known}")
    return build(kind, options or {}, "options")


def _config(data: dict[str, Any], objects: Mapping[str, Any], kept: Mapping[str, Any]) -> Config:
    """The data as a config that holds the parts which were passed."""
    data = {name: section for name, section in data.items() if name not in kept}
    config = parse_sections(data, recorded=isinstance(objects.get("env"), RecordedTasks))
    return dataclasses.replace(config, **kept, **({"feedback": objects["feedback"]} if "feedback" in objects else {}))


def _check_names(more: Mapping[str, Any]) -> None:
    for name in more:
        if name in RENAMED:
            raise ConfigError(f"unknown argument {name}", do=f"That is {RENAMED[name]}= here.")
        if name not in KEYWORDS:
            found = advice(name, ()) or nearest(name, [*KEYWORDS, "tokenizer", "algorithm", "feedback", "callbacks"])
            raise ConfigError(
                f"unknown argument {name}",
                expected='sections of the settings, such as optim={"learning_rate": 1e-5}',
                do=found,
            )


def _plain(value: Any, name: str) -> dict[str, Any]:
    """A section as a mapping.  Raises ConfigError."""
    if isinstance(value, Settings) and dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}= is no section", got=shown(value), expected="a mapping of its settings")
    return {key: str(entry) if isinstance(entry, Path) else entry for key, entry in value.items()}


def _require_instance(part: Any, name: str) -> None:
    """Raise ConfigError for a class where an object of it is meant."""
    if inspect.isclass(part):
        what = f"{name} is a class"
        raise ConfigError(what, got=part.__name__, expected="an object of it", do=f"Pass {part.__name__}(...).")


def _add_model(data: dict[str, Any], objects: dict[str, Any], model: ModelLike) -> None:
    """The model's name into the data, or the model itself into the objects."""
    if model is None:
        return
    section = _plain(model, "model") if isinstance(model, (Mapping, Settings)) else {"name_or_path": model}
    name = _model_of(section.get("name_or_path"))
    if isinstance(name, (str, Path)):
        section["name_or_path"] = str(name)
    elif name is not None:
        objects["model"] = section.pop("name_or_path")
    data["model"] = over(data.get("model"), section)


def _model_of(value: Any) -> Any:
    """The folder of a run's model; anything else as it is."""
    return str(value.folder / "model") if isinstance(value, Run) else value


def _add_part(data: dict[str, Any], name: str, part: Any) -> Passed | None:
    """An algorithm or an engine by its name or settings into the data; else what stands for the object."""
    if isinstance(part, str):
        part = {"name": part}
    if isinstance(part, Settings) and _is_shipped(name, part):
        part = _plain(part, name)
    if isinstance(part, Mapping):
        before = data.get(name, {})
        if "name" in part and "object" not in before:
            before = of_another(name, before, part["name"])
        data[name] = {**before, **{key: _model_of(value) for key, value in part.items()}}
        return None
    _require_instance(part, name)
    if name == "engine":
        return PassedEngine.of(part, engine=part)
    require(part, ("needs", "build"), f"{type(part).__name__} is no algorithm")
    return PassedAlgorithm.of(part, settings=part)


def _is_shipped(section: str, part: Any) -> bool:
    return f"{type(part).__module__}:{type(part).__qualname__}" in CHOICES[section].table.values()


def _environment(
    tasks: Any, grader: Any, more: Mapping[str, Any], data: Mapping[str, Any], *, all_held_out: bool
) -> Any:
    """Tasks and grader as an environment, or what ``env`` is; None where neither was passed."""
    env, held_out = more.get("env"), more.get("eval_tasks")
    log = env if isinstance(env, Mapping) and env.get("name") == "recorded" else None
    grading = env if isinstance(env, Mapping) and env and set(env) <= GRADING else None
    if grading is not None and tasks is not None and grader is not None:
        env = None
    if tasks is None and grader is None:
        if held_out is not None:
            raise ConfigError("eval_tasks= without tasks=", expected="tasks and grader, or an environment alone")
        return env if log is None else recorded(log)
    if (env is not None and log is None) or tasks is None or grader is None:
        passed = [name for name, part in (("tasks", tasks), ("grader", grader), ("env", env)) if part is not None]
        raise ConfigError(
            "what to train on is not clear", got=" and ".join(passed), expected="tasks and grader, or env="
        )
    if isinstance(tasks, str) and tasks in CHOICES["env"].table:
        raise ConfigError(f"tasks is the name of an environment, {tasks}", do=f"Write env={tasks!r}, without a grader.")
    made = _given(tasks, grader, held_out, data, all_held_out=all_held_out)
    made = dataclasses.replace(made, **(grading or {}))
    return made if log is None else recorded(log, made)


def _given(tasks: Any, grader: Any, held_out: Any, data: Mapping[str, Any], *, all_held_out: bool) -> GivenTasks:
    """Tasks and grader as an environment."""
    entries = read_entries(tasks, "tasks")
    if all_held_out:
        return AllHeldOut(tasks=entries, grader=grader, eval_share=0.0)
    if isinstance(held_out, (int, float)):
        if not 0 <= held_out < 1:
            raise ConfigError(
                "eval_tasks is out of range", got=held_out, expected="tasks, or a share of tasks= from 0 to below 1"
            )
        return GivenTasks(tasks=entries, grader=grader, eval_share=held_out)
    if held_out is None and data.get("run", {}).get("eval_steps"):
        raise ConfigError(
            "run.eval_steps needs held-out tasks", do="Pass eval_tasks= (tasks, or a share of tasks= such as 0.1)."
        )
    held = None if held_out is None else read_entries(held_out, "eval_tasks")
    return GivenTasks(tasks=entries, grader=grader, held_out=held, eval_share=0.0)


def _add_environment(data: dict[str, Any], env: Any) -> Any:
    """A named environment into the data; an object is given back."""
    if isinstance(env, str):
        env = {"name": env}
    if not isinstance(env, Mapping):
        _require_instance(env, "env")
        require(env, ("task", "eval_tasks", "grade"), f"{type(env).__name__} is no environment")
        data.pop("env", None)
        return make_env(env)
    before = data.get("env", {})
    data["env"] = {**(of_another("env", before, env.get("name")) if "object" not in before else {}), **env}
    return None


def _sources(feedback: Any) -> tuple[Any, ...]:
    """Feedback sources by name, as mappings or as objects."""
    single = isinstance(feedback, (str, Mapping)) or callable(feedback)
    return tuple(_source(source) for source in ([feedback] if single else feedback))


def _source(source: Any) -> Any:
    if isinstance(source, (str, Mapping)):
        options = {"name": source} if isinstance(source, str) else source
        return named("feedback", options, f"feedback.{options.get('name')}")
    if isinstance(source, (Custom, Passed)) or _is_shipped("feedback", source):
        return source
    _require_instance(source, "a feedback source")
    if not callable(source):
        raise ConfigError(
            "a feedback source cannot be called", got=shown(source), expected="called with (groups, writer)"
        )
    return PassedSource.of(source, source=source)
