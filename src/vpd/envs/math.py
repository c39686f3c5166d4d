r"""Mathematics: problems with one right value.  Right is the last ``\boxed{}``.

    What is 3/4 of 96? Put your final answer in \boxed{}.           <- the task
    A quarter is 24, so three are 72.                                <- an attempt
    Your answer has no \boxed{}; it must end with \boxed{VALUE}.     <- feedback: a fault of form, informative
    The value in your box is not right.                              <- feedback: a bare verdict, for people only

    env = Math(path="train.jsonl", eval_path="test.jsonl")
    env = Math(path="openai/gsm8k", subset="main", eval_share=0.05)

A record has a ``question``, ``problem`` or ``prompt`` (text or messages), and its right value in ``answer``,
``solution`` or ``reward_model.ground_truth``: after ``####`` (gsm8k), in the last ``\boxed{}`` (MATH), or as it is.

With ``answer_form`` hashes an answer's value stands after its last ``####`` instead, as in the answers of gsm8k.

How two values are compared is in :mod:`vpd.envs.math_values`: as written, less what does not count (spaces, ``\left``,
``\dfrac``, thousands commas, a dollar, per cent or degree sign); as exact numbers, with their units; and only where
that does not tell, by math-verify in a :class:`~vpd.envs.worker.Worker`.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Gt

from vpd.envs import per_row, records
from vpd.envs.math_values import LONGEST, compare, number, other_forms, other_values
from vpd.envs.record_tasks import FileTasks, Part
from vpd.envs.worker import Worker, WorkerFault
from vpd.errors import ConfigError, DataError
from vpd.types import Grade, Message, Task

ASK = r"Put your final answer in \boxed{}."
FORM = r"it must end with \boxed{VALUE}"
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
DAPO = re.compile(  # the frame of the data set's prompts, which asks for another form of answer
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form Answer:.*?"
    r"\n\n(?P<problem>.*?)\s*Remember to put your answer on its own line after \"Answer:\"\.\s*\Z",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem as read; ``value`` is the right one."""

    id: str
    text: str
    value: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Math(FileTasks[Problem]):
    """The environment; files are read when the first task is asked for.

    Raises DataError for data that cannot be used, ConfigError for settings or a missing math-verify.
    """

    name: Literal["math"] = "math"
    verify: Annotated[Literal["math-verify", "exact"], "exact: values must agree as written"] = "math-verify"
    verify_seconds: Annotated[float, Gt(0), "seconds that math-verify may take for one comparison"] = 5.0
    hint: Annotated[Literal["none", "key"], "key: feedback names the right value"] = "none"
    ask: Annotated[str, "text after each problem; '': none"] = ASK
    answer_form: Annotated[
        Literal["box", "hashes"], r"where an answer's value stands: in its last \boxed{}, or after its last ####"
    ] = "box"
    system: Annotated[str | None, "a system message"] = None

    def check(self) -> None:
        super().check()
        if self.verify == "math-verify" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "env.verify needs the package math-verify, which is missing",
                do="pip install 'vpd-rl[math]', or set env.verify to exact.",
            )

    @property
    def reveals_answer(self) -> bool:
        """Whether feedback holds the right value."""
        return self.hint == "key"

    def solution(self, task: Task) -> str:
        return self._written(task.payload.value)

    def restated(self, task: Task) -> list[str]:
        return [self._written(form) for form in other_forms(task.payload.value)]

    def altered(self, task: Task) -> list[str]:
        return [self._written(value) for value in other_values(task.payload.value)]

    def _written(self, value: str) -> str:
        return rf"\boxed{{{value}}}" if self.answer_form == "box" else f"#### {value}"

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        problem: Problem = task.payload
        boxed = self.answer_form == "box"
        value, fault = read_box(text) if boxed else read_hashes(text)
        place = "in your box" if boxed else "after your ####"
        right, unverified = False, None
        if value is not None:
            try:
                right = self._equal(problem.value, value)
            except WorkerFault as error:
                unverified = f"Your value could not be compared with the right one: {error}. Write it in simplest form."
        if right:
            return self._grade(True, f"The value {place} is right.", informative=False)
        if value is not None and number(problem.value) is not None and not any(map(str.isnumeric, value)):
            held = "Your box holds" if boxed else "Your #### is followed by"
            fault = fault or f'{held} "{records.excerpt(value)}"; the answer is a number.'
        details = [part for part in (unverified, fault) if part]
        verdict = [] if value is None or unverified else [f"The value {place} is not right."]
        details += [f"The right value is {problem.value}."] if self.reveals_answer else []
        return self._grade(
            False,
            " ".join(verdict + details),
            informative=bool(details),
            readable=value is not None,
            unverified=unverified is not None,
        )

    @staticmethod
    def _grade(
        right: bool, feedback: str, *, informative: bool, readable: bool = True, unverified: bool = False
    ) -> Grade:
        metrics = {"answer_readable": float(readable), "unverified": float(unverified)}
        return Grade(reward=float(right), success=right, feedback=feedback, informative=informative, metrics=metrics)

    def _equal(self, gold: str, value: str) -> bool:
        found = compare(gold, value)
        if found is not None or self.verify == "exact":
            return bool(found)
        return bool(self._worker.ask([gold, value]))

    @cached_property
    def _worker(self) -> Worker:
        return Worker("vpd.envs.math_values", seconds=self.verify_seconds)

    def split_key(self, item: Problem) -> str:
        return item.text

    def make_task(self, part: Part, item: Problem) -> Task:
        *before, last = item.messages
        content = f"{last['content']}\n{self.ask}" if self.ask else last["content"]
        messages = records.with_system((*before, {"role": last["role"], "content": content}), self.system)
        return Task(id=f"{part}/{item.id}", messages=messages, payload=item)

    def read_items(self, path: str) -> list[Problem]:
        return [
            _problem(record, where, number)
            for where, number, record in records.read(path, subset=self.subset, split=self.split)
        ]


def read_box(text: str) -> tuple[str | None, str | None]:
    r"""(value in the last ``\boxed{}``, fault of form); either may be None."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        empty = "is empty" if not text.strip() else r"has no \boxed{}"
        return None, f"Your answer {empty}; {FORM}."
    held = [_braced(text, box.end()) for box in boxes]
    last = held[-1]
    if last is None:
        opened = text[boxes[-1].end() :].lstrip().startswith("{")
        wrong = "is not closed" if opened else "has no braces"
        return None, rf"Your last \boxed {wrong}; {FORM}."
    if not last.strip():
        return None, rf"Your last \boxed{{}} is empty; {FORM}."
    if len(last) > LONGEST:
        return None, rf"Your last \boxed{{}} holds {len(last)} characters; only the final value belongs there."
    if len(held) > 1:
        return last.strip(), f"Your answer has {len(held)} boxes; only the last one counts."
    return last.strip(), None


def read_hashes(text: str) -> tuple[str | None, str | None]:
    """(value after the last ``####``, to the end of its line; fault of form); either may be None."""
    *before, last = text.split("####")
    if not before:
        empty = "is empty" if not text.strip() else "has no ####"
        return None, f"Your answer {empty}; it must end with #### VALUE."
    value = last.lstrip().partition("\n")[0].strip().rstrip(".")
    if not value:
        return None, "Nothing follows your last ####; your answer must end with #### VALUE."
    if len(value) > LONGEST:
        return None, f"Your last #### is followed by {len(value)} characters; only the final value belongs there."
    return value, None


def _braced(text: str, start: int) -> str | None:
    """The content of the braces that open at ``start``; None if none open there or they do not close."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : start + brace.start()]
    return None


def _problem(record: Mapping[str, Any], where: str, number: int) -> Problem:
    messages = _messages(record, where)
    value = _value(record, where)
    if len(value) > LONGEST:
        raise DataError(f"{where}: the right value is too long", got=f"{len(value)} characters", expected=f"{LONGEST}")
    name = records.name_of(record, number, "idx", "id", "unique_id", "extra_info.index")
    return Problem(id=name, text=messages[-1]["content"], value=value, messages=messages)


def _messages(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The problem as messages of which the last is the user's."""
    field = next((field for field in ("question", "problem", "prompt") if record.get(field) is not None), "question")
    messages = records.prompt(record, field, where, ends=("user",))
    framed = DAPO.match(messages[-1]["content"])
    content = framed["problem"] if framed else messages[-1]["content"]
    return (*messages[:-1], {"role": "user", "content": content.strip()})


def _value(record: Mapping[str, Any], where: str) -> str:
    """The right value, from the field that the data set uses."""
    if "reward_model" in record and record.get("answer") is None:
        record = records.mapping(record["reward_model"], f"{where}: 'reward_model'")
        field = "ground_truth"
    else:
        field = next((field for field in ("answer", "solution") if record.get(field) is not None), "answer")
    text = records.value_text(record, field, where)
    if "####" in text:
        text = text.rpartition("####")[2]
    elif BOX.search(text):
        value, fault = read_box(text)
        if value is None:
            raise DataError(f"{where}: {field!r} has no value in its last box", got=fault)
        text = value
    if not text.strip() or "\n" in text.strip():
        expected = r"a value on one line, after ####, or in a \boxed{}"
        raise DataError(f"{where}: {field!r} holds no value", got=repr(text)[:80], expected=expected)
    return text.strip()
