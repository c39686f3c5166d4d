"""Programs in several processes that can gather, each in a process group of its own that a deadline kills."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHONPATH = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])


class Launch:
    """A program of Python in ``world`` processes; their output goes to ``folder/rank-N.log``."""

    def __init__(self, program: Sequence[str], world: int, folder: Path, **variables: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONUNBUFFERED": "1"}
            if world > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} | together
            with log.open("w") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, *program],
                        env=environment | variables,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=folder,
                        start_new_session=True,
                    )
                )

    @property
    def outputs(self) -> list[str]:
        """What each process has written so far."""
        return [log.read_text(errors="replace") for log in self._logs]

    def send(self, number: int, only: int | None = None) -> None:
        """Send a signal to every process that still runs, or to one rank alone."""
        for rank, process in enumerate(self._processes):
            if process.poll() is None and only in (rank, None):
                process.send_signal(number)

    def end(self, deadline: float) -> list[int]:
        """The exit codes; after ``deadline`` seconds whatever still runs is killed with its children."""
        until = time.monotonic() + deadline
        try:
            return [process.wait(max(until - time.monotonic(), 0.1)) for process in self._processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError("not ended in time:\n" + "\n".join(text[-3000:] for text in self.outputs)) from error
        finally:
            for process in self._processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
