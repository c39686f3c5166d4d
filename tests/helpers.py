"""What several tests share: a tiny float64 model, groups of random rollouts with contexts, fakes for the loop."""

import dataclasses
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from vpd.cli import main
from vpd.config import parse
from vpd.engines import limits_of
from vpd.envs import Reply
from vpd.evaluate import EvalSettings, Evaluation, evaluate
from vpd.feedback import Written, extend
from vpd.feedback.writers import ModelWriter
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
from vpd.prompts import Prompter, PromptSettings
from vpd.recipes.assemble import Parts
from vpd.recipes.train import make_loop
from vpd.rollout import Sampling, collect
from vpd.types import Completion, Grade, Group, Message, Metrics, Rollout, Section, Task, TeacherPrompt, Tokens

VOCABULARY = 23


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_learner(model: Any, **changes: Any) -> AccelerateLearner:
    """SGD without clipping: a wrong loss scale cannot hide.  Rows are computed alone, which is the reference."""
    changes = {"share_prefixes": False} | changes
    known = {f.name for f in dataclasses.fields(OptimSettings)}
    optim = {"optimizer": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "max_grad_norm": None}
    optim |= {name: changes.pop(name) for name in list(changes) if name in known}
    return AccelerateLearner(model, OptimSettings(**optim), accelerator=Accelerator(cpu=True), **changes)


class TokenPrompter:
    """A prompter whose sections hold token ids as text: teacher's prompt = those ids, then the task's prompt."""

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        return [Group(rollouts=tuple(self._attach(r) for r in group.rollouts)) for group in groups]

    def _attach(self, rollout: Rollout) -> Rollout:
        if not rollout.context:
            return dataclasses.replace(rollout, teacher_prompt=None)
        ids = tuple(int(word) for section in rollout.context for word in section.text.split())
        sources = tuple(section.source for section in rollout.context)
        return dataclasses.replace(rollout, teacher_prompt=TeacherPrompt(tokens=ids + rollout.prompt, sources=sources))


def random_groups(seed: int, *, groups: int = 3, size: int = 4) -> list[Group]:
    """Ragged rollouts; failures carry a context, successes only now and then; both classes in most groups."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high)))

    made = []
    for number in range(groups):
        prompt = ids(2, 6)
        rollouts = []
        for index in range(size):
            tokens = ids(1, 5)
            success = index == 0 or draw.random() < 0.3
            text = " ".join(map(str, ids(1, 4)))
            context = (Section(kind="feedback", source="environment", text=text),)
            rollouts.append(
                Rollout(
                    task=Task(id=str(number), messages=({"role": "user", "content": ""},)),
                    prompt=prompt,
                    completion=Completion(
                        tokens=tokens,
                        sampled=(True,) * len(tokens),
                        logprobs=(-1.0,) * len(tokens),
                        text="",
                        finish="stop",
                    ),
                    grade=Grade(reward=float(success) + draw.random() / 4, success=success),
                    context=() if success and draw.random() < 0.6 else context,
                )
            )
        made.append(Group(rollouts=tuple(rollouts)))
    return TokenPrompter().attach(made)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def oracle() -> ModuleType:
    """The one-file implementation, loaded by path."""
    path = Path(__file__).resolve().parent.parent / "examples" / "vpd_from_scratch.py"
    spec = importlib.util.spec_from_file_location("vpd_from_scratch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vpd_from_scratch"] = module
    spec.loader.exec_module(module)
    return module


SMALL = {
    "model.name_or_path": "tiny",
    "env.name": "digits",
    "rollout.prompts_per_step": 4,
    "rollout.num_generations": 4,
    "rollout.max_completion_length": 6,
    "optim.learning_rate": 1e-3,
    "run.max_steps": 4,
    "run.eval_limit": 8,
    "run.eval_samples": 2,
}


def vpd_train(folder: Path, **changes: object) -> int:
    settings = SMALL | {"run.output_dir": folder} | {key.replace("__", "."): value for key, value in changes.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return main(["train", *words])


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


# Fakes of the loop's parts.  Each takes a function and keeps what it was asked; the factories below them are the only
# place that knows how the parts are put together.


class LetterTokenizer:
    """One token for each character, and a chat template that a test can read: ``[user]2+2?[assistant]``."""

    all_special_tokens: tuple[str, ...] = ()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages: Sequence[Message], *, tokenize: bool, **options: Any) -> Any:
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"
        return self.encode(text) if tokenize else text


@dataclass(frozen=True)
class Sample:
    """One answer that an engine was asked for: ``seed`` is all its randomness, ``loaded`` the weights it came from."""

    prompt: str
    seed: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    text: str
    loaded: Any


class RecordingEngine:
    """Answers ``answer(prompt, seed)``; log-probs are -0.5.  ``log`` is told of every load and every call."""

    def __init__(self, answer: Callable[[str, int], str], log: list[str] | None = None):
        self.answer = answer
        self.log = [] if log is None else log
        self.calls: list[list[Sample]] = []
        self.loaded: Any = None
        self.version = -1

    @property
    def samples(self) -> list[Sample]:
        return [sample for call in self.calls for sample in call]

    def load(self, weights: Any, version: int) -> None:
        self.loaded, self.version = weights, version
        self.log.append(f"load {version} {weights}")

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        seeds: Sequence[int],
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        self.log.append("generate")
        self.calls.append([])
        completions = []
        for tokens, seed, limit in zip(prompts, seeds, limits_of(max_tokens, len(prompts)), strict=True):
            prompt = LetterTokenizer().decode(tokens)
            text = self.answer(prompt, seed)
            self.calls[-1].append(Sample(prompt, seed, limit, temperature, top_p, top_k, text, self.loaded))
            completions.append(letters(text, limit=limit, version=self.version))
        return completions


def letters(text: str, *, limit: int = 1 << 20, version: int = 0) -> Completion:
    """A text as one sampled answer of at most ``limit`` tokens."""
    kept = tuple(LetterTokenizer().encode(text))[:limit]
    return Completion(
        tokens=kept,
        sampled=(True,) * len(kept),
        logprobs=(-0.5,) * len(kept),
        text=text[:limit],
        finish="stop" if len(text) <= limit else "length",
        version=version,
    )


def in_turn(texts: Mapping[str, Sequence[str]]) -> Callable[[str, int], str]:
    """Answers by question: the first text to whoever asks it first, then the second, and so on."""
    left = {f"[user]{question}[assistant]": iter(answers) for question, answers in texts.items()}
    return lambda prompt, seed: next(left[prompt])


class ScriptedEnv:
    """Training task ``index`` asks ``train{index}``, held-out task ``index`` ``eval{index}``; ``judge`` grades."""

    def __init__(self, judge: Callable[[Task, str], Grade], *, held_out: int = 4):
        self.judge = judge
        self.held_out = held_out
        self.seeds: set[int] = set()  # that tasks were asked with

    def task(self, index: int, *, seed: int) -> Task:
        self.seeds.add(seed)
        return asking(f"train{index}")

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return [asking(f"eval{index}") for index in range(self.held_out)][:limit]

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return [self.judge(task, text) for task, text in zip(tasks, texts, strict=True)]


class ScriptedChat(ScriptedEnv):
    """The same with ``reply(task, answers so far)``: a text, or None at the end."""

    def __init__(
        self, judge: Callable[[Task, str], Grade], reply: Callable[[Task, list[str]], str | None], **options: Any
    ):
        super().__init__(judge, **options)
        self.reply = reply
        self.conversations: list[list[Message]] = []  # that it was asked to reply to

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Reply]:
        self.conversations += [list(conversation) for conversation in conversations]
        answers = [[m["content"] for m in c if m["role"] == "assistant"] for c in conversations]
        return [self.reply(task, said) for task, said in zip(tasks, answers, strict=True)]


def asking(question: str) -> Task:
    return Task(id=question, messages=({"role": "user", "content": question},))


@dataclass
class RecordingLearner:
    """Nothing is learned; the weights are the number of iterations that ended."""

    log: list[str]
    iterations: int = 0

    @property
    def learning_rate(self) -> float:
        return 0.1 * self.iterations

    def end_iteration(self) -> None:
        self.iterations += 1
        self.log.append("end_iteration")

    def weights(self) -> int:
        return self.iterations


@dataclass
class RecordingAlgorithm:
    """Keeps the groups of every step; its state is the number of steps."""

    log: list[str]
    steps: int = 0
    seen: list[list[Group]] = field(default_factory=list)

    def step(self, groups: Sequence[Group], learner: Any) -> Metrics:
        self.log.append("step")
        self.steps += 1
        self.seen.append(list(groups))
        return {"policy/loss": float(self.steps)}

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@dataclass
class RecordingObserver:
    log: list[str]
    seen: list[tuple[int, Metrics, list[Group]]] = field(default_factory=list)

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        self.log.append(f"observe {step}")
        self.seen.append((step, metrics, list(groups)))


def write(writer: Any, texts: Sequence[str], *, max_tokens: int = 50, temperature: float = 0.7) -> list[Written]:
    """What a writer answers to each text."""
    conversations: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    return list(writer.write(conversations, max_tokens=max_tokens, temperature=temperature))


@dataclass(frozen=True)
class Comment:
    """A feedback source: ``say(rollout)``, or where ``ask`` is set what the writer answers to it; None says nothing."""

    say: Callable[[Rollout], str | None]
    ask: bool = False

    def __call__(self, groups: Sequence[Group], writer: Any) -> list[Group]:
        said = [[self.say(rollout) for rollout in group.rollouts] for group in groups]
        if self.ask:
            answers = iter(write(writer, [text for texts in said for text in texts if text is not None]))
            said = [[None if text is None else next(answers).text for text in texts] for texts in said]
        return [
            extend(group, [[] if t is None else [Section(kind="feedback", source="comment", text=t)] for t in texts])
            for group, texts in zip(groups, said, strict=True)
        ]


def scripted_prompter(*, max_completion_length: int = 100, **changes: Any) -> Prompter:
    settings = PromptSettings(**{"feedback_header": "<", "demonstration_header": "{", "closing": ">"} | changes)
    return Prompter(LetterTokenizer(), settings, window=None, max_completion_length=max_completion_length)


def collect_groups(
    env: Any, engine: Any, questions: Sequence[str], *, group: int = 2, seed: int = 0, step: int = 0,
    threshold: float = 0.5, **sampling: Any,
) -> list[Group]:  # fmt: skip
    """``group`` graded attempts at each question, as a training step makes them."""
    sampling = {"max_completion_length": 100} | sampling
    return collect(
        env, engine, scripted_prompter(), [asking(q) for q in questions], Sampling(**sampling), num_generations=group,
        success_threshold=threshold, stream=(seed, "train", step),
    )  # fmt: skip


def evaluate_with(
    env: Any, engine: Any, *, samples: int = 2, limit: int | None = None, seed: int = 0, threshold: float = 0.5,
    feedback: Sequence[Any] | None = None, **sampling: Any,
) -> Evaluation:  # fmt: skip
    """``samples`` answers to each held-out task, and with ``feedback`` the retries."""
    sampling = {"max_completion_length": 100} | sampling
    settings = EvalSettings(sampling=Sampling(**sampling), num_samples=samples, success_threshold=threshold, seed=seed)
    return evaluate(env, engine, scripted_prompter(), env.eval_tasks(limit), settings, feedback=feedback)


def model_writer(engine: Any, *, seed: int = 0, step: int = 0) -> ModelWriter:
    """The model as the writer of one training step."""
    return ModelWriter(engine, scripted_prompter(), stream=(seed, "feedback", step))


@dataclass(kw_only=True)
class ScriptedRun:
    """A loop of fakes, put together as ``vpd train`` does it; ``log`` holds what happened, in order."""

    loop: Any
    env: Any
    engine: RecordingEngine
    learner: RecordingLearner
    algorithm: RecordingAlgorithm
    observer: RecordingObserver
    log: list[str]
    saved: dict[int, str] = field(default_factory=dict)

    def run(self) -> "ScriptedRun":
        self.loop.run()
        return self

    def resume_from(self, other: "ScriptedRun", step: int) -> "ScriptedRun":
        """Continue from a checkpoint of another run, by way of JSON; a learner restores itself."""
        self.learner.iterations = step
        self.loop.resume(json.loads(other.saved[step]))
        return self


def scripted_run(
    env: Any, answer: Callable[[str, int], str], *, feedback: Sequence[Any] = (), group: int = 2, tasks: int = 3,
    turns: int = 8, threshold: float = 0.5, limit: int | None = None, samples: int = 2, **run: Any,
) -> ScriptedRun:  # fmt: skip
    """``tasks`` tasks a step with ``group`` answers each; ``run``: max_steps, eval_steps, save_steps, seed."""
    log: list[str] = []
    engine, learner, algorithm = RecordingEngine(answer, log), RecordingLearner(log), RecordingAlgorithm(log)
    observer = RecordingObserver(log)
    rollout = {"prompts_per_step": tasks, "num_generations": group, "max_turns": turns, "success_threshold": threshold}
    config = parse(
        {
            "rollout": rollout | {"max_completion_length": 100, "temperature": 0.9},
            "run": {"max_steps": 3, "eval_limit": limit, "eval_samples": samples} | run,
        }
    )
    parts: Any = Parts(
        config=dataclasses.replace(config, env=env, feedback=tuple(feedback)),
        env=env,
        tokenizer=LetterTokenizer(),
        prompter=scripted_prompter(),
        engine=engine,
        learner=cast(Any, learner),
        algorithm=algorithm,
    )
    loop = make_loop(parts, [observer], output=None)
    made = ScriptedRun(
        loop=loop, env=env, engine=engine, learner=learner, algorithm=algorithm, observer=observer, log=log
    )

    def save(loop: Any) -> None:
        log.append(f"save {loop.step}")
        made.saved[loop.step] = json.dumps({"step": loop.step, **loop.progress()})

    loop.save = save
    return made
