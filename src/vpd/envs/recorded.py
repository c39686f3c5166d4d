"""Answers that were given elsewhere and recorded, with what was said about them: a log, demonstrations, another run.

    {"messages": [{"role": "user", "content": "The capital of Peru?"}], "completion": "Cusco",
     "feedback": "That is where it once was.", "reward": 0.0}

How a record is read is in :mod:`vpd.envs.answer_records`.  The path may also be the folder of a run, whose attempts
and retries are then the records.

Nothing is sent anywhere: the file is read on this machine, and what is learned from it stays in the run folder.
"""

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge

from vpd.envs import (
    Announcing,
    Conversational,
    Env,
    FixedLength,
    RecordedAs,
    Reply,
    grade_texts,
    records,
    replies_of,
)
from vpd.envs.answer_records import check_keys, read_answer, read_grade
from vpd.envs.record_tasks import Part, RecordTasks
from vpd.errors import ConfigError, DataError
from vpd.settings import IsPath, Share
from vpd.types import Grade, Message, RecordedAnswer, Task

LOG = logging.getLogger("vpd")
Result = TypeVar("Result")
UNGRADED = Grade(reward=0.0, success=False, graded=False)
MOST_NAMED = 20  # columns in one line
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
        unread: Counter[str] = Counter()
        answers: dict[str, list[RecordedAnswer]] = {}
        for where, number, record in self.read_records():
            unread.update(check_keys(record, where))
            reason = self._left_out(record, where)
            if reason:
                left_out[reason] += 1
                continue
            task, answer = read_answer(record, number, where, self.success_threshold)
            key = json.dumps([task.messages, task.tools], default=str)
            questions.setdefault(key, Answered(id=task.id, task=task))
            answers.setdefault(key, []).append(answer)
        if unread:
            names = ", ".join(f"{name} ({count})" for name, count in unread.most_common(MOST_NAMED))
            more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
            LOG.info("%s: columns that are not read (in how many records): %s%s", source, names, more)
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
        return [UNGRADED for _ in tasks]


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
        """Fresh grades the answers to its tasks; none to a recorded task can be graded."""
        return [grade or UNGRADED for grade in _of_fresh(functools.partial(grade_texts, self.fresh), tasks, texts)]

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
        """Fresh replies to the answers to its tasks; nobody to those to a recorded one."""
        replies: list[Reply] = [*_of_fresh(functools.partial(replies_of, self.fresh), tasks, conversations)]
        return replies


def beside(log: AnswerTasks, fresh: Env, share: float = 0.0) -> RecordedAndFresh:
    """Recorded answers beside an environment, of which a ``share`` of the training tasks comes."""
    kind = RecordedAndReplying if isinstance(fresh, Conversational) else RecordedAndFresh
    return kind(log=log, fresh=fresh, share=share)


def _of_fresh(
    call: Callable[[list[Task], list[Any]], Sequence[Result]], tasks: Sequence[Task], given: Sequence[Any]
) -> list[Result | None]:
    """What ``call`` makes of the tasks that have no recorded answers, and of what is given for each; else None."""
    rows = [row for row, task in enumerate(tasks) if not isinstance(task.payload, Answers)]
    made = call([tasks[row] for row in rows], [given[row] for row in rows]) if rows else []
    found = dict(zip(rows, made, strict=True))
    return [found.get(row) for row in range(len(tasks))]


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
                    f"{file} holds no rollouts of a run",
                    got="no column 'messages'",
                    do="Sample the attempts again with vpd collect, or run it anew.",
                )
            kept = {name: row.get(name) for name in FROM_A_RUN}
            outcome = {} if row["graded"] else {"reward": None, "success": None}
            yield where, number, {**kept, **outcome, "id": row["task"]}
            number += 1
