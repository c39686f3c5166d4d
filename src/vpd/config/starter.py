"""A first configuration, as a file with comments: what each setting means is what its class declares.

The settings are the recommended ones (the default method, docs/choosing.md), and whatever was asked for over them.
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpd.bundled import BUNDLED
from vpd.config import SECTIONS, load_over, pairs_of, parse
from vpd.config.reading import inline, read_sections
from vpd.config.sections import CHOICES, PLAIN, is_place, known_keys, settings_class
from vpd.settings import declarations

WIDTH = 100
MODEL = "Qwen/Qwen3-0.6B"  # for every environment but the shipped base's own
ABOUT = {
    "feedback": "Where the teacher's context comes from; further sources are sibling, self_critique, critic and judge.",
    "algorithm": "The method: gated when unsure; grpo where the feedback says no more than right or wrong.",
    "env": "The task: where prompts come from, and how answers are graded.",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked on a terminal: the setting ``key`` that an answer goes to, and what an empty answer means."""

    key: str
    text: str
    default: str | None = None


def starter(overrides: Sequence[str] = ()) -> str:
    """A file's text: the recommended settings with ``--section.key value`` over them, each with its meaning.

    Raises ConfigError where a setting is missing or wrong.
    """
    _, settings = load_over(_recommended(dict(pairs_of(overrides))), overrides)
    text = "\n".join(_lines({section: settings[section] for section in SECTIONS if section in settings})) + "\n"
    parse(read_sections(text.encode(), "the new file"))
    return text


def questions(given: Mapping[str, Any]) -> Iterator[Question]:
    """What is still to be asked, one after the other; ``given`` holds the answers so far by their keys."""
    if "env.name" not in given:
        known = ", ".join(name for name in CHOICES["env"].table if name not in ("verifiers", "recorded"))
        text = f"Environment: {known}, or your own class, my_env.py:MyEnv"
        yield Question(key="env.name", text=text, default="digits")
    for key, meaning in _required(given["env.name"]):
        if f"env.{key}" not in given:
            yield Question(key=f"env.{key}", text=f"{key}: {meaning}")
    if "model.name_or_path" not in given:
        text = "Model: a Hub id, a folder, or tiny"
        yield Question(key="model.name_or_path", text=text, default=_model_for(given["env.name"]))
    if "algorithm.name" not in given:
        text = f"Method: {', '.join(CHOICES['algorithm'].table)}"
        yield Question(key="algorithm.name", text=text, default=CHOICES["algorithm"].default)
    if given.get("algorithm.name") == "gkd" and "algorithm.teacher_model" not in given:
        yield Question(key="algorithm.teacher_model", text="Teacher: a Hub id or folder with the student's tokenizer")
    if "run.max_steps" not in given:
        yield Question(key="run.max_steps", text="Iterations", default="100")


def _env_keys(name: Any) -> set[str]:
    """The settings of a shipped environment; a user's own is not loaded for this."""
    return set() if is_place(name) else known_keys("env", name) or set()


def _required(name: Any) -> Iterator[tuple[str, str]]:
    """The settings of a shipped environment that have no default, each with its meaning."""
    if name not in CHOICES["env"].table:
        return
    kind = settings_class(CHOICES["env"].table[name])
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield field.name, declarations(kind)[field.name].meaning


def _model_for(env: Any) -> str:
    return "tiny" if env == "digits" else MODEL


#: The sources of feedback of a method that needs others than the environment's text.
FEEDBACK: Mapping[str, list[Any]] = {"grpo": [], "gkd": [], "plare": [{"name": "judge"}]}


def _recommended(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to start with; those that hang on what was ``given`` fit it."""
    env, method = given.get("env.name", "digits"), given.get("algorithm.name", CHOICES["algorithm"].default)
    model = given.get("model.name_or_path", _model_for(env))
    fixed_length = env == "digits"
    return {
        "model": {"name_or_path": model},
        "env": {"name": env, **({"eval_share": 0.1} if "eval_share" in _env_keys(env) else {})},
        "feedback": FEEDBACK.get(method, ["environment"]),
        "rollout": {
            "prompts_per_step": 16,
            "num_generations": 8,
            **({} if fixed_length else {"max_completion_length": 256}),
        },
        "algorithm": {"name": method},
        "optim": {"learning_rate": 2e-4 if model in BUNDLED else 1e-5},
        "run": {
            "max_steps": 100,
            "save_steps": 20,
            "eval_steps": 20,
            "metric_for_best_model": "eval/accuracy",
            "output_dir": "out",
        },
    }


def _lines(settings: Mapping[str, Any]) -> Iterator[str]:
    yield "# vpd train --config FILE; every other setting with its default: vpd train --help"
    for section, value in settings.items():
        yield ""
        yield from _comment(ABOUT.get(section) or _first_sentence(settings_class(PLAIN[section])), "")
        if not isinstance(value, Mapping):
            yield f"{section}: {inline(value)}"
            continue
        yield f"{section}:"
        yield from _keys(value, _class_of(section, value))


def _keys(settings: Mapping[str, Any], kind: Any) -> Iterator[str]:
    """A line for each key, below its meaning."""
    declared = declarations(kind) if dataclasses.is_dataclass(kind) else {}
    for key, value in settings.items():
        declaration = declared.get(key)
        if declaration is not None and declaration.meaning:
            limits = f" ({declaration.range})" if declaration.range else ""
            yield from _comment(f"{declaration.meaning}{limits}", "  ")
        yield f"  {key}: {inline(value)}"


def _class_of(section: str, settings: Mapping[str, Any]) -> Any:
    """The class that declares a section's settings; None for a user's own, which may be no such class."""
    if section in PLAIN:
        return settings_class(PLAIN[section])
    name = settings.get("name", CHOICES[section].default)
    return None if is_place(name) else settings_class(CHOICES[section].table[str(name)])


def _first_sentence(kind: Any) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)
