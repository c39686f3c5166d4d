"""Runs of the lab: in a run folder without checkpoints and model, or in checkpoints alone."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from vpd.errors import StorageError
from vpd.loop import Loop, Observer
from vpd.monitor import Monitor
from vpd.recipes.assemble import Parts
from vpd.recipes.loops import continue_from, make_loop, recording_of
from vpd.recipes.resume import settings_of
from vpd.run_folder import checkpoint
from vpd.run_folder.files import FileSystem, prepare_folder
from vpd.run_folder.state import Recorder
from vpd.run_folder.tables import RunFolder

OTHER_OUTPUT = "Choose another --output_dir."  # what to do where the lab cannot write


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
    loop.recording = recording_of(parts.config)
    yield loop
    recorder.record("done", loop.step)


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
    continue_from(loop, parts, start)
    return loop
