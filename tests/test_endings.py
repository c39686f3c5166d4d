"""How a run ends before its last step: signals, checkpoints at safe points, exit codes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, metrics_of, vpd_train
from test_run_folder import Left, left_by, small

from vpd.api.callbacks import Function
from vpd.config.passed import PassedSource
from vpd.envs.digits import Digits
from vpd.errors import EnvError, Interrupted
from vpd.loop import Abandoned
from vpd.recipes.assemble import assemble
from vpd.recipes.endings import StopSignals
from vpd.recipes.train import _again, train
from vpd.recipes.train import run as run_parts
from vpd.run_folder.reading import read_run
from vpd.types import Grade, Group, Metrics, Task


@dataclass(frozen=True, kw_only=True)
class SignalledDigits(Digits):
    """Digits; grading for the ``at``-th time it gets a signal."""

    at: int = 0
    number: int = signal.SIGTERM
    calls: list[int] = field(default_factory=list, compare=False)

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        self.calls.append(len(tasks))
        if len(self.calls) == self.at:
            os.kill(os.getpid(), self.number)
        return super().grade(tasks, texts)


class Signals:
    """An observer that gets a signal after a step."""

    def __init__(self, at: int, number: int = signal.SIGTERM):
        self.at, self.number = at, number

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.number)

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The uninterrupted run."""
    return left_by(train(small(tmp_path_factory.mktemp("whole") / "run")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_a_step_saves_it_and_the_run_goes_on_as_if_uninterrupted(
    number: int, whole: Left, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        Interrupted, match=r"after step 3 of 4; checkpoint-3 is saved. Continue with: vpd train"
    ) as stop:
        train(small(tmp_path / "run"), observers=[Signals(3, number)])
    assert (stop.value.step, stop.value.saved, stop.value.signal) == (3, True, number)
    assert f"vpd: {signal.Signals(number).name}: stopping and saving a checkpoint" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoint-3").is_dir() and not (tmp_path / "run" / "model").exists()
    train(small(tmp_path / "run", resume=True))
    assert left_by(tmp_path / "run") == whole


def test_a_signal_while_grading_gives_the_step_up_and_saves_the_one_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match="after step 2 of 4; checkpoint-2 is saved"):
        train(small(run, save_steps=0, eval_steps=0), env=SignalledDigits(at=3))
    assert [line["step"] for line in metrics_of(run)] == [1, 2]
    train(small(run, save_steps=0, eval_steps=0, resume=True), env=SignalledDigits())
    uninterrupted = train(small(tmp_path / "whole", save_steps=0, eval_steps=0), env=SignalledDigits())
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert left_by(run).weights == left_by(uninterrupted).weights


@dataclass(frozen=True, kw_only=True)
class FailingDigits(Digits):
    """Digits, whose grader fails when it is called for the ``at``-th time."""

    at: int = 0
    calls: list[int] = field(default_factory=list, compare=False)

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        self.calls.append(len(tasks))
        if len(self.calls) == self.at:
            raise OSError("the service is down")
        return super().grade(tasks, texts)


def test_a_grader_that_fails_leaves_what_was_trained_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Ctrl-C there does: an hour of training must not be lost to a service that is down for a minute."""
    run = tmp_path / "run"
    with pytest.raises(EnvError, match=r"raised OSError .*the service is down"):
        train(small(run, save_steps=0, eval_steps=0), env=FailingDigits(at=3))
    assert (run / "checkpoint-2").is_dir() and "checkpoint-2 is saved: with run.resume true" in caplog.text
    train(small(run, save_steps=0, eval_steps=0, resume=True), env=FailingDigits())
    uninterrupted = train(small(tmp_path / "whole", save_steps=0, eval_steps=0), env=FailingDigits())
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert left_by(run).weights == left_by(uninterrupted).weights


@pytest.mark.parametrize("steps", [2, 4])
def test_an_evaluation_that_fails_is_made_when_the_run_goes_on(
    steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the last step too, and with the best step chosen by it."""
    best = {"metric_for_best_model": "eval/accuracy", "load_best_model_at_end": True}
    settings = {"save_steps": 0, "eval_steps": 2, "max_steps": steps, **best}
    counted = FailingDigits()
    uninterrupted = train(small(tmp_path / "whole", **settings), env=counted)
    run, before_training = tmp_path / "run", counted.calls.index(4)  # 2 x 2 answers a step
    with pytest.raises(EnvError, match=r"raised OSError .*the service is down"):
        train(small(run, **settings), env=FailingDigits(at=before_training + 3))
    assert (run / "checkpoint-2").is_dir() and "goes on there, after the evaluation that failed" in caplog.text
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2] and "eval/accuracy" not in metrics_of(run)[-1]
    train(small(run, **settings, resume=True), env=FailingDigits())
    measured, whole = read_run(run).metrics, read_run(uninterrupted).metrics
    assert [without_times(line) for line in measured] == [without_times(line) for line in whole]
    weights = [folder / "model" / "model.safetensors" for folder in (run, uninterrupted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_evaluation_that_fails_with_any_error_loses_no_training(tmp_path: Path) -> None:
    parts = assemble(small(tmp_path / "run", save_steps=0, eval_steps=2))
    generate, calls = parts.engine.generate, [0]

    def failing(*arguments: Any, keys: Any, **options: Any) -> Any:
        calls[0] += keys[0].phase == "eval"
        if calls[0] == 2:  # the first was before training
            raise RuntimeError("CUDA out of memory")
        return generate(*arguments, keys=keys, **options)

    parts.engine.generate = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        run_parts(parts)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def without_times(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


def test_an_observer_of_ones_own_that_fails_leaves_the_step_before(tmp_path: Path) -> None:
    class Refuses(Signals):
        def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
            raise RuntimeError("an observer's own")

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="an observer's own"):
        train(small(run, save_steps=0, eval_steps=0), observers=[Refuses(0)])
    assert (run / "checkpoint-1").is_dir()


def test_a_callback_that_fails_leaves_the_step_that_it_was_told_of(tmp_path: Path) -> None:
    def refuses(step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        if step == 3:
            raise KeyError("reward/mean")

    run = tmp_path / "run"
    with pytest.raises(EnvError, match="refuses"):
        train(small(run, save_steps=0, eval_steps=0), observers=[Function(refuses)])
    assert (run / "checkpoint-3").is_dir()
    train(small(run, save_steps=0, eval_steps=0, resume=True))
    uninterrupted = train(small(tmp_path / "whole", save_steps=0, eval_steps=0))
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert left_by(run).weights == left_by(uninterrupted).weights


def test_a_failure_before_the_first_step_or_in_an_update_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EnvError):
        train(small(tmp_path / "first", save_steps=0, eval_steps=0), env=FailingDigits(at=1))
    assert not list((tmp_path / "first").glob("checkpoint-*"))
    parts = assemble(small(tmp_path / "second", save_steps=0, eval_steps=0))
    good = parts.algorithm.step
    calls: list[int] = []

    def step(groups: Any, learner: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise EnvError("in the middle of an update")
        return good(groups, learner)

    parts.algorithm.step = step  # type: ignore[method-assign]
    with pytest.raises(EnvError, match="in the middle"):
        run_parts(parts)
    assert not list((tmp_path / "second").glob("checkpoint-*"))


def test_where_any_part_was_passed_a_run_is_continued_from_python(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    assert _again(config) == f"vpd train --run.resume true --run.output_dir {tmp_path}/run"
    source = PassedSource(object="mine.source", source=print)
    assert _again(replace(config, feedback=(source,))).startswith("the same call with")


@pytest.mark.parametrize("eval_steps", [0, 2])
def test_before_the_first_step_there_is_nothing_to_save(eval_steps: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match="after step 0 of 4; no step was trained") as stop:
        train(small(run, eval_steps=eval_steps), env=SignalledDigits(at=1))
    assert not stop.value.saved and not list(run.glob("checkpoint-*"))


def test_a_signal_in_the_last_step_is_a_finished_run(whole: Left, tmp_path: Path) -> None:
    train(small(tmp_path / "run"), observers=[Signals(4)])
    assert left_by(tmp_path / "run") == whole


def test_a_second_ctrl_c_stops_at_once_but_not_one_that_comes_with_the_first() -> None:
    with StopSignals(together=60.0) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    with StopSignals(together=0.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_is_not_lost_where_a_users_code_swallows_it() -> None:
    with StopSignals() as stop, pytest.raises(Abandoned), stop.abandonable(), contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


def test_a_request_before_the_rollouts_gives_them_up() -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Abandoned), stop.abandonable():
            pytest.fail("was begun")


def test_a_forked_child_dies_of_sigterm() -> None:
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM and stop.signal is None


def test_handlers_of_the_program_stay() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with StopSignals():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_exit_codes_of_a_run_that_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """75 where a checkpoint was saved; then the run goes on."""
    settings = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vpd.cli",
            "train",
            *settings,
            "--run.max_steps",
            "100000",
            "--run.output_dir",
            str(run),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        error = process.stderr.read()
    assert process.returncode == 75, error
    done = int(next(run.glob("checkpoint-*")).name.removeprefix("checkpoint-"))
    assert f"vpd: stopped by SIGTERM after step {done} of 100000; checkpoint-{done} is saved." in error
    assert "Traceback" not in error
    capsys.readouterr()
    assert vpd_train(run, run__resume="true", run__max_steps=done + 1) == 0
    assert [line["step"] for line in metrics_of(run)] == list(range(1, done + 2))
