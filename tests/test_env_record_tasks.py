"""FileTasks: what an environment over a file gets from it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from vpd.envs import Finite, records, required_held_out_tasks
from vpd.envs.record_tasks import FileTasks, Part, fraction
from vpd.errors import ConfigError, DataError
from vpd.types import Grade, Task


@dataclass(frozen=True, kw_only=True)
class Word:
    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Words(FileTasks[Word]):
    name: Literal["words"] = "words"

    def read_items(self, source: str) -> list[Word]:
        rows = records.read(source, subset=self.subset, split=self.split)
        return [Word(id=str(number), text=records.text(record, "text", where)) for where, number, record in rows]

    def make_task(self, part: Part, item: Word) -> Task:
        return Task(id=f"{part}/{item.id}", messages=({"role": "user", "content": item.text},), payload=item)

    def split_key(self, item: Word) -> str:
        return item.text

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return [Grade(reward=0.0) for _ in tasks]


def written(path: Path, texts: Sequence[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_the_split_is_by_the_hash_of_the_key(tmp_path: Path) -> None:
    texts = [f"word {number}" for number in range(50)]
    env = Words(path=written(tmp_path / "a.jsonl", texts), eval_share=0.3)
    assert isinstance(env, Finite)
    held_out = {task.payload.text for task in env.eval_tasks(None)}
    assert held_out == {text for text in texts if fraction(text) < 0.3}
    assert {task.payload.text for task in env.train_tasks()} == set(texts) - held_out
    assert {task.id.partition("/")[0] for task in env.train_tasks()} == {"train"}


def test_each_epoch_visits_every_task_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    env = Words(path=written(tmp_path / "a.jsonl", [f"word {number}" for number in range(50)]))
    count = len(env.train_tasks())
    first, second, other = (
        [env.task(start + index, seed=seed).id for index in range(count)]
        for start, seed in ((0, 0), (count, 0), (0, 1))
    )
    assert sorted(first) == sorted(second) == sorted(other) == sorted(task.id for task in env.train_tasks())
    assert first != second and first != other


def test_two_files_must_not_share_a_question(tmp_path: Path) -> None:
    train = written(tmp_path / "a.jsonl", ["one", "two"])
    env = Words(path=train, eval_path=written(tmp_path / "b.jsonl", ["three"]))
    assert (len(env.train_tasks()), len(env.eval_tasks(None))) == (2, 1)
    with pytest.raises(DataError, match="share 1 questions; got record 2 of the latter"):
        Words(path=train, eval_path=written(tmp_path / "c.jsonl", ["three", "two"])).train_tasks()


def test_a_share_that_would_take_all_or_none_holds_nothing_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"env\.eval_share is out of range"):
            Words(path="unread.jsonl", eval_share=share)
    for share in (0.01, 0.99):
        env = Words(path=written(tmp_path / "a.jsonl", ["one"]), eval_share=share)
        assert len(env.train_tasks()) == 1 and not env.eval_tasks(None)
        assert "of 1 different questions holds none out" in caplog.text
        with pytest.raises(DataError, match="holds no task out"):
            required_held_out_tasks(env, None)
        caplog.clear()
    env = Words(path=written(tmp_path / "a.jsonl", [f"word {number}" for number in range(50)]), eval_share=0.0)
    assert len(env.train_tasks()) == 50 and not env.eval_tasks(None) and not caplog.text


def test_a_share_of_a_small_file_holds_out_one_question_where_it_is_large_enough(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Chance alone would leave one file in eight of 20 questions without evaluation."""
    for number in range(40):
        words = [f"word {number} {place}" for place in range(20)] * 4  # four records of each question
        env = Words(path=written(tmp_path / "a.jsonl", words), eval_share=0.1)
        held_out = {task.messages[0]["content"] for task in env.eval_tasks(None)}
        below = {word for word in words if fraction(word) < 0.1}
        assert held_out == (below or {min(words, key=fraction)})
        assert not held_out & {task.messages[0]["content"] for task in env.train_tasks()}
    assert not caplog.text
    few = [f"word {place}" for place in range(100) if fraction(f"word {place}") >= 0.1][:9]
    env = Words(path=written(tmp_path / "a.jsonl", few * 2), eval_share=0.1)
    assert not env.eval_tasks(None) and "env.eval_share 0.1 of 9 different questions holds none out" in caplog.text


def test_a_file_for_evaluation_must_hold_something(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(DataError, match="is empty"):
        Words(path=path, eval_path=written(tmp_path / "b.jsonl", [])).train_tasks()


def test_what_is_no_file_is_an_error_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("pipe.jsonl", "a pipe or a device"), ("loop", "symbolic links"), ("a" * 300, "long")):
        with pytest.raises(DataError, match=said):
            list(records.read(str(tmp_path / name), split="train"))
