"""Which step of a run was the best so far, by a metric, and whether the run has waited long enough for a better one.

The words are transformers': ``metric_for_best_model``, ``greater_is_better``, and the patience and threshold of its
``EarlyStoppingCallback``.  A step counts where the metric was measured and is finite; the evaluation before the first
step does not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpd.types import Metrics


def greater_is_better(metric: str, chosen: bool | None) -> bool:
    """Which way a metric is better: as it was chosen, else the greater, but the less of a loss."""
    return not metric.endswith("loss") if chosen is None else chosen


@dataclass(kw_only=True)
class BestModel:
    """The best step by ``metric`` (-1: none yet) with its ``value``; ``since``: evaluations after it.

    ``patience`` None: a run never ends early.  An improvement by no more than ``threshold`` makes a step the best and
    leaves the patience as it is.

    >>> best = BestModel(metric="eval/accuracy", patience=2)
    >>> [best.judge(step, {"eval/accuracy": value}) for step, value in enumerate([0.2, 0.5, 0.4, 0.5], start=1)]
    [True, True, False, False]
    >>> best.step, best.is_over
    (2, True)
    """

    metric: str
    greater_is_better: bool = True
    patience: int | None = None
    threshold: float = 0.0
    step: int = -1
    value: float = math.nan
    since: int = 0

    @property
    def is_over(self) -> bool:
        """Whether ``patience`` evaluations in a row brought nothing better."""
        return self.patience is not None and self.since >= self.patience

    def judge(self, step: int, metrics: Metrics) -> bool:
        """Take the metrics of a step; whether it is the best so far."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return False
        gain = math.inf if self.step < 0 else value - self.value if self.greater_is_better else self.value - value
        self.since = 0 if gain > self.threshold else self.since + 1
        if gain > 0:
            self.step, self.value = step, value
        return gain > 0

    def state(self) -> dict[str, Any]:
        """What a continued run must remember, as plain JSON."""
        return {"step": self.step, "value": None if math.isnan(self.value) else self.value, "since": self.since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave; a checkpoint of a run that chose none has nothing."""
        if state:
            self.step, self.since = int(state["step"]), int(state["since"])
            self.value = math.nan if state["value"] is None else float(state["value"])
