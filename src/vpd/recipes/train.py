"""``vpd train``: one run, from settings to a folder with everything it learned."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vpd import checkpoint
from vpd.config import Config
from vpd.envs import Env, held_out_tasks
from vpd.errors import StorageError
from vpd.evaluate import EvalSettings, evaluate
from vpd.loop import Loop, Observer
from vpd.model import lora
from vpd.monitor import Monitor
from vpd.recipes.assemble import Parts, assemble
from vpd.report.console import ConsoleProgress
from vpd.report.folder import RunFolder
from vpd.report.rollout_metrics import rollout_metrics_for
from vpd.report.trackers import Trackers
from vpd.types import Metrics


def train(config: Config, *, env: Env | None = None) -> Path:
    """Train as configured and return the run folder.

    Everything is loaded and checked before the folder is made, so a user's mistake leaves none behind.
    """
    parts = assemble(config, env=env)
    trackers = Trackers(config.run.report_to, Path(config.run.output_dir))
    output = prepare_folder(config)
    folder = RunFolder(output, parts.tokenizer)
    loop = make_loop(parts, [folder], output=output)
    if config.run.resume:
        _resume(loop, parts, output)
        if loop.step >= config.run.max_steps:
            print(f"{output} is already at step {loop.step} of {config.run.max_steps}: nothing to do.")
            return output
    folder.rewind(loop.step if config.run.resume else -1)
    _write(output / "config.yaml", config.to_yaml())
    progress = ConsoleProgress(config.run.max_steps, title=config.algorithm.name, start=loop.step)
    trackers.config = config.as_dict()
    monitor = Monitor(progress.warn, folder=output)
    loop.observers = [folder, progress, trackers, monitor]
    with progress, trackers:
        loop.run()
    model = parts.learner.weights()
    if lora.is_attached(model):
        checkpoint.save_model(model, parts.tokenizer, output / "adapter")
        model = lora.merged(model)
    checkpoint.save_model(model, parts.tokenizer, output / "model")
    print(f"Done: {output}/metrics.jsonl, {output}/rollouts/, {output}/model/")
    return output


def make_loop(parts: Parts, observers: Sequence[Observer], *, output: Path | None) -> Loop:
    """The loop of a config's parts; without ``output`` nothing is saved."""
    run = parts.config.run

    def save(loop: Loop) -> None:
        assert output is not None
        checkpoint.save(output, loop.step, parts.learner, parts.tokenizer, loop.progress(), keep=run.save_total_limit)

    return Loop(
        env=parts.env,
        engine=parts.engine,
        learner=parts.learner,
        algorithm=parts.algorithm,
        feedback=parts.config.feedback,
        prompter=parts.prompter,
        rollout=parts.config.rollout,
        describe=rollout_metrics_for(fixed_length=parts.fixed_length),
        observers=observers,
        measure=lambda: measure(parts),
        save=None if output is None else save,
        seed=run.seed,
        max_steps=run.max_steps,
        eval_steps=run.eval_steps,
        save_steps=run.save_steps,
    )


def measure(parts: Parts) -> Metrics:
    """``eval/*`` of the student and ``eval_teacher/*`` of the same weights told what was wrong."""
    config = parts.config
    settings = EvalSettings(
        sampling=config.rollout.sampling,
        num_samples=config.run.eval_samples,
        success_threshold=config.rollout.success_threshold,
        seed=config.run.seed,
    )
    tasks = held_out_tasks(parts.env, config.run.eval_limit)
    result = evaluate(parts.env, parts.engine, parts.prompter, tasks, settings, feedback=config.feedback)
    metrics: Metrics = {}
    for prefix, values in (("eval", result.student), ("eval_teacher", result.teacher)):
        metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        if f"avg@{config.run.eval_samples}" in values:
            metrics[f"{prefix}/accuracy"] = values[f"avg@{config.run.eval_samples}"]
    return metrics


def prepare_folder(config: Config) -> Path:
    """Make the run folder and prove that it can be written; refuse to write over another run."""
    output = Path(config.run.output_dir)
    metrics = output / "metrics.jsonl"
    used = bool(checkpoint.checkpoints(output)) or (metrics.is_file() and metrics.stat().st_size > 0)
    if used and not config.run.resume:
        raise StorageError(
            f"{output} already holds a run",
            do="Continue it with --run.resume true, or choose another --run.output_dir.",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"0" * 65536)
            os.fsync(probe.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot write to {output}", got=error.strerror, do="Choose another run.output_dir."
        ) from error
    return output


def _resume(loop: Loop, parts: Parts, output: Path) -> None:
    folder, faults = checkpoint.newest_good(output)
    for fault in faults:
        print(f"passed over a damaged checkpoint: {fault}")
    if folder is None:
        print(f"no checkpoint in {output}: starting from step 0")
        return
    loop.resume(checkpoint.load(folder, parts.learner))
    print(f"continuing from {folder}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}", got=error.strerror, do="Choose another run.output_dir.") from error
