"""What both sides of a comparison train on: prompts, feedback, recorded completions, as texts and as tokens.

The words are drawn at random from the tokenizer's own, the completions are sampled by the model; every length is known
beforehand.  Half of a group succeeds.  ``record`` makes the material, ``groups_of`` turns it into rollouts.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meters import DEVICE

from vpd.bundled import load_bundled
from vpd.config import ModelSettings
from vpd.engines.torch_engine import TorchEngine
from vpd.lab import tiny
from vpd.policy import FixedPolicy
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.assemble import load_model
from vpd.types import Completion, Grade, Group, Rollout, SampleKey, Section, Task


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens: the student's prompt (give or take 5 %), feedback text, completion (exactly)."""

    prompts: int
    generations: int
    prompt: int
    feedback: int
    completion: int

    @property
    def rows(self) -> int:
        return self.prompts * self.generations


LEARNING_RATE = 1e-8  # the same rollouts are trained on several times: they must stay those of the weights at hand

SHAPES = {
    "prompt-heavy": Shape(prompts=4, generations=4, prompt=250, feedback=64, completion=64),
    "completion-heavy": Shape(prompts=4, generations=4, prompt=64, feedback=64, completion=256),
    "large": Shape(prompts=8, generations=8, prompt=512, feedback=128, completion=512),  # for a GPU
    "smoke": Shape(prompts=2, generations=2, prompt=16, feedback=8, completion=6),
}


def load(name: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and folder of a model by folder or ``tiny``."""
    model, tokenizer = load_model(ModelSettings(name_or_path=name))
    return model.to(DEVICE), tokenizer, str(load_bundled()) if name == "tiny" else name


def prompter_of(name: str, tokenizer: Any, shape: Shape) -> Prompter:
    settings = tiny.TEMPLATE if name == "tiny" else PromptSettings(layout="block")
    return Prompter(tokenizer, settings, window=None, max_completion_length=shape.completion)


def key_of(task: int, sample: int) -> SampleKey:
    return SampleKey(phase="train", step=0, task=task, sample=sample)


def draw(tokenizer: Any, prompter: Prompter, shape: Shape, seed: int) -> list[Group]:
    """Groups whose completions are still empty: tasks, grades, feedback and teacher's prompts."""
    words = Words(tokenizer, seed)
    groups = []
    for number in range(shape.prompts):
        length = round(shape.prompt * words.draw.uniform(0.95, 1.05))
        task = words.task(prompter, str(number), length)
        rollouts = [
            Rollout(
                key=key_of(number, index),
                task=task,
                prompt=prompter.build_student_prompt(task),
                completion=Completion(tokens=(), sampled=(), logprobs=(), text="", finish="length"),
                grade=Grade(reward=float(index % 2), success=bool(index % 2)),
                context=(Section(kind="feedback", source="environment", text=words.text(shape.feedback)),),
            )
            for index in range(shape.generations)
        ]
        groups.append(Group(rollouts=tuple(rollouts)))
    return prompter.attach(groups)


def record(name: str, shape: Shape, seed: int = 0) -> dict[str, Any]:
    """Sample completions of exactly the wanted length and keep everything as plain data."""
    model, tokenizer, folder = load(name)
    prompter = prompter_of(name, tokenizer, shape)
    rollouts = [r for group in draw(tokenizer, prompter, shape, seed) for r in group.rollouts]
    engine = TorchEngine(tokenizer, eos_ids=())
    engine.load(FixedPolicy(model))
    keys = [rollout.key for rollout in rollouts]
    completions = engine.generate([r.prompt for r in rollouts], keys=keys, seed=seed, max_tokens=shape.completion)
    settings = prompter.settings
    rows = [
        {
            "content": rollout.task.messages[0]["content"],
            "feedback": rollout.context[0].text,
            "reward": rollout.grade.reward,
            "prompt": rollout.prompt,
            "teacher": rollout.teacher_prompt.tokens if rollout.teacher_prompt else None,
            "completion": completion.tokens,
            "logprobs": completion.logprobs,
        }
        for rollout, completion in zip(rollouts, completions, strict=True)
    ]
    return {
        "model": name,
        "folder": folder,
        "seed": seed,
        "learning_rate": LEARNING_RATE,
        "top_k": min(100, len(tokenizer) // 2),
        "shape": asdict(shape),
        "rows": rows,
        "feedback_header": settings.feedback_header,
        "closing": settings.closing,
    }


def groups_of(recorded: dict[str, Any], prompter: Prompter) -> list[Group]:
    """The recorded rollouts, with the teacher's prompts that the prompter makes of them."""
    size = recorded["shape"]["generations"]
    rows: Sequence[dict[str, Any]] = recorded["rows"]
    rollouts = []
    for index, row in enumerate(rows):
        tokens = tuple(row["completion"])
        rollouts.append(
            Rollout(
                key=key_of(index // size, index % size),
                task=Task(id=str(index // size), messages=({"role": "user", "content": row["content"]},)),
                prompt=tuple(row["prompt"]),
                completion=Completion(
                    tokens=tokens,
                    sampled=(True,) * len(tokens),
                    logprobs=tuple(row["logprobs"]),
                    text="",
                    finish="length",
                ),
                grade=Grade(reward=row["reward"], success=row["reward"] > 0.5),
                context=(Section(kind="feedback", source="environment", text=row["feedback"]),),
            )
        )
    groups = [Group(rollouts=tuple(rollouts[start : start + size])) for start in range(0, len(rollouts), size)]
    attached = prompter.attach(groups)
    for rollout, row in zip((r for g in attached for r in g.rollouts), rows, strict=True):
        assert rollout.teacher_prompt is not None and list(rollout.teacher_prompt.tokens) == list(row["teacher"])
    return attached


class Words:
    """Random text of a known number of tokens, from words that are one token each."""

    def __init__(self, tokenizer: Any, seed: int):
        self.draw = random.Random(seed)
        self._tokenizer = tokenizer
        texts = {tokenizer.decode([token]).strip() for token in range(min(len(tokenizer), 20_000))}
        plain = sorted(text for text in texts if text.isascii() and text.isalpha() and text.islower())
        self._words = [w for w in plain if len(tokenizer.encode(" " + w, add_special_tokens=False)) == 1]

    def text(self, tokens: int) -> str:
        return " ".join(self.draw.choices(self._words, k=tokens))

    def task(self, prompter: Prompter, name: str, length: int) -> Task:
        """A task whose rendered prompt has at most ``length`` tokens, and as many as fit."""
        words = self.text(length).split()
        while True:
            task = Task(id=name, messages=({"role": "user", "content": " ".join(words)},))
            over = len(prompter.build_student_prompt(task)) - length
            if over <= 0:
                return task
            if over >= len(words):
                raise ValueError(f"a prompt of {length} tokens is shorter than the chat template around it")
            words = words[over:]
