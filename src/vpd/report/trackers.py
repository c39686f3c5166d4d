"""``run.report_to``: a run's metrics also to TensorBoard, W&B, trackio or MLflow, through Accelerate's trackers.

Nothing is sent anywhere unless ``run.report_to`` names a tracker.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from vpd.errors import ConfigError
from vpd.types import Group, Metrics

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ConfigError(f"run.report_to: {name} is not installed", do=f"pip install {PACKAGES[name]}")


class Trackers:
    """An observer; use as a context manager.  Raises ConfigError for a tracker whose package is missing."""

    def __init__(self, names: Sequence[str], output: Path):
        check_installed(names)
        self._names = list(names)
        self._output = output
        self._accelerator: Any = None
        self.config: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        if self._names:
            self._accelerator = Accelerator(log_with=self._names, project_dir=str(self._output))
            self._accelerator.init_trackers("vpd", config=_flat(self.config))
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # end_training would also end the processes' connection
                tracker.finish()

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        if self._accelerator is not None:
            self._accelerator.log({name: v for name, v in metrics.items() if not math.isnan(v)}, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: what was sent stays sent, and a continued run sends the steps after ``step`` again."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key``; what is neither number nor text becomes text."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
