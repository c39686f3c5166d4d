"""The loop of a run's assembled parts: what it saves, and how it is set to a checkpoint."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd.config import Config
from vpd.envs import held_out_tasks
from vpd.errors import StorageError, TrainingError
from vpd.evaluation import EvalSettings, evaluate
from vpd.learners.calls import Fault
from vpd.learners.token_records import Recording
from vpd.loop import Loop, Observer
from vpd.overlap import OverlappedSource
from vpd.prompts.settings import save_settings
from vpd.ranks import on_first, together
from vpd.recipes import best_step
from vpd.recipes.assemble import Parts
from vpd.recipes.resume import settings_of
from vpd.report.rollout_metrics import rollout_metrics_for
from vpd.run_folder import checkpoint, faults, groups_file
from vpd.run_folder.files import FileSystem
from vpd.types import Metrics


def make_loop(
    parts: Parts,
    observers: Sequence[Observer],
    *,
    output: Path | None,
    files: FileSystem | None = None,
    on_save: Callable[[int], None] | None = None,
) -> Loop:
    """The loop of a config's parts; without ``output`` nothing is saved.  ``on_save`` gets the step of a checkpoint."""
    settings, ranks = parts.config.run, parts.ranks

    def save(loop: Loop) -> None:
        assert output is not None
        made = loop.source.state(loop.step)

        def save_rest(folder: Path) -> None:
            save_tokenizer(parts, folder)
            if made is not None:
                groups_file.write(folder, *made)

        checkpoint.save(
            output,
            loop.step,
            parts.learner,
            progress_of(loop),
            save_rest=save_rest,
            keep=settings.save_total_limit,
            files=files or FileSystem(),
            ranks=ranks,
        )
        if on_save is not None:
            on_first(ranks, "after a checkpoint", lambda: on_save(loop.step))

    def dump(fault: Fault) -> Path:
        assert output is not None
        return faults.write(
            output,
            fault,
            settings=settings_of(parts.config),
            learner=parts.learner,
            save_tokenizer=lambda folder: save_tokenizer(parts, folder),
            files=files or FileSystem(),
            ranks=ranks,
        )

    return Loop(
        source=OverlappedSource(parts.source) if parts.config.rollout.overlap else parts.source,
        engine=parts.engine,
        learner=parts.learner,
        algorithm=parts.algorithm,
        rollout_metrics=rollout_metrics_for(fixed_length=parts.fixed_length),
        observers=observers,
        evaluate=lambda: evaluation_metrics(parts),
        save=None if output is None else save,
        dump=None if output is None else dump,
        recording=None if output is None else recording_of(parts.config),
        max_steps=settings.max_steps,
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
        best=best_step.chosen_by(settings),
        ranks=ranks,
    )


def continue_from(loop: Loop, parts: Parts, start: Path | None) -> None:
    """Set loop, learner and observers to a checkpoint, or to the beginning."""
    saved = {}
    if start is not None:
        progress = together(parts.ranks, "reading a checkpoint", lambda: checkpoint.load(start, parts.learner))
        with _states_fit(start):
            loop.resume(progress)
        together(parts.ranks, "groups of a checkpoint", lambda: _restore_groups(loop, start))
        saved = progress["observers"]
    on_first(parts.ranks, "observers set back", lambda: _rewind(loop, saved, start))


def progress_of(loop: Loop) -> dict[str, Any]:
    """What a checkpoint must hold besides files.  Raises TrainingError where a state is not plain JSON."""
    states = {name: observer.state() for name, observer in _named(loop.observers).items()}
    progress = loop.progress() | {"observers": {name: state for name, state in states.items() if state}}
    for owner, state in {"the method": progress["algorithm"], **states}.items():
        try:
            json.dumps(state)
        except (TypeError, ValueError, RecursionError) as error:
            raise TrainingError(
                f"the state of {owner} cannot be kept in a checkpoint",
                got=f"{type(error).__name__}: {error}",
                expected="a dict of plain JSON from state()",
            ) from error
    return progress


def evaluation_metrics(parts: Parts) -> Metrics:
    """``eval/*`` of the student, ``eval_teacher/*`` of the retries of its failed attempts."""
    config = parts.config
    settings = EvalSettings(
        sampling=config.rollout.sampling,
        num_samples=config.run.eval_samples,
        control=config.run.eval_control,
    )
    tasks = held_out_tasks(parts.env, config.run.eval_limit)
    result = evaluate(parts.source, tasks, settings)
    metrics: Metrics = {}
    for prefix, values in (("eval", result.student), ("eval_teacher", result.teacher)):
        metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        if f"avg@{config.run.eval_samples}" in values:
            metrics[f"{prefix}/accuracy"] = values[f"avg@{config.run.eval_samples}"]
    return metrics


def save_tokenizer(parts: Parts, folder: Path) -> None:
    """What a model's folder needs besides weights to be prompted as in the run: tokenizer and prompt settings."""
    parts.tokenizer.save_pretrained(folder)
    save_settings(parts.prompter.settings, folder)


def recording_of(config: Config) -> Recording:
    """Which rows of a step keep their tokens, and how many candidates for each."""
    return Recording(rows=config.run.record_rows, top_k=config.run.record_top_k)


def _restore_groups(loop: Loop, start: Path) -> None:
    """Give the source the groups that were made when a checkpoint was written, if there were any."""
    made = groups_file.read(start)
    if made is not None:
        loop.source.restore(loop.step, made)


def _rewind(loop: Loop, saved: Mapping[str, Any], start: Path | None) -> None:
    """Set the observers to a checkpoint, or to the beginning."""
    for name, observer in _named(loop.observers).items():
        if saved.get(name):
            with _states_fit(start):
                observer.restore(saved[name])
        observer.rewind(-1 if start is None else loop.step)


@contextlib.contextmanager
def _states_fit(start: Path | None) -> Iterator[None]:
    """Turn what a state of another form causes into one StorageError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"the states in {start}/trainer.json do not fit this run",
            got=f"{type(error).__name__}: {error}",
            do="Remove that checkpoint to continue from an older one.",
        ) from error


def _named(observers: Sequence[Observer]) -> dict[str, Observer]:
    """Observers by the name of their class; a second one of a class gets a number."""
    named: dict[str, Observer] = {}
    for observer in observers:
        name = type(observer).__name__
        count = sum(type(other).__name__ == name for other in named.values())
        named[f"{name}-{count + 1}" if count else name] = observer
    return named
