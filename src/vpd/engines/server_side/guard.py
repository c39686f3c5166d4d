"""Run as a program with a process group's number: ends the group once standard input is closed.

``vpd serve`` holds the other end, so its server ends with it, however it ends.  Standard library alone.
"""

import os
import signal
import sys
import time

PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL


def end_group(group: int, patience: float = PATIENCE) -> None:
    """SIGTERM to every process of the group, and SIGKILL to those that are still there after ``patience`` seconds."""
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(group, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                os.killpg(group, 0)  # nobody is left: ProcessLookupError
                time.sleep(0.05)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_group(int(sys.argv[1]))
