"""Work in processes of one thread: results and progress; a process that fails, dies or is interrupted."""

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vpd.engines.server_side.guard import lives
from vpd.errors import ModelError, TrainingError
from vpd.lab.processes import Advance, Call, run_calls
from vpd.model.threads import SMALL, threads_for


def threads_of(number: int, advance: Advance) -> tuple[int, int, int, str | None]:
    advance(2)
    return number, os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def fail_or_sleep(number: int, advance: Advance) -> None:
    if number == 0:
        raise ModelError("this model is no good")
    time.sleep(120)


def speak(number: int, advance: Advance) -> None:
    logging.getLogger("vpd").info("a line of every run")
    logging.getLogger("vpd").warning("a warning of a run")


def die(number: int, advance: Advance) -> None:
    os._exit(7)


def calls(count: int) -> list[Call]:
    return [Call(arguments=(number,), title="work", steps=3) for number in range(count)]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_results_come_in_order_from_processes_of_one_thread(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    results = run_calls(threads_of, calls(5), processes=2, console=console)
    assert [number for number, *_ in results] == [0, 1, 2, 3, 4]
    assert {tuple(rest) for _, _, *rest in results} == {(1, "1")} and os.environ["OMP_NUM_THREADS"] == "3"
    assert os.getpid() not in {process for _, process, *_ in results}
    assert "15/15" in shown(console) and not multiprocessing.active_children()


def test_one_process_is_this_one_and_gets_its_threads_back(console: Console) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        [(_, process, threads, _)] = run_calls(threads_of, calls(1), processes=1, console=console)
        assert process == os.getpid() and threads == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "3/3" in shown(console)


@pytest.mark.parametrize(("parameters", "chosen", "threads"), [(100, None, 1), (100, "2", 2), (SMALL, None, 2)])
def test_a_tiny_model_has_one_thread_unless_the_user_said_how_many(
    monkeypatch: pytest.MonkeyPatch, parameters: int, chosen: str | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(torch.nn.Linear(parameters, 1, bias=False)):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_in_one_process_a_run_says_its_warnings_alone(console: Console, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vpd")
    run_calls(speak, calls(1), processes=1, console=console)
    assert [record.message for record in caplog.records] == ["a warning of a run"]
    assert logging.getLogger("vpd").level == logging.INFO


def test_an_error_in_a_process_is_raised_and_ends_the_others(console: Console) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"^this model is no good$"):
        run_calls(fail_or_sleep, calls(2), processes=2, console=console)
    assert time.monotonic() - started < 100 and not multiprocessing.active_children()


def test_a_process_that_dies_is_an_error_and_not_a_hang(console: Console) -> None:
    with pytest.raises(TrainingError, match="ended before its work was done; got exit code 7"):
        run_calls(die, calls(2), processes=2, console=console)
    assert not multiprocessing.active_children()


DEMO = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from vpd.cli import main
sys.exit(main(["demo", "--output_dir", sys.argv[1]]))
"""


def test_ctrl_c_ends_the_demo_and_its_processes_with_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", DEMO, str(tmp_path)]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout is not None
        while "the teacher reads" not in run.stdout.readline():
            assert run.poll() is None
        time.sleep(2)  # the other processes are starting
        os.killpg(run.pid, signal.SIGINT)
        _, error = run.communicate(timeout=60)
        assert run.returncode == 130 and error == "vpd: interrupted; checkpoints already written are whole\n"
        assert group_is_gone(run.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def group_is_gone(group: int) -> bool:
    """Whether no process of a group is left, after 20 seconds at most; a zombie, which waits for init, is none."""
    for _ in range(100):
        if not lives(group):
            return True
        time.sleep(0.2)
    return False
