"""``vpd train --dry_run``: data, prompts and budgets as a run would have them, and what the run would need, without
weights."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vpd.bundled import source_of
from vpd.config import Config, check_together
from vpd.config.sections import announce, make_env
from vpd.engines.settings import VLLMSettings
from vpd.envs import Env, Finite, Solvable, all_train_tasks, draw_tasks, grade_texts, held_out_tasks, wrap_user_errors
from vpd.errors import ConfigError
from vpd.estimate.architecture import Architecture, find_architecture
from vpd.estimate.settings import DryRunSettings
from vpd.estimate.stand_in_tokenizer import find_tokenizer
from vpd.feedback import ScriptedWriter
from vpd.feedback.critique import Critic, SelfCritique
from vpd.feedback.judge import Judge
from vpd.prompts import Prompter
from vpd.recipes.assemble import make_prompter, resolve
from vpd.recipes.estimate import GIB, Attempts, Estimate, estimate
from vpd.report.console import Terminal
from vpd.types import Completion, Grade, Group, Message, Rollout, SampleKey, Task

GRADED = 32  # wrong answers that the environment grades; other tasks get these texts in turn
WRONG = "I do not know what to say here."


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What prompts and contexts are like, in tokens and shares of the rollouts of one iteration."""

    prompts: tuple[float, int]  # mean and longest of the student's
    teacher_prompts: tuple[float, int]
    with_context: float
    cut: float
    without_room: float


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """All that a dry run found; ``notes`` say what stood in for what is not here."""

    config: Config
    machine: DryRunSettings
    notes: tuple[str, ...]
    budgets: Budgets
    estimate: Estimate


def dry_run(config: Config, machine: DryRunSettings) -> DryRun:
    """Build settings, data and prompts, and compute what the run would need.  Raises a VPDError as ``train`` would."""
    check_together(config)
    if isinstance(config.engine, VLLMSettings) and not machine.server_gpus:
        raise ConfigError(
            "engine.name vllm samples on a server", got="dry_run.server_gpus 0", do="Say how many GPUs it has."
        )
    source = source_of(config.model.name_or_path)
    trust = config.model.trust_remote_code
    architecture = find_architecture(source, trust_remote_code=trust)
    tokenizer, which = find_tokenizer(source, trust_remote_code=trust)
    notes = [f"model: shape from {architecture.origin}", f"tokenizer: {which}"]
    env = _assumed_env(machine, config) if machine.prompt_tokens else make_env(config.env)
    if machine.prompt_tokens:
        notes.append(f"data: none read; prompts of about {machine.prompt_tokens} tokens are assumed")
    else:
        announce(env)
    notes += _left_out(config)
    shape = _shape(architecture, config, source)
    config = resolve(config, env, shape, tokenizer)
    prompter = make_prompter(config, shape, tokenizer)
    rollouts = _Rollouts(config, machine, env, prompter)
    groups = rollouts.expected()
    held_out = len(held_out_tasks(env, config.run.eval_limit)) if config.run.eval_steps else 0
    if machine.prompt_tokens:
        held_out = config.run.eval_limit or 0
    attempts = Attempts(expected=groups, longest=rollouts.longest(), critiques=rollouts.critiques, held_out=held_out)
    found = estimate(config, machine, architecture, prompter, attempts)
    return DryRun(config=config, machine=machine, notes=tuple(notes), budgets=_budgets(groups), estimate=found)


def _left_out(config: Config) -> list[str]:
    """What of the settings the estimate does not count."""
    needs = config.needs
    left_out = {
        "optim.cpu_offload: left out; shards are counted on the GPUs": config.optim.cpu_offload,
        "rollout.retries: left out, in sampling and in training": config.rollout.retries > 0,
        "algorithm.student_fraction: left out; the student is taken to answer all": needs.student_fraction < 1,
        "algorithm.teacher_url: left out; a teacher is taken to compute here": needs.remote_teacher is not None,
    }
    return [note for note, holds in left_out.items() if holds]


def _shape(architecture: Architecture, config: Config, source: str) -> Any:
    """The model without data, as far as prompts ask it for its window and its folder."""
    model = architecture.build(config.model.dtype)
    model.name_or_path = source if Path(source).is_dir() else ""
    return model


class _AssumedEnv:
    """An environment of prompts of one length, where no data are read."""

    def __init__(self, machine: DryRunSettings, prompt: str):
        self._feedback = " ".join(["word"] * machine.feedback_tokens)
        self._prompt = prompt

    def task(self, index: int, *, seed: int) -> Task:
        return Task(id=str(index), messages=({"role": "user", "content": f"{index} {self._prompt}"},))

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return ()

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return [Grade(reward=0.0, feedback=self._feedback) for _ in tasks]


def _assumed_env(machine: DryRunSettings, config: Config) -> Env:
    limit = config.prompts.max_prompt_length if config.prompts else None
    if limit is not None and machine.prompt_tokens is not None and machine.prompt_tokens > limit:
        raise ConfigError(
            "dry_run.prompt_tokens is above prompts.max_prompt_length", got=machine.prompt_tokens, expected=limit
        )
    return _AssumedEnv(machine, " ".join(["word"] * max((machine.prompt_tokens or 0) - 24, 1)))


class _Rollouts:
    """Groups of an iteration with answers of an assumed length, the environment's real prompts and feedback."""

    def __init__(self, config: Config, machine: DryRunSettings, env: Env, prompter: Prompter):
        self._config, self._machine, self._env, self._prompter = config, machine, env, prompter
        self._most = config.rollout.sampling.max_completion_length
        self.critiques = 0  # that a feedback source asked for in an iteration
        count = range(config.rollout.prompts_per_step)
        self._drawn = draw_tasks(env, count, seed=config.run.seed)
        known = all_train_tasks(env) if isinstance(env, Finite) else self._drawn
        lengths = {task.id: len(prompter.build_student_prompt(task)) for task in known}
        self._longest = sorted(known, key=lambda task: lengths[task.id])[-len(self._drawn) :]
        self._feedback = self._wrong_grades()

    def expected(self) -> list[Group]:
        """The first iteration's tasks with answers of mean length."""
        mean = self._machine.completion_tokens or max(self._most // 2, 1)
        if mean > self._most:
            raise ConfigError(
                "dry_run.completion_tokens is above rollout.max_completion_length", got=mean, expected=self._most
            )
        return self._groups(self._drawn, mean)

    def longest(self) -> list[Group]:
        """The longest prompts, each with answers that take all tokens that they may."""
        return self._groups(self._longest, self._most)

    def _groups(self, tasks: Sequence[Task], length: int) -> list[Group]:
        groups = [self._group(number, task, length) for number, task in enumerate(tasks)]
        writer = ScriptedWriter(self._written)
        for source in self._config.feedback:
            groups = _without_endpoint(source)(groups, writer)
        self.critiques = len(writer.asked)
        return self._prompter.attach(groups)

    def _written(self, conversation: Sequence[Message], key: SampleKey) -> str:
        """A text of the assumed length; a judge prefers the earlier of two attempts."""
        text = " ".join(["word"] * self._machine.feedback_tokens)
        against = key.phase.partition("/against-")[2]
        if not against:
            return text
        return f"{text}\n{'first' if key.sample < int(against) else 'second'}"

    def _group(self, number: int, task: Task, length: int) -> Group:
        prompt, size = self._prompter.build_student_prompt(task), self._config.rollout.num_generations
        right = round(self._machine.success * size)
        text = " ".join(itertools.islice(itertools.cycle(task.messages[-1]["content"].split() or ["word"]), length))
        completion = Completion(
            tokens=(0,) * length, sampled=(True,) * length, logprobs=(-1.0,) * length, text=text, finish="stop"
        )
        wrong = self._feedback[number % len(self._feedback)]
        rollouts = [
            Rollout(
                key=SampleKey(phase="train", step=0, task=number, sample=index),
                task=task,
                prompt=prompt,
                completion=completion,
                grade=Grade(reward=1.0, success=True) if index < right else wrong,
            )
            for index in range(size)
        ]
        return Group(rollouts=tuple(rollouts))

    def _wrong_grades(self) -> list[Grade]:
        """What the environment says of wrong answers: another task's solution, where it gives one."""
        tasks = self._drawn[:GRADED]
        grades = grade_texts(self._env, tasks, [self._solution(other) for other in (*tasks[1:], *tasks[:1])])
        return [dataclasses.replace(grade, reward=0.0, success=False) for grade in grades]

    def _solution(self, task: Task) -> str:
        env = self._env
        if not isinstance(env, Solvable):
            return WRONG
        return wrap_user_errors(lambda: env.solution(task), f"solution(task {task.id!r})") or WRONG


def _without_endpoint(source: Any) -> Any:
    """The source; one that asks another model is replaced by the same with a scripted one."""
    if isinstance(source, Judge):
        return source if source.judge == "reward" else dataclasses.replace(source, judge="self", judge_model=None)
    if source.name != Critic.name:
        return source
    shared = {field.name for field in dataclasses.fields(SelfCritique)} - {"name"}
    return SelfCritique(**{name: value for name, value in vars(source).items() if name in shared})


def _budgets(groups: Sequence[Group]) -> Budgets:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    teacher = [rollout.teacher_prompt for rollout in rollouts if rollout.teacher_prompt is not None]
    lengths = [len(rollout.prompt) for rollout in rollouts]
    teacher_lengths = [len(prompt.tokens) for prompt in teacher] or [0]
    without_room = sum(bool(rollout.context) and rollout.teacher_prompt is None for rollout in rollouts)
    return Budgets(
        prompts=(statistics.fmean(lengths), max(lengths)),
        teacher_prompts=(statistics.fmean(teacher_lengths), max(teacher_lengths)),
        with_context=len(teacher) / len(rollouts),
        cut=sum(prompt.cut > 0 for prompt in teacher) / max(len(teacher), 1),
        without_room=without_room / len(rollouts),
    )


def show(found: DryRun) -> None:
    """Print everything, with what it rests on."""
    console = Terminal()
    for note in found.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(_prompts_table(found.budgets))
    console.print(_memory_table(found))
    console.print(_time_table(found))
    for line in _summary(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _prompts_table(budgets: Budgets) -> Table:
    table = _table("prompts", "mean", "longest")
    for name, (mean, longest) in (("student", budgets.prompts), ("teacher", budgets.teacher_prompts)):
        table.add_row(name, f"{mean:.0f}", f"{longest}")
    table.add_row("rows with a context", f"{budgets.with_context:.0%}", "")
    table.add_row("of these with a cut context", f"{budgets.cut:.0%}", "")
    table.add_row("rows without room for one", f"{budgets.without_room:.0%}", "")
    return table


def _memory_table(found: DryRun) -> Table:
    estimate = found.estimate
    table = _table("memory of one GPU, GiB", "", "all")
    for item in estimate.fixed:
        table.add_row(item.name, f"{item.bytes / GIB:.2f}", "")
    table.add_row("CUDA's own", f"{found.machine.context_gb:.2f}", "")
    for stage in estimate.stages:
        table.add_row(f"+ {stage.name}", f"{stage.added / GIB:.2f}", f"{stage.total / GIB:.2f}")
    if estimate.server:
        table.add_row("a GPU of the server", "", f"{estimate.server / GIB:.2f}")
    return table


def _time_table(found: DryRun) -> Table:
    estimate = found.estimate
    table = _table("an iteration", "tokens", "TFLOP", "seconds", "times", "seconds on average")
    for phase in estimate.phases:
        work = phase.work
        cells = [f"{work.tokens:,}", f"{work.operations / 1e12:,.1f}", f"{work.seconds:.1f}", f"{phase.times:.2g}"]
        table.add_row(work.name, *cells, f"{phase.seconds:.1f}")
    return table


def _summary(found: DryRun) -> list[str]:
    estimate, machine = found.estimate, found.machine
    fits = "fits" if estimate.fits else "DOES NOT FIT"
    peak, run = estimate.peak / GIB, estimate.run_seconds
    updates = [f"{stage.name}: {stage.note}" for stage in estimate.stages if stage.note]
    count = f"{machine.gpus} GPU{'s' * (machine.gpus > 1)}"
    return [
        *updates,
        f"Assumed hardware, not this machine's: {count} to train, each with {machine.memory_gb:g} GiB and"
        f" {machine.tflops:g} TFLOP/s, at {machine.price:g} an hour;",
        "for another, set --dry_run.memory_gb, --dry_run.tflops, --dry_run.gb_per_s and --dry_run.price.",
        f"{estimate.parameters / 1e9:.2f}e9 parameters; {peak:.1f} GiB of {machine.memory_gb:g} on each of"
        f" {count}: {fits}",
        f"an iteration: {estimate.sampled_tokens:,} sampled tokens, {estimate.seconds:.0f} s,"
        f" {estimate.cost(estimate.seconds):.2f} in money",
        f"the run: {estimate.iterations} iterations and {estimate.evaluations} evaluations, {run / 3600:.1f} h,"
        f" {estimate.cost(run):.0f} in money at {machine.price:g} an hour for each of {estimate.gpus}"
        f" GPU{'s' * (estimate.gpus > 1)}",
        "Computed, not measured: seconds and money are as good as the assumptions (--dry_run.tflops, utilisation, ...);"
        " what graders take is not counted.",
    ]
