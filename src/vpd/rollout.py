"""Draw, generate, grade: from tasks to groups of rollouts.  Training and evaluation share this one path."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from vpd.engines import Engine, stream_seed
from vpd.envs import Conversational, Env, grade_texts, replies_of
from vpd.errors import ConfigError
from vpd.prompts import Prompter
from vpd.settings import Settings
from vpd.types import Completion, Group, Rollout, Task, Tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one attempt is sampled; the environment's replies count into ``max_completion_length``."""

    max_completion_length: int
    max_turns: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


LONGEST_COMPLETION = 256  # tokens of an attempt, where neither the settings nor the environment say


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings, section="rollout"):
    """How many answers are sampled, and how."""

    prompts_per_step: Annotated[int, Ge(1), "B: tasks per iteration"] = 16
    num_generations: Annotated[int, Ge(1), "G: answers per task"] = 8
    max_completion_length: Annotated[
        int | None,
        Ge(1),
        "longest attempt in tokens, all turns together; null: the length of the environment's answers if it has one,"
        f" else {LONGEST_COMPLETION} or half of what the longest known prompt leaves of the model's window, whichever"
        " is less (config.yaml records it)",
    ] = None
    max_turns: Annotated[int, Ge(1), "most answers in one attempt, where the environment replies"] = 8
    temperature: Annotated[float, Gt(0), "sampling temperature; every log-prob is of logits / temperature"] = 1.0
    success_threshold: Annotated[float, "an answer with at least this reward is a success"] = 0.5
    max_rows: Annotated[int, Ge(1), "answers that decode at once"] = 64

    @property
    def sampling(self) -> Sampling:
        """Raises ConfigError while ``max_completion_length`` is null; :func:`vpd.assemble` decides it."""
        if self.max_completion_length is None:
            raise ConfigError(
                "rollout.max_completion_length is not decided yet",
                do="Take the settings of the assembled parts (vpd.assemble(config).config), or set it.",
            )
        return Sampling(
            max_completion_length=self.max_completion_length, max_turns=self.max_turns, temperature=self.temperature
        )


def collect(
    env: Env,
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    num_generations: int,
    success_threshold: float,
    stream: tuple[int | str, ...],
) -> list[Group]:
    """G graded attempts at each task.  ``stream`` names the randomness: row i samples with (stream, i)."""
    owners = [task for task in tasks for _ in range(num_generations)]
    prompts = [prompt for task in tasks for prompt in [prompter.build_student_prompt(task)] * num_generations]
    completions = generate_turns(env, engine, prompter, owners, prompts, sampling, stream=stream)
    rollouts = grade_completions(env, owners, prompts, completions, success_threshold)
    starts = range(0, len(rollouts), num_generations)
    return [Group(rollouts=tuple(rollouts[start : start + num_generations])) for start in starts]


def generate_turns(
    env: Env,
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    prompts: Sequence[Tokens],
    sampling: Sampling,
    *,
    stream: tuple[int | str, ...],
) -> list[Completion]:
    """One attempt for each prompt; where the environment replies, the model goes on within the same budget."""

    def generate(rows: Sequence[int], before: Sequence[Tokens], room: Sequence[int], turn: int) -> list[Completion]:
        return engine.generate(
            before,
            seeds=[stream_seed(*stream, row, *([turn] if turn else [])) for row in rows],
            max_tokens=room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )

    rows = list(range(len(prompts)))
    attempts = generate(rows, prompts, [sampling.max_completion_length] * len(prompts), 0)
    if not isinstance(env, Conversational):
        return attempts
    conversations = [list(task.messages) for task in tasks]
    for turn in range(1, sampling.max_turns):
        rows = [row for row in rows if attempts[row].finish == "stop"]
        for row in rows:
            conversations[row].append({"role": "assistant", "content": attempts[row].text})
        replies = replies_of(env, [tasks[row] for row in rows], [conversations[row] for row in rows])
        said: dict[int, Tokens] = {}
        for row, reply in zip(rows, replies, strict=True):
            if reply is None:
                continue
            conversations[row].append(reply)
            said[row] = prompter.reply(reply, after=attempts[row].tokens[-1] if attempts[row].tokens else None)
        room = {row: sampling.max_completion_length - len(attempts[row].tokens) - len(said[row]) for row in said}
        rows = [row for row in said if room[row] > 0]
        for row in said.keys() - set(rows):
            attempts[row] = dataclasses.replace(attempts[row], finish="length")
        if not rows:
            break
        before = [prompts[row] + attempts[row].tokens + said[row] for row in rows]
        for row, answer in zip(rows, generate(rows, before, [room[row] for row in rows], turn), strict=True):
            attempts[row] = _joined(attempts[row], said[row], answer)
    return attempts


def _joined(attempt: Completion, said: Tokens, answer: Completion) -> Completion:
    """An attempt, what the environment said to it, and the next answer, as one attempt."""
    return dataclasses.replace(
        answer,
        tokens=attempt.tokens + said + answer.tokens,
        sampled=attempt.sampled + (False,) * len(said) + answer.sampled,
        logprobs=attempt.logprobs + (0.0,) * len(said) + answer.logprobs,
        turns=attempt.turns + 1,
    )


def grade_completions(
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
