"""How a run ends before its last step: Ctrl-C and SIGTERM save a checkpoint at the next safe point.

A safe point is the end of a step, or any moment while answers are sampled and graded: the weights are then those of the
last step, and the step that was begun is given up and made again, with the same answers, when the run is continued.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from vpd.errors import Abandoned, Interrupted, StorageError, VPDError
from vpd.loop import Loop, StopRequest
from vpd.ranks import OneProcess, Ranks

LOG = logging.getLogger("vpd")


class StopSignals(StopRequest):
    """While it is open, the first Ctrl-C or SIGTERM asks the run to stop, and a second Ctrl-C ends it at once.

    Only in the main thread, and only where the program has not set handlers of its own.  A second Ctrl-C within
    ``together`` seconds counts as the first: a wrapper may send it once more.  While ``ranks`` gather, a request waits
    for the end of that.
    """

    def __init__(self, together: float = 1.0, ranks: Ranks | None = None) -> None:
        self._together = together
        self._ranks = ranks or OneProcess()
        self._since = 0.0
        self._may_abandon = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        self._may_abandon = True
        try:
            if self.signal is not None:
                raise Abandoned
            yield
            if self.signal is not None:
                raise Abandoned
        finally:
            self._may_abandon = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked off ends as it would without this handler
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        elif self.signal is None:
            self.signal, self._since = number, time.monotonic()
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            if self._ranks.rank == 0:
                _say(f"{signal.Signals(number).name}: stopping and saving a checkpoint{again}")
            if self._may_abandon and not self._ranks.gathering:
                raise Abandoned
        elif number == signal.SIGINT and time.monotonic() - self._since >= self._together:
            raise KeyboardInterrupt


def save_and_stop(loop: Loop, again: str) -> None:
    """Save a run that was asked to stop, and raise Interrupted; a run without any step has nothing to save.

    ``again``: how it is continued.
    """
    saved = loop.step > 0
    if saved:
        loop.save_checkpoint()
    raise interrupted(loop, again, saved=saved)


class SavedAfterFailure(contextlib.AbstractContextManager[None]):
    """Saves what was trained before a grader, a source, a server, an evaluation or a callback failed, and says so.

    Not within an update, not among several processes, of which some may be gone, and not where what a step must leave
    could not be written.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, place: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, StorageError):
            _save_after_failure(self._loop)


def _save_after_failure(loop: Loop) -> None:
    if not loop.is_between_steps or loop.step == 0 or loop.saved_step == loop.step or loop.save is None:
        return
    if loop.ranks.world > 1:
        return
    try:
        loop.save_checkpoint()
    except VPDError as error:  # a full disk, perhaps the failure itself: what is told is the first
        LOG.warning("checkpoint-%d could not be saved: %s", loop.step, error)
    else:
        evaluated = ", after the evaluation that failed" if loop.owes_evaluation else ""
        LOG.warning("checkpoint-%d is saved: with run.resume true the run goes on there%s", loop.step, evaluated)


def interrupted(loop: Loop, again: str, *, saved: bool) -> Interrupted:
    """The error of a run that a signal has ended, with or without a checkpoint of its last step."""
    number = signal.SIGINT if loop.stop.signal is None else loop.stop.signal
    kept = f"checkpoint-{loop.step} is saved" if saved else "no step was trained"
    if not saved and loop.step > 0:
        kept = (
            f"the newest checkpoint is of step {loop.saved_step}" if loop.saved_step >= 0 else "there is no checkpoint"
        )
    text = (
        f"stopped by {signal.Signals(number).name} after step {loop.step} of {loop.max_steps}; {kept}. "
        f"Continue with: {again}"
    )
    return Interrupted(text, signal=number, step=loop.step, saved=saved)


def _say(text: str) -> None:
    """A line on stderr; a signal may come in the middle of a print, so nothing with a buffer is used."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nvpd: {text}\n".encode())
