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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vpd.envs import per_row, records
from vpd.envs.record_tasks import FileTasks, Part
from vpd.envs.tags import CLOSE, OPEN, read_tag
from vpd.errors import DataError, nearest
from vpd.types import Grade, Task

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
        """The question and its options, as they appear in every prompt."""
        return "\n".join((f"{self.stem}\n", *map("{}: {}".format, LETTERS, self.options)))


@dataclass(frozen=True, kw_only=True)
class Science(FileTasks[Question]):
    """The environment; files are read when the first task is asked for.

    Raises DataError for data that cannot be used, ConfigError for settings.  Source of the data:
    https://github.com/HICAI-ZJU/SciKnowEval.
    """

    name: Literal["science"] = "science"
    hint: Annotated[Literal["none", "key"], "key: feedback names the right option"] = "none"
    brief: Annotated[bool, "ask for the letter alone, without a tag: for small models"] = False
    system: Annotated[str | None, "another system message, with {count} and {letters}; '': none"] = None
    domain: Annotated[str | None, "Biology, Chemistry, Material or Physics; Hub records only"] = None
    level: Annotated[str | None, "level of the questions; null: all; Hub records only"] = "L3"
    split: Annotated[str, "split of the Hub's data set"] = "test"

    @property
    def reveals_answer(self) -> bool:
        """Whether feedback holds the gold answer."""
        return self.hint == "key"

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        question: Question = task.payload
        letter, fault = read_letter(text, question) if self.brief else read_answer(text, question)
        right = letter == question.key
        verdict = f"Option {letter} is {'right' if right else 'not right'}." if letter else ""
        details = [fault] if fault and not right else []
        details += [f"The right option is {question.key}."] if self.reveals_answer else []
        return Grade(
            reward=float(right),
            success=right,
            feedback=" ".join(filter(None, (verdict, *details))),
            informative=bool(details),
            metrics={"answer_readable": float(letter is not None)},
        )

    def solution(self, task: Task) -> str:
        key: str = task.payload.key
        return key if self.brief else f"{OPEN}{key}{CLOSE}"

    def split_key(self, item: Question) -> str:
        return item.stem

    def identity_key(self, item: Question) -> str:
        return item.text

    def make_task(self, part: Part, item: Question) -> Task:
        count = COUNTS[len(item.options)]
        if self.system is not None:
            system = self.system.replace("{count}", count).replace("{letters}", item.letters)
        elif self.brief:
            system = BRIEF
        else:
            system = _corrected(item.system or SYSTEM.format(count=count, letters=item.letters), item)
        user = item.prompt or f"{item.text}\nPlease reason step by step."
        if self.brief:
            user = f"{item.text}\n\nAnswer with one letter: {item.letters}."
        messages = records.with_system(({"role": "user", "content": user},), system)
        return Task(id=f"{part}/{item.id}", messages=messages, payload=item)

    def read_items(self, path: str) -> list[Question]:
        """All questions of one file or data set that pass the filters."""
        found: list[Question] = []
        domains: set[str] = set()
        for where, number, record in records.read(path, subset=self.subset, split=self.split):
            if "choices" in record:
                if records.text(record, "type", where) not in KINDS:
                    continue
                domains.add(records.text(record, "domain", where))
                level = records.text(records.mapping(record.get("details"), f"{where}: 'details'"), "level", where)
                if (self.domain or record["domain"]) != record["domain"] or (self.level or level) != level:
                    continue
                found.append(_from_hub(record, where, number))
            elif self.domain is not None:
                raise DataError(
                    f"{where} has no domain", expected=f"{self.domain!r} (env.domain)", do="Leave env.domain out."
                )
            else:
                found.append(_from_prepared(records.from_verl(record, where), where, number))
        if not found:
            raise DataError(
                f"{path} has no multiple-choice question",
                expected=f"domain {self.domain or 'any'}, level {self.level or 'any'}",
                do=nearest(self.domain, domains) if self.domain and self.domain not in domains else None,
            )
        return found


def read_answer(text: str, question: Question) -> tuple[str | None, str | None]:
    """The letter in the last answer tag, and what is wrong with the form; either may be None."""
    held, fault = read_tag(text, f"{OPEN}LETTER{CLOSE} with one of the letters {question.letters}")
    if held is None:
        return None, fault
    if len(held) > 1:
        return (
            None,
            f'Your answer tag holds "{records.excerpt(held)}"; it must hold one letter only: {question.letters}.',
        )
    if held not in LETTERS[: len(question.options)]:
        return None, f'Your answer tag holds "{records.excerpt(held)}"; the options are {question.letters}.'
    return held, fault


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


def _from_prepared(record: Mapping[str, Any], where: str, number: int) -> Question:
    prompt = records.text(record, "prompt", where)
    parts = re.split(r"(?m)^([A-F]): (.*)$", prompt)
    labels, texts = parts[1::3], parts[2::3]
    if "A" in labels:  # earlier lines of that look belong to the question
        first = len(labels) - 1 - labels[::-1].index("A")
        stem = prompt[: prompt.rindex(f"\nA: {texts[first]}")] if first or parts[0] else ""
        labels, texts = labels[first:], texts[first:]
    else:
        stem = prompt
    return Question(
        id=records.name_of(record, number, "idx", "extra_info.index"),
        stem=stem.strip(),
        options=_options(labels, texts, where),
        key=_key(record, "answer", labels, where),
        prompt=prompt,
        system=records.optional_text(record, "system", where),
    )


def _from_hub(record: Mapping[str, Any], where: str, number: int) -> Question:
    choices = records.mapping(record.get("choices"), f"{where}: 'choices'")
    for field in ("label", "text"):
        if not isinstance(choices.get(field), list):
            raise DataError(f"{where} has no list choices.{field}", got=repr(choices.get(field))[:80])
    labels = choices["label"]
    return Question(
        id=str(number),
        stem=records.text(record, "question", where).strip(),
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
    return tuple(records.text({"option": text}, "option", where).strip() for text in texts)


def _key(record: Mapping[str, Any], field: str, labels: Sequence[str], where: str) -> str:
    key = records.text(record, field, where).strip()
    if key not in labels:
        raise DataError(f"{where}: {field!r} is not among the options", got=repr(key[:40]), expected=", ".join(labels))
    return key


def _corrected(system: str, question: Question) -> str:
    """The system message with the number and the letters of this question's options."""
    count = COUNTS[len(question.options)]
    stated = COUNT.search(system)
    if stated is None:
        return f"{system.rstrip()}\nThere are {count} options: {question.letters}.\n"
    if stated[0].lower() in (count, str(len(question.options))):
        return system
    return LETTER_LIST.sub(question.letters, COUNT.sub(count, system))
