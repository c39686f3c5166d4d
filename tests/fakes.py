"""Fakes of the loop's parts, and factories that put them together.

Each fake takes a function and keeps what it was asked; the factories are the only place that knows how the parts fit.
"""

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from helpers import keys as some_keys

from vpd.config import parse
from vpd.engines import limits_of
from vpd.envs import Reply
from vpd.evaluation import EvalSettings, Evaluation, evaluate
from vpd.feedback import Written, extend
from vpd.feedback.writers import ModelWriter
from vpd.learners import Update
from vpd.policy import FixedPolicy
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.assemble import Parts
from vpd.recipes.loops import make_loop
from vpd.rollout import RolloutSettings, RolloutSource, Sampling
from vpd.types import Completion, Grade, Group, Message, Metrics, Rollout, SampleKey, Section, Task, Tokens


class LetterTokenizer:
    """One token for each character, and a chat template that a test can read: ``[user]2+2?[assistant]``."""

    added_tokens_decoder: Mapping[int, Any] = {}  # no control tokens
    unk_token_id: int | None = None
    is_fast = False

    def encode(self, text: str, *, add_special_tokens: bool = False, verbose: bool = True) -> list[int]:
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
    key: SampleKey
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

    def load(self, policy: Any) -> None:
        self.loaded, self.version = policy.model, policy.version
        self.log.append(f"load {policy.version} {policy.model}")

    def generate(
        self,
        prompts: Sequence[Tokens],
        *,
        keys: Sequence[SampleKey],
        seed: int,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        self.log.append("generate")
        self.calls.append([])
        completions = []
        for tokens, key, limit in zip(prompts, keys, limits_of(max_tokens, len(prompts)), strict=True):
            prompt, row_seed = LetterTokenizer().decode(tokens), key.seed(seed)
            text = self.answer(prompt, row_seed)
            self.calls[-1].append(Sample(prompt, key, row_seed, limit, temperature, top_p, top_k, text, self.loaded))
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


@dataclass
class OneStepAhead:
    """A source that samples when it is started, so with the weights of that moment; ``log`` is told of both."""

    source: RolloutSource
    log: list[str]
    ready: dict[int, tuple[list[Group], Metrics]] = field(default_factory=dict)

    def start(self, step: int) -> None:
        self.log.append(f"start {step}")
        self.ready[step] = self.source.take(step)

    def take(self, step: int) -> tuple[list[Group], Metrics]:
        self.log.append(f"take {step}")
        return self.ready.pop(step)

    def finish(self) -> None: ...

    def close(self) -> None: ...


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

    @property
    def version(self) -> int:
        return self.iterations

    def end_iteration(self) -> None:
        self.iterations += 1
        self.log.append("end_iteration")

    def policy(self) -> FixedPolicy:
        return FixedPolicy(self.iterations, version=self.iterations)


@dataclass
class RecordingAlgorithm:
    """Keeps the groups and the learner of every step; its state is the number of steps."""

    log: list[str]
    steps: int = 0
    seen: list[list[Group]] = field(default_factory=list)
    learners: list[Any] = field(default_factory=list)

    def step(self, groups: Sequence[Group], learner: Any) -> Update:
        self.log.append("step")
        self.steps += 1
        self.seen.append(list(groups))
        self.learners.append(learner)
        return Update({"policy/loss": float(self.steps)})

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

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def write(
    writer: Any,
    texts: Sequence[str],
    keys: Sequence[SampleKey] | None = None,
    *,
    max_tokens: int = 50,
    temperature: float = 0.7,
) -> list[Written]:
    """What a writer answers to each text; by default each text is about a task of its own."""
    conversations: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    keys = some_keys(len(texts)) if keys is None else keys
    return list(writer.write(conversations, keys=keys, max_tokens=max_tokens, temperature=temperature))


@dataclass(frozen=True)
class Comment:
    """A feedback source: ``say(rollout)``, or where ``ask`` is set what the writer answers to it; None says nothing."""

    say: Callable[[Rollout], str | None]
    ask: bool = False

    def __call__(self, groups: Sequence[Group], writer: Any) -> list[Group]:
        said = [[self.say(rollout) for rollout in group.rollouts] for group in groups]
        if self.ask:
            asked = [
                (text, rollout.key)
                for texts, group in zip(said, groups, strict=True)
                for text, rollout in zip(texts, group.rollouts, strict=True)
                if text is not None
            ]
            answers = iter(write(writer, [text for text, _ in asked], [key for _, key in asked]))
            said = [[None if text is None else next(answers).text for text in texts] for texts in said]
        return [
            extend(group, [[] if t is None else [Section(kind="feedback", source="comment", text=t)] for t in texts])
            for group, texts in zip(groups, said, strict=True)
        ]


def scripted_prompter(*, max_completion_length: int = 100, **changes: Any) -> Prompter:
    settings = PromptSettings(**{"feedback_header": "<", "demonstration_header": "{", "closing": ">"} | changes)
    return Prompter(LetterTokenizer(), settings, window=None, max_completion_length=max_completion_length)


def scripted_source(
    env: Any, engine: Any, *, feedback: Sequence[Any] = (), seed: int = 0, threshold: float = 0.5, **settings: Any
) -> RolloutSource:
    settings = {"max_completion_length": 100, "success_threshold": threshold} | settings
    return RolloutSource(
        env=env,
        engine=engine,
        prompter=scripted_prompter(),
        feedback=feedback,
        settings=RolloutSettings(**settings),
        seed=seed,
    )


def collect_groups(
    env: Any, engine: Any, questions: Sequence[str], *, group: int = 2, seed: int = 0, step: int = 0,
    threshold: float = 0.5, **sampling: Any,
) -> list[Group]:  # fmt: skip
    """``group`` graded attempts at each question, as a training step makes them."""
    source = scripted_source(env, engine, seed=seed, threshold=threshold)
    keys = [SampleKey(phase="train", step=step, task=task, sample=0) for task in range(len(questions))]
    chosen = Sampling(**{"max_completion_length": 100} | sampling)
    return source.generate_groups(keys, [asking(q) for q in questions], chosen, group)


def evaluate_with(
    env: Any, engine: Any, *, samples: int = 2, limit: int | None = None, seed: int = 0, threshold: float = 0.5,
    feedback: Sequence[Any] | None = None, control: bool = True, **sampling: Any,
) -> Evaluation:  # fmt: skip
    """``samples`` answers to each held-out task, and with ``feedback`` the retries."""
    source = scripted_source(env, engine, feedback=feedback or (), seed=seed, threshold=threshold)
    chosen = Sampling(**{"max_completion_length": 100} | sampling)
    settings = EvalSettings(sampling=chosen, num_samples=samples, teacher=feedback is not None, control=control)
    return evaluate(source, env.eval_tasks(limit), settings)


def model_writer(engine: Any, *, seed: int = 0) -> ModelWriter:
    """The model as the writer of a run."""
    return ModelWriter(engine, scripted_prompter(), seed=seed)


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
    prompter = scripted_prompter()
    source = RolloutSource(
        env=env, engine=engine, prompter=prompter, feedback=feedback, settings=config.rollout, seed=config.run.seed
    )
    parts: Any = Parts(
        config=dataclasses.replace(config, env=env, feedback=tuple(feedback)),
        env=env,
        feedback=tuple(feedback),
        tokenizer=LetterTokenizer(),
        prompter=prompter,
        engine=engine,
        source=source,
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


@dataclass(frozen=True)
class Posted:
    """One request that an endpoint got; the names in ``headers`` are in lower case."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@contextlib.contextmanager
def endpoint(
    answer: Callable[[dict[str, Any]], tuple[int, bytes]], **headers: str
) -> Iterator[tuple[str, list[Posted]]]:
    """A server on this machine, as (URL, requests so far); ``answer(body)`` gives the status and what it says."""
    posted: list[Posted] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            posted.append(Posted(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            status, said = answer(body)
            with contextlib.suppress(BrokenPipeError):  # whoever asked may have given up
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(said)

        def log_message(self, *arguments: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", posted
        finally:
            server.shutdown()
            thread.join()


def chat_completion(text: str, **rest: Any) -> bytes:
    """What an OpenAI-compatible endpoint says."""
    return json.dumps({"choices": [{"message": {"content": text}}], **rest}).encode()
