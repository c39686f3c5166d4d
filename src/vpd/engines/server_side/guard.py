"""Run as a program with a process group's number: ends the group once standard input is closed.

``vpd serve`` holds the other end, so its server ends with it, however it ends.  Standard library alone.
"""

import os
import signal
import sys
import time
from pathlib import Path

PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL


def end_group(group: int, patience: float = PATIENCE) -> None:
    """SIGTERM to every process of the group, and SIGKILL to those that are still there after ``patience`` seconds."""
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(group, number)
            deadline = time.monotonic() + patience
            while lives(group) and time.monotonic() < deadline:
                time.sleep(0.05)
    except ProcessLookupError:
        return


def lives(group: int) -> bool:
    """Whether a process of the group has not ended.

    One that has ended stays in its group until its parent has looked, and in a container without an init for good: such
    a zombie does not count.  Without ``/proc`` it does.
    """
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    processes = list(Path("/proc").glob("[0-9]*/stat"))
    return not processes or any(_is_of(group, process) for process in processes)


def _is_of(group: int, process: Path) -> bool:
    """By ``/proc/PID/stat``: the state is field 3 and the group field 5, after a name that may hold anything."""
    try:
        state, _, own_group = process.read_bytes().rpartition(b")")[2].split()[:3]
    except OSError:  # it ended meanwhile
        return False
    return int(own_group) == group and state not in (b"Z", b"X")


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_group(int(sys.argv[1]))
