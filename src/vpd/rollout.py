"""Draw, generate, grade: from tasks to groups of rollouts.  Training and evaluation share this one path."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from vpd.engines import Engine, stream_seed
from vpd.envs import Env, grade_texts
from vpd.errors import ConfigError
from vpd.prompts import Prompter
from vpd.types import Completion, Group, Rollout, Task


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How many answers are sampled, and how."""

    prompts_per_step: Annotated[int, "B: tasks per iteration"] = 16
    num_generations: Annotated[int, "G: answers per task"] = 8
    max_completion_length: Annotated[int, "longest answer in tokens"] = 256
    temperature: Annotated[float, "sampling temperature; every log-prob is of logits / temperature"] = 1.0
    success_threshold: Annotated[float, "an answer with at least this reward is a success"] = 0.5
    max_rows: Annotated[int, "answers that decode at once"] = 64

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "num_generations", "max_completion_length", "max_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name} is too small", got=getattr(self, name), expected="at least 1")
        if self.temperature <= 0:
            raise ConfigError(
                "rollout.temperature must be positive in training",
                got=self.temperature,
                do="Greedy decoding is for vpd eval --temperature 0.",
            )


def collect(
    env: Env,
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    *,
    num_generations: int,
    max_completion_length: int,
    success_threshold: float,
    stream: tuple[int | str, ...],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> list[Group]:
    """G graded attempts at each task.  ``stream`` names the randomness: row i samples with (stream, i)."""
    prompts = [prompt for task in tasks for prompt in [prompter.student(task)] * num_generations]
    completions = engine.generate(
        prompts,
        seeds=[stream_seed(*stream, row) for row in range(len(prompts))],
        max_tokens=max_completion_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    owners = [task for task in tasks for _ in range(num_generations)]
    rollouts = graded(env, owners, prompts, completions, success_threshold)
    starts = range(0, len(rollouts), num_generations)
    return [Group(rollouts=tuple(rollouts[start : start + num_generations])) for start in starts]


def graded(
    env: Env,
    tasks: Sequence[Task],
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Completion],
    success_threshold: float,
) -> list[Rollout]:
    """Rollouts with their grades; an undecided ``success`` is resolved here, once."""
    grades = grade_texts(env, tasks, [completion.text for completion in completions])
    rollouts = []
    for task, prompt, completion, grade in zip(tasks, prompts, completions, grades, strict=True):
        if grade.success is None:
            grade = dataclasses.replace(grade, success=grade.reward >= success_threshold)
        rollouts.append(Rollout(task=task, prompt=prompt, completion=completion, grade=grade))
    return rollouts
