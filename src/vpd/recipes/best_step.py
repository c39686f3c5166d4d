"""The best step of a run: which metric chooses it, and going back to its weights."""

import logging
from pathlib import Path

from vpd.config import RunSettings
from vpd.errors import ConfigError, StorageError, near, nearest
from vpd.loop import Loop
from vpd.ranks import on_first, together
from vpd.recipes.assemble import Parts
from vpd.report.metric_table import find_metric, metrics, names_of_evaluation
from vpd.run_folder import checkpoint
from vpd.run_folder.best import BestModel

log = logging.getLogger("vpd")


def check_metric(settings: RunSettings) -> None:
    """Raise ConfigError where ``run.metric_for_best_model`` names what no evaluation measures.

    Another name that the library does not know may be a metric of the user's own method, and is logged.
    """
    metric = settings.metric_for_best_model
    if metric is None or metric in (known := names_of_evaluation(settings.eval_samples)):
        return
    if metric.startswith("eval"):
        what = "run.metric_for_best_model is nothing that an evaluation measures"
        raise ConfigError(what, got=metric, do=nearest(metric, known))
    if find_metric(metric) is None:
        hint = near(metric, [one.name for one in metrics()])
        log.warning("run.metric_for_best_model: vpd itself measures no %s. %s", metric, hint or "See docs/metrics.md.")


def chosen_by(settings: RunSettings) -> BestModel | None:
    """What keeps the best step by these settings, None where they choose none."""
    if settings.metric_for_best_model is None:
        return None
    return BestModel(
        metric=settings.metric_for_best_model,
        greater_is_better=settings.best_is_greatest,
        patience=settings.early_stopping_patience,
        threshold=settings.early_stopping_threshold,
    )


def finish(loop: Loop, best: BestModel, parts: Parts, output: Path) -> None:
    """Say which step was the best, and with ``run.load_best_model_at_end`` go back to its weights."""
    settings = parts.config.run
    if best.step < 0:
        log.warning("run.metric_for_best_model %s was never measured: the last step is taken", best.metric)
        return
    ended = f" (the run ended at step {loop.step}: {best.since} evaluations brought nothing better)"
    if loop.step < loop.max_steps and parts.config.rollout.overlap:
        log.info("the answers that were already made for step %d are not used", loop.step + 1)
    log.info("best %s: %.4g at step %d%s", best.metric, best.value, best.step, ended if best.is_over else "")
    if settings.load_best_model_at_end and best.step != loop.step:
        ranks = parts.ranks
        fault = on_first(ranks, "the best checkpoint", lambda: checkpoint.fault_of(output, best.step))
        if fault is not None:
            raise StorageError(
                f"checkpoint-{best.step} of the best step cannot be read",
                got=fault,
                do="Restore it, or continue with --run.load_best_model_at_end false to take the last step.",
            )
        folder = output / f"checkpoint-{best.step}"
        together(ranks, "reading the best checkpoint", lambda: checkpoint.load(folder, parts.learner))
