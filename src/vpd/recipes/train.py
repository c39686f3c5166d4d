"""``vpd train``: one run, from settings to a folder with everything it learned."""

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vpd.config import Config
from vpd.envs import Env, Finite, all_train_tasks, held_out_tasks
from vpd.errors import Interrupted, StorageError
from vpd.evaluation import EvalSettings, evaluate
from vpd.feedback import Feedback
from vpd.learners.journal import Fault
from vpd.learners.token_records import Recording
from vpd.loop import Loop, Observer
from vpd.monitor import Monitor
from vpd.prompts import save_settings
from vpd.recipes.assemble import Parts, assemble
from vpd.recipes.endings import StopSignals, interrupted, save_and_stop
from vpd.recipes.export import check_hub, push_run, write_card
from vpd.recipes.prompt_checks import require_room
from vpd.recipes.resume import check_folder, contents_of, log_changes, settings_of, start_point
from vpd.report.console import ConsoleProgress
from vpd.report.rollout_metrics import rollout_metrics_for
from vpd.report.trackers import Trackers
from vpd.run_folder import checkpoint, faults
from vpd.run_folder.files import FileSystem
from vpd.run_folder.lock import locked
from vpd.run_folder.reading import ROLLOUTS, TOKENS, read_run
from vpd.run_folder.state import Recorder, RunState
from vpd.run_folder.tables import RunFolder
from vpd.types import Metrics

log = logging.getLogger("vpd")


def train(
    config: Config,
    *,
    model: Any = None,
    tokenizer: Any = None,
    env: Env | None = None,
    feedback: Sequence[Feedback] | None = None,
    observers: Sequence[Observer] = (),
) -> Path:
    """Train as configured and return the run folder; what there is to say goes to the logger ``vpd``.

    Objects take the place of their sections (:func:`assemble`).  Everything is loaded and checked before the folder is
    made, so a user's mistake leaves none behind.
    """
    return run(assemble(config, model=model, tokenizer=tokenizer, env=env, feedback=feedback, observers=observers))


def run(parts: Parts, files: FileSystem | None = None) -> Path:
    """Train assembled parts in their run folder; ``files`` is what may be done to the disk."""
    config = parts.config
    files = files or FileSystem()
    output = Path(config.run.output_dir)
    contents = contents_of(config)
    past = check_folder(output, config, contents)
    done = past is not None and past.phase == "done" and past.step >= config.run.max_steps
    if past is not None and done and (output / "model").is_dir():
        log.info(
            "%s has trained %d steps, run.max_steps is %d: nothing to do.", output, past.step, config.run.max_steps
        )
        return output
    if config.algorithm.needs.feedback and isinstance(parts.env, Finite):
        require_room(parts.prompter, all_train_tasks(parts.env))
    trackers = Trackers(config.run.report_to, output, tokenizer=parts.tokenizer if config.run.log_completions else None)
    if config.run.push_to_hub:
        check_hub()
    prepare_folder(output)
    recorder = Recorder(folder=output, files=files, settings=settings_of(config), contents=contents)
    with locked(output), StopSignals() as stop:
        past = check_folder(output, config, contents)  # again: another run may just have ended
        if past is not None:
            log_changes(past, config, contents)
        files.repair(output)
        for name in (ROLLOUTS, TOKENS):
            files.repair(output / name)
        loop = _prepared(parts, trackers, recorder, past)
        loop.stop = stop
        _run(loop, parts, recorder)
    log.info("Done: %s/metrics.jsonl, %s/rollouts/, %s/model/", output, output, output)
    if config.run.push_to_hub:
        push_run(output, str(config.run.hub_model_id), private=config.run.hub_private_repo)
    return output


def _prepared(parts: Parts, trackers: Trackers, recorder: Recorder, past: RunState | None) -> Loop:
    """The loop with its observers, set to where the run goes on; the folder's files are set back to there too."""
    config, output, files = parts.config, recorder.folder, recorder.files
    progress = ConsoleProgress(config.run.max_steps, title=config.method)
    monitor = Monitor(progress.warn, folder=output, files=files)
    ours: list[Observer] = [RunFolder(output, parts.tokenizer, files=files), progress, trackers, monitor]
    observers = [*ours, *parts.observers]
    loop = make_loop(parts, observers, output=output, files=files, on_save=partial(recorder.record, "training"))
    start = start_point(output, past, config.run.max_steps) if config.run.resume else None
    _resume(loop, parts, start)
    recorder.record("training", loop.step)  # before anything else, so that what follows is known to be this run's
    checkpoint.remove_old(output, loop.step, keep=config.run.save_total_limit, files=files)
    files.write_atomically(output / "config.yaml", config.to_yaml().encode())
    trackers.config = config.as_dict()
    return loop


def _run(loop: Loop, parts: Parts, recorder: Recorder) -> None:
    """Train, unless only the export is missing, and export.  Raises Interrupted where a signal asked for the end."""
    try:
        if loop.step < loop.max_steps:
            _train(loop)
        if loop.step < loop.max_steps:
            save_and_stop(loop, recorder.folder)
    except KeyboardInterrupt as error:
        raise error if isinstance(error, Interrupted) else interrupted(loop, recorder.folder, saved=False) from error
    recorder.record("exporting", loop.step)
    export(parts, recorder.folder, recorder.files)
    recorder.record("done", loop.step)


def _train(loop: Loop) -> None:
    """Run the loop while the observers that are context managers are open."""
    with contextlib.ExitStack() as opened:
        for observer in loop.observers:
            if isinstance(observer, contextlib.AbstractContextManager):
                opened.enter_context(observer)
        loop.run()


def make_loop(
    parts: Parts,
    observers: Sequence[Observer],
    *,
    output: Path | None,
    files: FileSystem | None = None,
    on_save: Callable[[int], None] | None = None,
) -> Loop:
    """The loop of a config's parts; without ``output`` nothing is saved.  ``on_save`` gets the step of a checkpoint."""
    settings = parts.config.run

    def save(loop: Loop) -> None:
        assert output is not None
        checkpoint.save(
            output,
            loop.step,
            parts.learner,
            loop.progress() | {"observers": _states(loop.observers)},
            save_tokenizer=lambda folder: save_tokenizer(parts, folder),
            keep=settings.save_total_limit,
            files=files or FileSystem(),
        )
        if on_save is not None:
            on_save(loop.step)

    def dump(fault: Fault) -> Path:
        assert output is not None
        return faults.write(
            output,
            fault,
            settings=settings_of(parts.config),
            learner=parts.learner,
            save_tokenizer=lambda folder: save_tokenizer(parts, folder),
            files=files or FileSystem(),
        )

    return Loop(
        source=parts.source,
        engine=parts.engine,
        learner=parts.learner,
        algorithm=parts.algorithm,
        rollout_metrics=rollout_metrics_for(fixed_length=parts.fixed_length),
        observers=observers,
        evaluate=lambda: evaluation_metrics(parts),
        save=None if output is None else save,
        dump=None if output is None else dump,
        recording=None if output is None else _recording(parts.config),
        max_steps=settings.max_steps,
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
    )


@contextlib.contextmanager
def kept_run(parts: Parts, output: Path, observers: Sequence[Observer]) -> Iterator[Loop]:
    """A loop whose settings, metrics, rollouts and alarms are kept in a run folder, without checkpoints and model.

    What an earlier run left there is replaced.  The run is done when the block ends without an error.
    Raises StorageError.
    """
    files = FileSystem()
    prepare_folder(output)
    settings = dataclasses.replace(parts.config.run, output_dir=str(output))
    config = dataclasses.replace(parts.config, run=settings)
    recorder = Recorder(folder=output, files=files, settings=settings_of(config))
    monitor = Monitor(lambda alarm: None, folder=output, files=files)
    ours: list[Observer] = [RunFolder(output, parts.tokenizer, files=files), monitor]
    for observer in ours:
        observer.rewind(-1)
    recorder.record("training", 0)
    files.write_atomically(output / "config.yaml", config.to_yaml().encode())
    loop = make_loop(parts, [*ours, *observers], output=None)
    loop.recording = _recording(parts.config)
    yield loop
    recorder.record("done", loop.step)


def _recording(config: Config) -> Recording:
    return Recording(rows=config.run.record_rows, top_k=config.run.record_top_k)


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


def export(parts: Parts, output: Path, files: FileSystem) -> None:
    """Write ``model/``, and with LoRA ``adapter/``; what was there stays until each is whole."""

    def fill(folder: Path) -> None:
        parts.learner.export(folder)
        for part in folder.iterdir():
            save_tokenizer(parts, part)
            write_card(part, read_run(output))

    files.write_folders(output, fill)


def prepare_folder(output: Path) -> None:
    """Make the run folder and prove that it can be written.  Raises StorageError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"0" * 65536)
            os.fsync(probe.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot write to {output}", got=error.strerror, do="Choose another run.output_dir."
        ) from error


def _resume(loop: Loop, parts: Parts, start: Path | None) -> None:
    """Set loop, learner and observers to a checkpoint, or to the beginning."""
    saved = {}
    if start is not None:
        progress = checkpoint.load(start, parts.learner)
        with _states_fit(start):
            loop.resume(progress)
        saved = progress.get("observers", {})
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


def _states(observers: Sequence[Observer]) -> dict[str, object]:
    states = {name: observer.state() for name, observer in _named(observers).items()}
    return {name: state for name, state in states.items() if state}


def _named(observers: Sequence[Observer]) -> dict[str, Observer]:
    """Observers by the name of their class; a second one of a class gets a number."""
    named: dict[str, Observer] = {}
    for observer in observers:
        name = type(observer).__name__
        count = sum(type(other).__name__ == name for other in named.values())
        named[f"{name}-{count + 1}" if count else name] = observer
    return named
