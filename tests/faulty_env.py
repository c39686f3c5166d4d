"""Digits with a grader that goes wrong at its third call on rank 1, as the variable FAULT says; tests/test_ranks.py."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vpd.envs.digits import Digits
from vpd.types import Grade, Task


@dataclass(frozen=True, kw_only=True)
class Faulty(Digits):
    calls: list[int] = field(default_factory=list, compare=False)

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        self.calls.append(len(tasks))
        if os.environ["RANK"] == "1" and len(self.calls) == 3:
            match os.environ["FAULT"]:
                case "raise":
                    raise KeyError("no such column")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "sleep":
                    time.sleep(20)
        return super().grade(tasks, texts)


@dataclass(frozen=True, kw_only=True)
class Hashed(Digits):
    """Draws its tasks by a hash that Python salts in each process."""

    def task(self, index: int, *, seed: int) -> Task:
        return super().task(hash(f"{seed}/{index}") % 100_000, seed=0)
