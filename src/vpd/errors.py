"""Errors that a user can mend.

A fault that the user can mend is a :class:`VPDError`: one line that says *what* is wrong, what we
*got*, what we *expected* and what to *do*.  The command line prints that line and exits with code 2.
Anything else that escapes is a bug of ours and keeps its traceback.

Text from outside may stand in any part: control characters are made visible, and what is long loses its middle.

Nothing is replaced by a default behind the user's back: what cannot be honoured is an error, and what
is cut, skipped or left out on purpose is counted in the metrics.
"""

import difflib
from collections.abc import Iterable

from vpd.printable import one_line


class VPDError(Exception):
    """A mistake or an outside fault, in one line: what, got, expected, do; ``problem`` is the line without ``do``.

    >>> print(VPDError("alpha is out of range", got=2, expected="from 0 to 1", do="Lower it."))
    alpha is out of range; got 2; expected from 0 to 1. Lower it.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, do: str | None = None):
        parts = [one_line(what)]
        if got is not None:
            parts.append(f"got {one_line(str(got))}")
        if expected is not None:
            parts.append(f"expected {one_line(str(expected))}")
        self.problem, self.do = "; ".join(parts), do
        super().__init__(f"{self.problem}. {one_line(do)}" if do else self.problem)


class ConfigError(VPDError):
    """A setting is unknown, has a wrong value, or contradicts another one."""


class DataError(VPDError):
    """A data file is missing, unreadable or holds a bad record."""


class EnvError(VPDError):
    """An environment broke its contract: it raised, or returned the wrong number or kind of grades."""


class FeedbackError(VPDError):
    """A source of feedback from outside cannot be reached or answers nonsense."""


class EngineError(VPDError):
    """A sampling server cannot be reached, refuses, or does not serve the weights that it was sent."""


class ModelError(VPDError):
    """A model or tokenizer cannot be loaded, or does not fit the task (window, vocabulary)."""


class TrainingError(VPDError):
    """Training cannot go on: a loss or gradient is not finite, or a loss has the wrong shape."""


class NonFiniteError(TrainingError):
    """A loss, gradient, reward, log-prob or weight is not finite; no step was taken on it."""


class SandboxError(VPDError):
    """The machine or a service failed to run a program; no fault of the program."""


class StorageError(VPDError):
    """A file or folder cannot be written or read back (permissions, full disk, damaged checkpoint)."""


class RankError(VPDError):
    """Another process of the run has failed; its own line says why, and this one shows none."""


class Abandoned(KeyboardInterrupt):
    """The rollouts in progress are given up; the learner is what it was after the last step."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal (``signal``, its number) after ``step`` whole steps.

    ``saved``: a checkpoint of that step is written.  The text says how to go on.
    """

    def __init__(self, text: str, *, signal: int, step: int, saved: bool):
        super().__init__(text)
        self.signal, self.step, self.saved = signal, step, saved


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them.

    >>> nearest("e_evry", ["e_every", "teacher_beta"])
    "Did you mean 'e_every'?"
    """
    known = sorted(known)
    return near(name, known) or (f"Known: {', '.join(known)}." if known else "None is known here.")


def near(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The hint of :func:`nearest` where a known name is near, else None; ``cutoff``: how near, at most 1 (the same)."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return f"Did you mean '{close[0]}'?" if close else None
