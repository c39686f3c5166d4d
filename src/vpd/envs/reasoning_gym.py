"""The tasks of reasoning-gym: a hundred procedural generators, each with its verifier.

    Alice counts the legs of 3 ants and 2 cows. How many?            <- the task, of leg_counting
    <answer>three ants</answer>                                      <- an attempt
    Your answer has no answer tag; it must end with ...              <- feedback: a fault of form, informative
    The verifier does not accept your answer.                        <- feedback: a bare verdict, for people only

    env = ReasoningGym(tasks=["leg_counting", {"name": "chain_sum", "config": {"max_terms": 3}}])

Task ``index`` is drawn from generator ``index % len(tasks)`` with a seed that hashes ``(seed, index)``.  The generators
themselves take item ``i`` of seed ``s`` from ``s + i``, so neighbouring seeds share items; and different seeds may ask
the same question.  Therefore evaluation is disjoint by *question*: its questions are drawn first, all different, and
training draws again if it gets one of them.

Generators and verifiers run in a :class:`~vpd.envs.worker.Worker` with a fixed hash seed, because some depend on the
order of sets.  Some verifiers pass an answer to ``eval`` or sympy's ``parse_expr``, which run it as code: the worker
passes only literals and arithmetic to them, and feedback says so otherwise.  ``REFUSED`` generators are an error: one
runs programs that a model wrote, and the verifiers of two accept wrong answers (as of reasoning-gym 0.1.25).

A partial score does not say what is wrong with an answer, so it is a bare verdict.
"""

import ast
import functools
import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from vpd.envs import per_row
from vpd.envs.records import with_system
from vpd.envs.tags import CLOSE, OPEN, read_tag
from vpd.envs.worker import Worker, WorkerFault
from vpd.errors import ConfigError, EnvError, nearest
from vpd.printable import shown
from vpd.settings import Settings
from vpd.types import Grade, Task

ASK = f"Give your final answer between {OPEN} and {CLOSE}."
LONGEST = 10_000  # characters of an answer
TRIES = 200  # draws for one question that is new
REFUSED = {
    "codeio": "it runs programs that a model wrote",
    "coin_flip": "its verifier accepts the beginning of an answer: 0 for 0.994",
    "composite": "it is a mixture of others: name them in env.tasks",
    "game_of_life_halting": "its verifier accepts whatever is not empty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The generator and seed of a task, for its verifier, and a right answer if the generator gives one."""

    generator: int
    seed: int
    answer: str | None


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(Settings, section="env"):
    """The environment.  Raises ConfigError for settings that do not work, EnvError if a generator fails.

    Source: https://github.com/open-thought/reasoning-gym (Apache-2.0).
    """

    name: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: Annotated[Any, "a generator's name, {name, config: {...}}, or a list of such, drawn in turn"]
    reward: Annotated[Literal["all", "share"], "1 if the verifier's score is 1 else 0, or the score itself"] = "all"
    eval_size: Annotated[int, Ge(1), "number of held-out questions"] = 64
    verify_seconds: Annotated[float, Gt(0), "seconds that drawing one task or judging one answer may take"] = 10.0
    ask: Annotated[str, "text after each question; '': none"] = ASK
    system: Annotated[str | None, "a system message"] = None

    def check(self) -> None:
        super().check()
        for name, config in self._generators:
            if name in REFUSED:
                raise ConfigError(f"env.tasks: {name} is refused", got=REFUSED[name])
            for key in ("seed", "size"):
                if key in config:
                    raise ConfigError(f"env.tasks: {name} must not set {key!r}", do="Use run.seed and env.eval_size.")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError(
                "the package reasoning-gym is missing",
                do="pip install 'vpd-rl[reasoning-gym]' (env.name reasoning_gym)",
            )

    def task(self, index: int, *, seed: int) -> Task:
        return self._new(f"train/{seed}/{index}", index, self._held_out)[1]

    def eval_tasks(self, limit: int | None) -> list[Task]:
        return list(self._held_out.values())[:limit]

    def solution(self, task: Task) -> str | None:
        answer: str | None = task.payload.answer
        return None if answer is None else f"{OPEN}{answer}{CLOSE}"

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        held, fault = read_tag(text, f"{OPEN}YOUR ANSWER{CLOSE}")
        if held is None:
            return self._grade(0.0, str(fault), informative=True, readable=False)
        if len(held) > LONGEST:
            feedback = f"Your answer tag holds {len(held)} characters; only the final answer belongs there."
            return self._grade(0.0, feedback, informative=True, readable=False)
        drawn: Drawn = task.payload
        try:
            found = self._worker.ask(["score", drawn.generator, drawn.seed, held])
        except WorkerFault as error:
            feedback = f"Your answer could not be judged: {error}. Write it in the form that the task asks for."
            return self._grade(0.0, feedback, informative=True, unverified=True)
        score = float(found["score"])
        if not math.isfinite(score):
            raise EnvError(f"the verifier of {self._generators[drawn.generator][0]} gave no finite score", got=score)
        if score >= 1:
            return self._grade(score, "The verifier accepts your answer.", informative=False)
        partly = score > 0
        verdict = f"The verifier gives {score:.2g} of 1." if partly else "The verifier does not accept your answer."
        if found["refused"]:
            fault = "Your answer holds what is neither a literal nor arithmetic; write plain values."
        elif found["contained"]:
            fault = "Your answer tag holds other text beside the answer; write the answer alone."
        return self._grade(score, f"{verdict} {fault}" if fault else verdict, informative=bool(fault))

    def _grade(
        self, score: float, feedback: str, *, informative: bool, readable: bool = True, unverified: bool = False
    ) -> Grade:
        right = score >= 1
        metrics = {"answer_readable": float(readable), "unverified": float(unverified), "score": score}
        reward = score if self.reward == "share" else float(right)
        return Grade(reward=reward, success=right, feedback=feedback, informative=informative, metrics=metrics)

    def _new(self, stream: str, index: int, known: Mapping[str, Task]) -> tuple[str, Task]:
        """(question, task) of the first draw of a stream whose question is not in ``known``."""
        number = index % len(self._generators)
        name = self._generators[number][0]
        for attempt in range(TRIES):
            seed = int.from_bytes(hashlib.blake2b(f"{stream}/{attempt}".encode(), digest_size=4).digest(), "big") >> 1
            try:
                found = self._worker.ask(["draw", number, seed])
            except WorkerFault as error:
                raise EnvError(
                    f"reasoning-gym drew no task of {name}",
                    got=str(error),
                    do="Make its config easier, or raise env.verify_seconds.",
                ) from error
            if found["question"] in known:
                continue
            content = f"{found['question'].strip()}\n\n{self.ask}" if self.ask else found["question"]
            messages = with_system(({"role": "user", "content": content},), self.system)
            drawn = Drawn(generator=number, seed=seed, answer=found["answer"])
            return found["question"], Task(id=f"{stream}/{name}", messages=messages, payload=drawn)
        raise ConfigError(
            f"{name} has too few different questions",
            got=f"{TRIES} draws in a row were held-out questions",
            do="Lower env.eval_size, or give it a config with more of them.",
        )

    @cached_property
    def _held_out(self) -> dict[str, Task]:
        """The held-out tasks by question, in order."""
        tasks: dict[str, Task] = {}
        for index in range(self.eval_size):
            question, task = self._new(f"eval/{index}", index, tasks)
            tasks[question] = task
        return tasks

    @cached_property
    def _generators(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """(name, config) of each."""
        entries = self.tasks if isinstance(self.tasks, (list, tuple)) else [self.tasks]
        found = []
        for entry in entries:
            named: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"name": entry}
            config = named.get("config", {})
            readable = isinstance(config, Mapping) and isinstance(named.get("name"), str)
            if not readable or set(named) - {"name", "config"}:
                raise ConfigError(
                    "env.tasks has an entry that cannot be read",
                    got=shown(entry),
                    expected="a name, or {name: ..., config: {...}}",
                )
            found.append((named["name"], dict(config)))
        if not found:
            raise ConfigError("env.tasks is empty", expected="names such as [leg_counting, chain_sum]")
        return tuple(found)

    @cached_property
    def _worker(self) -> Worker:
        worker = Worker("vpd.envs.reasoning_gym", self._generators, seconds=self.verify_seconds)
        for number, (name, config) in enumerate(self._generators):
            fault = worker.ask(["open", number])
            if fault is None:
                continue
            worker.close()
            if "known" in fault:
                raise ConfigError(f"env.tasks: unknown generator {name!r}", do=nearest(name, fault["known"]))
            expected = f"a config with {', '.join(fault['keys'])}"
            raise ConfigError(f"env.tasks: {name} refuses its config {config}", got=fault["message"], expected=expected)
        return worker


def serve(generators: list[tuple[str, dict[str, Any]]]) -> Callable[[list[Any]], Any]:
    """In the worker: ``open`` a generator, ``draw`` a question from it, or ``score`` an answer to one."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    guard = _SafeEval()
    guard.install()

    @functools.lru_cache(maxsize=4096)
    def drawn(number: int, seed: int) -> tuple[Any, Any]:
        name, config = generators[number]
        source = reasoning_gym.create_dataset(name, **config, seed=seed, size=1)
        return source, source[0]

    def opened(number: int) -> Any:
        name, config = generators[number]
        if name not in DATASETS:
            return {"known": sorted(set(DATASETS) - set(REFUSED))}
        try:
            reasoning_gym.create_dataset(name, **config, seed=0, size=1)
        except (AssertionError, TypeError, ValueError) as error:
            keys = sorted(set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"})
            return {"message": " ".join(str(error).split())[:200], "keys": keys}
        return None

    def serve_request(request: list[Any]) -> Any:
        order, number, *rest = request
        if order == "open":
            return opened(number)
        source, entry = drawn(number, rest[0])
        if order == "draw":
            answer = entry["answer"]
            return {"question": entry["question"], "answer": answer if isinstance(answer, str) else None}
        with guard:
            score = float(source.score_answer(rest[1], entry))
        reference = rf"(?<!\w){re.escape(str(entry['answer']))}(?!\w)"
        contained = 0 < score < 1 and re.search(reference, rest[1]) is not None
        return {"score": score, "contained": contained, "refused": guard.refused}

    return serve_request


NAMES = {"Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp", "ln", "log"} | {
    *("pi", "sec", "sin", "sinh", "sqrt", "tan", "tanh")
}


def is_arithmetic(text: str, *, names: bool) -> bool:
    """Whether text is numbers, operators and brackets; with ``names`` also single letters and functions such as sin."""
    if not names:
        return bool(re.fullmatch(r"(?:0[xX][0-9a-fA-F]+|[0-9]|[-+*/%()<>&|^~. \t])*", text))
    known = all(len(name) == 1 or name in NAMES for name in re.findall(r"[A-Za-z]+", text))
    return known and bool(re.fullmatch(r"[A-Za-z0-9+\-*/^(), .\t]*", text)) and not re.search(r"\.\s*[A-Za-z]", text)


class _SafeEval:
    """A context in which reasoning-gym's ``eval`` and ``parse_expr`` accept only literals and arithmetic."""

    def __init__(self) -> None:
        self.closed = self.refused = False

    def __enter__(self) -> None:
        self.closed, self.refused = True, False

    def __exit__(self, *exception: Any) -> None:
        self.closed = False

    def install(self) -> None:
        """Replace both names in every module of reasoning-gym; those modules look them up there first."""
        import sympy

        original = sympy.parse_expr
        sympy.parse_expr = functools.partial(self._parsed, original)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "reasoning_gym":
                vars(module)["eval"] = self._evaluated
                if vars(module).get("parse_expr") is original:
                    vars(module)["parse_expr"] = sympy.parse_expr

    def _evaluated(self, source: Any, *scopes: Any) -> Any:
        if not self.closed or (isinstance(source, str) and is_arithmetic(source, names=False)):
            return eval(source, *scopes)
        try:
            return ast.literal_eval(source)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            self.refused = True
            raise

    def _parsed(self, original: Callable[..., Any], text: Any, *arguments: Any, **options: Any) -> Any:
        if self.closed and not (isinstance(text, str) and is_arithmetic(text, names=True)):
            self.refused = True
            raise ValueError("not arithmetic")
        return original(text, *arguments, **options)
