"""Any data set with a column of prompts, graded by your reward functions; no class to write.

    env = Dataset(path="train.jsonl", reward="my_rewards.py:accuracy")
    env = Dataset(path="train.parquet", reward=[{"function": "a.py:right", "weight": 1.0}, {"function": "a.py:short"}])

A prompt is a text, which becomes one user message, or a list of messages.  Every other column reaches the functions by
name; how they are called and what they may return is in :mod:`vpd.envs.adapters.trl_verl`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from vpd.envs import records
from vpd.envs.adapters.reward_functions import Caller, GradedByFunctions, Row
from vpd.envs.adapters.trl_verl import (
    Reward,
    TRLFunction,
    VerlFunction,
    make_caller,
    make_reward_function,
    parse_rewards,
)
from vpd.envs.record_tasks import FileTasks, Part
from vpd.types import Task


def no_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """0 for every answer: the reward function of a run that learns from an external teacher alone (gkd).

    >>> no_reward(["a", "b"], ["1", "2"])
    [0.0, 0.0]
    """
    return [0.0] * len(completions)


@dataclass(frozen=True, kw_only=True)
class Dataset(GradedByFunctions, FileTasks[Task]):
    """The environment; files are read when the first task is asked for.

    Raises DataError for data that cannot be used, ConfigError for settings and for functions that do not fit the data.
    Up to ``max_failed`` of a batch's rows may raise, time out, or get no finite reward: such a row counts as a failure
    that no teacher reads, is logged as a warning, and is counted in the metric ``env/grader_failed``.
    """

    name: Literal["dataset"] = "dataset"
    reward: Annotated[Any, "my_rewards.py:function, {function, weight}, or a list of such"]
    prompt: Annotated[str, "the column with a text or messages"] = "prompt"
    solution_column: Annotated[str | None, "a column with a right answer, for vpd check"] = None
    reveals_answer: Annotated[bool, "declares that feedback may hold the right answer"] = False
    process: Annotated[
        bool,
        "with env.seconds: grade in a process of its own, which the limit ends; false: in a thread, which it cannot"
        " end",
    ] = True
    system: Annotated[str | None, "a system message, in place of the record's"] = None

    def check(self) -> None:
        super().check()
        parse_rewards(self.reward)

    def solution(self, task: Task) -> str | None:
        if self.solution_column is None:
            return None
        return records.value_text(task.payload.columns, self.solution_column, f"task {task.id!r}")

    def announce(self) -> list[str]:
        """For each function: where it runs, and what its time limit cannot bound."""
        return [self._limits(function.name, reward) for reward, function in self._functions]

    def _limits(self, name: str, reward: Reward) -> str:
        if self.seconds is None:
            return f"{name} grades in this process without a limit of time (env.seconds)"
        limit = f"env.seconds ({self.seconds:g} s an answer)"
        if self.process and isinstance(reward.function, str):
            return f"{name} grades in a process of its own, which {limit} ends"
        why = "env.process is false" if not self.process else "it is an object, which no other process can load"
        return f"{name} grades in a thread, as {why}: {limit} fails a late answer, and cannot end C code that hangs"

    @cached_property
    def _functions(self) -> list[tuple[Reward, TRLFunction | VerlFunction]]:
        return [(reward, make_reward_function(reward.function)) for reward in parse_rewards(self.reward)]

    def callers(self) -> list[tuple[Caller, float]]:
        process = self.process and self.seconds is not None
        return [(make_caller(reward, function, process=process), reward.weight) for reward, function in self._functions]

    def split_key(self, item: Task) -> str:
        return json.dumps(item.messages, default=str)

    def make_task(self, part: Part, item: Task) -> Task:
        return dataclasses.replace(item, id=f"{part}/{item.id}")

    def read_items(self, path: str) -> list[Task]:
        tasks = [self._task(*entry) for entry in records.read(path, subset=self.subset, split=self.split)]
        for _, function in self._functions:
            function.check([task.payload for task in tasks])
        return tasks

    def _task(self, where: str, number: int, record: Mapping[str, Any]) -> Task:
        prompt = records.listed(record.get(self.prompt), f"{where}: {self.prompt!r}")
        messages = records.prompt(record, self.prompt, where)
        if self.system is not None:
            others = tuple(message for message in messages if message["role"] != "system")
            messages = ({"role": "system", "content": self.system}, *others)
        columns = {key: value for key, value in record.items() if key != self.prompt}
        return Task(
            id=records.name_of(record, number, "id", "idx"),
            messages=messages,
            payload=Row(prompt=prompt, columns=columns),
            tools=records.tools(record, where),
        )
