"""The tiny task of the demo, in words: a letter hides an operation on digits.

    apply rule B to 3 1 4 1 5 9        ->  6 8 5 8 4 0
    wrong : rule B means mirror             (the feedback on a wrong answer)

Every letter stands for one look-up applied to each digit; no letter stands for ``copy``.  An answer is right if all its
digits are.  Answers have exactly ``length`` tokens, so a ``length`` finish is normal here.

The feedback can be degraded on purpose: wrong for a share of the tasks, informative for some letters only, wrong from
one training task to another, or empty.  It is a pure function of the task's index and seed.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Ge

from vpd.envs import per_row
from vpd.errors import ConfigError
from vpd.settings import Settings, Share
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
NOTHING = "?"  # in place of the operation if the feedback names none
DEFAULT_EVAL_TASKS = 512


class Problem(NamedTuple):
    """A task's payload: the letter, the digits, and the operation that the feedback will name."""

    rule: str
    digits: list[int]
    named: str


def apply(operation: str, digits: Sequence[int]) -> list[int]:
    """The digits after an operation."""
    return [int(OPERATIONS[operation][digit]) for digit in digits]


@dataclass(frozen=True, kw_only=True)
class Digits(Settings, section="env"):
    """The environment.  Raises ConfigError for settings.

    ``hint="operation"``: feedback names an operation; ``"empty"``: the same sentence without the operation, read by the
    teacher; ``"verdict"``: only ``wrong``, which the teacher does not read.
    """

    name: Literal["digits"] = "digits"
    hint: Annotated[Literal["operation", "empty", "verdict"], "content of the feedback on a wrong answer"] = "operation"
    length: Annotated[int, Ge(1), "digits of a task, and tokens of its answer"] = LENGTH
    wrong_share: Annotated[float, Share, "share of tasks whose feedback names a wrong operation"] = 0.0
    helped_rules: Annotated[
        str, "letters whose feedback names the right operation; for others it names a random one"
    ] = "ABCD"
    wrong_from: Annotated[int | None, "index of the first training task with wrong feedback; null: none"] = None
    wrong_until: Annotated[int | None, "index of the first training task with right feedback again; null: none"] = None
    fixed_length: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if not set(self.helped_rules) <= set(RULES):
            raise ConfigError(
                "env.helped_rules is out of range", got=self.helped_rules, expected=f"letters of {''.join(RULES)}"
            )
        if self.wrong_until is not None and self.wrong_from is None:
            raise ConfigError(
                "env.wrong_until is out of range", got=self.wrong_until, expected="null without wrong_from"
            )

    def task(self, index: int, *, seed: int) -> Task:
        wrong = self.wrong_from is not None and self.wrong_from <= index < (self.wrong_until or index + 1)
        return self._draw(f"train/{seed}/{index}", held_out=False, wrong=wrong)

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        """Held-out tasks; ``wrong_from`` and ``wrong_until`` do not affect their feedback."""
        return _eval_tasks(self, DEFAULT_EVAL_TASKS if limit is None else limit)

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        problem: Problem = task.payload
        if text.split() == self.solution(task).split():
            return Grade(reward=1.0, feedback="right", informative=False)
        if self.hint == "verdict":
            return Grade(reward=0.0, feedback="wrong", informative=False)
        named = NOTHING if self.hint == "empty" else problem.named
        return Grade(reward=0.0, feedback=f"wrong : rule {problem.rule} means {named}")

    @property
    def answer_length(self) -> int:
        """Tokens of every answer."""
        return self.length

    def solution(self, task: Task) -> str:
        problem: Problem = task.payload
        return " ".join(map(str, apply(RULES[problem.rule], problem.digits)))

    def _draw(self, key: str, *, held_out: bool, wrong: bool = False) -> Task:
        """A task of one stream; one number in sixteen belongs to evaluation, so the two streams are disjoint."""
        source = random.Random(key)
        while True:
            rule = source.choice("ABCD")
            digits = [source.randrange(10) for _ in range(self.length)]
            if (sum((place + 2) * digit for place, digit in enumerate(digits)) % 16 == 0) == held_out:
                break
        content = f"apply rule {rule} to {' '.join(map(str, digits))}"
        payload = Problem(rule, digits, self._named(random.Random(f"{key}/text"), rule, wrong))
        return Task(id=content, messages=({"role": "user", "content": content},), payload=payload)

    def _named(self, source: random.Random, rule: str, wrong: bool) -> str:
        """The operation that the feedback names."""
        wrong = wrong or source.random() < self.wrong_share
        if wrong:
            return source.choice([name for name in OPERATIONS if name != RULES[rule]])
        return RULES[rule] if rule in self.helped_rules else source.choice(list(OPERATIONS))


@functools.lru_cache(maxsize=16)
def _eval_tasks(env: Digits, count: int) -> tuple[Task, ...]:
    return tuple(env._draw(f"eval/{i}", held_out=True) for i in range(count))
