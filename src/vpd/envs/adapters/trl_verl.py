"""TRL's and verl's reward functions, with their own signatures.

TRL's, on a whole batch; every column of the data reaches it by name, and None means "does not apply to this row"::

    def accuracy(prompts, completions, answer, **columns) -> list[float | None]: ...

verl's, on one record of its schema (``data_source``, ``reward_model.ground_truth``, ``extra_info``)::

    def compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict: ...

The parameters of a function decide which of the two it is; either may be ``async``.  For each row it returns a number
or, so that a teacher has something to read, more: ``(number, feedback)``, a ``Grade``, or a mapping with ``reward`` or
``score`` and optionally ``feedback``, ``informative``, ``success`` and ``graded``; other numbers of the mapping become
metrics, its other texts are ignored.  As in TRL, a completion is a text where the prompt is a text, and a list with
one message where the prompt is a list of messages.
"""

import copy
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from vpd.envs.adapters.callers import LocalCaller, ProcessCaller, answering
from vpd.envs.adapters.reward_functions import Caller, Row
from vpd.envs.loading import load_object
from vpd.errors import ConfigError, EnvError
from vpd.printable import shown
from vpd.types import LARGEST_REWARD, Grade

LOG = logging.getLogger("vpd")
TRAINER_ARGUMENTS = (
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)  # TRL passes them, vpd does not


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One reward function, a callable or its name (``my_rewards.py:accuracy``), and its weight in the sum."""

    function: str | Callable[..., Any]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TRLFunction:
    """``f(prompts, completions, **columns) -> list``."""

    name: str
    function: Callable[..., Any]
    is_async: bool
    batched: bool = True

    def check(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError if the function needs an argument that the data does not have."""
        columns = dict.fromkeys(column for row in rows for column in row.columns)
        _accepted_arguments(self.name, self.function, ["prompts", "completions", *columns])
        for parameter in inspect.signature(self.function).parameters.values():
            lacking = [number for number, row in enumerate(rows) if row.columns.get(parameter.name) is None]
            if parameter.name in columns and parameter.default is parameter.empty and lacking:
                LOG.warning(
                    "the reward function %s gets None for %r where the data has none: in %d of %d records, first %d.",
                    self.name, parameter.name, len(lacking), len(rows), lacking[0] + 1,
                )  # fmt: skip

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Any:
        names = list(dict.fromkeys(name for row in rows for name in row.columns))
        given: dict[str, Any] = {name: [row.columns.get(name) for row in rows] for name in names}
        given["prompts"] = [row.prompt for row in rows]
        given["completions"] = [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        accepted = _accepted_arguments(self.name, self.function, list(given))
        return self.function(**{name: copy.deepcopy(given[name]) for name in accepted})


@dataclass(frozen=True, slots=True)
class VerlFunction:
    """``compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict``."""

    name: str
    function: Callable[..., Any]
    is_async: bool
    batched: bool = False

    def check(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError if the function needs other arguments, or a record is not in verl's schema."""
        _accepted_arguments(self.name, self.function, ["data_source", "solution_str", "ground_truth", "extra_info"])
        for number, row in enumerate(rows):
            model = row.columns.get("reward_model")
            if "data_source" not in row.columns or not isinstance(model, Mapping) or "ground_truth" not in model:
                raise ConfigError(
                    f"{self.name} is verl's, and record {number} is not in its schema",
                    got=f"the columns {', '.join(row.columns) or 'none'}",
                    expected="data_source, prompt, reward_model.ground_truth, extra_info",
                )

    def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> Any:
        [row], [text] = rows, texts
        given = {
            "data_source": row.columns["data_source"],
            "solution_str": text,
            "ground_truth": row.columns["reward_model"]["ground_truth"],
            "extra_info": row.columns.get("extra_info"),
        }
        accepted = _accepted_arguments(self.name, self.function, list(given))
        answer = self.function(**{name: copy.deepcopy(given[name]) for name in accepted})
        return listed_answer(answer) if inspect.isawaitable(answer) else [answer]


async def listed_answer(answer: Awaitable[Any]) -> list[Any]:
    """The answer to one row, as a list of it."""
    return [await answer]


def _accepted_arguments(name: str, function: Callable[..., Any], given: Sequence[str]) -> list[str]:
    """The given arguments that a function accepts.  Raises ConfigError if it needs others."""
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty and parameter.name not in given:
            of_trainer = parameter.name in TRAINER_ARGUMENTS
            raise ConfigError(
                f"the reward function {name} needs {parameter.name!r}",
                got=f"the arguments {', '.join(given)}",
                expected="columns of the data" if not of_trainer else "a function of texts and columns",
                do="That argument is about TRL's trainer; give it a default." if of_trainer else None,
            )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [key for key in given if takes_all or key in parameters]


def parse_rewards(setting: Any) -> tuple[Reward, ...]:
    """The setting ``reward`` as a list: a name or callable, ``{function, weight}``, or several.  Raises ConfigError."""
    entries = setting if isinstance(setting, (list, tuple)) else [setting]
    rewards = []
    for entry in entries:
        if isinstance(entry, Mapping):
            unknown = set(entry) - {"function", "weight"}
            if unknown or "function" not in entry:
                raise ConfigError("env.reward has an entry that cannot be read", got=entry, expected=_FORM)
            entry = Reward(**entry)
        elif isinstance(entry, str) or callable(entry):
            entry = Reward(function=entry)
        if not isinstance(entry, Reward) or not (isinstance(entry.function, str) or callable(entry.function)):
            raise ConfigError("env.reward has an entry that cannot be read", got=shown(entry), expected=_FORM)
        if (
            isinstance(entry.weight, bool)
            or not isinstance(entry.weight, (int, float))
            or not 0 < abs(entry.weight) <= LARGEST_REWARD
        ):
            raise ConfigError(
                "env.reward has a wrong weight", got=shown(entry.weight), expected="a number other than 0"
            )
        rewards.append(entry)
    if not rewards:
        raise ConfigError("env.reward is empty", expected=_FORM)
    return tuple(rewards)


_FORM = "my_rewards.py:name, {function: my_rewards.py:name, weight: 1.0}, or a list of such"


def make_reward_function(function: str | Callable[..., Any]) -> TRLFunction | VerlFunction:
    """A function as TRL's or verl's, decided by its parameters.  Raises ConfigError if it is neither."""
    found = load_object(function, "env.reward") if isinstance(function, str) else function
    if not callable(found) or inspect.isclass(found):
        raise ConfigError(f"env.reward: {function} is not a function", got=shown(found), expected="a reward function")
    name = found.__name__ if inspect.isroutine(found) else type(found).__name__
    is_async = inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(vars(type(found)).get("__call__"))
    parameters = inspect.signature(found).parameters
    if "completions" in parameters:
        return TRLFunction(name, found, is_async)
    if "solution_str" in parameters:
        return VerlFunction(name, found, is_async)
    raise ConfigError(
        f"env.reward: {name} is neither TRL's nor verl's reward function",
        got=f"the parameters {', '.join(parameters) or 'none'}",
        expected="'completions' among them (TRL's), or 'solution_str' (verl's)",
    )


def make_caller(reward: Reward, function: TRLFunction | VerlFunction, *, process: bool) -> Caller:
    """Calls the function of ``reward``; ``process``: in one of its own, if it is named by its place."""
    if process and isinstance(reward.function, str):
        return ProcessCaller(name=function.name, batched=function.batched, module=__name__, spec=reward.function)
    return LocalCaller(function, read_answer)


def serve(spec: str) -> Callable[[str], dict[str, Any]]:
    """In the process of a :class:`~vpd.envs.adapters.callers.ProcessCaller`."""
    return answering(LocalCaller(make_reward_function(spec), read_answer))


def read_answer(answer: Any, what: str) -> Grade | None:
    """What a function returned for a row, as a grade.  Raises EnvError (it starts with ``what``) for anything else."""
    if answer is None or isinstance(answer, Grade):
        return answer
    if isinstance(answer, Mapping):
        return _from_mapping(dict(answer), what)
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], str | None):
        return Grade(reward=_number(answer[0], what), feedback=answer[1] or None)
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], SupportsFloat):
        raise EnvError(
            f"{what} returned feedback that is no text",
            got=shown(answer[1]),
            expected="(number, text)",
            do="Write it as a text, such as json.dumps(...).",
        )
    return Grade(reward=_number(answer, what))


def _from_mapping(answer: dict[Any, Any], what: str) -> Grade:
    names = [name for name in ("reward", "score") if name in answer]
    if len(names) != 1:
        raise EnvError(
            f"{what} returned a mapping without one reward", got=list(answer), expected="'reward' or 'score'"
        )
    reward = _number(answer.pop(names[0]), what)
    feedback = answer.pop("feedback", None)
    flags = {
        name: _truth(value, f"{what} returned a mapping with a wrong {name!r}")
        for name in ("success", "informative", "graded")
        if (value := answer.pop(name, None)) is not None
    }
    metrics = {
        str(key): _number(value, f"{what}, in {key!r},")
        for key, value in answer.items()
        if isinstance(value, SupportsFloat)
    }
    return Grade(reward=reward, feedback=feedback or None, metrics=metrics, **flags)


def _truth(value: Any, what: str) -> bool:
    """A bool, also NumPy's or torch's, or the numbers 0 and 1."""
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, (bool, int, float)) or plain not in (0, 1):
        raise EnvError(what, got=repr(value)[:80], expected="a bool")
    return bool(plain)


def _number(value: Any, what: str) -> float:
    """A finite number of any type with ``__float__``."""
    wrong = EnvError(f"{what} returned no number", got=shown(value), expected="a number, (number, text), a mapping")
    if not isinstance(value, SupportsFloat):
        raise wrong
    try:
        number = float(value)
    except TypeError:  # an array
        raise wrong from None
    if not math.isfinite(number):
        raise EnvError(f"{what} returned no finite number", got=shown(value), expected="a finite number, or None")
    if abs(number) > LARGEST_REWARD:
        expected = f"at most {LARGEST_REWARD:g} either way"
        raise EnvError(f"{what} returned a number too large to compute with", got=shown(value), expected=expected)
    return number
