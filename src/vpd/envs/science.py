"""SciKnowEval: multiple-choice questions of science (arXiv 2406.09098), reward 1 for the right letter.

``path`` is a file of JSON lines, or a data set on the Hub.  Two record shapes are read: the flat one
(``prompt`` with options ``A: ...``, ``answer`` a letter) and the Hub's (``question``, ``choices`` {text, label},
``answerKey``, ``domain``, ``details.level``).

The letter is read from the *last* ``<answer>`` tag.  A fault of form is told precisely, and that is feedback;
"option B is not right" is a bare verdict, which the teacher does not see.  ``hint: key`` adds the right letter to the
feedback and declares it (``reveals_answer``).
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vpd.envs import per_row
from vpd.errors import ConfigError, DataError
from vpd.types import Grade, Message, Task

_OPTION = re.compile(r"^([A-Z])[:.)] ", re.MULTILINE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SYSTEM = (
    "You are given a question and {count} options. Think inside <reasoning> and </reasoning>, then give the letter of "
    "the right option ({letters}) inside <answer> and </answer>, and nothing else in that tag."
)
_BRIEF = (
    "You are given a question and {count} options. Reply with the letter of the right option ({letters}) and nothing "
    "else, in this form: <answer>{first}</answer>"
)


@dataclass(frozen=True, slots=True)
class Question:
    """One record: the question with its options, their letters, and the right one."""

    text: str
    letters: tuple[str, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class Science:
    """``brief`` asks for the letter at once, for small models and short completions."""

    name: Literal["science"] = "science"
    path: Annotated[str, "JSON lines of training questions, or a Hub data set (owner/name)"]
    eval_path: Annotated[str | None, "held-out questions; null: a tenth of path, chosen by hash"] = None
    hint: Annotated[Literal["none", "key"], "key: feedback names the right option (declared as gold)"] = "none"
    brief: Annotated[bool, "ask for the letter at once, without reasoning"] = False
    domain: Annotated[str | None, "Hub records: only this domain"] = None
    level: Annotated[str | None, "Hub records: only this level"] = "L3"

    @property
    def reveals_answer(self) -> bool:
        """Whether the feedback may hold the reference answer."""
        return self.hint == "key"

    def task(self, index: int, *, seed: int) -> Task:
        tasks = self.train_tasks()
        epoch, place = divmod(index, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"science/{seed}/{epoch}").shuffle(order)
        return tasks[order[place]]

    def train_tasks(self) -> Sequence[Task]:
        return _split(self)[0]

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return _split(self)[1][:limit]

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        question: Question = task.payload
        letter, fault = read_answer(text, question.letters)
        right = letter == question.key
        metrics = {"format": float(fault is None)}
        if right:
            return Grade(reward=1.0, feedback="That is right.", informative=False, metrics=metrics)
        told = fault or f"Option {letter} is not right."
        if self.hint == "key":
            told = f"{told} The right option is {question.key}."
        informative = fault is not None or self.hint == "key"
        return Grade(reward=0.0, feedback=told, informative=informative, metrics=metrics)


def read_answer(text: str, letters: Sequence[str]) -> tuple[str | None, str | None]:
    """The letter in the last answer tag, or what is wrong with the form: (letter, fault), one of them None."""
    shown = f"{', '.join(letters[:-1])} or {letters[-1]}"
    found = _ANSWER.findall(text)
    if not found:
        if not text.strip():
            return None, f"Your answer is empty. Write one letter ({shown}) between <answer> and </answer>."
        if "<answer>" in text.lower():
            return None, f"Your <answer> tag is not closed. Write one letter ({shown}) between <answer> and </answer>."
        return None, f"Your answer has no <answer> tag. Write one letter ({shown}) between <answer> and </answer>."
    held = found[-1].strip()
    if held in letters:
        return held, None
    if not held:
        return None, f"Your <answer> tag is empty. Write one letter ({shown}) in it."
    if len(held) == 1:
        return None, f'Your <answer> tag holds "{held}", which is no option. The options are {shown}.'
    return None, f'Your <answer> tag holds more than a letter: "{held[:60]}". Write only {shown} in it.'


@functools.lru_cache(maxsize=8)
def _split(env: Science) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks, apart."""
    train = [_task(question, env.brief) for question in _questions(env.path, env)]
    if env.eval_path is None:
        held_out = [task for task in train if int(hashlib.sha256(task.id.encode()).hexdigest(), 16) % 10 == 0]
        train = [task for task in train if task not in held_out]
    else:
        held_out = [_task(question, env.brief) for question in _questions(env.eval_path, env)]
        shared = {task.payload.text for task in train} & {task.payload.text for task in held_out}
        if shared:
            raise DataError(
                f"{env.path} and {env.eval_path} share {len(shared)} questions",
                got=repr(sorted(shared)[0][:60]),
                do="Take them out of one file: an evaluation on training questions says nothing.",
            )
    if not train or not held_out:
        raise DataError(
            f"{env.path}: no {'training' if not train else 'held-out'} questions are left", do="Check domain and level."
        )
    return train, held_out


def _task(question: Question, brief: bool) -> Task:
    letters = ", ".join(question.letters[:-1]) + f" or {question.letters[-1]}"
    count = {2: "two", 3: "three", 4: "four", 5: "five"}.get(len(question.letters), str(len(question.letters)))
    system = (_BRIEF if brief else _SYSTEM).format(count=count, letters=letters, first=question.letters[0])
    messages: tuple[Message, ...] = (
        {"role": "system", "content": system},
        {"role": "user", "content": question.text},
    )
    digest = hashlib.sha256(question.text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Task(id=f"science-{digest}", messages=messages, payload=question)


def _questions(path: str, env: Science) -> list[Question]:
    records = _file(Path(path)) if _is_file(path) else _hub(path, env)
    questions = [_question(record, where) for where, record in records]
    if not questions:
        raise DataError(f"{path} holds no questions", do="Check the file, or env.domain and env.level.")
    return questions


def _is_file(path: str) -> bool:
    return Path(path).exists() or path.count("/") != 1 or path.endswith((".jsonl", ".json")) or path.startswith(".")


def _file(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(
            f"cannot read the data file {path}", got=error.strerror, expected="a file of JSON lines"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", got=str(error), expected="a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON", got=repr(line[:60]), do=f"Mend the line ({error}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: not an object", got=type(record).__name__, expected="one JSON object per line")
        yield where, record


def _hub(path: str, env: Science) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{path} is no file, and Hub data needs the package datasets", do="pip install 'vpd-rl[hub]'"
        ) from error
    try:
        data = load_dataset(path, split="test")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the data set {path}", got=str(error).split("\n")[0][:160]) from error
    for number, record in enumerate(data):
        level = (record.get("details") or {}).get("level")
        if (env.domain in (None, record.get("domain"))) and (env.level in (None, level)) and record.get("answerKey"):
            yield f"{path}, record {number}", record


def _question(record: Mapping[str, Any], where: str) -> Question:
    """Either record shape as a question.  Raises DataError naming the record."""
    if "choices" in record:
        text, key = _field(record, "question", where), _field(record, "answerKey", where)
        choices = record["choices"]
        if not isinstance(choices, Mapping) or len(choices.get("text", ())) != len(choices.get("label", ())):
            raise DataError(f"{where}: choices are malformed", expected="{'text': [...], 'label': [...]} of one length")
        text += "\n\n" + "\n".join(f"{a}: {b}" for a, b in zip(choices["label"], choices["text"], strict=True))
        letters = tuple(choices["label"])
    else:
        text, key = _field(record, "prompt", where), _field(record, "answer", where)
        text = text.removesuffix("\nPlease reason step by step.")
        letters = tuple(dict.fromkeys(_OPTION.findall(text)))
    if len(letters) < 2:
        raise DataError(
            f"{where}: fewer than two options found", got=repr(text[-60:]), expected="lines such as 'A: ...'"
        )
    if key.strip() not in letters:
        raise DataError(
            f"{where}: the key is not among the options", got=repr(key), expected=f"one of {', '.join(letters)}"
        )
    return Question(text, letters, key.strip())


def _field(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: field {name!r} is missing or not text", got=repr(value)[:60], expected="a non-empty string"
        )
    return value
