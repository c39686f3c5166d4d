"""One task, solved at test time: adapt the model to it from its own failed attempts, against asking without learning.

Test-time self-distillation (SDPO, arXiv 2601.20802, section on test time): the task is attempted G times; while none
succeeds, the method takes a step on these attempts and their feedback, and the adapted model attempts it again.  Two
ways that train nothing get the same number of sampled tokens: ``best_of``, independent attempts of the model as it is,
and ``repair``, one conversation in which it reads its answer and the feedback and answers again.

Every sampled token counts: attempts, retries, critiques and comparisons.  A success counts if it ends within the
budget.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge

from vpd.algorithms import Algorithm
from vpd.engines import Engine
from vpd.envs import Conversational, Env
from vpd.errors import ConfigError, EnvError
from vpd.learners import TrainedLearner
from vpd.prompts import Prompter
from vpd.rollout import RolloutSource
from vpd.settings import Settings
from vpd.types import Grade, Group, Message, Rollout, SampleKey, Task

LOG = logging.getLogger("vpd")

Way: TypeAlias = Literal["adapt", "best_of", "repair"]
Turn: TypeAlias = tuple[str, str]  # an answer, and what was said about it
WAYS: tuple[Way, ...] = ("adapt", "best_of", "repair")
UNGRADED = 8  # attempts without a grade that say that nobody grades
AGAIN = "That is not right.{feedback}\n\nAnswer the task again."


@dataclass(frozen=True, kw_only=True)
class SolveOptions(Settings):
    """Which task is solved, and what it may cost."""

    task: Annotated[int, Ge(0), "place of the task among the held-out tasks, or with train among those of training"] = 0
    train: Annotated[bool, "take a training task"] = False
    budget: Annotated[int, Ge(1), "tokens that each way of solving may sample"] = 20_000
    repeats: Annotated[int, Ge(1), "runs of each way, each with samples of its own and from the same weights"] = 1
    compare: Annotated[bool, "also run best-of-k and repair in several turns, which train nothing"] = True


@dataclass(frozen=True, kw_only=True)
class Try:
    """One run of one way of solving.

    ``attempts`` and ``tokens`` up to the first success, or all that were made; ``steps`` counts updates; ``answer`` is
    the attempt that succeeded.
    """

    solved: bool
    attempts: int
    tokens: int
    steps: int = 0
    answer: str | None = None


@dataclass(frozen=True)
class _Event:
    """An attempt, or (``rollout`` None) texts about attempts, and the tokens that were sampled for it."""

    rollout: Rollout | None
    tokens: int


class OneTask:
    """The environment of a single task: every position of the stream is that task."""

    def __init__(self, env: Env, task: Task):
        self._env = env
        self._task = task

    def task(self, index: int, *, seed: int) -> Task:
        return self._task

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return ()

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return self._env.grade(tasks, texts)


class OneConversation(OneTask):
    """The same, where the environment replies."""

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Any]:
        assert isinstance(self._env, Conversational)
        return self._env.respond(tasks, conversations)


def alone(source: RolloutSource, task: Task) -> RolloutSource:
    """The source with one task in the place of the environment's."""
    env = (OneConversation if isinstance(source.env, Conversational) else OneTask)(source.env, task)
    return dataclasses.replace(source, env=env, settings=dataclasses.replace(source.settings, prompts_per_step=1))


def adapt(source: RolloutSource, engine: Engine, learner: TrainedLearner, algorithm: Algorithm, *, budget: int) -> Try:
    """Attempt the source's one task and learn from the failures, until an attempt succeeds or the budget is spent."""
    steps = 0

    def attempts() -> Iterator[_Event]:
        nonlocal steps
        for step in itertools.count():
            groups, _ = source.take(step)
            yield from in_order(groups)
            algorithm.step(groups, learner)
            learner.end_iteration()
            engine.load(learner.policy())
            steps += 1

    found = _first_success(attempts(), budget)
    return dataclasses.replace(found, steps=steps)


def best_of(source: RolloutSource, task: Task, *, budget: int) -> Try:
    """Independent attempts of the model as it is."""

    def attempts() -> Iterator[_Event]:
        for step in itertools.count():
            key = SampleKey(phase="solve/best_of", step=step, task=0, sample=0)
            count = source.settings.num_generations
            groups = source.generate_groups([key], [task], source.settings.sampling, count)
            yield from in_order(groups)

    return _first_success(attempts(), budget)


def repair(source: RolloutSource, task: Task, *, budget: int) -> Try:
    """One conversation: each answer and its feedback are read before the next.

    Feedback is cut as the teacher's; where no room is left the oldest turns go, and of the last the feedback's middle.
    Where not even that fits, it is logged that attempts are independent.
    """
    prompter = source.prompter

    def attempts() -> Iterator[_Event]:
        turns: list[Turn] = []
        for step in itertools.count():
            turns = _kept(prompter, task, turns)
            if step == 1 and not turns:
                LOG.warning(
                    "repair in turns: an answer and what is said about it do not fit prompts.max_prompt_length or the"
                    " window, so these attempts are independent"
                )
            asked = _with_turns(task, turns)
            key = SampleKey(phase="solve/repair", step=step, task=0, sample=0)
            (group,) = source.generate_groups([key], [asked], source.settings.sampling, 1)
            yield from in_order([group])
            (made,) = group.rollouts
            words = prompter.fit(made.grade.feedback or "", prompter.settings.max_feedback_length).text
            turns.append((made.completion.text, words))

    return _first_success(attempts(), budget)


def _kept(prompter: Prompter, task: Task, turns: Sequence[Turn]) -> list[Turn]:
    """The latest turns that fit; of one alone the feedback loses its middle, and it goes where that is not enough."""
    kept = list(turns)
    while len(kept) > 1 and _excess(prompter, _with_turns(task, kept)) > 0:
        del kept[0]
    while kept and (excess := _excess(prompter, _with_turns(task, kept))) > 0:
        answer, words = kept[0]
        room = prompter.fit(words, prompter.settings.max_feedback_length).length - excess
        kept = [(answer, prompter.fit(words, max(room, 0)).text)] if words else []
    return kept


def _excess(prompter: Prompter, task: Task) -> int:
    """Tokens that a task's prompt takes beyond ``prompts.max_prompt_length`` or the window; 0 where it fits."""
    length = len(prompter.prompt_of(task))
    limits = [prompter.settings.max_prompt_length]
    limits += [None if prompter.window is None else prompter.window - prompter.max_completion_length]
    return max([length - limit for limit in limits if limit is not None] + [0])


def _with_turns(task: Task, turns: Sequence[Turn]) -> Task:
    """The task with answers and what was said about them behind it."""
    more: list[Message] = []
    for answer, words in turns:
        remark = f"\n\n{words}" if words else ""
        more += [{"role": "assistant", "content": answer}, {"role": "user", "content": AGAIN.format(feedback=remark)}]
    return dataclasses.replace(task, messages=(*task.messages, *more))


def in_order(groups: Sequence[Group]) -> Iterator[_Event]:
    """What was sampled: the attempts, the texts about them, then the retries, group by group."""
    for group in groups:
        yield from map(_attempt, group.rollouts)
        yield _Event(None, sum(_written(attempt) for attempt in group.rollouts))
        yield from (_attempt(retry) for attempt in group.rollouts for retry in attempt.retries)


def _attempt(rollout: Rollout) -> _Event:
    return _Event(rollout, sum(rollout.completion.sampled))


def _written(attempt: Rollout) -> int:
    """Tokens of critiques and comparisons about an attempt; a text that is both is counted as a comparison."""
    compared = sum(comparison.tokens for comparison in attempt.comparisons)
    return compared + sum(section.tokens for section in attempt.context if section.source != "judge" or not compared)


def _first_success(events: Iterator[_Event], budget: int) -> Try:
    """Take from ``events`` until an attempt succeeds, or until the next would go beyond the budget.

    Raises ConfigError for a budget that is not enough for one attempt, EnvError where the attempts are not graded.
    """
    attempts = graded = tokens = 0
    for event in events:
        if tokens + event.tokens > budget:
            break
        tokens += event.tokens
        if event.rollout is not None:
            attempts += 1
            graded += event.rollout.grade.graded
        if attempts == UNGRADED and not graded:
            raise EnvError(
                "the environment grades no new attempt at this task",
                got=f"{attempts} attempts without a grade",
                do="Solve a task of an environment that grades answers; records alone hold the grades of old ones.",
            )
        if event.rollout is not None and event.rollout.success:
            return Try(solved=True, attempts=attempts, tokens=tokens, answer=event.rollout.completion.text)
    if not attempts:
        do = "Raise it, or lower rollout.max_completion_length."
        raise ConfigError("the budget is less than one attempt takes", got=f"{budget} tokens", do=do)
    return Try(solved=False, attempts=attempts, tokens=tokens)
