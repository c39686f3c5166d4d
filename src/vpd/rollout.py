"""Draw, generate, grade, add feedback: from tasks to groups of rollouts, for training and evaluation alike."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeAlias

from annotated_types import Ge, Gt

from vpd.engines import Abandonable, Engine, MeasuredEngine, require_completions
from vpd.envs import Conversational, Env, RecordedTasks, draw_tasks, grade_texts, recorded_answers, replies_of
from vpd.errors import ConfigError
from vpd.feedback import Feedback, demonstrate_retries
from vpd.feedback.writers import ModelWriter
from vpd.prompts import Prompter, ReplyTokens
from vpd.prompts.external import with_own_prompts
from vpd.prompts.recorded import recorded_group
from vpd.ranks import OneProcess, Ranks, divide, share_of
from vpd.settings import Settings
from vpd.types import Completion, Group, Message, Metrics, Rollout, SampleKey, Task, Tokens, TopKLogprobs


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one attempt is sampled; the environment's replies count into ``max_completion_length``."""

    max_completion_length: int
    max_turns: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


#: The groups of a step, and metrics: timings (seconds), and ``rows/drawn``, the attempts that were to be made.
Made: TypeAlias = tuple[list[Group], Metrics]

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
    overlap: Annotated[
        bool,
        "sample, grade and give feedback to the next step's answers while the learner updates, so that they come from"
        " weights one step older; needs engine vllm, or an engine of your own that keeps its own weights",
    ] = False
    retries: Annotated[
        int, Ge(0), "attempts of the teacher, which reads the feedback, at each failed attempt's task; 0: none"
    ] = 0
    max_retries_per_task: Annotated[
        int | None, Ge(1), "most retries at one task, those of its first failures; null: no bound"
    ] = None
    retry_demonstrations: Annotated[
        bool, "a retry that succeeded becomes the demonstration of its group's failed attempts that have none"
    ] = False

    def check(self) -> None:
        super().check()
        if self.retry_demonstrations and not self.retries:
            raise ConfigError(
                "rollout.retry_demonstrations needs retries to show", got="rollout.retries 0", do="Set it to 1 or more."
            )

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One attempt to generate: the task, the prompt [P] that the model reads, and the key that says which it is."""

    key: SampleKey
    task: Task
    prompt: Tokens


class TopKTeacher(Protocol):
    """A teacher that runs elsewhere."""

    def top_k(self, rows: Sequence[tuple[Tokens, Tokens]]) -> list[TopKLogprobs]:
        """Its likeliest tokens at each token of each row's completion; a row is (prompt, completion), none empty."""
        ...


class Source(Protocol):
    """Where the loop's rollouts come from."""

    def start(self, step: int) -> None:
        """Announce that ``take(step)`` follows; a source that works ahead begins now, with the weights loaded now."""
        ...

    def take(self, step: int) -> Made:
        """All groups of ``step``, the same on every rank and with teacher prompts, and metrics."""
        ...

    def finish(self) -> None:
        """Wait until nothing is sampled any more, so that other weights may be loaded; ``take`` raises what failed."""
        ...

    def state(self, step: int) -> Made | None:
        """What a checkpoint of ``step`` must hold: its groups, where they are made already.  Raises what failed."""
        ...

    def restore(self, step: int, made: Made) -> None:
        """Take back what :meth:`state` gave, so that ``take(step)`` gives it."""
        ...

    def close(self) -> None:
        """Give up whatever is still being made."""
        ...


@dataclass(frozen=True, kw_only=True)
class RolloutSource:
    """The synchronous source.  It has no memory: the tasks of a step and all randomness follow from (seed, step).

    With several ranks each works on a contiguous share of the tasks, from drawing to teacher prompts, and the groups
    are gathered; the result is the same for any number of ranks.

    ``engine`` is the student.  It answers everything: evaluation, retries, critiques, and the training tasks too unless
    there is a ``training_engine`` (a mixture with an external teacher or the data), which answers these and nothing
    else.  ``own_prompt`` is a task as an external teacher reads it (None: there is none, or it reads the student's
    prompt).  A remote ``teacher`` scores the training tasks' answers after that prompt, or with
    ``teacher_reads_context`` after the teacher's, where there is one.
    """

    env: Env
    engine: Engine
    prompter: Prompter
    feedback: Sequence[Feedback]
    settings: RolloutSettings
    seed: int = 0
    training_engine: Engine | None = None
    teacher: TopKTeacher | None = None
    own_prompt: Callable[[Task], Tokens] | None = None
    teacher_reads_context: bool = False
    ranks: Ranks = dataclasses.field(default_factory=OneProcess)

    def start(self, step: int) -> None:
        """Nothing: the groups are made when they are taken."""

    def take(self, step: int) -> Made:
        return self.gather(lambda: self.make(step))

    def finish(self) -> None:
        """Nothing: no groups are made when none are taken."""

    def state(self, step: int) -> Made | None:
        return None

    def restore(self, step: int, made: Made) -> None:
        """Nothing: what it makes again is the same."""

    def close(self) -> None:
        """Nothing."""

    def gather(self, make: Callable[[], Made]) -> Made:
        """The groups that ``make()`` gives on every rank, in order, and this rank's metrics."""
        metrics: Metrics = {}

        def work(ranks: Sequence[int]) -> list[Group]:
            groups, own = make()
            metrics.update(own)
            return groups

        return divide(self.ranks, range(self.ranks.world), work), metrics

    def make(self, step: int) -> Made:
        """This rank's share of the groups of a step; no other rank is waited for."""
        settings, count = self.settings, self.settings.prompts_per_step
        drawn = float(self._rows(range(step * count, (step + 1) * count)))
        metrics: Metrics = {"rows/drawn": drawn, "time/rollout": 0.0, "time/feedback": 0.0}
        if isinstance(self.engine, MeasuredEngine):
            metrics |= self.engine.metrics()
        places = [step * count + number for number in share_of(self.ranks.rank, self.ranks.world, count)]
        if not places:
            return [], metrics
        started = time.perf_counter()
        keys = [SampleKey(phase="train", step=step, task=place, sample=0) for place in places]
        groups = self._train_groups(keys, draw_tasks(self.env, places, seed=self.seed))
        sampled = time.perf_counter()
        groups = self.add_feedback(groups)
        with_feedback = time.perf_counter()
        groups = self.add_retries(groups)
        if settings.retry_demonstrations:
            groups = self.prompter.attach(demonstrate_retries(groups))
        metrics["time/rollout"] = sampled - started
        metrics["time/feedback"] = with_feedback - sampled
        if settings.retries:
            metrics["time/retries"] = time.perf_counter() - with_feedback
        if self.own_prompt is not None:
            groups = with_own_prompts(groups, self.own_prompt)
        return (groups if self.teacher is None else self._scored(groups, self.teacher, metrics)), metrics

    def abandon(self) -> None:
        """End what another thread makes here, as far as the engines and the teacher allow it."""
        for part in (self.engine, self.training_engine, self.teacher):
            if isinstance(part, Abandonable):
                part.abandon()

    def _rows(self, places: Sequence[int]) -> int:
        """How many attempts these training tasks are to have: G each, or as many as there are recorded answers."""
        count = self.settings.num_generations
        if not isinstance(self.env, RecordedTasks):
            return len(places) * count
        tasks = draw_tasks(self.env, places, seed=self.seed)
        return sum(len(recorded_answers(self.env, task)) or count for task in tasks)

    def _train_groups(self, keys: Sequence[SampleKey], tasks: Sequence[Task]) -> list[Group]:
        """A group for each training task: its recorded answers where it has any, else G attempts."""
        answers = [recorded_answers(self.env, task) for task in tasks]
        fresh = [place for place, recorded in enumerate(answers) if not recorded]
        source = self if self.training_engine is None else dataclasses.replace(self, engine=self.training_engine)
        made = iter(
            source.generate_groups(
                [keys[place] for place in fresh],
                [tasks[place] for place in fresh],
                self.settings.sampling,
                self.settings.num_generations,
            )
        )
        return [
            recorded_group(self.prompter, key, task, recorded) if recorded else next(made)
            for key, task, recorded in zip(keys, tasks, answers, strict=True)
        ]

    def generate_groups(
        self, keys: Sequence[SampleKey], tasks: Sequence[Task], sampling: Sampling, num_generations: int
    ) -> list[Group]:
        """G graded attempts of the student at each task; ``keys`` are those of each task's first attempt."""
        requests = [
            Request(key=dataclasses.replace(key, sample=sample), task=task, prompt=prompt)
            for key, task in zip(keys, tasks, strict=True)
            for prompt in [self.prompter.build_student_prompt(task)]
            for sample in range(num_generations)
        ]
        rollouts = self.generate_rollouts(requests, sampling)
        starts = range(0, len(rollouts), num_generations)
        return [Group(rollouts=tuple(rollouts[start : start + num_generations])) for start in starts]

    def generate_rollouts(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """A graded attempt of the student for each request; an undecided ``success`` is resolved here, once."""
        completions = generate_turns(self.env, self.engine, self.prompter, requests, sampling, seed=self.seed)
        return grade_completions(self.env, requests, completions, self.settings.success_threshold)

    def add_feedback(self, groups: Sequence[Group]) -> list[Group]:
        """The rollouts with the sections of every feedback source, and with their teacher's prompts."""
        for number, source in enumerate(self.feedback):
            groups = source(groups, ModelWriter(self.engine, self.prompter, seed=self.seed, source=number))
        return self.prompter.attach(groups)

    def add_retries(self, groups: Sequence[Group]) -> list[Group]:
        """The rollouts with ``settings.retries`` attempts of the teacher at each failure that it has a prompt for."""
        wanted = [request for group in groups for request in self._retry_requests(group)]
        if not wanted:
            return list(groups)
        made: dict[tuple[int, int], list[Rollout]] = {}
        for retry in self.generate_rollouts(wanted, self.settings.sampling):
            made.setdefault((retry.key.task, retry.key.sample // self.settings.retries), []).append(retry)
        return [
            Group(
                rollouts=tuple(
                    dataclasses.replace(r, retries=tuple(made.get((r.key.task, r.key.sample), ())))
                    for r in group.rollouts
                )
            )
            for group in groups
        ]

    def _scored(self, groups: Sequence[Group], teacher: TopKTeacher, metrics: Metrics) -> list[Group]:
        """The rollouts with what the teacher says of their tokens."""
        started = time.perf_counter()
        read = [(rollout, self._read_by_teacher(rollout)) for group in groups for rollout in group.rollouts]
        rows = [(prompt, rollout.completion.tokens) for rollout, prompt in read if prompt is not None]
        answers = iter(teacher.top_k(rows))
        scored = iter([r if p is None else dataclasses.replace(r, teacher_logprobs=next(answers)) for r, p in read])
        metrics["time/teacher"] = time.perf_counter() - started
        return [Group(rollouts=tuple(next(scored) for _ in group.rollouts)) for group in groups]

    def _read_by_teacher(self, rollout: Rollout) -> Tokens | None:
        """The prompt that a remote teacher reads before a rollout's answer; None: it does not score this one."""
        if not rollout.completion.tokens:
            return None
        if not self.teacher_reads_context:
            return rollout.external_prompt
        return None if rollout.teacher_prompt is None else rollout.teacher_prompt.tokens

    def _retry_requests(self, group: Group) -> list[Request]:
        """The teacher's attempts at a group's task, those of its first failures first."""
        count = self.settings.retries
        requests = [
            Request(
                key=dataclasses.replace(rollout.key, phase="retry", sample=rollout.key.sample * count + number),
                task=rollout.task,
                prompt=rollout.teacher_prompt.tokens,
            )
            for rollout in group.rollouts
            if not rollout.success and rollout.teacher_prompt is not None and not rollout.completion.recorded
            for number in range(count)
        ]
        return requests[: self.settings.max_retries_per_task]


def generate_turns(
    env: Env,
    engine: Engine,
    prompter: Prompter,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    seed: int,
) -> list[Completion]:
    """One attempt for each request; where the environment replies, the model goes on within the same budget."""

    def generate(rows: Sequence[int], prompts: Sequence[Tokens], room: Sequence[int], turn: int) -> list[Completion]:
        made = engine.generate(
            prompts,
            keys=[dataclasses.replace(requests[row].key, turn=turn) for row in rows],
            seed=seed,
            max_tokens=room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        return require_completions(made, len(prompts), type(engine).__name__)

    rows = list(range(len(requests)))
    prompts = [request.prompt for request in requests]
    attempts = [
        dataclasses.replace(attempt, thinking_open=prompter.opens_thinking(prompt))
        for attempt, prompt in zip(
            generate(rows, prompts, [sampling.max_completion_length] * len(requests), 0), prompts, strict=True
        )
    ]
    if not isinstance(env, Conversational):
        return attempts
    conversations: list[list[Message]] = [list(request.task.messages) for request in requests]
    for turn in range(1, sampling.max_turns):
        rows = [row for row in rows if attempts[row].finish == "stop"]
        replies = _replies(env, prompter, requests, rows, attempts, conversations)
        room = {
            row: sampling.max_completion_length - len(attempts[row].tokens) - len(replies[row].tokens)
            for row in replies
        }
        rows = [row for row in replies if room[row] > 0]
        for row in replies.keys() - set(rows):
            attempts[row] = dataclasses.replace(attempts[row], finish="length")
        if not rows:
            break
        prompts = [requests[row].prompt + attempts[row].tokens + replies[row].tokens for row in rows]
        for row, answer in zip(rows, generate(rows, prompts, [room[row] for row in rows], turn), strict=True):
            attempts[row] = _joined(attempts[row], replies[row], answer)
    return attempts


def _replies(
    env: Conversational,
    prompter: Prompter,
    requests: Sequence[Request],
    rows: Sequence[int],
    attempts: Sequence[Completion],
    conversations: Sequence[list[Message]],
) -> dict[int, ReplyTokens]:
    """The environment's reply to the newest answer of each row, as tokens; both are added to its conversation."""
    for row in rows:
        conversations[row].append({"role": "assistant", "content": attempts[row].text})
    replies = replies_of(env, [requests[row].task for row in rows], [conversations[row] for row in rows])
    found: dict[int, ReplyTokens] = {}
    for row, reply in zip(rows, replies, strict=True):
        if reply is not None:
            conversations[row].append(reply)
            last = attempts[row].tokens[-1] if attempts[row].tokens else None
            found[row] = prompter.reply(reply, after=last)
    return found


def _joined(attempt: Completion, reply: ReplyTokens, answer: Completion) -> Completion:
    """An attempt, what the environment replied, and the next answer, as one attempt."""
    return dataclasses.replace(
        answer,
        tokens=attempt.tokens + reply.tokens + answer.tokens,
        sampled=attempt.sampled + (False,) * len(reply.tokens) + answer.sampled,
        logprobs=attempt.logprobs + (0.0,) * len(reply.tokens) + answer.logprobs,
        turns=attempt.turns + 1,
        thinking_open=attempt.thinking_open,
        reply_cut=attempt.reply_cut + reply.cut,
        reply_control_tokens=attempt.reply_control_tokens + reply.control_tokens,
    )


def grade_completions(
    env: Env, requests: Sequence[Request], completions: Sequence[Completion], success_threshold: float
) -> list[Rollout]:
    """Rollouts with their grades; where the grader leaves ``success`` open, the reward and the threshold decide."""
    grades = grade_texts(env, [request.task for request in requests], [completion.text for completion in completions])
    rollouts = []
    for request, completion, grade in zip(requests, completions, grades, strict=True):
        if grade.success is None:
            grade = dataclasses.replace(grade, success=grade.reward >= success_threshold)
        rollouts.append(
            Rollout(key=request.key, task=request.task, prompt=request.prompt, completion=completion, grade=grade)
        )
    return rollouts
