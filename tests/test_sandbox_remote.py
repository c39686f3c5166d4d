"""The remote sandbox against a local service that speaks SandboxFusion's form."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vpd.errors import ConfigError, SandboxError
from vpd.sandbox import Limits, Program
from vpd.sandbox.remote import RemoteSandbox

Answer = Callable[[dict[str, Any]], Any]


def reply(**result: Any) -> dict[str, Any]:
    run = {"status": "Finished", "execution_time": 0.5, "return_code": 0, "stdout": "", "stderr": "", **result}
    return {"status": "Success" if run["return_code"] == 0 else "Failed", "message": "", "run_result": run}


@pytest.fixture
def service() -> Iterator[Callable[[Answer], RemoteSandbox]]:
    servers = []

    def serve(answer: Answer) -> RemoteSandbox:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/run_code"
                order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = answer(order)
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                with contextlib.suppress(BrokenPipeError):  # the client has given up, as a test wants
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return RemoteSandbox(url=f"http://127.0.0.1:{server.server_port}/", workers=4, margin_seconds=1.0)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_programs_go_over_whole_and_come_back_in_order(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # a proxy that would fail
    orders = []

    def answer(order: dict[str, Any]) -> Any:
        orders.append(order)
        time.sleep(0.2 if order["code"] == "0" else 0)
        return reply(stdout=order["code"] + order["stdin"])

    sandbox = service(answer)
    limits = Limits(seconds=2.5, memory_mb=99)
    programs = [Program(source=str(n), stdin="in", files={"a.txt": "é"}, limits=limits) for n in range(6)]
    outcomes = sandbox.run(programs)
    assert [outcome.stdout for outcome in outcomes] == [f"{n}in" for n in range(6)]
    assert {outcome.status for outcome in outcomes} == {"ok"} and outcomes[0].seconds == 0.5
    assert orders[0]["run_timeout"] == 2.5 and orders[0]["memory_limit_MB"] == 99 and orders[0]["language"] == "python"
    assert base64.b64decode(orders[0]["files"]["a.txt"]).decode() == "é"
    assert sandbox.url in sandbox.describe() and sandbox.run([]) == []


@pytest.mark.parametrize(
    ("result", "status", "code"),
    [
        ({}, "ok", 0),
        ({"return_code": 3}, "error", 3),
        ({"return_code": -11}, "killed", -11),
        ({"return_code": 1, "stderr": "Traceback\nMemoryError\n"}, "memory", 1),
        ({"status": "TimeLimitExceeded", "return_code": None, "stdout": None}, "timeout", None),
        ({"stdout": "x" * 1025}, "output", None),
        ({"stdout": "x" * 10**6}, "output", None),
    ],
)
def test_its_words_become_ours(service: Any, result: dict[str, Any], status: str, code: int | None) -> None:
    [outcome] = service(lambda order: reply(**result)).run([Program(source="", limits=Limits(output_kb=1))])
    assert (outcome.status, outcome.exit_code) == (status, code)
    assert len(outcome.stdout) <= 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"status": "SandboxError", "message": "no disk"}, "no disk"),
        ({"status": "Success"}, "cannot be read"),
        ([], "cannot be read"),
        (reply(return_code="zero"), "cannot be read"),
        (b"<html>", "failed"),
    ],
)
def test_a_fault_of_the_service_is_an_error_and_no_grade(service: Any, content: Any, message: str) -> None:
    with pytest.raises(SandboxError, match=message):
        service(lambda order: content).run([Program(source="")])


def test_a_service_that_is_absent_or_silent_is_an_error_in_bounded_time(service: Any) -> None:
    with pytest.raises(SandboxError, match=r"127\.0\.0\.1:1 failed"):
        RemoteSandbox(url="http://127.0.0.1:1").run([Program(source="")])
    began = time.monotonic()
    with pytest.raises(SandboxError, match="failed"):
        service(lambda order: time.sleep(4)).run([Program(source="", limits=Limits(seconds=0.5))])
    assert time.monotonic() - began < 4
    with pytest.raises(ConfigError, match="not a URL"):
        RemoteSandbox(url="file:///etc/passwd")
    assert RemoteSandbox().url == "http://127.0.0.1:8080"
