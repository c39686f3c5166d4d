"""Runs untrusted programs isolated from the caller, with limits, so that they always end.

    sandbox = strongest(workers=2)
    [outcome] = sandbox.run([Program(source="print(1 + 1)")])
    outcome.status, outcome.stdout        # "ok", "2\\n"

:func:`strongest` probes the kinds of protection on this machine and returns the first that holds; ``describe()`` says
which it is.  A remote service (:mod:`vpd.sandbox.remote`) and :class:`ScriptedSandbox` have the same two methods.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Literal, Protocol, TypeAlias

from annotated_types import Ge

from vpd.errors import ConfigError
from vpd.settings import Settings

Status: TypeAlias = Literal["ok", "error", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(Settings, section="limits"):
    """What a program may use.

    ``memory_mb`` limits each address space (a larger request raises MemoryError) and the sum over the program's
    processes, which is measured about twenty times a second.  Time that the program waited for busy processors is added
    to ``seconds``, up to three times ``seconds``.
    """

    seconds: Annotated[float, Ge(0.01), "wall-clock time"] = 6.0
    cpu_seconds: Annotated[int, Ge(1), "processor time of each process"] = 6
    memory_mb: Annotated[int, Ge(32), "memory of each process, and of all together"] = 512
    file_mb: Annotated[int, Ge(1), "size of all its files together, source included"] = 32
    processes: Annotated[int, Ge(1), "processes and threads at the same time"] = 16
    output_kb: Annotated[int, Ge(1), "size of standard output, and of standard error"] = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Python source, run as ``main.py`` in an empty folder beside ``files`` (relative path: text)."""

    source: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in self.files:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] in ("/", "main.py") or ".." in parts or "\0" in name:
                raise ConfigError(
                    "a program's file has a bad name", got=repr(name), expected="a relative path other than main.py"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended.

    ``status``: ``ok`` (exit code 0), ``error`` (another exit code), ``killed`` (by a signal), or the limit reached:
    ``timeout``, ``memory``, ``output``.  ``exit_code``: minus the signal's number after a signal, None if the
    sandbox ended the program.  ``stdout``, ``stderr``: what was written until then.  ``seconds``: wall-clock time.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox(Protocol):
    """Runs programs isolated from the caller."""

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """One outcome for each program, in order, in bounded time.

        Nothing that a program does raises.  Raises SandboxError if the machine or the service fails.
        """
        ...

    def describe(self) -> str:
        """One line: which protections are active."""
        ...


def ran_out_of_memory(code: int, stderr: str) -> bool:
    """Whether a program ended by an uncaught MemoryError (NumPy's subclass included)."""
    last = stderr.rstrip().rpartition("\n")[2]
    return code == 1 and re.match(r"[\w.]*MemoryError\b", last) is not None


class ScriptedSandbox:
    """A fake for tests and dry runs: answers by a function and runs nothing; ``asked`` holds the programs so far."""

    def __init__(self, answer: Callable[[Program], Outcome]):
        self.answer = answer
        self.asked: list[Program] = []

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        self.asked.extend(programs)
        return [self.answer(program) for program in programs]

    def describe(self) -> str:
        return "sandbox: scripted, runs nothing"


def strongest(*, workers: int | None = None, packages: Sequence[str] = (), insist: bool = False) -> Sandbox:
    """The strongest sandbox that works on this machine, tested with a program that tries to break out.

    ``workers`` programs run at the same time (None: one per usable processor); besides the standard library, programs
    may import from the folders ``packages``, read only.  Raises ConfigError if the minimum is missing (no network, no
    reading of the caller's files, limits, no process left after a kill); with ``insist`` programs then run
    unprotected, and ``describe()`` says so.
    """
    from vpd.sandbox.local import choose  # that module imports this one

    return choose(workers=workers, packages=packages, insist=insist)
