"""Digits with a reward for each; a quarter of them is a success, so that groups are mixed from the first step."""

import dataclasses

from vpd.envs import per_row
from vpd.envs.digits import Digits
from vpd.types import Grade, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial(Digits):
    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        wanted = self.solution(task).split()
        share = sum(a == b for a, b in zip(wanted, text.split(), strict=False)) / len(wanted)
        feedback = "right" if share == 1 else f"wrong : rule {task.payload.rule} means {task.payload.named}"
        return Grade(reward=share, success=share >= 0.25, feedback=feedback, informative=share < 1)
