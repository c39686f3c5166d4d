"""The section ``run``: how long, how often, and where."""

import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt

from vpd.errors import ConfigError
from vpd.ranks import TIMEOUT
from vpd.run_folder.best import greater_is_better
from vpd.settings import IsPath, Settings

Tracker: TypeAlias = Literal["tensorboard", "wandb", "trackio", "mlflow"]

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")

LONGEST_NAME = 255  # bytes of a file's name, on every usual file system


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings, section="run"):
    """How long, how often, and where."""

    max_steps: Annotated[int, Ge(1), "iterations"] = 100
    save_steps: Annotated[
        int,
        Ge(0),
        "a checkpoint every so many iterations, and after the last; 0: none but where a run is stopped, so one that"
        " is killed begins anew",
    ] = 50
    save_total_limit: Annotated[
        int | None,
        Ge(1),
        "newest checkpoints to keep; null: all; each holds the model and about twice as much again for AdamW",
    ] = 2
    eval_steps: Annotated[int, Ge(0), "evaluate student and teacher every so many iterations; 0: never"] = 0
    eval_limit: Annotated[int | None, Ge(1), "held-out tasks per evaluation; null: all"] = 64
    eval_samples: Annotated[int, Ge(1), "answers per held-out task"] = 4
    eval_control: Annotated[
        bool,
        "where the teacher retries failed attempts, retry them without the feedback too, to compare with: one more"
        " answer per failed attempt; without it there is no eval_teacher/gain and no alarm teacher_no_better",
    ] = True
    metric_for_best_model: Annotated[
        str | None,
        "metric of the evaluations (metrics.jsonl) that chooses the best step, such as eval/accuracy; its checkpoint is"
        " written at once and kept besides save_total_limit; null: none is chosen",
    ] = None
    greater_is_better: Annotated[
        bool | None, "whether the best is the largest; null: yes, but for a metric whose name ends in loss"
    ] = None
    load_best_model_at_end: Annotated[bool, "model/ has the weights of the best step, not of the last"] = False
    early_stopping_patience: Annotated[
        int | None, Ge(1), "end the run after so many evaluations in a row without a better value; null: never"
    ] = None
    early_stopping_threshold: Annotated[
        float, Ge(0), "what a value must be better by, for early_stopping_patience to begin anew"
    ] = 0.0
    seed: Annotated[int, "fixes tasks and samples"] = 0
    output_dir: Annotated[str, IsPath(read=False), "the run folder"] = "out"
    report_to: Annotated[tuple[Tracker, ...], "where metrics go besides output_dir"] = ()
    log_completions: Annotated[
        bool, "with report_to: also send a table of 8 attempts a step, with feedback and teacher's prompt"
    ] = False
    push_to_hub: Annotated[bool, "upload model/ with its card to the Hub when the run is done"] = False
    hub_model_id: Annotated[str | None, "where push_to_hub uploads to: owner/name"] = None
    hub_private_repo: Annotated[bool, "a repository that push_to_hub makes is private"] = True
    record_rows: Annotated[
        int,
        Ge(0),
        "rows a step that are kept token by token in tokens/, with log-probs of student and teacher, for vpd report;"
        " each costs two passes without gradient, five in a step with an E-step (metric time/record); 0: none",
    ] = 4
    record_top_k: Annotated[int, Ge(0), "the teacher's likeliest tokens that are kept beside each token"] = 5
    resume: Annotated[bool, "continue from the newest good checkpoint of output_dir"] = False
    rank_timeout: Annotated[
        float, Gt(0), "seconds that one of several processes waits for the others before the run ends with an error"
    ] = TIMEOUT

    def check(self) -> None:
        super().check()
        longest = max(len(os.fsencode(part)) for part in self.output_dir.split("/"))
        if not self.output_dir.strip():
            raise ConfigError("run.output_dir is empty", expected="a folder")
        if longest > LONGEST_NAME:
            raise ConfigError(
                "run.output_dir has a name that no file system takes", got=f"{longest} bytes", expected="at most 255"
            )
        if self.push_to_hub and not HUB_ID.fullmatch(self.hub_model_id or ""):
            raise ConfigError(
                "run.push_to_hub needs a place", got=f"run.hub_model_id {self.hub_model_id}", expected="owner/name"
            )
        self._check_best()

    def _check_best(self) -> None:
        metric = self.metric_for_best_model
        wanted = {
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience is not None,
            "greater_is_better": self.greater_is_better is not None,
        }
        if metric is None and any(wanted.values()):
            key = next(key for key, given in wanted.items() if given)
            raise ConfigError(
                f"run.{key} needs a metric to compare steps by",
                got="run.metric_for_best_model null",
                do="Set it, for example to eval/accuracy.",
            )
        if metric is not None and metric.startswith("eval") and not self.eval_steps:
            raise ConfigError(
                f"run.metric_for_best_model {metric} is measured by evaluations, and there are none",
                got="run.eval_steps 0",
                expected="at least 1",
            )

    @property
    def best_is_greatest(self) -> bool:
        """``greater_is_better``, decided."""
        return greater_is_better(str(self.metric_for_best_model), self.greater_is_better)
