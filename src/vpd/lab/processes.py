"""Independent work in processes of one thread each, with progress bars.

Tiny models run fastest on one thread; with more, the threads spend their time waiting for each other.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vpd.errors import TrainingError, VPDError
from vpd.model.threads import one_thread
from vpd.report.console import Terminal

Advance: TypeAlias = Callable[[int], None]  # reports so many finished steps


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call ``function(*arguments, advance)``.

    Calls with the same ``title`` share a progress bar.  ``steps`` is what the call adds to the bar's total; whatever it
    has not reported through ``advance`` by its end is added then.
    """

    arguments: tuple[Any, ...]
    title: str
    steps: int = 1


def run_calls(function: Callable[..., Any], calls: Sequence[Call], *, processes: int, console: Terminal) -> list[Any]:
    """The results of all calls, in their order, from at most ``processes`` processes at a time.

    With ``processes`` 1 everything runs in this process.  ``function`` and its arguments must be picklable otherwise.
    The first error, and an interrupt, ends all processes at once.  Raises what a call raised if it is a VPDError;
    TrainingError if a process ended without a result (its traceback, if it has one, is on stderr).
    """
    with _Bars(calls, console) as bars:
        if processes > 1:
            return _in_workers(function, calls, min(processes, len(calls)), bars)
        with one_thread(), _warnings_alone():
            results = []
            for index, call in enumerate(calls):
                results.append(function(*call.arguments, lambda steps, index=index: bars.advance(index, steps)))
                bars.finish(index)
            return results


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bars:
    """One progress bar for each title."""

    def __init__(self, calls: Sequence[Call], console: Terminal) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
        totals: dict[str, int] = {}
        for call in calls:
            totals[call.title] = totals.get(call.title, 0) + call.steps
        bars = {title: self._progress.add_task(title, total=total) for title, total in totals.items()}
        self._bars = [bars[call.title] for call in calls]
        self._left = [call.steps for call in calls]

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, index: int, steps: int) -> None:
        self._left[index] -= steps
        self._progress.advance(self._bars[index], steps)

    def finish(self, index: int) -> None:
        self.advance(index, self._left[index])


@dataclass(frozen=True)
class _Result:
    value: Any


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


def _in_workers(function: Callable[..., Any], calls: Sequence[Call], count: int, bars: _Bars) -> list[Any]:
    workers = [_start(function) for _ in range(count)]
    try:
        return _distribute(workers, calls, bars)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


def _distribute(workers: Sequence[_Worker], calls: Sequence[Call], bars: _Bars) -> list[Any]:
    """Give every free worker the next call until all have a result."""
    results: list[Any] = [None] * len(calls)
    waiting = iter(enumerate(calls))
    busy: dict[Connection, tuple[_Worker, int]] = {}

    def give(worker: _Worker) -> None:
        index, call = next(waiting, (None, None))
        if index is None or call is None:
            return
        with contextlib.suppress(BrokenPipeError):  # a dead worker is found when its answer is read
            worker.connection.send(call.arguments)
        busy[worker.connection] = (worker, index)

    for worker in workers:
        give(worker)
    while busy:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker, index = busy[connection]
            message = _receive(worker)
            if isinstance(message, int):
                bars.advance(index, message)
                continue
            del busy[connection]
            results[index] = message.value
            bars.finish(index)
            give(worker)
    return results


def _receive(worker: _Worker) -> "int | _Result":
    """What a worker says: finished steps, or a result.  Raises the error that it met."""
    try:
        message: int | _Result | VPDError = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        raise TrainingError(
            "a process that trains ended before its work was done",
            got=f"exit code {worker.process.exitcode}",
            do="A negative code is a signal; -9 often means that memory ran out: run fewer processes.",
        ) from None
    if isinstance(message, VPDError):
        raise message
    return message


def _start(function: Callable[..., Any]) -> _Worker:
    resource_tracker.ensure_running()  # its own start, which comes with the first worker's, unblocks interrupts
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs), daemon=True)
    # A spawned process inherits both: torch reads the variable when it is loaded, and Ctrl-C, which reaches the whole
    # process group, is left to the parent, which then ends its workers.
    with _environment(OMP_NUM_THREADS="1"), _interrupts_blocked():
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextlib.contextmanager
def _warnings_alone() -> Iterator[None]:
    """What each run says of itself is left out, as in processes of their own."""
    logger = logging.getLogger("vpd")
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(function: Callable[..., Any], connection: Connection) -> None:
    """The loop of a worker: receive arguments, send back finished steps and a result or an error."""
    torch.set_num_threads(1)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_Result(function(*arguments, connection.send)))
        except VPDError as error:
            connection.send(error)
