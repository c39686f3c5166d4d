"""A vLLM server as a process of ours: its own process group on this machine, with a token, and nothing left of it.

A second process, the guard, ends the group when this one is gone, a kill included.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from vpd.engines.server_side.guard import lives
from vpd.engines.vllm_client import VLLMClient
from vpd.errors import EngineError, StorageError

STATE, LOG_FILE = "server.json", "server.log"
SIDE = Path(__file__).parent / "server_side"
MIDDLEWARE = "vpd_token.RequireToken"
GONE = 45.0  # seconds that the guard may take


class VLLMServer:
    """``command`` run with ``environment`` added to ours; ``folder`` gets its log and ``server.json``.

    While it is open, the token is in ``server.json``, which only this user can read.  Raises EngineError: the address
    is taken, or the command cannot be run; StorageError.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, url: str, folder: Path):
        self.url = url
        self.log = folder / LOG_FILE
        self._command = list(command)
        self._environment = environment
        self._folder = folder
        self._token = secrets.token_urlsafe(24)
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        check_free(self.url)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_private(
                self._folder / STATE, json.dumps({"url": self.url, "token": self._token, "pid": os.getpid()})
            )
            with self.log.open("wb") as log:
                self._start(log)
        except OSError as error:
            self._forget()
            if error.filename == self._command[0]:
                raise EngineError(f"cannot run {self._command[0]}", got=error.strerror) from error
            raise StorageError(f"cannot write to {self._folder}", got=error.strerror) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self, timeout: float, stopped: Callable[[], bool]) -> bool:
        """Wait until the server answers; False: ``stopped`` said so before.  Raises EngineError."""
        client = VLLMClient(self.url, timeout=5.0, wait=0.2)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if stopped():
                return False
            self.check_alive()
            if _is_healthy(client):
                return True
        raise EngineError(
            f"the vLLM server does not answer after {timeout:g} s",
            got=_last_error(self.log),
            do=f"Look at {self.log}, or raise engine.start_timeout.",
        )

    def check_alive(self) -> None:
        """Raise EngineError if the server has ended."""
        code = self._server.poll() if self._server is not None else None
        if code is not None:
            raise EngineError(
                f"the vLLM server ended with code {code}", got=_last_error(self.log), do=f"Look at {self.log}."
            )

    def stop(self) -> None:
        """End every process of the group and wait for it.  Raises EngineError if one is left."""
        if self._guard is None or self._server is None:
            return
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        deadline = time.monotonic() + GONE
        while self._guard.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._forget()
        self._server.poll()
        if lives(self._server.pid):
            raise EngineError("a process of the vLLM server does not end", got=f"process group {self._server.pid}")
        self._guard = None

    def _start(self, log: IO[bytes]) -> None:
        paths = os.pathsep.join([str(SIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **self._environment, "VLLM_API_KEY": self._token, "PYTHONPATH": paths}
        self._server = subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._guard = subprocess.Popen(
            [sys.executable, "-I", str(SIDE / "guard.py"), str(self._server.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _forget(self) -> None:
        (self._folder / STATE).unlink(missing_ok=True)


def known_token(folder: Path, url: str) -> str | None:
    """The token of the server that ``vpd serve`` runs at ``url``, None if there is none.  Raises EngineError."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
        return str(state["token"]) if state["url"] == url else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"cannot read {path}, which vpd serve writes", got=str(error), do="Remove it.") from error


def check_free(url: str) -> None:
    """Raise EngineError where something answers at the address, or where it is not one of this machine alone."""
    at = urllib.parse.urlsplit(url)
    if at.scheme != "http" or at.hostname not in ("127.0.0.1", "localhost"):
        raise EngineError(
            "vpd serve starts a server for this machine alone",
            got=f"engine.url {url}",
            expected="http://127.0.0.1:PORT",
            do="Name a server elsewhere in engine.url for vpd train.",
        )
    with socket.socket() as probe:
        if probe.connect_ex((at.hostname, at.port or 0)) == 0:
            raise EngineError(f"something answers at {url} already", do="End it, or choose another port in engine.url.")


def _is_healthy(client: VLLMClient) -> bool:
    try:
        client.get("/health")
    except EngineError:
        return False
    return True


def _last_error(log: Path) -> str:
    """The last line of the server's log that names an error, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    return (errors or lines or ["nothing in its log"])[-1][-300:]


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
