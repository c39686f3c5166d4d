"""A run, read from its folder: metrics and rollouts as tables, the model, the report."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vpd.api.run_html import run_html
from vpd.errors import ConfigError, StorageError
from vpd.run_folder.reading import RunRecord, read_rollouts, read_run

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from vpd.recipes.export import Form

DEFAULT_METRIC = "eval/accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The step of a run with the best value of a metric; ``checkpoint`` None: that step's is not kept."""

    metric: str
    step: int
    value: float
    checkpoint: Path | None


class Run(os.PathLike[str]):
    """What a run left behind, read when it is asked for; ``vpd.train`` returns one, and ``vpd.Run(folder)`` opens one.

    It stands for its folder wherever a path is taken.  Raises StorageError: the folder holds no run.

    >>> Run("nowhere")
    Traceback (most recent call last):
    vpd.errors.StorageError: nowhere holds no run; got no such folder; expected the output_dir of vpd train
    """

    folder: Path

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        read_run(self.folder)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        record, best = self.record, self.best
        found = f"{record.phase}, step {record.step}" + ("" if best is None else f", {_best_text(best)}")
        return f"Run({str(self.folder)!r}: {found})"

    def _repr_html_(self) -> str:
        return run_html(self.record)

    @property
    def record(self) -> RunRecord:
        """Settings, progress, metrics and alarms as they are on the disk now."""
        return read_run(self.folder)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The resolved settings, a mapping for each section (``feedback``: a list)."""
        return self.record.settings

    @property
    def step(self) -> int:
        """Iterations trained, as far as they are saved."""
        return self.record.step

    @property
    def alarms(self) -> tuple[Mapping[str, Any], ...]:
        """What a monitor saw go wrong: ``step``, ``rule``, ``saw`` and ``do``."""
        return self.record.alarms

    @property
    def metrics(self) -> "pandas.DataFrame":
        """One row a step, one column a metric; NaN where it was not measured.  Raises ConfigError without pandas."""
        _require_pandas("metrics")
        import pandas

        return pandas.DataFrame.from_records(list(self.record.metrics), index="step")

    @property
    def rollouts(self) -> "pandas.DataFrame":
        """One row an attempt: prompt, teacher's prompt, completion, reward, feedback, ...

        Raises ConfigError without pandas.
        """
        _require_pandas("rollouts")
        return self.rollouts_table().to_pandas()

    def rollouts_table(self, steps: Iterable[int] | None = None) -> "pyarrow.Table":
        """The rollouts of some steps (None: all) without pandas."""
        return read_rollouts(self.folder, steps)

    @property
    def best(self) -> Best | None:
        """The best step by ``run.metric_for_best_model``, or ``eval/accuracy``; None where it was never measured.

        The evaluation before the first step does not count; of equal steps the first does.
        """
        record = self.record
        metric = record.settings.get("run", {}).get("metric_for_best_model") or DEFAULT_METRIC
        found = record.best(metric)
        if found is None:
            return None
        step, value = found
        checkpoint = self.folder / f"checkpoint-{step}"
        return Best(metric=metric, step=step, value=value, checkpoint=checkpoint if checkpoint.is_dir() else None)

    def model(self, checkpoint: str | os.PathLike[str] | None = None) -> Any:
        """The trained model, in fp32, or that of a ``checkpoint-N`` folder; an adapter is merged.

        Raises StorageError: the run has not exported one yet; ModelError: its files are damaged.
        """
        from vpd.model.settings import ModelSettings
        from vpd.recipes.assemble import load_model

        return load_model(ModelSettings(name_or_path=str(self._model_folder(checkpoint))))[0]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model.  Raises as :meth:`model` does."""
        from vpd.model.loading import load_tokenizer

        return load_tokenizer(self._model_folder(None))

    def report(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the report, one HTML file, and return its path; default ``report.html`` in the run folder."""
        from vpd.report.html import write_report

        return write_report([self.folder], self.folder / "report.html" if path is None else Path(path))

    def export(self, destination: str | os.PathLike[str], *, form: "Form" = "model") -> Path:
        """Write the trained model: ``model`` (a folder, an adapter merged), ``adapter``, or ``gguf`` (a file).

        Raises StorageError: there is something at the destination, or the run has no such part; ConfigError: gguf
        without llama.cpp's converter.
        """
        from vpd.recipes.export import export_run

        return export_run(self.folder, Path(destination), form=form)

    def push_to_hub(
        self, hub_model_id: str, *, private: bool = True, form: Literal["model", "adapter"] = "model"
    ) -> str:
        """Upload the model with its card and return its address.  Raises ConfigError without a token, StorageError."""
        from vpd.recipes.export import push_run

        return push_run(self.folder, hub_model_id, private=private, form=form)

    def _model_folder(self, checkpoint: str | os.PathLike[str] | None) -> Path:
        folder = self.folder / "model" if checkpoint is None else Path(checkpoint)
        if not folder.is_dir():
            raise StorageError(
                f"{self.folder} has no {folder.name}",
                got=f"a run in phase {self.record.phase}",
                do='Continue it with run.resume true, or name a folder "checkpoint-N".',
            )
        return folder


def _best_text(best: Best) -> str:
    return f"best {best.metric} {best.value:.3g} at step {best.step}"


def _require_pandas(what: str) -> None:
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"Run.{what} is a DataFrame, and pandas is missing",
            do="pip install 'vpd-rl[notebook]', or read Run.record.metrics and Run.rollouts_table().",
        ) from error
