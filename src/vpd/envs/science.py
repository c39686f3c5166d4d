"""SciKnowEval: multiple-choice questions of science.  Right is the letter in the last ``<answer>`` tag.

    Which gas is lighter?  A: helium  B: argon                       <- the task
    <reasoning>Argon is heavy.</reasoning> <answer>A, helium</answer>  <- an attempt
    The answer tag holds "A, helium"; it must hold one letter: A or B.  <- feedback: a fault of form, informative
    Option B is not right.                                           <- feedback: a bare verdict, for people only

    env = Science(path="chemistry-train.jsonl", eval_path="chemistry-test.jsonl")
    env = Science(path="hicai-zju/SciKnowEval", domain="Biology")    # the Hub; a tenth is held out

A record is one of two kinds: *prepared* (``prompt`` with lines ``A: ...``, ``answer``, ``system``), as the SDPO release
writes them, or the *Hub's* (``question``, ``choices``, ``answerKey``, ``type``, ``domain``, ``details.level``), of
which the multiple-choice questions are taken.  Both may come from a file of JSON lines or from a data set on the Hub.
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from vpd.envs import per_row
from vpd.errors import ConfigError, DataError, nearest
from vpd.types import Grade, Message, Task

OPEN, CLOSE = "<answer>", "</answer>"
COUNTS = ("no", "one", "two", "three", "four", "five", "six")
LETTERS = "ABCDEF"
KINDS = ("mcq-2-choices", "mcq-4-choices")
SYSTEM = """Choose the right one of the {count} options. Answer in this form:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

Between the answer tags stands the letter of the right option ({letters}) and nothing else."""
BRIEF = "You answer with one letter."
HUB = re.compile(r"[\w.-]+/[\w.-]+")
COUNT = re.compile(r"\b(two|three|four|five|six|[2-6])(?= (?:options|choices)\b)", re.IGNORECASE)
LETTER_LIST = re.compile(r"\bA(?:, [B-F])*,? or [B-F]\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question as read: ``prompt`` is the prepared wording, if there is one; ``options`` are A, B, ..."""

    id: str
    stem: str
    options: tuple[str, ...]
    key: str
    prompt: str | None = None
    system: str | None = None

    @property
    def letters(self) -> str:
        """``A or B``, ``A, B, C or D``."""
        *first, last = list(LETTERS[: len(self.options)])
        return f"{', '.join(first)} or {last}"

    @property
    def text(self) -> str:
        """The question and its options, as every prompt shows them."""
        return "\n".join((f"{self.stem}\n", *map("{}: {}".format, LETTERS, self.options)))


@dataclass(frozen=True, kw_only=True)
class Science:
    """The environment; files are read when the first task is asked for.

    Raises DataError for data that cannot be used, ConfigError for settings.  Source of the data:
    https://github.com/HICAI-ZJU/SciKnowEval.
    """

    name: Literal["science"] = "science"
    path: Annotated[str, "a file of JSON lines, or a data set of the Hub: owner/name"]
    eval_path: Annotated[str | None, "held-out questions; null: a share of path, chosen by a hash"] = None
    eval_share: Annotated[float, "that share"] = 0.1
    hint: Annotated[Literal["none", "key"], "key: feedback names the right option"] = "none"
    brief: Annotated[bool, "ask for the letter alone, without a tag: for small models"] = False
    system: Annotated[str | None, "another system message, with {count} and {letters}; '': none"] = None
    domain: Annotated[str | None, "Biology, Chemistry, Material or Physics; Hub records only"] = None
    level: Annotated[str | None, "null: all; Hub records only"] = "L3"
    subset: Annotated[str | None, "configuration of the Hub's data set"] = None
    split: Annotated[str, "split of the Hub's data set"] = "test"

    def __post_init__(self) -> None:
        if not 0 < self.eval_share < 1:
            raise ConfigError("env.eval_share is out of range", got=self.eval_share, expected="between 0 and 1")
        if self.hint not in ("none", "key"):
            raise ConfigError("env.hint is unknown", got=repr(self.hint), expected="'none' or 'key'")

    @property
    def reveals_answer(self) -> bool:
        """Whether feedback holds the gold answer."""
        return self.hint == "key"

    def task(self, index: int, *, seed: int) -> Task:
        """Epoch ``index // n`` walks through all training questions in the order drawn by (seed, epoch)."""
        tasks = self.train_tasks()
        epoch, place = divmod(index, len(tasks))
        return tasks[_permutation(len(tasks), seed, epoch)[place]]

    def train_tasks(self) -> Sequence[Task]:
        return self._tasks[0]

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self._tasks[1][:limit]

    @cached_property
    def repeated_stems(self) -> int:
        """Held-out questions that training asks too, with other options: a memory of training may solve them."""
        known = {task.payload.stem for task in self._tasks[0]}
        return sum(task.payload.stem in known for task in self._tasks[1])

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        question: Question = task.payload
        letter, fault = read_letter(text, question) if self.brief else read_answer(text, question)
        right = letter == question.key
        verdict = f"Option {letter} is {'right' if right else 'not right'}." if letter else ""
        told = [fault] if fault and not right else []
        told += [f"The right option is {question.key}."] if self.reveals_answer else []
        return Grade(
            reward=float(right),
            success=right,
            feedback=" ".join(filter(None, (verdict, *told))),
            informative=bool(told),
            metrics={"answer_readable": float(letter is not None)},
        )

    @cached_property
    def _tasks(self) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        """Training and evaluation, apart."""
        everything = self._questions(self.path)
        if self.eval_path is None or self.eval_path == self.path:
            train = [question for question in everything if _hash(question.stem) >= self.eval_share]
            held_out = [question for question in everything if _hash(question.stem) < self.eval_share]
        else:
            train, held_out = everything, self._questions(self.eval_path)
            known = {question.text for question in train}
            shared = [question.id for question in held_out if question.text in known]
            if shared:
                raise DataError(
                    f"{self.path} and {self.eval_path} share {len(shared)} questions",
                    got=f"record {shared[0]} of the latter in both",
                    expected="evaluation apart from training",
                    do="Take them out of one, or leave env.eval_path out: then a share of env.path is held out.",
                )
        for part, questions in (("training", train), ("evaluation", held_out)):
            if not questions:
                raise DataError(
                    f"{self.path} leaves no question for {part}",
                    got=f"{len(everything)} in all, env.eval_share {self.eval_share}",
                    do="Give more questions, another env.eval_share, or env.eval_path.",
                )
        held_out.sort(key=lambda question: _hash(question.text))  # any first few are a fair sample
        return tuple(self._task("train", q) for q in train), tuple(self._task("eval", q) for q in held_out)

    def _task(self, part: str, question: Question) -> Task:
        count = COUNTS[len(question.options)]
        if self.system is not None:
            system = self.system.replace("{count}", count).replace("{letters}", question.letters)
        elif self.brief:
            system = BRIEF
        else:
            system = _corrected(question.system or SYSTEM.format(count=count, letters=question.letters), question)
        user = question.prompt or f"{question.text}\nPlease reason step by step."
        if self.brief:
            user = f"{question.text}\n\nAnswer with one letter: {question.letters}."
        messages: tuple[Message, ...] = ({"role": "user", "content": user},)
        if system:
            messages = ({"role": "system", "content": system}, *messages)
        return Task(id=f"{part}/{question.id}", messages=messages, payload=question)

    def _questions(self, path: str) -> list[Question]:
        """All questions of one file or data set that pass the filters."""
        found: list[Question] = []
        domains: set[str] = set()
        for where, number, record in _records(path, self.subset, self.split):
            if "choices" in record:
                if _text(record, "type", where) not in KINDS:
                    continue
                domains.add(_text(record, "domain", where))
                level = _text(_mapping(record, "details", where), "level", where)
                if (self.domain or record["domain"]) != record["domain"] or (self.level or level) != level:
                    continue
                found.append(_from_hub(record, where, number))
            elif self.domain is not None:
                raise DataError(
                    f"{where} has no domain", expected=f"{self.domain!r} (env.domain)", do="Leave env.domain out."
                )
            else:
                found.append(_from_prepared(record, where, number))
        if not found:
            raise DataError(
                f"{path} has no multiple-choice question",
                expected=f"domain {self.domain or 'any'}, level {self.level or 'any'}",
                do=nearest(self.domain, domains) if self.domain and self.domain not in domains else None,
            )
        return found


def read_answer(text: str, question: Question) -> tuple[str | None, str | None]:
    """The letter in the last answer tag, and what is wrong with the form; either may be None."""
    form = f"{OPEN}LETTER{CLOSE} with one of the letters {question.letters}"
    start = text.rfind(OPEN, 0, max(text.rfind(CLOSE), 0))
    end = text.find(CLOSE, start)
    if start < 0:
        if not text.strip():
            return None, f"Your answer is empty; it must end with {form}."
        if OPEN in text:
            return None, f"Your answer tag is not closed; write {form}."
        return None, f"Your answer has no answer tag; it must end with {form}."
    held = text[start + len(OPEN) : end].strip()
    if not held:
        return None, f"Your answer tag is empty; write {form}."
    if len(held) > 1:
        return None, f'Your answer tag holds "{_shown(held)}"; it must hold one letter only: {question.letters}.'
    if held not in LETTERS[: len(question.options)]:
        return None, f'Your answer tag holds "{_shown(held)}"; the options are {question.letters}.'
    return held, f"Text follows your {CLOSE}; nothing may." if text[end + len(CLOSE) :].strip() else None


def read_letter(text: str, question: Question) -> tuple[str | None, str | None]:
    """The letter that is the whole answer (``B``, ``B.`` or ``(B)``), and what is wrong with the form."""
    form = f"it must be one letter and nothing else: {question.letters}"
    held = text.strip().strip("().")
    if not held:
        return None, f"Your answer is empty; {form}."
    if held in LETTERS[: len(question.options)]:
        return held, None
    words = len(held.split())
    return None, f"Your answer has {words} {'word' if words == 1 else 'words'}; {form}."


def _records(path: str, subset: str | None, split: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(where it stands, its number, record) of every record."""
    source = Path(path)
    if source.exists() or source.suffix in (".json", ".jsonl") or not HUB.fullmatch(path):
        for number, line in _lines(source):
            where = f"{path} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON", got=str(error)[:200], expected="one object a line") from error
            yield where, number, _object(record, where)
        return
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is on the Hub, and the package datasets is missing", do="pip install 'vpd-rl[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {path} from the Hub",
            got=" ".join(str(error).split())[:300],
            do="Check the name, env.subset and env.split, or give a file of JSON lines.",
        ) from error
    for number, record in enumerate(rows):
        yield f"{path} record {number}", number, record


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file that are not blank."""
    try:
        raw = source.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{source} is not UTF-8", got=f"byte 0x{raw[error.start]:02x} in line {line}") from error
    except OSError as error:
        expected = "a file of JSON lines, or owner/name on the Hub"
        raise DataError(f"cannot read {source}", got=error.strerror, expected=expected) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{source} is empty", expected="one JSON object a line")
    yield from lines


def _from_prepared(record: Mapping[str, Any], where: str, number: int) -> Question:
    prompt = _text(record, "prompt", where)
    parts = re.split(r"(?m)^([A-F]): (.*)$", prompt)
    labels, texts = parts[1::3], parts[2::3]
    if "A" in labels:  # earlier lines of that look belong to the question
        first = len(labels) - 1 - labels[::-1].index("A")
        stem = prompt[: prompt.rindex(f"\nA: {texts[first]}")] if first or parts[0] else ""
        labels, texts = labels[first:], texts[first:]
    else:
        stem = prompt
    return Question(
        id=str(record.get("idx", number)),
        stem=stem.strip(),
        options=_options(labels, texts, where),
        key=_key(record, "answer", labels, where),
        prompt=prompt,
        system=_text(record, "system", where) if "system" in record else None,
    )


def _from_hub(record: Mapping[str, Any], where: str, number: int) -> Question:
    choices = _mapping(record, "choices", where)
    for field in ("label", "text"):
        if not isinstance(choices.get(field), list):
            raise DataError(f"{where} has no list choices.{field}", got=repr(choices.get(field))[:80])
    labels = choices["label"]
    return Question(
        id=str(number),
        stem=_text(record, "question", where).strip(),
        options=_options(labels, choices["text"], where),
        key=_key(record, "answerKey", labels, where),
    )


def _options(labels: Sequence[Any], texts: Sequence[Any], where: str) -> tuple[str, ...]:
    if (
        not 2 <= len(labels) <= len(LETTERS)
        or list(labels) != list(LETTERS[: len(labels)])
        or len(texts) != len(labels)
    ):
        raise DataError(
            f"{where} has options that cannot be read",
            got=f"{len(texts)} texts for the letters {', '.join(map(str, labels)) or 'none'}",
            expected="two to six, in the order A, B, ...",
        )
    return tuple(_text({"option": text}, "option", where).strip() for text in texts)


def _key(record: Mapping[str, Any], field: str, labels: Sequence[str], where: str) -> str:
    key = _text(record, field, where).strip()
    if key not in labels:
        raise DataError(f"{where}: {field!r} is not among the options", got=repr(key[:40]), expected=", ".join(labels))
    return key


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        got = f"only {', '.join(map(str, record))}"[:200] if field not in record else repr(value)[:80]
        raise DataError(f"{where} lacks the text {field!r}", got=got, expected="a string that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: {field!r} holds half a surrogate pair", expected="text that UTF-8 can write")
    return value


def _mapping(record: Mapping[str, Any], field: str, where: str) -> Mapping[str, Any]:
    return _object(record.get(field), f"{where}: {field!r}")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object", got=type(value).__name__, expected="a JSON object")
    return value


def _corrected(system: str, question: Question) -> str:
    """The system message with the number and the letters of this question's options."""
    count = COUNTS[len(question.options)]
    stated = COUNT.search(system)
    if stated is None:
        return f"{system.rstrip()}\nThere are {count} options: {question.letters}.\n"
    if stated[0].lower() in (count, str(len(question.options))):
        return system
    return LETTER_LIST.sub(question.letters, COUNT.sub(count, system))


def _shown(text: str) -> str:
    """At most 40 printable characters on one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:200]).split())
    return line if len(line) <= 40 else f"{line[:40]}..."


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


@functools.lru_cache(maxsize=8)
def _permutation(length: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(length))
    random.Random(f"science/{seed}/{epoch}").shuffle(order)
    return order
