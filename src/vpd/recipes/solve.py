"""``vpd solve``: adapt a copy of a model to one task within a budget of sampled tokens, and what that buys."""

import copy
import dataclasses
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vpd import solving
from vpd.config import Config
from vpd.envs import Env, Finite, all_train_tasks, draw_tasks, required_held_out_tasks
from vpd.errors import ConfigError
from vpd.feedback import Feedback
from vpd.printable import cut
from vpd.ranks import launched
from vpd.recipes.assemble import Parts, assemble
from vpd.recipes.loops import save_tokenizer
from vpd.report.console import Terminal
from vpd.run_folder.files import FileSystem, require_writable
from vpd.solving import SolveOptions, Try, Way
from vpd.types import Metrics, Task

LOG = logging.getLogger("vpd")
LONGEST_ANSWER = 600  # characters of the answer that is shown
TITLES: Mapping[Way, str] = {"adapt": "adapted", "best_of": "best of k", "repair": "repair in turns"}


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The task, the budget, and the runs of each way of solving it: adapt, and with ``compare`` best_of and repair."""

    task: Task
    budget: int
    tries: Mapping[Way, Sequence[Try]]

    def numbers(self) -> dict[str, Metrics]:
        """For each way: runs, the share that solved the task, and means over the runs that did.

        ``attempts`` and ``tokens`` (up to the first success) are of runs that solved it, absent where none did;
        ``attempts_made`` and ``tokens_sampled`` of all runs.
        """
        return {way: _numbers(tries) for way, tries in self.tries.items()}

    @property
    def answer(self) -> str | None:
        """An attempt that succeeded, of the adapted model if it has one; None: no way has solved the task."""
        ways = [way for way in TITLES if way in self.tries]
        return next((one.answer for way in ways for one in self.tries[way] if one.answer is not None), None)


def solve(
    config: Config,
    options: SolveOptions | None = None,
    *,
    output: Path | None = None,
    model: Any = None,
    tokenizer: Any = None,
    env: Env | None = None,
    feedback: Sequence[Feedback] | None = None,
) -> Solution:
    """Solve one task of ``config.env``; objects take the place of their sections.

    ``config.algorithm`` is what adapts, ``config.rollout.num_generations`` the attempts between two steps.  Nothing is
    written unless ``output`` names a folder for the adapted model (``output/model``), which must be new.  Raises
    ConfigError, and whatever :func:`vpd.assemble` raises.
    """
    options = options or SolveOptions()
    _check(options, output)
    rollout = dataclasses.replace(config.rollout, prompts_per_step=1)
    run = dataclasses.replace(config.run, eval_steps=0)
    config = dataclasses.replace(config, rollout=rollout, run=run)
    parts = assemble(config, model=model, tokenizer=tokenizer, env=env, feedback=feedback)
    task = chosen_task(parts, options)
    tries: dict[Way, list[Try]] = {way: [] for way in solving.WAYS if way == "adapt" or options.compare}
    start = copy.deepcopy(parts.learner.state()) if options.repeats > 1 else None
    for repeat in range(options.repeats):
        if start is not None:
            parts.learner.restore(copy.deepcopy(start))
            parts.engine.load(parts.learner.policy())
        for way, found in _one_of_each(parts, task, options, seed=config.run.seed + repeat):
            LOG.info("run %d of %d, %s: %s", repeat + 1, options.repeats, TITLES[way], _in_words(found))
            tries[way].append(found)
    if output is not None:
        _export(parts, output)
    return Solution(task=task, budget=options.budget, tries=tries)


def chosen_task(parts: Parts, options: SolveOptions) -> Task:
    """The task that the options name.  Raises ConfigError where there are fewer."""
    env = parts.env
    if options.train and not isinstance(env, Finite):
        return draw_tasks(env, [options.task], seed=parts.config.run.seed)[0]
    held_out = partial(required_held_out_tasks, env, options.task + 1)
    tasks = all_train_tasks(env) if options.train and isinstance(env, Finite) else held_out()
    if options.task >= len(tasks):
        what = "training" if options.train else "held-out"
        raise ConfigError(
            f"there is no {what} task {options.task}", got=f"{len(tasks)} tasks", expected=f"0 to {len(tasks) - 1}"
        )
    return tasks[options.task]


def _one_of_each(parts: Parts, task: Task, options: SolveOptions, *, seed: int) -> Iterator[tuple[Way, Try]]:
    """A run of each way; the two that train nothing come first, with the weights as they were loaded."""
    source = dataclasses.replace(solving.alone(parts.source, task), seed=seed)
    if options.compare:
        yield "best_of", solving.best_of(source, task, budget=options.budget)
        yield "repair", solving.repair(source, task, budget=options.budget)
    algorithm = parts.config.build_algorithm(parts.prompter)
    yield "adapt", solving.adapt(source, parts.engine, parts.learner, algorithm, budget=options.budget)


def _in_words(one: Try) -> str:
    return f"{'solved' if one.solved else 'not solved'} in {one.attempts} attempts, {one.tokens} tokens"


def _check(options: SolveOptions, output: Path | None) -> None:
    if launched()[1] > 1:
        raise ConfigError("one task is solved in one process", got=f"{launched()[1]} processes")
    if output is None:
        return
    if options.repeats > 1:
        raise ConfigError(
            "one adapted model can be written", got=f"output with repeats {options.repeats}", expected="repeats 1"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output} is there already", expected="a new folder, so that nothing is lost")
    require_writable(output, "Name a folder where you may write.")


def _export(parts: Parts, output: Path) -> None:
    """Write ``output/model``, and with LoRA ``output/adapter``."""

    def fill(folder: Path) -> None:
        parts.learner.export(folder)
        for part in folder.iterdir():
            save_tokenizer(parts, part)

    output.mkdir(parents=True, exist_ok=True)
    FileSystem().write_folders(output, fill, parts.ranks)


def _numbers(tries: Sequence[Try]) -> Metrics:
    solved = [one for one in tries if one.solved]
    numbers: Metrics = {
        "runs": float(len(tries)),
        "solved": len(solved) / len(tries),
        "attempts_made": statistics.fmean(one.attempts for one in tries),
        "tokens_sampled": statistics.fmean(one.tokens for one in tries),
        "steps": statistics.fmean(one.steps for one in tries),
    }
    if solved:
        numbers["attempts"] = statistics.fmean(one.attempts for one in solved)
        numbers["tokens"] = statistics.fmean(one.tokens for one in solved)
    return numbers


def show(solution: Solution) -> None:
    """Print what each way needed for its first success, and the answer."""
    console = Terminal()
    asked = cut(solution.task.messages[-1]["content"], LONGEST_ANSWER)
    console.print(f"task    {asked}", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "solved", "attempts", "tokens", "of", "of tokens", "steps"):
        table.add_column(column, no_wrap=True)
    for way, title in TITLES.items():
        if way in solution.tries:
            table.add_row(title, *_cells(_numbers(solution.tries[way])))
    console.print(table)
    console.print(
        "attempts, tokens: to the first success, means over the runs that have one; of, of tokens: what was sampled,"
        f" means over all runs. Each way may sample {solution.budget} tokens a run.",
        highlight=False,
    )
    if solution.answer is not None:
        console.print(f"answer  {cut(solution.answer, LONGEST_ANSWER)}", markup=False, highlight=False, soft_wrap=True)


def _cells(numbers: Metrics) -> list[str]:
    """The cells of a row after its name."""
    first = [f"{numbers[name]:.0f}" if name in numbers else "-" for name in ("attempts", "tokens")]
    spent = [f"{numbers[name]:.0f}" for name in ("attempts_made", "tokens_sampled", "steps")]
    return [f"{numbers['solved'] * numbers['runs']:.0f} of {numbers['runs']:.0f}", *first, *spent]
