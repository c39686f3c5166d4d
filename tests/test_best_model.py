"""The best step of a run: which it is, that its checkpoint stays, that a run ends early, and that a resume knows it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ScriptedEnv, ScriptedRun, scripted_run
from helpers import metrics_of, vpd_train
from safetensors.torch import load_file

from vpd.config import parse
from vpd.errors import ConfigError
from vpd.report.metric_table import names_of_evaluation
from vpd.run_folder import checkpoint
from vpd.run_folder import state as run_state
from vpd.run_folder.best import BestModel
from vpd.types import Grade

#: the learning rate falls with every step, so that the first is the best
FALLING: dict[str, object] = {
    "optim__lr_scheduler_type": "linear",
    "run__metric_for_best_model": "learning_rate",
    "run__save_steps": 1,
    "run__save_total_limit": 1,
}


def judged(values: list[float], **settings: Any) -> tuple[BestModel, list[bool]]:
    best = BestModel(metric="m", **settings)
    return best, [best.judge(step, {"m": value}) for step, value in enumerate(values, start=1)]


def test_the_best_is_the_first_of_the_greatest_or_the_least() -> None:
    best, improved = judged([1.0, 3.0, 3.0, 2.0])
    assert improved == [True, True, False, False] and (best.step, best.value) == (2, 3.0)
    best, improved = judged([1.0, 3.0, 0.5], greater_is_better=False)
    assert improved == [True, False, True] and best.step == 3


def test_a_step_without_a_finite_value_counts_for_nothing() -> None:
    best, improved = judged([1.0, math.nan, math.inf], patience=1)
    assert improved == [True, False, False] and best.since == 0
    assert not best.judge(4, {"other": 2.0}) and not best.is_over


def test_a_gain_within_the_threshold_is_the_best_and_no_reason_to_wait() -> None:
    best, _ = judged([1.0, 1.1, 1.2], patience=2, threshold=0.5)
    assert best.step == 3 and best.is_over


def test_a_state_goes_through_json() -> None:
    best, _ = judged([1.0, 0.0], patience=5)
    other = BestModel(metric="m", patience=5)
    other.restore(best.state())
    assert other == best
    other.restore({})  # of a checkpoint without one
    assert other == best
    assert BestModel(metric="m").state()["value"] is None


def scripted(**run: Any) -> ScriptedRun:
    """Answers that are always right: the first evaluation after a step is the best for good."""
    env = ScriptedEnv(lambda task, text: Grade(reward=1.0))
    return scripted_run(env, lambda prompt, seed: "right", max_steps=9, **run)


def test_a_run_ends_when_nothing_better_comes_and_saves_the_best_and_the_last() -> None:
    made = scripted(eval_steps=2, save_steps=5, metric_for_best_model="eval/accuracy", early_stopping_patience=2).run()
    assert made.loop.step == 6 and made.loop.is_over and made.loop.best is not None and made.loop.best.step == 2
    assert list(made.saved) == [2, 5, 6]


def test_the_evaluation_before_the_first_step_is_not_the_best() -> None:
    made = scripted(eval_steps=4, save_steps=0, metric_for_best_model="eval/accuracy").run()
    assert made.loop.best is not None and made.loop.best.step == 4 and made.loop.step == 9
    assert list(made.saved) == [4]


@pytest.mark.parametrize("step", [2, 5])
def test_a_continued_run_knows_the_best_and_how_long_it_has_waited(step: int) -> None:
    options: dict[str, Any] = {
        "eval_steps": 2, "save_steps": 5, "metric_for_best_model": "eval/accuracy", "early_stopping_patience": 2,
    }  # fmt: skip
    whole = scripted(**options).run()
    parts = scripted(**options).resume_from(whole, step).run()
    assert parts.loop.step == whole.loop.step and parts.loop.best == whole.loop.best


def test_the_best_checkpoint_stays_and_its_weights_are_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert vpd_train(run, **FALLING, run__load_best_model_at_end=True) == 0
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-1", "checkpoint-4"]
    model, best, last = (
        load_file(run / folder / "model.safetensors") for folder in ("model", "checkpoint-1", "checkpoint-4")
    )
    assert all(torch.equal(model[key], best[key]) for key in best)
    assert not all(torch.equal(model[key], last[key]) for key in last)


def test_a_run_that_ended_early_is_done_and_its_resume_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stop = FALLING | {"run__early_stopping_patience": 2, "run__max_steps": 9}
    assert vpd_train(run, **stop) == 0
    assert "best learning_rate: 0.001 at step 1 (the run ended at step 3: 2 evaluations" in capsys.readouterr().out
    state, metrics = run_state.read(run), metrics_of(run)
    assert state is not None and (state.phase, state.step) == ("done", 3) and len(metrics) == 3
    assert vpd_train(run, **stop, run__resume=True) == 0
    again = run_state.read(run)
    assert metrics_of(run) == metrics and again is not None and (again.phase, again.step) == ("done", 3)
    assert vpd_train(run, **(stop | {"run__early_stopping_patience": 4}), run__resume=True) == 0  # waits for longer
    assert len(metrics_of(run)) == 5


def test_a_best_checkpoint_that_is_gone_is_an_error_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert vpd_train(run, **FALLING, run__max_steps=2) == 0
    weights = run / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = FALLING | {"run__max_steps": 3, "run__resume": True}
    assert vpd_train(run, **again, run__load_best_model_at_end=True) == 2
    assert "checkpoint-1 of the best step cannot be read; got model.safetensors has" in capsys.readouterr().err
    assert vpd_train(run, **again, run__load_best_model_at_end=False) == 0


def test_a_metric_that_is_never_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = FALLING | {"run__metric_for_best_model": "nonsense", "run__load_best_model_at_end": True}
    assert vpd_train(tmp_path / "run", **settings, run__max_steps=1) == 0
    said = capsys.readouterr().out
    assert "run.metric_for_best_model: vpd itself measures no nonsense" in said.splitlines()[0]
    assert "run.metric_for_best_model nonsense was never measured" in said


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("eval/acuracy", "Did you mean 'eval/accuracy'?"),
        ("eval/pass@16", "Did you mean 'eval/pass@2'?"),
        ("evaluation", ""),
    ],
)
def test_a_misspelt_metric_of_the_evaluation_is_an_error_before_training(
    metric: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"run__metric_for_best_model": metric, "run__eval_steps": 1, "run__load_best_model_at_end": True}
    assert vpd_train(tmp_path / "run", **settings) == 2
    said = capsys.readouterr().err
    assert f"is nothing that an evaluation measures; got {metric}" in said and hint in said
    assert not (tmp_path / "run").exists()


def test_what_the_evaluation_measures_may_choose_the_best_step(tmp_path: Path) -> None:
    settings = {"run__eval_steps": 1, "run__max_steps": 1, "run__eval_limit": 4, "run__eval_samples": 3}
    assert vpd_train(tmp_path / "run", **settings) == 0
    measured = {name for line in metrics_of(tmp_path / "run") for name in line if name.startswith("eval")}
    assert measured <= set(names_of_evaluation(3))
    assert {name for name in names_of_evaluation(3) if name.startswith("eval/")} <= measured


MISTAKES = [
    ({"load_best_model_at_end": True}, "run.load_best_model_at_end needs a metric to compare steps by"),
    ({"early_stopping_patience": 2}, "run.early_stopping_patience needs a metric"),
    ({"greater_is_better": False}, "run.greater_is_better needs a metric"),
    ({"metric_for_best_model": "eval/accuracy"}, "is measured by evaluations, and there are none"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"run": settings})


def test_a_loss_is_best_when_it_is_least_unless_the_setting_says() -> None:
    assert not parse({"run": {"metric_for_best_model": "e_step/loss"}}).run.best_is_greatest
    assert parse({"run": {"metric_for_best_model": "e_step/loss", "greater_is_better": True}}).run.best_is_greatest
    assert parse({"run": {"metric_for_best_model": "reward"}}).run.best_is_greatest
