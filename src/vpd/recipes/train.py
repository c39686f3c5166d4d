"""``vpd train``: one run, from settings to a folder with everything it learned."""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vpd.config import Config
from vpd.envs import Env, Finite, all_train_tasks, held_out_tasks
from vpd.errors import ConfigError, Interrupted, StorageError, TrainingError
from vpd.evaluation import EvalSettings, evaluate
from vpd.feedback import Feedback
from vpd.learners.calls import Fault
from vpd.learners.token_records import Recording
from vpd.loop import Loop, Observer
from vpd.model.threads import threads_for
from vpd.monitor import Monitor
from vpd.overlap import OverlappedSource
from vpd.prompts.settings import save_settings
from vpd.ranks import on_first, start_ranks, together
from vpd.recipes import best_step
from vpd.recipes.assemble import Parts, assemble
from vpd.recipes.endings import SavedAfterFailure, StopSignals, interrupted, save_and_stop
from vpd.recipes.export import check_hub, push_run, write_card
from vpd.recipes.prompt_checks import require_room
from vpd.recipes.resume import check_folder, contents_of, log_changes, settings_of, start_point
from vpd.recipes.run_checks import check_critics, warn_of_idle_settings
from vpd.report.console import ConsoleProgress
from vpd.report.rollout_metrics import rollout_metrics_for
from vpd.report.trackers import Trackers, check_installed
from vpd.run_folder import checkpoint, faults, groups_file
from vpd.run_folder.files import FileSystem, require_writable
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
    best_step.check_metric(config.run)
    if torch.is_inference_mode_enabled():
        raise ConfigError("nothing can be trained inside of torch.inference_mode", do="Train outside of it.")
    ranks = start_ranks(config.run.rank_timeout)

    def work() -> Path:
        on_first(ranks, "the run folder", lambda: require_writable(Path(config.run.output_dir)))
        objects: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "env": env, "feedback": feedback}
        return run(assemble(config, **objects, observers=observers, ranks=ranks))

    with torch.enable_grad():
        return together(ranks, "the run", work)


def run(parts: Parts, files: FileSystem | None = None) -> Path:
    """Train assembled parts in their run folder; ``files`` is what may be done to the disk.

    All processes of a run call this.  The first writes the folder and has the observers.
    """
    config, ranks = parts.config, parts.ranks
    files = files or FileSystem()
    output = Path(config.run.output_dir)
    contents, past = on_first(ranks, "the run folder", lambda: _look(output, config))
    done = past is not None and past.phase == "done" and past.step >= config.run.max_steps
    if past is not None and done and on_first(ranks, "the model", (output / "model").is_dir):
        log.info(
            "%s has trained %d steps, run.max_steps is %d: nothing to do.", output, past.step, config.run.max_steps
        )
        return output
    env = parts.env
    if config.algorithm.needs.feedback and isinstance(env, Finite):
        together(ranks, "prompts", lambda: require_room(parts.prompter, all_train_tasks(env)))
    on_first(ranks, "critics", lambda: check_critics(parts))
    warn_of_idle_settings(config)
    recorder = Recorder(folder=output, files=files, settings=settings_of(config), contents=contents)
    with contextlib.ExitStack() as held, threads_for(parts.learner.model), StopSignals(ranks=ranks) as stop:
        past = on_first(ranks, "the run folder's lock", lambda: _entered(held, recorder, config))
        loop = _prepared(parts, recorder, past)
        loop.stop = stop
        _run(loop, parts, recorder)
    log.info("Done: %s/metrics.jsonl, %s/rollouts/, %s/model/", output, output, output)
    log.info("To look at it: vpd report %s", shlex.quote(str(output)))
    if config.run.push_to_hub:
        place, private = str(config.run.hub_model_id), config.run.hub_private_repo
        on_first(ranks, "the upload", lambda: push_run(output, place, private=private))
    return output


def _look(output: Path, config: Config) -> tuple[dict[str, str], RunState | None]:
    """The hashes of the files that settings name, and the state of the run in the folder."""
    contents = contents_of(config)
    return contents, check_folder(output, config, contents)


def _entered(held: contextlib.ExitStack, recorder: Recorder, config: Config) -> RunState | None:
    """Make and lock the run folder, and mend what a kill has left; the state of the run in it."""
    output, files = recorder.folder, recorder.files
    check_installed(config.run.report_to, completions=config.run.log_completions)
    if config.run.push_to_hub:
        check_hub()
    prepare_folder(output)
    held.enter_context(locked(output))
    past = check_folder(output, config, recorder.contents)  # again: another run may just have ended
    if past is not None:
        log_changes(past, config, recorder.contents)
    files.repair(output)
    for name in (ROLLOUTS, TOKENS):
        files.repair(output / name)
    return past


def _prepared(parts: Parts, recorder: Recorder, past: RunState | None) -> Loop:
    """The loop with its observers, set to where the run goes on; the folder's files are set back to there too."""
    config, output, files, ranks = parts.config, recorder.folder, recorder.files, parts.ranks
    observers = _observers(parts, recorder) if ranks.rank == 0 else []
    loop = make_loop(parts, observers, output=output, files=files, on_save=partial(recorder.record, "training"))

    def start() -> Path | None:
        return start_point(output, past, config.run.max_steps) if config.run.resume else None

    def begin() -> None:
        _progress(loop)  # a state that cannot be kept is told of now
        recorder.record("training", loop.step)  # before anything else, so that what follows is known to be this run's
        best = -1 if loop.best is None else loop.best.step
        checkpoint.remove_old(output, loop.step, keep=config.run.save_total_limit, files=files, best=best)
        files.write_atomically(output / "config.yaml", config.to_yaml().encode())

    _resume(loop, parts, on_first(ranks, "where the run goes on", start))
    on_first(ranks, "the beginning of the run", begin)
    return loop


def _observers(parts: Parts, recorder: Recorder) -> list[Observer]:
    """The run's own observers, and those that were passed."""
    config, output, files = parts.config, recorder.folder, recorder.files
    progress = ConsoleProgress(config.run.max_steps, title=config.method, evaluates=config.run.eval_steps > 0)
    monitor = Monitor(progress.warn, folder=output, files=files)
    trackers = Trackers(config.run.report_to, output, tokenizer=parts.tokenizer if config.run.log_completions else None)
    trackers.config = config.as_dict()
    return [RunFolder(output, parts.tokenizer, files=files), progress, trackers, monitor, *parts.observers]


def _again(config: Config) -> str:
    """How a run is continued: by a command, or from Python where objects were passed."""
    sections = config.as_dict()
    if any("object" in part for part in (*sections.pop("feedback"), *sections.values())):
        return "the same call with run={'resume': True, ...}"
    return f"vpd train --run.resume true --run.output_dir {config.run.output_dir}"


def _run(loop: Loop, parts: Parts, recorder: Recorder) -> None:
    """Train, unless only the export is missing, and export.  Raises Interrupted where a signal asked for the end."""
    again = _again(parts.config)
    try:
        if not loop.is_over:
            with SavedAfterFailure(loop):
                _train(loop)
        if not loop.is_over:
            save_and_stop(loop, again)
    except KeyboardInterrupt as error:
        raise error if isinstance(error, Interrupted) else interrupted(loop, again, saved=False) from error
    on_first(parts.ranks, "the phase exporting", lambda: recorder.record("exporting", loop.step))
    if loop.best is not None:
        best_step.finish(loop, loop.best, parts, recorder.folder)
    export(parts, recorder.folder, recorder.files)
    on_first(parts.ranks, "the phase done", lambda: recorder.record("done", loop.step))


def _train(loop: Loop) -> None:
    """Run the loop while the observers that are context managers are open."""
    with contextlib.ExitStack() as opened:

        def enter() -> None:
            for observer in loop.observers:
                if isinstance(observer, contextlib.AbstractContextManager):
                    opened.enter_context(observer)

        on_first(loop.ranks, "opening observers", enter)
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
            _progress(loop),
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
        recording=None if output is None else _recording(parts.config),
        max_steps=settings.max_steps,
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
        best=best_step.chosen_by(settings),
        ranks=ranks,
    )


def saved_loop(parts: Parts, observers: Sequence[Observer], output: Path) -> Loop:
    """A loop that keeps its checkpoints in ``output`` and nothing else, set to the newest of them.

    Raises StorageError where there are some and none can be read.
    """
    FileSystem().repair(output)
    loop = make_loop(parts, observers, output=output)
    loop.recording = None
    start, found = checkpoint.newest_good(output)
    if start is None and found:
        raise StorageError(f"no checkpoint in {output} can be read", got=found[0], do="Remove it to begin anew.")
    _resume(loop, parts, start)
    return loop


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

    def finish(folder: Path) -> None:
        for part in folder.iterdir():
            save_tokenizer(parts, part)
            write_card(part, read_run(output))

    def fill(folder: Path) -> None:
        parts.learner.export(folder)
        on_first(parts.ranks, "end of the export", lambda: finish(folder))

    files.write_folders(output, fill, parts.ranks)


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
        progress = together(parts.ranks, "reading a checkpoint", lambda: checkpoint.load(start, parts.learner))
        with _states_fit(start):
            loop.resume(progress)
        together(parts.ranks, "groups of a checkpoint", lambda: _restore_groups(loop, start))
        saved = progress["observers"]
    on_first(parts.ranks, "observers set back", lambda: _rewind(loop, saved, start))


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


def _progress(loop: Loop) -> dict[str, Any]:
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


def _named(observers: Sequence[Observer]) -> dict[str, Observer]:
    """Observers by the name of their class; a second one of a class gets a number."""
    named: dict[str, Observer] = {}
    for observer in observers:
        name = type(observer).__name__
        count = sum(type(other).__name__ == name for other in named.values())
        named[f"{name}-{count + 1}" if count else name] = observer
    return named
