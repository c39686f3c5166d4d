"""Runs programs that nobody has read, so that they can do no harm and always end.

    sandbox = strongest(workers=2)
    [outcome] = sandbox.run([Program(source="print(1 + 1)")])
    outcome.status, outcome.stdout        # "ok", "2\\n"

:func:`strongest` tries the kinds of protection on this machine, keeps the first that holds, and ``describe()`` says
which it is.  A remote service (:mod:`vpd.sandbox.remote`) and :class:`ScriptedSandbox` fit the same two methods.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Literal, Protocol, TypeAlias

from vpd.errors import ConfigError

Status: TypeAlias = Literal["ok", "error", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use.  ``memory_mb`` bounds each address space exactly (a larger request raises MemoryError)
    and what all its processes hold together, which is looked at about twenty times a second.  To ``seconds`` is added
    what the program waited for busy processors, up to three times as long again."""

    seconds: Annotated[float, "wall-clock time"] = 6.0
    cpu_seconds: Annotated[int, "processor time of each process"] = 6
    memory_mb: Annotated[int, "memory, of each process and of all together"] = 512
    file_mb: Annotated[int, "its own and all files it writes, together"] = 32
    processes: Annotated[int, "processes and threads at once"] = 16
    output_kb: Annotated[int, "standard output, and as much standard error"] = 64

    def __post_init__(self) -> None:
        low = {"seconds": 0.01, "cpu_seconds": 1, "memory_mb": 32, "file_mb": 1, "processes": 1, "output_kb": 1}
        for name, least in low.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"limits.{name} is too small", got=getattr(self, name), expected=f"at least {least}")


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

    ``ok``: exit code 0; ``error``: another one; ``killed``: by a signal (a crash); ``timeout``, ``memory`` and
    ``output``: a limit was reached.  ``exit_code`` is minus the signal's number after a signal, None where the sandbox
    ended it; ``stdout`` and ``stderr`` are what came before that.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


class Sandbox(Protocol):
    """Runs programs apart from the caller."""

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """One outcome for each program, in order.  Ends in bounded time and raises for no deed of a program.

        Raises SandboxError where the machine or the service fails.
        """
        ...

    def describe(self) -> str:
        """One line: which protections are in force."""
        ...


def ran_out_of_memory(code: int, stderr: str) -> bool:
    """Whether a program ended by a MemoryError (NumPy's has a name of its own) that it did not catch."""
    last = stderr.rstrip().rpartition("\n")[2]
    return code == 1 and re.match(r"[\w.]*MemoryError\b", last) is not None


class ScriptedSandbox:
    """A fake for tests and dry runs: runs nothing, answers by a function; ``asked`` holds the programs so far."""

    def __init__(self, answer: Callable[[Program], Outcome]):
        self.answer = answer
        self.asked: list[Program] = []

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        self.asked.extend(programs)
        return [self.answer(program) for program in programs]

    def describe(self) -> str:
        return "sandbox: scripted, runs nothing"


def strongest(*, workers: int | None = None, packages: Sequence[str] = (), insist: bool = False) -> Sandbox:
    """The strongest sandbox that this machine carries, proved by a program that tries to break out.

    ``workers`` programs run at once (None: one for each usable processor); programs may import from the folders
    ``packages``, read only, besides the standard library.  Raises ConfigError where the minimum (no network, no reading
    of the caller's files, a kill that leaves nothing, limits) cannot be had; ``insist`` runs without it, and
    ``describe()`` says so.
    """
    from vpd.sandbox.local import choose  # imports this module's types

    return choose(workers=workers, packages=packages, insist=insist)
