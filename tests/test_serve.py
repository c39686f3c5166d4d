"""``vpd serve`` with a stand-in for vLLM: its command, its token, and that nothing of it is left, however it ends."""

import asyncio
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpd.cli import main
from vpd.config import load, parse
from vpd.engines.server_side.guard import end_group, lives
from vpd.engines.settings import VLLMSettings
from vpd.engines.vllm_server import SIDE, VLLMServer, known_token
from vpd.recipes.serve import plan

COMMAND = Path(__file__).with_name("fake_vllm_command.py")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The settings of a server on a free port, in the order of a command line."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(COMMAND))} "$@"\n')
    python.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"name": "vllm", "url": f"http://127.0.0.1:{port}", "python": python, "sync_dir": tmp_path / "sync"}
    return [word for key, value in settings.items() for word in (f"--engine.{key}", str(value))]


def started(words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vpd", "serve", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("ready"):
            return server
    raise AssertionError("it ended before it was ready")


def processes(words: list[str]) -> list[int]:
    """Of the stand-in and its child: its file in the command line, the mark in the environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
            environment = path.with_name("environ").read_bytes()
        except OSError:
            continue
        if str(COMMAND).encode() in line and str(words[5]).encode() in environment:
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.05)
    return condition()


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """What marks the processes of this test is in their environment."""
    monkeypatch.setenv("MARK", words[5])


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, ""), (signal.SIGTERM, "stubborn"), (signal.SIGHUP, ""), (signal.SIGKILL, "")],
)
def test_nothing_of_the_server_is_left_however_the_command_ends(
    words: list[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, kind: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", kind)
    server = started(words)
    token = Path(words[7]) / "server.json"
    assert len(processes(words)) == 2 and stat.S_IMODE(token.stat().st_mode) == 0o600
    server.send_signal(number)
    output, _ = server.communicate(timeout=60)
    assert wait_for(lambda: not processes(words))
    if number != signal.SIGKILL:
        assert server.returncode == 0 and "no process of it is left" in output and not token.exists()


#: Leaves a zombie in its own group: the child's parent is in another one, and looks only in the end.
ZOMBIE = """
import os, sys, time
group = os.getpgid(0)
if os.fork():
    time.sleep(60)
os.setpgid(0, 0)
child = os.fork()
if not child:
    os.setpgid(0, group)
    os._exit(0)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
os.waitpid(child, 0)
"""


def test_a_process_that_has_ended_and_that_nobody_reaps_does_not_count_as_left(tmp_path: Path) -> None:
    url, end = "http://127.0.0.1:1", tmp_path / "end"
    try:
        with VLLMServer([sys.executable, "-c", ZOMBIE, str(end)], {}, url=url, folder=tmp_path) as server:
            assert server._server is not None
            group = server._server.pid
            assert wait_for(lambda: "Z" in states(group).values())
        assert set(states(group).values()) == {"Z"} and not lives(group)
    finally:
        end.touch()
    assert wait_for(lambda: not states(group))


def test_a_group_lives_while_one_of_its_processes_does() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        assert lives(process.pid)
        process.kill()
        assert wait_for(lambda: not lives(process.pid)) and states(process.pid) == {process.pid: "Z"}
        began = time.monotonic()
        end_group(process.pid, patience=10)
        assert time.monotonic() - began < 9


def states(group: int) -> dict[int, str]:
    """The state of each process of a group, zombies included, by its number (``/proc/PID/stat``)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, own_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(own_group) == group:
                found[int(path.parent.name)] = state
    return found


def test_a_server_that_ends_is_one_line_with_the_error_of_its_log(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "ends")
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert "the vLLM server ended with code 3; got ValueError: no such model. Look at" in error
    assert not (Path(words[7]) / "server.json").exists()


def test_a_server_that_does_not_answer_is_stopped(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "silent")
    assert main(["serve", *words, "--engine.start_timeout", "1"]) == 2
    assert "does not answer after 1 s" in capsys.readouterr().err and not processes(words)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--engine.name", "embedded"], "vpd serve starts a vLLM server"),
        (["--engine.url", "http://10.0.0.1:80"], "for this machine alone; got engine.url http://10.0.0.1:80"),
        (["--engine.python", "/nowhere/python"], "cannot run /nowhere/python"),
        (["--engine.python", sys.executable], "has no package vllm"),
        (["--model.dtype", "float64"], "vLLM serves no float64"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    words: list[str], changes: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if changes == ["--engine.name", "embedded"]:
        words = []
    assert main(["serve", *words, *changes]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_address_that_is_taken_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", int(words[3].rpartition(":")[2]))):
        assert main(["serve", *words]) == 2
    assert "something answers at http://127.0.0.1:" in capsys.readouterr().err


def test_the_token_is_that_of_the_server_at_this_address(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "token": "abc", "pid": 1}))
    assert known_token(tmp_path, "http://127.0.0.1:1") == "abc"
    assert known_token(tmp_path, "http://127.0.0.1:2") is None and known_token(tmp_path / "x", "http://x:1") is None


def options_of(words: list[str], *more: str) -> list[str]:
    config = load(None, [*words, *more])
    assert isinstance(config.engine, VLLMSettings)
    return list(plan(config, config.engine).command)


def test_the_server_fits_the_run(words: list[str]) -> None:
    command = options_of(words, "--rollout.max_rows", "5", "--engine.max_model_len", "99")
    assert command[:3] == [words[5], "-m", "vllm.entrypoints.openai.api_server"]
    wanted = {
        "--served-model-name=policy", "--host=127.0.0.1", "--dtype=float32", "--max-num-seqs=5", "--max-model-len=99",
        "--logprobs-mode=processed_logprobs", "--generation-config=vllm", "--no-enable-chunked-prefill",
    }  # fmt: skip
    assert wanted <= set(command) and "--enable-lora" not in command
    adapted = options_of(words, "--model.lora", "{r: 24}", "--engine.server_args", "[--seed=3]")
    assert {"--enable-lora", "--max-lora-rank=32", "--seed=3"} <= set(adapted)


@pytest.mark.parametrize("method", ["vpd", "gated", "sdpo", "grpo", "hybrid"])
def test_a_run_on_a_server_takes_its_ratio_against_the_sampler_unless_it_is_set(method: str) -> None:
    def reference(engine: str, **more: str) -> str:
        made: Any = parse({"engine": {"name": engine}, "algorithm": {"name": method, **more}}).algorithm
        return str(made.importance_reference)

    assert (reference("vllm"), reference("embedded")) == ("sampler", "own")
    assert reference("vllm", importance_reference="own") == "own"


def test_gkd_has_no_ratio_on_a_server_either() -> None:
    made: Any = parse({"engine": {"name": "vllm"}, "algorithm": {"name": "gkd", "teacher_model": "x"}}).algorithm
    assert made.importance_reference == "own"


def middleware(token: str) -> Any:
    spec = importlib.util.spec_from_file_location("vpd_token", SIDE / "vpd_token.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    os.environ["VLLM_API_KEY"] = token
    try:
        return module.RequireToken(app)
    finally:
        del os.environ["VLLM_API_KEY"]


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/collective_rpc", b"Bearer abc", 200), ("/collective_rpc", b"Bearer abd", 401), ("/pause", b"", 401),
        ("/v1/completions", b"", 401), ("/health", b"", 200), ("/server_info", b"abc", 401),
    ],
)  # fmt: skip
def test_every_path_of_the_server_but_health_needs_the_token(path: str, header: bytes, status: int) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"authorization", header)]}
    asyncio.run(middleware("abc")(scope, None, send))
    assert sent[0]["status"] == status
