"""Answers that were given elsewhere and recorded, with what was said about them: a log, demonstrations, another run.

    {"messages": [{"role": "user", "content": "The capital of Peru?"}], "completion": "Cusco",
     "feedback": "That is where it once was.", "reward": 0.0}

A record has its task as ``messages`` or ``prompt`` (a text or messages) and the answer as ``completion``, or as the
last message, the assistant's.  Everything else is optional: ``feedback`` (a text about the answer), ``reward`` or
``success`` (without both nobody has graded it), ``tokens`` and ``logprobs`` (of the answer, when it was sampled),
``tools``, ``id``.  The path may also be the folder of a run, whose attempts and retries are then the records.

Nothing is sent anywhere: the file is read on this machine, and what is learned from it stays in the run folder.
"""

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from vpd.envs import Announcing, Conversational, Env, FixedLength, RecordedAs, Reply, records
from vpd.envs.record_tasks import Part, RecordTasks
from vpd.errors import ConfigError, DataError
from vpd.settings import IsPath, Share
from vpd.types import LARGEST_REWARD, Grade, Message, RecordedAnswer, Task

LOG = logging.getLogger("vpd")
ANSWERS = ("completion", "answer")
OUTCOME = ("reward", "success", "feedback", "informative")
FROM_A_RUN = (
    "messages",
    "tools",
    "completion",
    "feedback",
    "informative",
    "reward",
    "success",
    "turns",
    "quoted",
)  # columns of rollouts/*.parquet


@dataclass(frozen=True, slots=True)
class Answers:
    """The payload of a task with recorded answers, which make its group."""

    answers: tuple[RecordedAnswer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question with its answers."""

    id: str
    task: Task


@dataclass(frozen=True, kw_only=True)
class AnswerTasks(RecordTasks[Answered]):
    """Tasks that come with recorded answers; none is held out, as no other answer to them could be graded.

    A base of :class:`RecordedAnswers`, which reads a file, and of :class:`GivenAnswers`.
    """

    name: str
    only: Annotated[
        Literal["all", "success"], "all records, or those that are a success or that nobody has graded (demonstrations)"
    ] = "all"
    success_threshold: Annotated[float, "a record without 'success' is one from this reward on"] = 0.5
    max_quote: Annotated[
        int | None,
        Ge(1),
        "a run's retry that repeats more words of its feedback in a row, beyond the task's own, is left out; null:"
        " none is",
    ] = 8
    group_size: Annotated[int, Ge(1), "most answers to one question that make one group"] = 8
    eval_share: ClassVar[float] = 0.0  # type: ignore[misc]

    def read_records(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        """(place for error messages, number, record) of every record.  Raises DataError."""
        raise NotImplementedError

    def read_items(self, source: str) -> list[Answered]:
        """The questions in the order of their first record; of one with many answers several."""
        questions: dict[str, Answered] = {}
        left_out: Counter[str] = Counter()
        answers: dict[str, list[RecordedAnswer]] = {}
        for where, number, record in self.read_records():
            reason = self._left_out(record, where)
            if reason:
                left_out[reason] += 1
                continue
            task, answer = read_answer(record, number, where, self.success_threshold)
            key = json.dumps([task.messages, task.tools], default=str)
            questions.setdefault(key, Answered(id=task.id, task=task))
            answers.setdefault(key, []).append(answer)
        if left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
            LOG.info("%s: left out %s of %d", source, counts, left_out.total() + sum(map(len, answers.values())))
        if not questions:
            raise DataError(
                f"{source} has no answer to learn from",
                got=", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "no record",
                do="Take a longer run or log, or env.only all for a method that learns from failures too.",
            )
        return [
            replace(question, task=replace(question.task, payload=Answers(part)))
            for key, question in questions.items()
            for part in _parts(answers[key], self.group_size)
        ]

    def _left_out(self, record: Mapping[str, Any], where: str) -> str:
        """Why a record is not used; empty: it is."""
        if (record.get("turns") or 1) > 1:
            return "of several turns"
        if self.max_quote is not None and (record.get("quoted") or 0) > self.max_quote:
            return "that quote their feedback"
        grade = read_grade(record, where, self.success_threshold)
        return "failures" if self.only == "success" and grade.graded and not grade.success else ""

    def make_task(self, part: Part, item: Answered) -> Task:
        return replace(item.task, id=f"{part}/{item.id}")

    def split_key(self, item: Answered) -> str:
        return json.dumps(item.task.messages, default=str)

    def recorded(self, task: Task) -> Sequence[RecordedAnswer]:
        return task.payload.answers if isinstance(task.payload, Answers) else ()

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        """No other answer than the recorded ones can be graded."""
        return [Grade(reward=0.0, success=False, graded=False) for _ in tasks]


@dataclass(frozen=True, kw_only=True)
class RecordedAnswers(AnswerTasks):
    """Answers of a log, of demonstrations or of another run, in the place of samples.  Raises DataError.

    ``fresh`` is another environment, which is evaluated on and, with ``fresh_share``, trained on too: its tasks are
    answered now, and graded.
    """

    name: Literal["recorded"] = "recorded"
    path: Annotated[str, IsPath(), "JSON lines, a JSON array, parquet, owner/name on the Hub, or a run folder"]
    fresh: Annotated[
        Mapping[str, Any] | None,
        "section env of the environment whose tasks are answered now: those held out for evaluation, and the share"
        " fresh_share in training; null: none",
    ] = None
    fresh_share: Annotated[float, Share, "share of the training tasks that are fresh's"] = 0.0
    subset: Annotated[str | None, "configuration of the Hub's data set"] = None
    split: Annotated[str, "split of the Hub's data set"] = "train"

    def check(self) -> None:
        super().check()
        if self.fresh is None and self.fresh_share:
            raise ConfigError(
                "env.fresh_share without an environment to draw from",
                got=f"fresh_share {self.fresh_share:g}, fresh null",
                do="Set env.fresh, for example to {name: math, path: train.jsonl}.",
            )

    def beside(self, env: Env) -> Env:
        """These answers, and another environment, ``fresh``."""
        return beside(self, env, self.fresh_share)

    @property
    def sources(self) -> tuple[str, str | None]:
        return self.path, None

    @property
    def recorded_as(self) -> str:
        """How ``config.yaml`` names it beside an environment that was passed."""
        return self.path

    def read_records(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        if is_run(self.path):
            return _run_records(Path(self.path))
        return records.read(self.path, subset=self.subset, split=self.split)


@dataclass(frozen=True, kw_only=True)
class GivenAnswers(AnswerTasks):
    """The same of records that are Python objects."""

    name: str = "recorded"
    entries: tuple[Any, ...] = field(repr=False)

    @property
    def sources(self) -> tuple[str, str | None]:
        return "data", None

    @property
    def recorded_as(self) -> str:
        """How ``config.yaml`` names it: number and hash of the records."""
        text = json.dumps(self.entries, default=str).encode()
        return f"{len(self.entries)} records ({hashlib.blake2b(text, digest_size=4).hexdigest()})"

    def read_records(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        for number, entry in enumerate(self.entries):
            where = f"data[{number}]"
            yield where, number, records.mapping(entry, where)


@dataclass(frozen=True, kw_only=True)
class RecordedAndFresh:
    """Recorded answers, and an environment whose tasks are answered now: evaluation is the latter's.

    Of any n training tasks in a row, ``share`` n are fresh, to within one.
    """

    log: AnswerTasks
    fresh: Env
    share: float = 0.0

    @property
    def recorded_as(self) -> str:
        """How ``config.yaml`` names it where it was passed."""
        parts = (self.log, self.fresh)
        names = [part.recorded_as if isinstance(part, RecordedAs) else type(part).__name__ for part in parts]
        return f"{names[0]} beside {names[1]}"

    def task(self, index: int, *, seed: int) -> Task:
        before = int(index * self.share + 1e-9)  # fresh tasks so far
        if int((index + 1) * self.share + 1e-9) > before:
            return self.fresh.task(before, seed=seed)
        return self.log.task(index - before, seed=seed)

    def train_tasks(self) -> Sequence[Task]:
        """The log's: what is fresh has no end."""
        return self.log.train_tasks()

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self.fresh.eval_tasks(limit)

    def recorded(self, task: Task) -> Sequence[RecordedAnswer]:
        return self.log.recorded(task)

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return self.fresh.grade(tasks, texts)

    @property
    def fixed_length(self) -> bool:
        return isinstance(self.fresh, FixedLength) and self.fresh.fixed_length

    def announce(self) -> Sequence[str]:
        return self.fresh.announce() if isinstance(self.fresh, Announcing) else ()


@dataclass(frozen=True, kw_only=True)
class RecordedAndReplying(RecordedAndFresh):
    """The same beside an environment that may reply to an answer."""

    fresh: Any

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        replies: list[Reply] = self.fresh.respond(tasks, conversations)
        return replies


def beside(log: AnswerTasks, fresh: Env, share: float = 0.0) -> RecordedAndFresh:
    """Recorded answers beside an environment, of which a ``share`` of the training tasks comes."""
    kind = RecordedAndReplying if isinstance(fresh, Conversational) else RecordedAndFresh
    return kind(log=log, fresh=fresh, share=share)


def _parts(answers: Sequence[RecordedAnswer], size: int) -> list[tuple[RecordedAnswer, ...]]:
    return [tuple(answers[start : start + size]) for start in range(0, len(answers), size)]


def is_run(path: str) -> bool:
    """Whether a path is the folder of a run with rollouts."""
    return (Path(path) / "rollouts").is_dir()


def _run_records(folder: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """The attempts and retries of a run; a retry is an answer to the task alone, as the student reads it."""
    number = 0
    for file in sorted((folder / "rollouts").glob("step-*.parquet")):
        for where, _, row in records.read(str(file), split="train"):
            if "messages" not in row:
                raise DataError(
                    f"{file} was written by an older version",
                    got="no column 'messages'",
                    do="Sample the attempts again with vpd collect, or run it anew.",
                )
            kept = {name: row.get(name) for name in FROM_A_RUN}
            outcome = {} if row["graded"] else {"reward": None, "success": None}
            yield where, number, {**kept, **outcome, "id": row["task"]}
            number += 1


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
    task = Task(id=str(record.get("id", number)), messages=messages, tools=records.tools(record, where))
    grade = read_grade(record, where, success_threshold)
    return task, RecordedAnswer(
        text=text,
        grade=grade,
        tokens=None if tokens is None else tuple(map(int, tokens)),
        logprobs=None if logprobs is None else tuple(map(float, logprobs)),
    )


def _typed(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with null where a table has nothing (NaN), and with the values of a line of CSV, which are all texts."""
    if all(isinstance(value, str) for value in record.values()):
        return {name: _of_a_table(name, value) for name, value in record.items()}
    return {name: None if value != value else value for name, value in record.items() if name in OUTCOME}


def _of_a_table(name: str, text: str) -> Any:
    """The value that a text of CSV stands for in the column ``name``; what cannot be read stays a text."""
    if name not in OUTCOME:
        return text
    if not text.strip():
        return None
    if name == "feedback":
        return text
    with contextlib.suppress(ValueError):
        return float(text) if name == "reward" else {"true": True, "false": False}.get(text.strip().lower(), text)
    return text


def read_grade(record: Mapping[str, Any], where: str, success_threshold: float) -> Grade:
    """What was said about the answer: an outcome, if there is one, and a text, if there is one.  Raises DataError."""
    record = _typed(record)
    reward, success = record.get("reward"), record.get("success")
    if success is not None and not isinstance(success, bool):
        raise DataError(f"{where}: 'success' is no truth value", got=repr(success)[:80], expected="true, false or null")
    number = isinstance(reward, (int, float)) and not isinstance(reward, bool) and abs(reward) <= LARGEST_REWARD
    if reward is not None and not number:
        raise DataError(f"{where}: 'reward' is no number", got=repr(reward)[:80], expected="a finite number or null")
    feedback = None if record.get("feedback") is None else records.text(record, "feedback", where)
    graded = reward is not None or success is not None
    value = float(success or False) if reward is None else float(reward)
    return Grade(
        reward=value,
        success=(value >= success_threshold if graded else False) if success is None else success,
        feedback=feedback,
        informative=record.get("informative") is not False,
        graded=graded,
    )


def _conversation(record: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str]:
    """The messages of the task, and the text of the answer."""
    field_name = next((name for name in ("messages", "prompt") if record.get(name) is not None), None)
    if field_name is None:
        raise DataError(
            f"{where} has no task",
            got=f"the keys {', '.join(map(str, record))}"[:200],
            expected="'messages' or 'prompt', and 'completion'",
        )
    asked = records.listed(record[field_name], f"{where}: {field_name!r}")
    if isinstance(asked, str):
        asked = [{"role": "user", "content": records.text(record, field_name, where)}]
    answer_field = next((name for name in ANSWERS if record.get(name) is not None), None)
    if answer_field is not None:
        return records.messages(asked, field_name, where, ends=("user", "tool")), _text(record, answer_field, where)
    whole = records.messages(asked, field_name, where, ends=("assistant",)) if _ends_answered(asked) else ()
    if len(whole) < 2:
        raise DataError(
            f"{where} has no answer",
            got=f"the keys {', '.join(map(str, record))}"[:200],
            expected="'completion', or the assistant's message as the last of 'messages'",
        )
    return records.messages(whole[:-1], field_name, where, ends=("user", "tool")), whole[-1]["content"]


def _ends_answered(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    """An answer: a text, or a list of one assistant's message.  It may be empty: a model may have said nothing."""
    value = records.listed(record[name], f"{where}: {name!r}")
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return records.messages(value, name, where, ends=("assistant",))[0]["content"]
    if value == "":
        return ""
    return records.text({name: value}, name, where)


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
