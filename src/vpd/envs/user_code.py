"""The border to a user's code: it may raise, exit, fork, or change the process, and the run stays as it was.

    grades = wrap_user_errors(lambda: env.grade(tasks, texts), "the grader on a batch of 8 rows")

An exception of any kind becomes an :class:`~vpd.errors.EnvError`, ``sys.exit()`` and ``os._exit()`` too; only a
VPDError and a real Ctrl-C pass, and of a VPDError of :mod:`vpd.types` (a grade without a number) the place is named.  A
process that the code forked and that comes back from the call ends here, so that there are never two runs.  What the
code changed of the process is put back: the working directory, environment variables, locale, signal handlers and
alarm, standard streams, ``logging.disable``, and torch's gradient mode, default dtype, default device and number of
threads.
"""

import contextlib
import inspect
import locale
import logging
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from vpd import scalars, types
from vpd.errors import EnvError, VPDError

Result = TypeVar("Result")
FIX = "Fix the environment."
OURS = os.path.join(os.path.dirname(types.__file__), "")
LIBRARIES = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib"))
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALS = (
    *RUN_SIGNALS, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGCHLD, signal.SIGPIPE, signal.SIGQUIT,
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGTSTP, signal.SIGCONT, signal.SIGABRT,
)  # fmt: skip
#: calls of a user's code that have not come back
ACTIVE: set[object] = set()


def wrap_user_errors(call: Callable[[], Result], what: str, *, do: str | None = FIX, loading: bool = False) -> Result:
    """Call user code; an exception becomes an EnvError with its type, message, file and line.

    A VPDError passes through as it is, unless a type of :mod:`vpd.types` raised it: then it begins with ``what`` and
    the place.  ``loading``: the code is a file, module or class that is made ready once; the environment variables it
    sets and the handlers of signals that the run does not use stay.
    """
    with process_kept(what, loading=loading), errors_named(what, do=do):
        return call()


@contextlib.contextmanager
def errors_named(what: str, *, do: str | None = FIX) -> Iterator[None]:
    """Every exception as an EnvError that begins with ``what``; a VPDError passes, and so does a real Ctrl-C.

    A VPDError that a type of :mod:`vpd.types` raised, when it was made there, begins with ``what`` too.
    """
    try:
        yield
    except VPDError as error:
        stack = traceback.extract_tb(error.__traceback__)
        if not stack or stack[-1].filename not in (types.__file__, scalars.__file__):
            raise
        makers = _of_user(stack)
        place = f" at {makers[-1].filename}:{makers[-1].lineno}" if makers else ""
        raise EnvError(f"{what}{place}: {error.problem}", do=error.do) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        shown = traceback.TracebackException.from_exception(error)
        raise EnvError(
            f"{what} raised {type(error).__name__} at {_place(error, shown.stack)}",
            got=" ".join(str(shown).split())[:200] or "no message",
            do=do,
        ) from error


def _place(error: BaseException, stack: traceback.StackSummary) -> str:
    """File and line of the user's innermost frame; where there is none, of the innermost one in a file."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno}"
    files = [frame for frame in stack if frame.filename != __file__ and not frame.filename.startswith("<")]
    frames = _of_user(files) or files or stack
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def _of_user(stack: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames outside of this package, and, unless all the others are there, outside of Python's libraries."""
    outside = [frame for frame in stack if not frame.filename.startswith((OURS, "<"))]
    return [frame for frame in outside if not frame.filename.startswith(LIBRARIES)] or outside


def raised_outside(error: BaseException) -> str:
    """File and line of the innermost frame, below a call of ours, that is in no library; empty where all are."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = [frame.filename.startswith(OURS) for frame in stack]
    below = stack[ours.index(True) :] if True in ours else []
    outside = [frame for frame in below if not frame.filename.startswith((OURS, "<", *LIBRARIES))]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else ""


def defined_at(function: Any) -> str:
    """File and line where a function or method of a user is defined; empty where that is not known.

    >>> defined_at(print)
    ''
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (
        "" if code is None or code.co_filename.startswith((OURS, "<")) else f"{code.co_filename}:{code.co_firstlineno}"
    )


@contextlib.contextmanager
def process_kept(what: str, *, loading: bool = False) -> Iterator[None]:
    """The process afterwards as it was before; a forked copy of it that comes out here ends."""
    kept = [(read, write, read()) for read, write in _parts(loading)]
    with one_process(what):
        try:
            yield
        finally:
            if ACTIVE:  # not in a process that was forked
                for read, write, value in kept:
                    if read() != value:
                        write(value)


@contextlib.contextmanager
def one_process(what: str) -> Iterator[None]:
    """The process may not end inside, and a forked copy of it that comes out ends."""
    process, call = os.getpid(), object()
    _refuse_exits()
    ACTIVE.add(call)
    try:
        yield
    finally:
        if os.getpid() != process:
            os.write(2, f"vpd: {what} forked a process that came back; it was ended\n".encode(errors="replace"))
            os._exit(1)
        ACTIVE.discard(call)


def _refuse_exits() -> None:
    """Let calls that end or replace this process at once raise SystemExit while a user's code runs."""
    for name in ("_exit", "execv", "execve"):
        real = vars(os)[name]
        if not isinstance(real, _Refused):
            setattr(os, name, _Refused(real))


class _Refused:
    """A function of ``os`` that ends this process; it works in processes that were forked, and outside of a call."""

    def __init__(self, real: Callable[..., Any]):
        self.real = real

    def __call__(self, *arguments: Any) -> Any:
        if ACTIVE:
            raise SystemExit(f"os.{self.real.__name__}({', '.join(map(repr, arguments))})"[:80])
        return self.real(*arguments)


os.register_at_fork(after_in_child=ACTIVE.clear)


def _parts(loading: bool) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """(read, write) of each part of the process that a user's code must not change for the run."""
    parts: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
        (_folder, _set_folder),
        (lambda: locale.setlocale(locale.LC_ALL), _set_locale),
        (lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, _stop_alarm),
        (lambda: (sys.stdin, sys.stdout, sys.stderr), _set_streams),
        (lambda: logging.root.manager.disable, logging.disable),
        *_torch_parts(),
    ]
    if not loading:
        parts.append((lambda: dict(os.environ), _set_environment))
    if threading.current_thread() is threading.main_thread():
        signals = RUN_SIGNALS if loading else SIGNALS
        parts.append((lambda: {number: signal.getsignal(number) for number in signals}, _set_handlers))
    return parts


def _torch_parts() -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_default_device"):  # not imported, or not to the end
        return []
    return [
        (torch.is_grad_enabled, torch._C._set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
        (torch.get_num_threads, torch.set_num_threads),
    ]


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):  # it is gone
            os.chdir(folder)


def _set_locale(name: str) -> None:
    locale.setlocale(locale.LC_ALL, name)


def _stop_alarm(running: bool) -> None:
    if not running:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _set_streams(streams: tuple[Any, Any, Any]) -> None:
    sys.stdin, sys.stdout, sys.stderr = streams


def _set_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)
