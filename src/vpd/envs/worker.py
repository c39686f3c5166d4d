"""A verifier in its own process: it may hang, crash or run out of memory without harm to the caller.

    worker = Worker("vpd.envs.math", seconds=5)
    worker.ask(["1/2", "0.5"])        # True; raises WorkerFault if the worker did not answer

Requests and answers are lines of JSON.  A worker starts with the first request, serves one request at a time, and is
killed with its process group when it exceeds its time; the next request starts another.  It does not inherit the
caller's environment variables, cannot write files, and has limits of address space (``MEMORY`` bytes) and processor
time, so it ends even if the caller is gone.  It is for *our* verifiers, whose libraries were not written for hostile
input.  It is not a sandbox: text that a library would run as code must not be sent to it.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from vpd.envs.user_code import wrap_user_errors
from vpd.errors import EnvError, VPDError

MEMORY = 4 << 30
START_SECONDS = 120.0


class WorkerFault(Exception):
    """The worker gave no answer: it exceeded its time, died, or its library raised.  The message says which; it leaves
    out the library's message, which may contain the right answer.  ``late``: it exceeded its time."""

    def __init__(self, what: str, *, late: bool = False):
        super().__init__(what)
        self.late = late


class Worker:
    """One process that serves ``module.serve(*setup) -> (request -> answer)``.

    ``users``: it runs a user's code, which has the caller's environment variables, files and error stream, and no limit
    of memory.
    """

    def __init__(self, module: str, *setup: Any, seconds: float, users: bool = False):
        self.module, self.setup, self.seconds, self.users = module, setup, seconds, users
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Any, *, seconds: float | None = None) -> Any:
        """The worker's answer to one request.  Raises WorkerFault if none comes in ``seconds`` (None: the worker's)."""
        with self._lock:
            process = self._process or self._start()
            with contextlib.ExitStack() as stack:
                stack.callback(self.close)  # a late answer must not be taken for the next one
                answer = self._exchange(process, request, self.seconds if seconds is None else seconds)
                stack.pop_all()
        if "raised" in answer:
            raise WorkerFault(f"it raised {answer['raised']}")
        return answer["value"]

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            _kill(self._process)
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        folders = os.pathsep.join(folder for folder in sys.path if folder)
        bare = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self.module, *(["users"] if self.users else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self.users else subprocess.DEVNULL,
            env={**(os.environ if self.users else bare), "PYTHONPATH": folders},
            start_new_session=True,
        )
        weakref.finalize(self, _kill, process)
        try:
            ready = self._exchange(process, self.setup, START_SECONDS)
        except WorkerFault as fault:
            ready = {"raised": "WorkerFault", "message": str(fault)}
        if "raised" in ready:
            _kill(process)
            raise EnvError(f"the worker {self.module} does not start", got=f"{ready['raised']}: {ready['message']}")
        self._process = process
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], request: Any, seconds: float) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + seconds
        ready = select.poll()
        ready.register(process.stdout, select.POLLIN)
        received = b""
        try:
            process.stdin.write(json.dumps([seconds, request]).encode() + b"\n")
            process.stdin.flush()
            while not received.endswith(b"\n"):
                if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise WorkerFault(f"it took more than {seconds:g} seconds", late=True)
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise WorkerFault(f"it ended{_cause(process)}")
                received += chunk
        except BrokenPipeError:
            raise WorkerFault(f"it ended{_cause(process)}") from None
        return json.loads(received)


def _cause(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, after it closed its output."""
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return " its output"
    return f" by {signal.Signals(-code).name}" if code < 0 else f" with code {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):  # a request that was never read
            stream.close()


def _serve(module: str, users: bool) -> None:
    """In the worker: set up, then answer line by line until the caller is gone."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    shown = 2 if users else nothing
    for descriptor, target in ((0, nothing), (1, shown), (2, shown)):  # what is printed must not garble the answers
        os.dup2(target, descriptor)

    def reply(call: Callable[[], Any]) -> None:
        try:
            answer = {"value": wrap_user_errors(call, module, loading=True)}
        except VPDError as error:  # reported to the caller, who counts it
            cause = error.__cause__ or error
            answer = {"raised": type(cause).__name__, "message": str(error)[:400]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    _, setup = json.loads(requests.readline())
    serve: list[Callable[[Any], Any]] = []
    reply(lambda: serve.append(importlib.import_module(module).serve(*setup)))
    if not users:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in requests:
        limit, request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        threads = os.cpu_count() or 1 if users else 1
        spent = int(used.ru_utime + used.ru_stime + limit * threads) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (spent, resource.RLIM_INFINITY))
        reply(functools.partial(serve[0], request))


if __name__ == "__main__":
    _serve(sys.argv[1], users="users" in sys.argv[2:])
