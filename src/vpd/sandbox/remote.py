"""A sandbox that is a service: SandboxFusion's ``POST /run_code`` (https://bytedance.github.io/SandboxFusion), or one
with the same interface.  The service is responsible for the isolation of programs."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from vpd.errors import ConfigError, SandboxError
from vpd.sandbox import Outcome, Program, Status, ran_out_of_memory
from vpd.sandbox.pool import run_each

CHUNK = 1 << 16


class RemoteSandbox:
    """Sends ``workers`` programs at a time and waits ``margin_seconds`` longer than each program's own limit."""

    def __init__(self, *, url: str = "http://127.0.0.1:8080", workers: int = 8, margin_seconds: float = 30.0):
        if not url.startswith(("http://", "https://")):
            raise ConfigError("the sandbox's address is not a URL", got=url, expected="http://host:port")
        if workers < 1:
            raise ConfigError("the sandbox has too few workers", got=workers, expected="at least 1")
        self.url = url.rstrip("/")
        self.workers = workers
        self.margin_seconds = margin_seconds
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment

    def describe(self) -> str:
        return f"sandbox: the service at {self.url}, which is responsible for isolation; {self.workers} at once"

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        return run_each(self._run, programs, self.workers)

    def _run(self, program: Program) -> Outcome:
        limits = program.limits
        order = {
            "language": "python",
            "code": program.source,
            "stdin": program.stdin,
            "files": {
                name: base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()
                for name, text in program.files.items()
            },
            "run_timeout": limits.seconds,
            "memory_limit_MB": limits.memory_mb,
        }
        began = time.monotonic()
        most = (16 * limits.output_kb + 64) << 10  # both streams, escaped, and what is around them
        answer = self._post(json.dumps(order).encode(), limits.seconds + self.margin_seconds, most)
        if answer is None:
            return Outcome(status="output", exit_code=None, stdout="", stderr="", seconds=time.monotonic() - began)
        try:
            return _outcome(answer, limits.output_kb << 10)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SandboxError(
                "the sandbox service returned an answer that cannot be read",
                got=repr(answer)[:200],
                expected="status and run_result, as SandboxFusion's /run_code",
            ) from error

    def _post(self, data: bytes, seconds: float, most: int) -> Any:
        """The answer as parsed JSON; None if it is longer than ``most`` bytes."""
        request = urllib.request.Request(
            f"{self.url}/run_code", data=data, headers={"Content-Type": "application/json"}, method="POST"
        )
        deadline = time.monotonic() + seconds
        body = bytearray()
        try:
            with self._opener.open(request, timeout=seconds) as reply:
                while chunk := reply.read1(CHUNK):
                    body += chunk
                    if len(body) > most:
                        return None
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"no whole answer in {seconds:g} seconds")
            return json.loads(body)
        except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors, bad JSON is a ValueError
            raise SandboxError(
                f"the sandbox service at {self.url} failed", got=error, do="Start it, or correct its address."
            ) from error


def _outcome(answer: dict[str, Any], most: int) -> Outcome:
    if answer["status"] == "SandboxError":
        raise SandboxError("the sandbox service failed to run a program", got=str(answer["message"])[:200])
    result = answer["run_result"]
    texts = [str(result[name] or "") for name in ("stdout", "stderr")]
    code = result["return_code"]
    status: Status = "error"
    if result["status"] == "TimeLimitExceeded":
        status, code = "timeout", None
    elif any(len(text.encode("utf-8", "replace")) > most for text in texts):
        status, code = "output", None
    elif code == 0:
        status = "ok"
    elif ran_out_of_memory(int(code), texts[1]):
        status = "memory"
    elif code < 0:
        status = "killed"
    stdout, stderr = (text.encode("utf-8", "replace")[:most].decode("utf-8", "replace") for text in texts)
    return Outcome(
        status=status, exit_code=code, stdout=stdout, stderr=stderr, seconds=float(result["execution_time"] or 0.0)
    )
