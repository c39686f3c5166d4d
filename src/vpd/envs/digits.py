"""The tiny task of the demo, in words: a letter hides an operation on digits.

    apply rule B to 3 1 4 1 5 9        ->  6 8 5 8 4 0
    wrong : rule B means mirror             (the feedback on a wrong answer)

Every letter stands for one look-up applied to each digit; ``copy`` is a decoy that no letter means.  An answer is right
when all six digits are.  Answers fill six tokens, so a ``length`` finish is normal here.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from vpd.envs import per_row
from vpd.types import Grade, Task

LENGTH = 6
OPERATIONS = {
    "swap": "1032547698",
    "mirror": "9876543210",
    "half": "5678901234",
    "shuffle": "2301674598",
    "copy": "0123456789",
}
RULES = {"A": "swap", "B": "mirror", "C": "half", "D": "shuffle"}
DEFAULT_EVAL_TASKS = 512


def apply(operation: str, digits: Sequence[int]) -> list[int]:
    """What an operation answers."""
    return [int(OPERATIONS[operation][digit]) for digit in digits]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """``hint="operation"``: feedback names the operation; ``"verdict"``: it says ``wrong`` and nothing else."""

    name: Literal["digits"] = "digits"
    hint: Annotated[Literal["operation", "verdict"], "what the feedback on a wrong answer says"] = "operation"
    fixed_length: ClassVar[bool] = True

    def task(self, index: int, *, seed: int) -> Task:
        return self._draw(f"train/{seed}/{index}", held_out=False)

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return [self._draw(f"eval/{i}", held_out=True) for i in range(DEFAULT_EVAL_TASKS if limit is None else limit)]

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        rule, _ = task.payload
        if text.split() == self.solution(task).split():
            return Grade(reward=1.0, feedback="right", informative=False)
        if self.hint == "verdict":
            return Grade(reward=0.0, feedback="wrong", informative=False)
        return Grade(reward=0.0, feedback=f"wrong : rule {rule} means {RULES[rule]}")

    def solution(self, task: Task) -> str:
        rule, digits = task.payload
        return " ".join(map(str, apply(RULES[rule], digits)))

    def _draw(self, key: str, *, held_out: bool) -> Task:
        """A task of one stream; one number in sixteen belongs to evaluation, so the streams never meet."""
        source = random.Random(key)
        while True:
            rule = source.choice("ABCD")
            digits = [source.randrange(10) for _ in range(LENGTH)]
            if (sum((place + 2) * digit for place, digit in enumerate(digits)) % 16 == 0) == held_out:
                break
        content = f"apply rule {rule} to {' '.join(map(str, digits))}"
        return Task(id=content, messages=({"role": "user", "content": content},), payload=(rule, digits))
