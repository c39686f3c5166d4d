"""Runs in a new process: reads an order from standard input, confines a program and runs it.

    supervisor --order, then the program's stdin--> keeper --fork--> init --fork--> program

Init is process 1 of the program's own namespaces: when it ends, the kernel kills every process in them.  Without
namespaces the keeper does init's work itself.  The descriptor ``report`` carries lines back: ``init PID``, ``start``,
``end WAIT_STATUS CPU_SECONDS MAX_RSS_KB`` or ``fault TEXT``.  It runs before any of the program's code, as ``python -I
-S``, and imports little, because every program pays for each import.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes longer to import than all the rest
    from typing import Any

SIGINT, SIGKILL, SIGTERM, SIG_IGN = 2, 9, 15, 1
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18
MNT_DETACH = 2
AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 0x8000, 1, 2, 4
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
LANDLOCK_WRITE_FILE, LANDLOCK_READ_FILE, LANDLOCK_READ_AND_RUN = 2, 4, 1 | 4 | 8
PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH = 8, 47, 2, 2
PROGRAM_ID, NOBODY = 1000, 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

REMOVE = """rm -rf --one-file-system "$1" || { chmod -R u+rwx "$1"; rm -rf --one-file-system "$1"; }"""  # at any depth

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(function: str, *arguments: int | bytes | None) -> int:
    """Call a C function.  Raises OSError if it fails."""
    result = getattr(libc, function)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return int(result)


def main(report: int) -> None:
    os.set_inheritable(report, False)
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    order = marshal.loads(_read(int.from_bytes(_read(8), "big")))
    if not order["namespaces"]:  # then the kernel does not clean up after the program
        import signal  # takes a while

        signal.signal(SIGTERM, lambda number, frame: kill_and_remove(order["home"]))
        call("prctl", PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0)
    if os.getppid() != order["parent"]:
        os._exit(1)  # it was gone before prctl
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, kill this process first
    os.umask(0o022)
    os.environ.clear()
    if order["namespaces"]:
        unshare()
        build_root(order)
        life, lifeline = os.pipe()
        init = os.fork()
        if init:
            os.close(life)
            os.write(report, b"init %d\n" % init)
            os.waitpid(init, 0)  # returns when everything in the namespace is dead
        else:
            os.close(lifeline)
            call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
            if not select.select([life], [], [], 0)[0]:  # readable: the keeper was gone before prctl
                supervise(order, report, announce=False)
    else:
        os.mkdir(order["home"], 0o700)
        write_environment(order, order["home"] + "/venv")
        write_files(order, order["home"], NOBODY)
        if os.geteuid() == 0:
            os.chown(order["home"], NOBODY, NOBODY)
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        supervise(order, report, announce=True)
        kill_descendants()
    os._exit(0)


def supervise(order: dict[str, Any], report: int, *, announce: bool) -> None:
    """Fork the program, reap its processes, report how it ended."""
    program = os.fork()
    if program == 0:
        try:
            exec_program(order, report)
        except OSError as error:
            os.write(report, f"fault {error}\n".encode())
        os._exit(1)
    if announce:
        os.write(report, b"init %d\n" % program)
    libc.signal(SIGINT, SIG_IGN)  # from the program, where it is the same user; process 1 gets what it handles
    for stream in (0, 1, 2):
        os.close(stream)
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == program:
            break
    line = f"end {status} {usage.ru_utime + usage.ru_stime:.3f} {usage.ru_maxrss}\n"
    os.write(report, line.encode())


def exec_program(order: dict[str, Any], report: int) -> None:
    """Drop all remaining privileges and exec the program."""
    os.setsid()
    os.chdir(order["home"] + "/tmp")
    for what, soft, hard in order["limits"]:
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))
    if order["landlock"]:
        restrict_files(order)
    drop_rights(order)
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if order["filter"]:
        code = ctypes.create_string_buffer(order["filter"], len(order["filter"]))
        count = (len(code) // 8).to_bytes(8, sys.byteorder)  # struct sock_fprog: a short, padding, a pointer
        call("prctl", PR_SET_SECCOMP, 2, count + ctypes.addressof(code).to_bytes(8, sys.byteorder), 0, 0)
    os.write(report, b"start\n")
    os.execve(order["command"][0], order["command"], order["environment"])


def drop_rights(order: dict[str, Any]) -> None:
    """Root becomes the user nobody (inside namespaces: user 1000), without capabilities.

    One exception: outside namespaces, if root's interpreter is in a folder that nobody cannot read, the capability to
    bypass file modes stays; Landlock still limits what can be opened.
    """
    kept = 0
    if os.geteuid() == 0:
        user = PROGRAM_ID if order["namespaces"] else NOBODY
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        if not order["namespaces"]:
            os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        try:
            os.stat(order["interpreter"])
        except PermissionError:
            kept = 1 << CAP_DAC_READ_SEARCH
    words = (0x20080522, 0), (kept, kept, kept, 0, 0, 0)  # header; effective, permitted, inheritable, and their halves
    header, rights = (b"".join(word.to_bytes(4, sys.byteorder) for word in line) for line in words)
    call("capset", header, rights)
    if kept:
        call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0)


def unshare() -> None:
    """New namespaces.  Inside, the program is user 1000: the caller outside, or nobody where the caller is root."""
    keeper, caller, group = os.getpid(), os.geteuid(), os.getegid()
    one_line = f"{PROGRAM_ID} {{}} 1\n"
    two_lines = f"0 {{}} 1\n{PROGRAM_ID} {NOBODY} 1\n"
    lines = two_lines if caller == 0 and _nobody_exists() else one_line
    if caller == 0 and lines == two_lines:
        os.setgroups([])
    ready, go = os.pipe()
    helper = os.fork()  # stays outside, as only from there may root write two lines
    if helper == 0:
        os.close(go)
        os.read(ready, 1)
        texts = {"uid_map": lines.format(caller), "gid_map": lines.format(group)}
        if lines == one_line:
            texts = {"setgroups": "deny", **texts}
        for name, text in texts.items():
            with open(f"/proc/{keeper}/{name}", "w") as file:
                file.write(text)
        os._exit(0)
    call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    os.write(go, b"x")
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError("the user map was refused")
    os.close(ready)
    os.close(go)


def _nobody_exists() -> bool:
    """Whether the user namespace we are in knows the user nobody."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= NOBODY < first + count for first, _, count in ranges)


def build_root(order: dict[str, Any]) -> None:
    """Build a new root with ``order["readable"]`` read only, three devices, and /tmp in memory, and nothing else."""
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=1m,nr_inodes=4k")
    os.mkdir("/tmp/old")
    call("syscall", order["pivot_root"], b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    size = f"size={order['file_mb']}m,nr_inodes=4k,mode=700,uid={PROGRAM_ID},gid={PROGRAM_ID}"
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size.encode())
    write_files(order, "/", PROGRAM_ID)
    for path in order["readable"]:
        if os.path.islink("/old" + path):
            os.symlink(os.readlink("/old" + path), path)
        elif os.path.isdir("/old" + path):
            os.makedirs(path, exist_ok=True)
            call("mount", b"/old" + path.encode(), path.encode(), None, MS_BIND | MS_REC, None)
            set_attributes(path, AT_RECURSIVE, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    os.mkdir("/dev")
    os.symlink("/tmp", "/dev/shm")
    for path in DEVICES:
        os.close(os.open(path, os.O_CREAT))
        call("mount", b"/old" + path.encode(), path.encode(), None, MS_BIND, None)
        set_attributes(path, 0, ATTR_RDONLY | ATTR_NOSUID)  # its mode, not what is written to it
    write_environment(order, "/venv")
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    set_attributes("/", 0, ATTR_RDONLY | ATTR_NOSUID)
    call("sethostname", b"sandbox", 7)


def set_attributes(path: str, flags: int, attributes: int) -> None:
    """mount_setattr(2), which unlike a remount reaches the mounts below."""
    wanted = attributes.to_bytes(8, sys.byteorder) + bytes(24)
    call("syscall", SYS_MOUNT_SETATTR, -100, path.encode(), flags, wanted, len(wanted))


def write_environment(order: dict[str, Any], folder: str) -> None:
    """A virtual environment with no packages: the interpreter, and no start-up file of the machine's."""
    os.makedirs(f"{folder}/bin")
    os.symlink(order["interpreter"], f"{folder}/bin/python")
    with open(f"{folder}/pyvenv.cfg", "w") as file:
        file.write(f"home = {os.path.dirname(order['interpreter'])}\ninclude-system-site-packages = false\n")


def write_files(order: dict[str, Any], home: str, owner: int) -> None:
    """The program's files in its folder, ``home``/tmp; root gives all that is there to the user it will be."""
    folder = os.path.join(home, "tmp")
    os.makedirs(folder, exist_ok=True)
    for name, content in order["files"].items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    if os.geteuid() == 0:
        for place, _, names in os.walk(folder):
            for name in (".", *names):
                os.chown(os.path.join(place, name), owner, owner)


def restrict_files(order: dict[str, Any]) -> None:
    """Landlock (landlock(7)): only ``readable``, the folder and the devices can be opened; no file can be written."""
    version = call("syscall", SYS_LANDLOCK_CREATE, None, 0, 1)
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    words = [rights, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]  # files; TCP; signals, sockets
    rules = b"".join(word.to_bytes(8, sys.byteorder) for word in words)
    ruleset = call("syscall", SYS_LANDLOCK_CREATE, rules, len(rules), 0)
    allowed = dict.fromkeys([*order["readable"], order["home"]], LANDLOCK_READ_AND_RUN)
    allowed |= dict.fromkeys(DEVICES, LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE)
    for path, access in allowed.items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = access.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
            call("syscall", SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(place)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("syscall", SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def kill_descendants() -> None:
    """Kill all descendants; orphans become this process's children (subreaper), so repeat until there are none."""
    while True:
        for process in descendants(os.getpid()):
            try:
                os.kill(process, SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        time.sleep(0.001)


def kill_and_remove(home: str) -> None:
    """After the caller's death: kill all processes, then exec the command that removes the folder.

    Every thread of the caller that ends sends the signal again, which would kill that command, so it is ignored.
    """
    libc.signal(SIGTERM, SIG_IGN)
    call("prctl", PR_SET_PDEATHSIG, 0, 0, 0, 0)
    kill_descendants()
    os.execve("/bin/sh", ["sh", "-c", REMOVE, "sh", home], {})


def descendants(process: int) -> list[int]:
    """Pids of all processes below ``process``."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        return found
    return found + [below for child in found for below in descendants(child)]


def _read(count: int) -> bytes:
    """Exactly ``count`` bytes of standard input; the rest belongs to the program."""
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 20))
        if not part:
            raise EOFError("the order ended early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
