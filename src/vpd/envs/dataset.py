"""Any data set with a column of prompts, graded by reward functions of the user's: no class to write.

    env = Dataset(path="train.jsonl", reward="my_rewards.py:accuracy")
    env = Dataset(path="train.parquet", reward=[{"function": "a.py:right", "weight": 1.0}, {"function": "a.py:short"}])

A prompt is a text, which becomes one message of the user's, or a list of messages.  Every other column reaches the
functions by name; how they are called and what they may answer is in :mod:`vpd.envs.adapters.rewards`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from vpd.envs import records
from vpd.envs.adapters.reward_functions import RetryPolicy, RewardFunctions, Row
from vpd.envs.adapters.rewards import TRLFunction, VerlFunction, make_grader, read_answer, rewards_of
from vpd.errors import DataError
from vpd.types import Grade, Message, Task


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The environment; files are read when the first task is asked for.

    Raises DataError for data that cannot be used, ConfigError for settings and for functions that do not fit the data.
    ``max_failed`` rows of a batch may raise, be late, or get no finite reward: they are failures that no teacher reads,
    counted in the metric ``env/grader_failed`` and told one by one.
    """

    name: Literal["dataset"] = "dataset"
    path: Annotated[str, "JSON lines, a parquet file, or a data set of the Hub: owner/name"]
    reward: Annotated[Any, "my_rewards.py:function, {function, weight}, or a list of such"]
    eval_path: Annotated[str | None, "held-out records; null: a share of path, chosen by a hash"] = None
    eval_share: Annotated[float, "that share"] = 0.1
    prompt: Annotated[str, "the column with a text or messages"] = "prompt"
    solution_column: Annotated[str | None, "a column with a right answer, for vpd check"] = None
    reveals_answer: Annotated[bool, "declares that feedback may hold the right answer"] = False
    seconds: Annotated[float | None, "time to grade one answer; null: no limit"] = None
    retries: Annotated[int, "how often an answer that could not be graded is graded again"] = 0
    max_failed: Annotated[float, "share of a batch's answers that may not be gradable; above it: an error"] = 0.0
    system: Annotated[str | None, "a system message, in place of the record's"] = None
    subset: Annotated[str | None, "configuration of the Hub's data set"] = None
    split: Annotated[str, "split of the Hub's data set"] = "train"

    def __post_init__(self) -> None:
        records.check_share(self.eval_share)
        rewards_of(self.reward)
        self._retry_policy()

    def task(self, index: int, *, seed: int) -> Task:
        return records.walk(self.train_tasks(), index, name=self.name, seed=seed)

    def train_tasks(self) -> Sequence[Task]:
        return self._tasks[0]

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self._tasks[1][:limit]

    def solution(self, task: Task) -> str | None:
        if self.solution_column is None:
            return None
        return records.text(task.payload.columns, self.solution_column, f"task {task.id!r}")

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return self._reward_functions.grade(tasks, [task.payload for task in tasks], texts)

    def _retry_policy(self) -> RetryPolicy:
        return RetryPolicy(seconds=self.seconds, retries=self.retries, max_failed=self.max_failed)

    @cached_property
    def _graders(self) -> list[tuple[TRLFunction | VerlFunction, float]]:
        return [(make_grader(reward.function), reward.weight) for reward in rewards_of(self.reward)]

    @cached_property
    def _reward_functions(self) -> RewardFunctions:
        return RewardFunctions(self._graders, read_answer, self._retry_policy())

    @cached_property
    def _tasks(self) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        """Training and evaluation, apart, and both such that the functions can judge them."""
        parts = records.apart(
            self._read,
            self.path,
            self.eval_path,
            self.eval_share,
            stem=_asked,
            whole=_asked,
            name=lambda task: task.id,
        )
        for part in parts:
            for grader, _ in self._graders:
                grader.check([task.payload for task in part])
        return _named("train", parts[0]), _named("eval", parts[1])

    def _read(self, path: str) -> list[Task]:
        return [self._task(*entry) for entry in records.read(path, subset=self.subset, split=self.split)]

    def _task(self, where: str, number: int, record: Mapping[str, Any]) -> Task:
        prompt = record.get(self.prompt)
        messages: tuple[Message, ...]
        if isinstance(prompt, (list, tuple)):
            messages = records.messages(prompt, self.prompt, where)
        else:
            messages = ({"role": "user", "content": records.text(record, self.prompt, where)},)
        if self.system is not None:
            others = tuple(message for message in messages if message["role"] != "system")
            messages = ({"role": "system", "content": self.system}, *others)
        columns = {key: value for key, value in record.items() if key != self.prompt}
        tools = columns.get("tools") or ()
        if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
            raise DataError(f"{where}: 'tools' is no list of objects", got=repr(tools)[:80])
        names = [str(record[key]) for key in ("id", "idx") if record.get(key) is not None]
        return Task(
            id=names[0] if names else str(number),
            messages=messages,
            payload=Row(prompt=prompt, columns=columns),
            tools=tuple(tools),
        )


def _named(part: str, tasks: Sequence[Task]) -> tuple[Task, ...]:
    return tuple(dataclasses.replace(task, id=f"{part}/{task.id}") for task in tasks)


def _asked(task: Task) -> str:
    return json.dumps(task.messages)
