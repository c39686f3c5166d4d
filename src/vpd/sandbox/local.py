"""Runs programs on this machine, each in a jail of its own (:mod:`vpd.sandbox.jail`), a few at once.

Nothing here waits without a deadline or keeps more of a program's output than its limit.  The kinds of protection:

* ``namespaces``: its own users, mounts, processes, network and IPC; a root folder with the interpreter, the system's
  libraries and an empty /tmp in memory; and a seccomp filter.  When its process 1 ends, the kernel kills all others.
* ``landlock``, where containers forbid namespaces: it may open the interpreter, the libraries and its own folder, and
  write nothing; seccomp refuses sockets, new processes, signals and changes to files it cannot open.
* ``bare``: limits, and a kill of all its descendants.  Only if the user insists.

Always: an empty environment, closed descriptors, no new privileges, resource limits, user nobody if run as root.
Memory is also measured from outside, as a limit on each address space does not limit the sum over many processes.
"""

import contextlib
import dataclasses
import marshal
import os
import re
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from vpd.errors import ConfigError, SandboxError
from vpd.sandbox import Limits, Outcome, Program, Status, ran_out_of_memory, syscalls
from vpd.sandbox.jail import REMOVE, descendants
from vpd.sandbox.pool import run_each

Protection: TypeAlias = Literal["namespaces", "landlock", "bare"]
DESCRIPTIONS: dict[Protection, str] = {
    "namespaces": "own user, mount, process, network and IPC namespaces, read-only root without the caller's files, "
    "seccomp, resource limits",
    "landlock": "Landlock (opens the interpreter and its own folder, writes nothing), seccomp (no sockets, no new "
    "processes, no signals), resource limits",
    "bare": "NOT ISOLATED (insist): resource limits only; programs can read your files and reach the network",
}
JAIL = "import sys; sys.path.append(sys.argv[1]); import jail; jail.main(int(sys.argv[2]))"  # compiled, once
TICK = 0.05  # seconds between measurements of time and memory
SET_UP = 30.0  # seconds within which the program must have started
GRACE = 5.0  # seconds that a killed program may take to end
CHUNK = 1 << 16
MAX_WAIT_FACTOR = 3.0  # of limits.seconds: what a program may wait for a busy processor in addition
PAGE, MAX_NAMES = 4096, 4000  # of the folder in memory, which the jail makes for 4096 names
RLIMIT_SIGPENDING = 11  # signals waiting and timers; on Linux the same everywhere


class LocalSandbox:
    """A pool of jails; ``workers`` programs run at the same time, over all concurrent calls."""

    def __init__(self, *, protection: Protection, workers: int, packages: Sequence[str] = ()):
        if workers < 1:
            raise ConfigError("the sandbox has too few workers", got=workers, expected="at least 1")
        for folder in packages:
            if not os.path.isdir(folder):
                raise ConfigError("a package folder of the sandbox does not exist", got=folder)
        if protection != "bare" and not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            raise SandboxError("the sandbox cannot see a process's children", expected="CONFIG_PROC_CHILDREN, /proc")
        self.protection = protection
        self.workers = workers
        self.packages = [os.path.realpath(folder) for folder in packages]
        self._slots = threading.BoundedSemaphore(workers)
        self._interpreter = _interpreter()
        bases = ("", "/usr", os.path.realpath(sys.base_prefix))
        folders = [f"{base}/{name}" for base in bases for name in ("bin", "lib", "lib64")]
        folders += ["/usr/share/zoneinfo", os.path.dirname(self._interpreter), *self.packages]
        self._order: dict[str, Any] = {
            "namespaces": protection == "namespaces",
            "landlock": protection == "landlock",
            "filter": b"" if protection == "bare" else syscalls.seccomp_filter(shared=protection == "landlock"),
            "pivot_root": 0 if protection == "bare" else syscalls.PIVOT_ROOT[syscalls.column()],
            "readable": list(dict.fromkeys(folders)),
            "interpreter": self._interpreter,
        }

    def describe(self) -> str:
        return f"sandbox: {DESCRIPTIONS[self.protection]}; {self.workers} at once"

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        return run_each(self._run, programs, self.workers)

    def _run(self, program: Program) -> Outcome:
        too_large = _too_large(program)
        if too_large:
            return Outcome(status="error", exit_code=None, stdout="", stderr=f"{too_large}\n", seconds=0.0)
        with self._slots, self._home() as home:
            order = {**self._order, "parent": os.getpid(), "home": home, **self._program_order(program, home)}
            data = marshal.dumps(order)
            text = program.stdin.encode("utf-8", "surrogatepass")
            outcome = _Run(program.limits, len(data).to_bytes(8, "big") + data + text).outcome(self._interpreter)
        return dataclasses.replace(outcome, stderr=outcome.stderr.replace(home, "")) if home else outcome

    @contextlib.contextmanager
    def _home(self) -> Iterator[str]:
        """The folder for the program's /tmp and interpreter; with namespaces no file is made outside them."""
        if self.protection == "namespaces":
            yield ""
            return
        home = f"{tempfile.gettempdir()}/vpd-sandbox-{secrets.token_hex(8)}"  # made by the keeper, which can outlive us
        try:
            yield home
        finally:
            subprocess.run(["/bin/sh", "-c", REMOVE, "sh", home], check=False, stderr=subprocess.DEVNULL)

    def _program_order(self, program: Program, home: str) -> dict[str, Any]:
        limits = program.limits
        memory, file = limits.memory_mb << 20, limits.file_mb << 20
        bounds = [
            (resource.RLIMIT_AS, memory, memory),
            (resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1),
            (resource.RLIMIT_FSIZE, file, file),
            (resource.RLIMIT_NOFILE, 128, 128),
            (resource.RLIMIT_STACK, 8 << 20, 8 << 20),
            (resource.RLIMIT_CORE, 1, 1),  # 0 would still start a handler that core_pattern names (core(5))
            (RLIMIT_SIGPENDING, 64, 64),
            (resource.RLIMIT_MEMLOCK, 0, 0),
            (resource.RLIMIT_MSGQUEUE, 0, 0),
        ]
        if self.protection == "namespaces":  # elsewhere this limit counts all that the user runs
            bounds.append((resource.RLIMIT_NPROC, limits.processes, limits.processes))
        environment = {
            "PATH": f"{home}/venv/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": f"{home}/tmp",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        if self.packages:
            environment["PYTHONPATH"] = ":".join(self.packages)
        files = {"main.py": program.source, **program.files}
        return {
            "limits": bounds,
            "file_mb": limits.file_mb,
            "files": {name: text.encode("utf-8", "surrogatepass") for name, text in files.items()},
            "environment": environment,
            "command": [f"{home}/venv/bin/python", "-s", "-B", "main.py"],
        }


def _too_large(program: Program) -> str:
    """Why a program does not fit into its folder, whose pages and names are limited; empty if it fits."""
    texts = [program.source, *program.files.values()]
    pages = sum(-(-len(text.encode("utf-8", "surrogatepass")) // PAGE) for text in texts)
    folders = {parent for name in program.files for parent in PurePosixPath(name).parents}
    if pages * PAGE > program.limits.file_mb << 20:
        return f"the program and its files are larger than {program.limits.file_mb} MB"
    if len(texts) + len(folders) > MAX_NAMES:
        return f"the program has more than {MAX_NAMES} files and folders"
    return ""


class _Run:
    """One program, from its start to the removal of its processes."""

    def __init__(self, limits: Limits, stdin: bytes):
        self.limits = limits
        self.stdin = memoryview(stdin)
        self.output = {"stdout": bytearray(), "stderr": bytearray()}
        self.report = bytearray()
        self.init: int | None = None  # its pid
        self.pidfd: int | None = None  # of init; unlike a pid it is never reused
        self.started: float | None = None
        self.ended: tuple[int, float, int, float] | None = None  # wait status, CPU seconds, KiB, time
        self.fault: str | None = None
        self.reason: Status | None = None  # why it was killed

    def outcome(self, interpreter: str) -> Outcome:
        ours, theirs = os.pipe()
        try:
            jail = subprocess.Popen(
                [interpreter, "-I", "-S", "-B", "-c", JAIL, str(Path(__file__).parent), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=[theirs],
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as error:
            os.close(ours)
            raise SandboxError("the sandbox cannot start a process", got=error) from error
        finally:
            os.close(theirs)
        launched = time.monotonic()
        try:
            with selectors.DefaultSelector() as selector:
                self._supervise(jail, ours, selector, launched)
        finally:
            self._clean_up(jail, ours)
        return self._result(launched)

    def _supervise(
        self, jail: subprocess.Popen[bytes], report: int, selector: selectors.BaseSelector, launched: float
    ) -> None:
        """Exchange data with the jail until it ends; kill it at a limit, and stop waiting ``GRACE`` seconds later."""
        assert jail.stdin and jail.stdout and jail.stderr
        streams = {"stdout": jail.stdout.fileno(), "stderr": jail.stderr.fileno(), "report": report}
        for name, number in streams.items():
            os.set_blocking(number, False)
            selector.register(number, selectors.EVENT_READ, name)
        os.set_blocking(jail.stdin.fileno(), False)
        selector.register(jail.stdin.fileno(), selectors.EVENT_WRITE, "stdin")
        look = launched
        killed: float | None = None
        while report in selector.get_map():
            for key, _ in selector.select(TICK):
                if key.data == "stdin":
                    self._write(jail, selector)
                else:
                    self._read(key.fd, key.data, selector)
            now = time.monotonic()
            if self.reason is None and now >= look:
                look = now + TICK
                self.reason = self._exceeded(now, launched)
            if self.reason is not None and killed is None:
                killed = now
                self._kill(jail)
            if killed is not None and now > killed + GRACE:
                return
        for name in ("stdout", "stderr"):
            if streams[name] in selector.get_map():
                while self._read(streams[name], name, selector):
                    pass

    def _write(self, jail: subprocess.Popen[bytes], selector: selectors.BaseSelector) -> None:
        assert jail.stdin
        try:
            self.stdin = self.stdin[os.write(jail.stdin.fileno(), self.stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.stdin = memoryview(b"")
        if not self.stdin:
            selector.unregister(jail.stdin.fileno())
            jail.stdin.close()

    def _read(self, number: int, name: str, selector: selectors.BaseSelector) -> bool:
        """Read one chunk; False if there is none now or any more.  A stream over its limit is not read further."""
        try:
            chunk = os.read(number, CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            selector.unregister(number)
            return False
        if name == "report":
            self.report += chunk
            self._parse_report()
            return True
        kept = self.output[name]
        room = (self.limits.output_kb << 10) - len(kept)
        kept += chunk[:room]
        if len(chunk) > room:
            self.reason = self.reason or "output"
            selector.unregister(number)
            return False
        return True

    def _parse_report(self) -> None:
        *lines, rest = self.report.split(b"\n")
        self.report = bytearray(rest)
        for line in lines:
            word, _, values = line.decode("utf-8", "replace").partition(" ")
            if word == "init":
                self.init = int(values)
                with contextlib.suppress(ProcessLookupError):
                    self.pidfd = os.pidfd_open(self.init)
            elif word == "start":
                self.started = time.monotonic()
            elif word == "end":
                status, processor, resident = values.split()
                self.ended = (int(status), float(processor), int(resident), time.monotonic())
            else:
                self.fault = values

    def _exceeded(self, now: float, launched: float) -> Status | None:
        if self.ended is not None:
            return "killed" if now > self.ended[3] + GRACE else None
        if self.started is None:
            return "timeout" if now > launched + SET_UP else None
        late = now - self.started - self.limits.seconds
        if late > 0 and (
            self.init is None or late > _waited(self.init, now - self.started, MAX_WAIT_FACTOR * self.limits.seconds)
        ):
            return "timeout"
        if self.init is not None:
            resident, threads = _usage(self.init)
            if resident > self.limits.memory_mb << 10:
                return "memory"
            if threads > self.limits.processes + 1:  # init
                return "killed"
        return None

    def _kill(self, jail: subprocess.Popen[bytes]) -> None:
        if self.pidfd is None:
            jail.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _clean_up(self, jail: subprocess.Popen[bytes], report: int) -> None:
        jail.kill()  # it has closed the report and is ending, or it hangs
        with contextlib.suppress(subprocess.TimeoutExpired):
            jail.wait(GRACE)
        for stream in (jail.stdin, jail.stdout, jail.stderr):
            assert stream
            stream.close()
        os.close(report)
        if self.pidfd is not None:
            os.close(self.pidfd)

    def _result(self, launched: float) -> Outcome:
        stdout, stderr = (bytes(self.output[name]).decode("utf-8", "replace") for name in ("stdout", "stderr"))
        if self.started is None or self.fault is not None:
            last = stderr.strip().splitlines()[-1:] or ["no output"]
            raise SandboxError("the sandbox could not be set up", got=self.fault or last[0])
        status: Status = self.reason or "killed"
        code = None
        end = time.monotonic()
        if self.ended is not None:
            end = self.ended[3]
            reported = os.waitstatus_to_exitcode(self.ended[0])
            if self.reason is None or (self.reason == "timeout" and reported != -signal.SIGKILL):  # it ended by itself
                code, status = reported, self._status(reported, stderr)
        return Outcome(status=status, exit_code=code, stdout=stdout, stderr=stderr, seconds=end - self.started)

    def _status(self, code: int, stderr: str) -> Status:
        assert self.ended
        _, processor, resident, _ = self.ended
        if code == 0:
            return "ok"
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and processor >= self.limits.cpu_seconds):
            return "timeout"
        if code == -signal.SIGKILL and resident > 0.9 * (self.limits.memory_mb << 10):
            return "memory"
        if ran_out_of_memory(code, stderr):
            return "memory"
        return "killed" if code < 0 else "error"


def _interpreter() -> str:
    """The Python interpreter of this process, outside the virtual environment."""
    path = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    if not os.path.exists(path):
        raise SandboxError("the sandbox finds no Python interpreter", got=path)
    return os.path.realpath(path)


def _usage(init: int) -> tuple[int, int]:
    """KiB of its own memory and number of threads, of a process and all below it."""
    memory = threads = 0
    for process in [init, *descendants(init)]:
        try:
            text = Path(f"/proc/{process}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        values = dict(re.findall(r"^(RssAnon|RssShmem|Threads):\s+(\d+)", text, re.MULTILINE))
        if "RssAnon" in values:  # absent in one that has ended
            memory += int(values["RssAnon"]) + int(values["RssShmem"])
            threads += int(values["Threads"])
    return memory, threads


def _waited(init: int, elapsed: float, most: float) -> float:
    """Seconds, up to ``most``, that a program waited for processors that other programs used: the longest wait of a
    process below ``init``, less what its own processes took from each other.  0 where the kernel does not count it."""
    ran = longest = 0.0
    for process in [init, *descendants(init)]:
        try:
            took, wait, _ = Path(f"/proc/{process}/schedstat").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ran += int(took) / 1e9
        longest = max(longest, int(wait) / 1e9)
    return max(0.0, min(longest, elapsed - ran, most))


PROBE = """
import socket
def attempt(action, violation):
    try:
        action()
    except BaseException:
        return
    print(violation)
attempt(lambda: open({secret!r}).read(), "reads the caller's files")
attempt(lambda: open("/etc/passwd").read(), "reads /etc/passwd")
attempt(lambda: socket.create_connection(("127.0.0.1", {port}), 1), "reaches the network")
attempt(lambda: bytearray({memory}), "exceeds its memory")
attempt(lambda: open({secret!r}, "w").close(), "writes outside its folder")
print("done")
"""


def choose(
    *,
    workers: int | None,
    packages: Sequence[str],
    insist: bool,
    protections: Sequence[Protection] = ("namespaces", "landlock"),
) -> LocalSandbox:
    """See :func:`vpd.sandbox.strongest`."""
    if sys.platform != "linux":
        raise ConfigError("the local sandbox needs Linux", got=sys.platform, do="Use a remote sandbox.")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    reasons = []
    for protection in protections:
        try:
            sandbox = LocalSandbox(protection=protection, workers=workers, packages=packages)
            violations = probe(sandbox)
        except SandboxError as error:
            violations = str(error)
        if not violations:
            return sandbox
        reasons.append(f"{protection}: {violations}")
    if insist:
        return LocalSandbox(protection="bare", workers=workers, packages=packages)
    raise ConfigError(
        "no safe sandbox is available on this machine",
        got=" | ".join(reasons),
        expected="user namespaces, or Landlock and seccomp",
        do="Allow one of them, use a remote sandbox, or set insist to run model-written code unprotected.",
    )


def probe(sandbox: LocalSandbox) -> str:
    """Run a program that tries to break out; what it managed to do, or an empty text."""
    with tempfile.TemporaryDirectory(prefix="vpd-probe-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o755)
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        limits = Limits(memory_mb=128, seconds=30)  # so long because the machine may be busy
        source = PROBE.format(secret=str(secret), port=server.getsockname()[1], memory=256 << 20)
        [outcome] = sandbox.run([Program(source=source, limits=limits)])
    *violations, last = outcome.stdout.split("\n")[:-1] or [""]
    if last != "done":
        violations.append(f"the probe ended early ({outcome.status}: {outcome.stderr.strip()[-200:]})")
    return ", ".join(violations)
