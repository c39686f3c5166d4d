"""A record of an answer: the task, the answer, and what was said about it, checked field by field.

A record has its task as ``messages`` or ``prompt`` (a text or messages) and the answer as ``completion`` or ``answer``,
or as the last message, the assistant's.  Everything else is optional: ``feedback`` (a text about the answer;
``informative`` false: a bare verdict), ``reward`` (or ``score``) or ``success`` (without them nobody has graded it),
``tokens`` and ``logprobs`` (of the answer, when it was sampled), ``tools``, ``id``.

Of ``messages`` and ``prompt``, ``completion`` and ``answer``, ``reward`` and ``score`` the first is read where both are
there.  Other columns are not read; one whose name is a slip of the outcome's is an error, as what it says would get
lost.  Every error names the file and the line.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vpd.envs import records
from vpd.errors import DataError, near
from vpd.scalars import plain
from vpd.types import LARGEST_REWARD, Grade, Message, RecordedAnswer, Task

TASKS = ("messages", "prompt")
ANSWERS = ("completion", "answer")
REWARDS = ("reward", "score")
OUTCOME = (*REWARDS, "success", "feedback", "informative")
READ = (*TASKS, *ANSWERS, *OUTCOME, "tokens", "logprobs", "tools", "id", "turns", "quoted")
#: keys that change what is learned, and whose absence nobody would notice
MISSED = (*OUTCOME, "logprobs")
SLIP = 0.86  # how like one of these another key must be: "rewards" is, "reward_model", "source" and "prompt_id" are not
WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def read_answer(
    record: Mapping[str, Any], number: int, where: str, success_threshold: float
) -> tuple[Task, RecordedAnswer]:
    """A record as a task and the answer that was given to it.  Raises DataError."""
    messages, text = _conversation(record, where)
    tokens, logprobs = _numbers(record, "tokens", where), _numbers(record, "logprobs", where)
    if logprobs is not None and (tokens is None or len(tokens) != len(logprobs)):
        raise DataError(
            f"{where}: 'logprobs' are of no tokens that are known",
            got=f"{len(logprobs)} log-probs and {'no' if tokens is None else len(tokens)} tokens",
            expected="'tokens', the answer's token ids when it was sampled, as many as log-probs",
            do="Write both, or leave 'logprobs' out: the initial model's then stand in.",
        )
    task = Task(id=records.name_of(record, number, "id"), messages=messages, tools=records.tools(record, where))
    grade = read_grade(record, where, success_threshold)
    return task, RecordedAnswer(
        text=text,
        grade=grade,
        tokens=None if tokens is None else tuple(map(int, tokens)),
        logprobs=None if logprobs is None else tuple(map(float, logprobs)),
        where=where,
    )


def check_keys(record: Mapping[str, Any], where: str) -> list[str]:
    """The keys of a record that are not read.  Raises DataError for one that must be a slip of one that is."""
    given = [name for name in record if not records.says_nothing(record[name])]
    ignored = [name for name in given if name not in READ]
    for first, second in (TASKS, ANSWERS, REWARDS):
        ignored += [second] if first in given and second in given else []
    decided = {*REWARDS, "success"} & {*given}
    lacking = tuple(name for name in MISSED if name not in given and not (name in REWARDS and decided))
    for name in ignored:
        hint = _slip(str(name).strip().lower(), lacking)
        if hint:
            raise DataError(
                f"{where} has a key that is not read",
                got=repr(name),
                do=f"{hint} If it is something else, rename it or leave it out.",
            )
    return [str(name) for name in ignored]


@functools.lru_cache(maxsize=4096)
def _slip(name: str, lacking: tuple[str, ...]) -> str | None:
    """A hint where a name is almost one that is lacking; names with a number count something else."""
    return None if any(map(str.isdigit, name)) else near(name, lacking, cutoff=SLIP)


def _typed(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with null where a table has nothing (NaN), and with the values of a line of CSV, which are all texts."""
    if all(isinstance(value, str) for value in record.values()):
        return {name: _of_a_table(name, value) for name, value in record.items()}
    values = {name: plain(value) for name, value in record.items() if name in OUTCOME}
    return {name: None if isinstance(value, float) and value != value else value for name, value in values.items()}


def _of_a_table(name: str, text: str) -> Any:
    """The value that a text of CSV stands for in the column ``name``; what cannot be read stays a text."""
    if name not in OUTCOME:
        return text
    if not text.strip():
        return None
    if name == "feedback":
        return text
    with contextlib.suppress(ValueError):
        return float(text) if name in REWARDS else WORDS.get(text.strip().lower(), text)
    return text


def read_grade(record: Mapping[str, Any], where: str, success_threshold: float) -> Grade:
    """What was said about the answer: an outcome, if there is one, and a text, if there is one.  Raises DataError."""
    record = _typed(record)
    column = next((name for name in REWARDS if record.get(name) is not None), "reward")
    reward, success, informative = (record.get(name) for name in (column, "success", "informative"))
    for name, value in (("success", success), ("informative", informative)):
        if value is not None and not isinstance(value, bool):
            raise DataError(
                f"{where}: {name!r} is no truth value", got=repr(value)[:80], expected="true, false or null"
            )
    number = isinstance(reward, (int, float)) and not isinstance(reward, bool) and abs(reward) <= LARGEST_REWARD
    if reward is not None and not number:
        raise DataError(f"{where}: {column!r} is no number", got=repr(reward)[:80], expected="a finite number or null")
    feedback = None if record.get("feedback") is None else records.text(record, "feedback", where)
    graded = reward is not None or success is not None
    value = float(success or False) if reward is None else float(reward)
    return Grade(
        reward=value,
        success=(value >= success_threshold if graded else False) if success is None else success,
        feedback=feedback,
        informative=informative is not False,
        graded=graded,
    )


def _conversation(record: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str]:
    """The messages of the task, and the text of the answer."""
    field_name = next((name for name in TASKS if record.get(name) is not None), None)
    if field_name is None:
        raise DataError(
            f"{where} has no task",
            got=f"the keys {', '.join(map(str, record))}"[:200],
            expected="'messages' or 'prompt', and 'completion'",
        )
    _check_one_task(record, where)
    answer_field = next((name for name in ANSWERS if record.get(name) is not None), None)
    if answer_field is not None:
        return records.prompt(record, field_name, where), _text(record, answer_field, where)
    asked = records.listed(record[field_name], f"{where}: {field_name!r}")
    if not _ends_answered(asked) or len(asked) < 2:
        raise DataError(
            f"{where} has no answer",
            got=f"the keys {', '.join(map(str, record))}"[:200],
            expected="'completion', or the assistant's message as the last of 'messages'",
        )
    task = records.messages(asked[:-1], field_name, where, ends=("user", "tool"))
    return task, _message_text(asked[-1], field_name, where)


def _check_one_task(record: Mapping[str, Any], where: str) -> None:
    """Raise DataError where ``messages`` and ``prompt`` have no text in common: one of them was not answered."""
    messages, prompt = (_texts(record.get(name), f"{where}: {name!r}") for name in TASKS)
    if messages and prompt and not any(one in other or other in one for one in messages for other in prompt):
        raise DataError(
            f"{where}: 'messages' and 'prompt' are different tasks",
            got=f"{messages[-1]!r:.60} and {prompt[-1]!r:.60}",
            expected="one of them, or in 'prompt' what 'messages' say",
            do="Leave one out.",
        )


def _texts(value: Any, what: str) -> list[str]:
    """What a prompt or messages say."""
    found = records.listed(value, what)
    parts = found if isinstance(found, (list, tuple)) else [{"content": found}]
    texts = [part.get("content") for part in parts if isinstance(part, Mapping)]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _ends_answered(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    """An answer: a text, or a list of one assistant's message.  It may be blank: a model may have said nothing."""
    value = records.listed(record[name], f"{where}: {name!r}")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _message_text(value[0], name, where)
    if isinstance(value, str) and not value.strip():
        return value
    return records.text({name: value}, name, where)


def _message_text(message: Any, name: str, where: str) -> str:
    """The text of the assistant's message that is the answer."""
    content = message.get("content") if _ends_answered([message]) else None
    if isinstance(content, str) and not content.strip():
        return content
    return records.messages([message], name, where, ends=("assistant",))[0]["content"]


def _numbers(record: Mapping[str, Any], name: str, where: str) -> Sequence[float] | None:
    values = record.get(name)
    if values is None:
        return None
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    ):
        raise DataError(f"{where}: {name!r} is no list of numbers", got=repr(values)[:80])
    if name == "tokens" and not all(isinstance(v, int) and v >= 0 for v in values):
        raise DataError(f"{where}: 'tokens' are no token ids", got=repr(values)[:80], expected="whole numbers")
    if name == "logprobs" and not all(-1e9 < v <= 1e-3 for v in values):
        raise DataError(f"{where}: 'logprobs' are no natural logarithms of probabilities", got=repr(values)[:80])
    return values
