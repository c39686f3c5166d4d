"""``vpd train``: one run, from settings to a folder with everything it learned."""

import contextlib
import logging
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vpd.config import Config
from vpd.envs import Env, Finite, all_train_tasks
from vpd.errors import ConfigError, Interrupted
from vpd.feedback import Feedback
from vpd.loop import Loop, Observer
from vpd.model.threads import threads_for
from vpd.monitor import Monitor
from vpd.ranks import on_first, start_ranks, together
from vpd.recipes import best_step
from vpd.recipes.assemble import Parts, assemble
from vpd.recipes.endings import SavedAfterFailure, StopSignals, interrupted, save_and_stop
from vpd.recipes.export import check_hub, push_run, write_card
from vpd.recipes.loops import continue_from, make_loop, progress_of, save_tokenizer
from vpd.recipes.prompt_checks import require_room
from vpd.recipes.resume import check_folder, contents_of, log_changes, settings_of, start_point
from vpd.recipes.run_checks import check_critics, warn_of_idle_settings
from vpd.report.console import ConsoleProgress
from vpd.report.trackers import Trackers, check_installed
from vpd.run_folder import checkpoint
from vpd.run_folder.files import FileSystem, prepare_folder, require_writable
from vpd.run_folder.lock import locked
from vpd.run_folder.reading import ROLLOUTS, TOKENS, read_run
from vpd.run_folder.state import Recorder, RunState
from vpd.run_folder.tables import RunFolder

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
        progress_of(loop)  # a state that cannot be kept is told of now
        recorder.record("training", loop.step)  # before anything else, so that what follows is known to be this run's
        best = -1 if loop.best is None else loop.best.step
        checkpoint.remove_old(output, loop.step, keep=config.run.save_total_limit, files=files, best=best)
        files.write_atomically(output / "config.yaml", config.to_yaml().encode())

    continue_from(loop, parts, on_first(ranks, "where the run goes on", start))
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
