"""``run.report_to``: a run's metrics also to TensorBoard, W&B, trackio or MLflow, through Accelerate's trackers.

Nothing is sent anywhere unless ``run.report_to`` names a tracker, and no text of the model or the data unless
``run.log_completions`` is true: then a few attempts of every step go there as a table, with feedback and teacher's
prompt.  A run is named after its folder, in the project ``vpd``.
"""

import importlib.util
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from vpd.envs.user_code import errors_named
from vpd.errors import ConfigError, EnvError
from vpd.printable import cut, printable
from vpd.settings import flat
from vpd.types import Group, Metrics, Rollout

LOG = logging.getLogger("vpd")
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
NEED_PANDAS = ("trackio", "mlflow")  # for tables of completions
ROWS = 8  # attempts of a step in a table
LONGEST = 8000  # characters of one cell
TABLE = "completions"
Row: TypeAlias = dict[str, Any]


def check_installed(names: Sequence[str], *, completions: bool = False) -> None:
    """Raise ConfigError for a tracker whose package is missing, or with ``completions`` what its tables need."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ConfigError(f"run.report_to: {name} is not installed", do=f"pip install {PACKAGES[name]}")
        if completions and name in NEED_PANDAS and importlib.util.find_spec("pandas") is None:
            raise ConfigError(f"run.log_completions: tables for {name} need pandas", do="pip install pandas")


class Trackers:
    """An observer; use as a context manager.

    ``tokenizer``: decodes prompts for the tables of completions; None: there are none.  A tracker that fails while the
    run goes on is a warning, not the run's end.  Raises ConfigError for a tracker whose package is missing, EnvError
    for one that cannot be started (such as W&B without a login).
    """

    def __init__(self, names: Sequence[str], output: Path, *, tokenizer: Any = None):
        check_installed(names, completions=tokenizer is not None)
        self._names = list(names)
        self._output = output
        self._tokenizer = tokenizer
        self._started: dict[str, Any] = {}
        self._failed: dict[str, int] = {}
        self.config: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        named = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
        options = {name: {key: self._output.absolute().name} for name, key in named.items()}
        for name in self._names:
            with errors_named(f"run.report_to: starting {name}", do="Log in there, or leave it out."):
                accelerator = Accelerator(log_with=[name], project_dir=str(self._output))
                accelerator.init_trackers("vpd", config=_flat(self.config), init_kwargs=options)
                self._started[name] = accelerator.get_tracker(name)
        return self

    def __exit__(self, *exception: Any) -> None:
        with ExitStack() as ends:
            for name, tracker in self._started.items():
                ends.callback(self._guarded, name, tracker.finish)
        for name, count in self._failed.items():
            LOG.warning("run.report_to: %d calls of %s failed; metrics.jsonl has everything", count, name)

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        finite = {name: value for name, value in metrics.items() if not math.isnan(value)}
        rows = [] if self._tokenizer is None or not self._started else completion_rows(step, groups, self._tokenizer)
        for name, tracker in self._started.items():
            values = {mlflow_name(key): v for key, v in finite.items()} if name == "mlflow" else finite
            self._guarded(name, partial(tracker.log, values, step=step))
            if rows:
                self._guarded(name, partial(TABLES[name], tracker, step, rows))

    def rewind(self, step: int) -> None:
        """Nothing: what was sent stays sent, and a continued run sends the steps after ``step`` again."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        """``call()``; what it raises is counted, and a warning the first time."""
        try:
            with errors_named(f"run.report_to: {name}", do="The run goes on."):
                call()
        except EnvError as error:
            self._failed[name] = self._failed.get(name, 0) + 1
            if self._failed[name] == 1:
                LOG.warning("%s", error)


def mlflow_name(metric: str) -> str:
    """A metric's name in the characters that MLflow takes; it refuses all metrics of a step for one such name."""
    return re.sub(r"[^\w\-. :/]", "_", metric.replace("@", "_at_"))


def completion_rows(step: int, groups: Sequence[Group], tokenizer: Any) -> list[Row]:
    """A few attempts of a step, from as many groups as there are: what was asked, answered, and made of it."""
    rounds = max((len(group.rollouts) for group in groups), default=0)
    attempts = [g.rollouts[number] for number in range(rounds) for g in groups if number < len(g.rollouts)]
    return [_row(step, rollout, tokenizer) for rollout in attempts[:ROWS]]


def _row(step: int, rollout: Rollout, tokenizer: Any) -> Row:
    teacher = rollout.teacher_prompt
    texts = {
        "task": rollout.task.id,
        "prompt": tokenizer.decode(rollout.prompt),
        "completion": rollout.completion.text,
        "feedback": rollout.grade.feedback or "",
        "teacher_prompt": "" if teacher is None else tokenizer.decode(teacher.tokens),
    }
    cells = {name: printable(cut(text, LONGEST)) for name, text in texts.items()}
    return {"step": step, **cells, "reward": float(rollout.grade.reward), "success": rollout.success}


def _wandb_table(tracker: Any, step: int, rows: Sequence[Row]) -> None:
    columns = list(rows[0])
    tracker.log_table(TABLE, columns=columns, data=[[row[name] for name in columns] for row in rows], step=step)


def _trackio_table(tracker: Any, step: int, rows: Sequence[Row]) -> None:
    import pandas
    import trackio

    tracker.log({TABLE: trackio.Table(dataframe=pandas.DataFrame(list(rows)))}, step=step)


def _mlflow_table(tracker: Any, step: int, rows: Sequence[Row]) -> None:
    import mlflow

    mlflow.log_table({name: [row[name] for row in rows] for name in rows[0]}, f"{TABLE}.json")


def _tensorboard_text(tracker: Any, step: int, rows: Sequence[Row]) -> None:
    """Each attempt as text; four spaces before a line make it code, in which nothing is marked up."""
    texts = [
        f"**{name}**\n\n" + "\n".join(f"    {line}" for line in str(value).split("\n"))
        for row in rows
        for name, value in row.items()
    ]
    tracker.writer.add_text(TABLE, "\n\n".join(texts), global_step=step)


TABLES: Mapping[str, Callable[[Any, int, Sequence[Row]], None]] = {
    "tensorboard": _tensorboard_text,
    "wandb": _wandb_table,
    "trackio": _trackio_table,
    "mlflow": _mlflow_table,
}


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as ``section.key``; what is neither number nor text becomes text."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat(data).items()}
