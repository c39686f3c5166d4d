"""Hostile programs made at random: each must end within its limits, reach nothing of the caller's and leave nothing.

    python tests/fuzz_sandbox.py [--seed 0] [--programs 2000] [--kinds namespaces landlock] [--output fuzz-out]
    python tests/fuzz_sandbox.py --seed 0 --show 17          # the program of that seed and number

A program is a few statements of a grammar of system calls, files, signals, sockets, processes, memory and output, in
loops and children.  It knows where a secret, a file, a process and three listeners of the caller are.  A program after
which the secret is in an output, one of these has changed, or a process, a file or a handle is left, or that took
longer than its limits allow, is written to ``OUTPUT/seed-S-N-KIND.py`` with what it did, and the exit code is 1.
``make fuzz SEED=...`` is for the night.
"""

import argparse
import contextlib
import ctypes
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.errors import SandboxError
from vpd.sandbox import Limits, Outcome, Program
from vpd.sandbox.jail import descendants
from vpd.sandbox.local import MAX_WAIT_FACTOR, LocalSandbox

LIMITS = Limits(seconds=0.5, cpu_seconds=1, memory_mb=128, file_mb=4, processes=8, output_kb=16)
SLOWEST = (1 + MAX_WAIT_FACTOR) * LIMITS.seconds + 20  # the rest is the start on a busy machine
SECRET = "opensesame-7d1f"
PR_SET_CHILD_SUBREAPER = 36
NOBODY = 65534  # the user of every program where the caller is root

Make = Callable[[random.Random], str]
HEAD = """\
import contextlib, ctypes, mmap, os, random, resource, signal, socket, subprocess, sys, tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(4096)
FOLDER, PROCESS, PORT, NAME = {folder!r}, {process}, {port}, {name!r}
def attempt(call):
    try: return call()
    except BaseException as error: return type(error).__name__
"""


def _number(draw: random.Random) -> str:
    return draw.choice(
        ["0", "1", "-1", "2", "7", "4096", "1 << 31", "(1 << 63) - 1", "buffer", "os.getpid()", "PROCESS"]
    )


def system_call(draw: random.Random) -> str:
    arguments = ", ".join(_number(draw) for _ in range(draw.randint(0, 6)))
    return f"libc.syscall({draw.randrange(0, 470)}{', ' + arguments if arguments else ''})"


def file_call(draw: random.Random) -> str:
    path = draw.choice(
        [
            "'a'",
            "'b'",
            "'d/e'",
            "FOLDER + '/secret'",
            "FOLDER + '/file'",
            "FOLDER",
            "'/etc/passwd'",
            "'/proc/1/environ'",
            "f'/proc/{PROCESS}/mem'",
            "'/proc/self/fd/%d' % random.randrange(20)",
            "'/tmp/x' + str(random.random())",
            "'/dev/shm/x'",
            "'/sys/fs/cgroup/x'",
            "'.' + '/d' * 60",
            "'\\udcff' * 99",
            "os.getcwd() + '/../x'",
            "'/proc/self/root/etc'",
        ]
    )
    call = draw.choice(
        [
            "print(open({p}, 'rb').read(9999))",
            "open({p}, 'ab').write(b'x' * 99999)",
            "os.mkdir({p})",
            "os.mkfifo({p})",
            "os.symlink(FOLDER + '/secret', {p})",
            "print(os.readlink({p}))",
            "os.link({p}, 'l' + str(random.random()))",
            "os.remove({p})",
            "os.rename({p}, 'r')",
            "os.chmod({p}, random.choice([0, 0o7777]))",
            "os.truncate({p}, 1 << 40)",
            "os.chdir({p})",
            "print(os.listdir({p}))",
            "os.mknod({p})",
            "os.open({p}, os.O_PATH)",
            "os.setxattr({p}, 'user.x', b'y')",
            "[open(str(i), 'w').write('z' * i) for i in range(3000)]",
            "[(os.mkdir('n'), os.chdir('n')) for _ in range(300)]",
            "os.sendfile(1, os.open({p}, 0), 0, 999)",
            "os.chroot({p})",
            "os.chown({p}, 0, 0)",
            "os.execv({p}, ['x'])",
        ]
    )
    return call.replace("{p}", path)


def signal_call(draw: random.Random) -> str:
    process = draw.choice(
        ["os.getpid()", "os.getppid()", "1", "-1", "0", "PROCESS", "-os.getpgrp()", "random.randrange(2, 40000)"]
    )
    number = draw.choice(["9", "15", "19", "18", "2", "11", "random.randrange(1, 65)"])
    return draw.choice(
        [
            f"os.kill({process}, {number})",
            f"signal.signal({number}, signal.SIG_IGN)",
            "signal.alarm(1)",
            f"signal.pidfd_send_signal(os.pidfd_open(abs({process})), {number})",
            "signal.pthread_sigmask(0, range(1, 65))",
            f"libc.prctl({draw.randrange(1, 60)}, {_number(draw)}, {_number(draw)}, 0, 0)",
            "os.setsid()",
            "os.nice(-20)",
            f"os.sched_setaffinity({process}, [0])",
            f"resource.setrlimit({draw.randrange(16)}, (-1, -1))",
            "os.setuid(0)",
        ]
    )


def socket_call(draw: random.Random) -> str:
    family = draw.choice(["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"])
    address = draw.choice(
        ["('127.0.0.1', PORT)", "FOLDER + '/listener'", "'\\0' + NAME", "('::1', PORT)", "('8.8.8.8', 53)"]
    )
    kind = draw.choice(["SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW"])
    made = f"socket.socket(socket.{family}, socket.{kind})"
    return draw.choice(
        [
            f"{made}.connect({address})",
            f"{made}.bind({address})",
            f"{made}.sendto(b'x', {address})",
            "socket.socketpair()",
            "[socket.socketpair()[0].send(b'y' * 9999) for _ in range(99)]",
            f"socket.create_connection({address}, 1)",
            "socket.socket(fileno=random.randrange(9)).sendall(b'z')",
            "socket.getaddrinfo('localhost', PORT)",
        ]
    )


def memory_call(draw: random.Random) -> str:
    size = draw.choice(["1 << 20", "64 << 20", "1 << 30", "1 << 40"])
    return draw.choice(
        [
            f"bytearray({size})",
            f"mmap.mmap(-1, {size}).write(b'x' * 9999)",
            "ctypes.string_at(random.randrange(1 << 40))",
            "[os.pipe() for _ in range(999)]",
            "sys.setrecursionlimit(10**9) or (lambda f: f(f))(lambda f: f(f))",
            "libc.shmget(random.randrange(9), 4096, 0o1777)",
            "libc.msgget(random.randrange(9), 0o1777)",
            "9 ** 9 ** 7",
        ]
    )


def output_call(draw: random.Random) -> str:
    return draw.choice(
        [
            "print('x' * 99999)",
            "os.write(random.randrange(9), b'init 1\\nend 0 0 0\\n')",
            "os.close(random.randrange(9))",
            "sys.stderr.write('\\x1b]0;x\\x07' * 99)",
            "sys.stdout.buffer.write(os.urandom(999))",
            "os.closerange(0, 99)",
            "os.dup2(2, random.randrange(99))",
            "print(os.environ, sys.argv)",
            "time.sleep(9)",
            "os._exit(random.randrange(256))",
        ]
    )


CALLS: Sequence[Make] = (system_call, file_call, signal_call, socket_call, memory_call, output_call)


def statement(draw: random.Random, depth: int = 0) -> list[str]:
    """A statement of the grammar: a call, or a loop, child or thread around others."""
    if depth > 2 or draw.random() < 0.6:
        return [f"attempt(lambda: {draw.choice(CALLS)(draw)})"]
    inner = [line for _ in range(draw.randint(1, 3)) for line in statement(draw, depth + 1)]
    body = [f"    {line}" for line in inner]
    name = f"f{draw.randrange(10**6)}"
    match draw.randrange(6):
        case 0:
            return [f"for _ in range({draw.choice([2, 9, 10**9])}):", *body]
        case 1:
            return ["if attempt(os.fork) == 0:", *body, *(["    os._exit(0)"] if draw.random() < 0.5 else [])]
        case 2:
            return [
                "if attempt(os.fork) == 0:",
                "    attempt(os.setsid)",
                "    if attempt(os.fork): os._exit(0)",
                *body,
            ]
        case 3:
            return [f"def {name}():", *body, f"attempt(threading.Thread(target={name}).start)"]
        case 4:
            return ["attempt(lambda: subprocess.Popen([sys.executable, sys.argv[0]]))"]
        case _:
            return ["try:", *body, "finally:", f"    attempt(lambda: {draw.choice(CALLS)(draw)})"]


@dataclass(frozen=True)
class Targets:
    """What of the caller's a program is told of."""

    folder: str
    process: int
    port: int
    name: str

    def program(self, seed: int, number: int) -> Program:
        draw = random.Random(f"{seed}/{number}")
        lines = [line for _ in range(draw.randint(1, 6)) for line in statement(draw)]
        head = HEAD.format(folder=self.folder, process=self.process, port=self.port, name=self.name)
        return Program(source=head + f"random.seed({number})\n" + "\n".join(lines) + "\n", limits=LIMITS)


class Caller:
    """The targets, kept watch over."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "secret").write_text(SECRET)
        (folder / "file").write_text("as it was")
        for path in folder.iterdir():
            path.chmod(0o666)  # nothing but the sandbox stands in the way
        self.process = subprocess.Popen(["sleep", "1000000"], user=NOBODY if os.geteuid() == 0 else None)
        self.name = f"vpd-fuzz-{os.getpid()}"
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        for address in (str(folder / "listener"), f"\0{self.name}"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen()
            self.listeners.append(listener)
        for listener in self.listeners:
            listener.setblocking(False)
        port = self.listeners[0].getsockname()[1]
        self.targets = Targets(str(folder), self.process.pid, port, self.name)

    def harm(self) -> list[str]:
        """What has happened to the targets."""
        found = []
        if sorted(p.name for p in self.folder.iterdir()) != ["file", "listener", "secret"]:
            found.append("the caller's folder has changed")
        elif (self.folder / "file").read_text() != "as it was" or (self.folder / "secret").read_text() != SECRET:
            found.append("the caller's files have changed")
        if self.process.poll() is not None:
            found.append("the caller's process was killed")
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                listener.accept()
                found.append("a listener of the caller's was reached")
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for listener in self.listeners:
            listener.close()


def left_behind(before: Any, temporary: Path) -> list[str]:
    """What a program left: processes, files, handles."""
    deadline = time.monotonic() + 2
    while (now := state(temporary)) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    names = ("processes", "files", "handles")
    return [f"{name} left: {b} instead of {a}" for name, a, b in zip(names, before, now, strict=True) if a != b]


def state(temporary: Path) -> tuple[list[int], list[str], int]:
    with contextlib.suppress(ChildProcessError):  # what has ended needs no more than to be reaped
        for process in descendants(os.getpid()):
            with contextlib.suppress(ChildProcessError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    os.waitpid(process, os.WNOHANG)
    files = [str(path) for path in sorted(temporary.rglob("*"))]
    return sorted(descendants(os.getpid())), files, len(os.listdir("/proc/self/fd"))


def try_one(
    sandbox: LocalSandbox, program: Program, caller: Caller, temporary: Path
) -> tuple[Outcome | None, list[str]]:
    """Run a program; its outcome, and what it should not have done."""
    before, began, outcome, found = state(temporary), time.monotonic(), None, []
    try:
        [outcome] = sandbox.run([program])
    except SandboxError as error:
        found.append(f"the sandbox failed: {error}")
    seconds = time.monotonic() - began
    if seconds > SLOWEST:
        found.append(f"took {seconds:.1f} s of at most {SLOWEST:.1f}")
    if outcome is not None and SECRET in outcome.stdout + outcome.stderr:
        found.append("the caller's secret was read")
    if outcome is not None and max(len(outcome.stdout), len(outcome.stderr)) > LIMITS.output_kb << 10:
        found.append("more output than the limit")
    return outcome, found + caller.harm() + left_behind(before, temporary)


@contextlib.contextmanager
def caller_and_folder() -> Iterator[tuple[Caller, Path]]:
    """The targets, and the empty folder in which the sandbox makes its own."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["VPD_FUZZ_SECRET"] = SECRET
    with tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as temporary:
        for folder in (kept, temporary):
            os.chmod(folder, 0o777)
        old, tempfile.tempdir = tempfile.tempdir, temporary
        caller = Caller(Path(kept))
        try:
            yield caller, Path(temporary)
        finally:
            tempfile.tempdir = old
            caller.close()
            del os.environ["VPD_FUZZ_SECRET"]


def fuzz(
    kind: Any, seed: int, numbers: Sequence[int], output: Path | None
) -> tuple[Counter[str], dict[int, list[str]]]:
    """Run the programs of these numbers one by one; how they ended, and the faults by number."""
    ended: Counter[str] = Counter()
    faults: dict[int, list[str]] = {}
    with caller_and_folder() as (caller, temporary):
        sandbox = LocalSandbox(protection=kind, workers=1)
        for number in numbers:
            program = caller.targets.program(seed, number)
            outcome, found = try_one(sandbox, program, caller, temporary)
            ended[outcome.status if outcome else "failed"] += 1
            if found:
                faults[number] = found
                if output is not None:
                    report(output, kind, seed, number, program, outcome, found)
            if any("caller's" in line for line in found):
                break  # the targets are no longer what they were
    return ended, faults


def report(
    output: Path, kind: str, seed: int, number: int, program: Program, outcome: Outcome | None, found: Sequence[str]
) -> None:
    """A program file for one that did what it should not."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [f"seed {seed}, program {number}, {kind}", *found, repr(outcome)[:2000]]
    head = "".join(f"# {line}\n" for text in lines for line in text.splitlines())
    path = output / f"seed-{seed}-{number}-{kind}.py"
    path.write_text(head + program.source, errors="backslashreplace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, default=2000, help="of each kind of sandbox")
    parser.add_argument("--kinds", nargs="*", default=["namespaces", "landlock"])
    parser.add_argument("--output", type=Path, default=Path("fuzz-out"))
    parser.add_argument("--show", type=int, help="print the program of this number and end")
    options = parser.parse_args()
    if options.show is not None:
        print(Targets("/folder", 1, 1, "name").program(options.seed, options.show).source)
        return 0
    failed = False
    for kind in options.kinds:
        began = time.monotonic()
        ended, faults = fuzz(kind, options.seed, range(options.programs), options.output)
        how = ", ".join(f"{status} {count}" for status, count in sorted(ended.items()))
        print(
            f"{kind}, seed {options.seed}: {ended.total()} programs ({how}) in {time.monotonic() - began:.0f} s",
            flush=True,
        )
        for number, found in faults.items():
            print(f"  program {number}: {'; '.join(found)}", flush=True)
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
