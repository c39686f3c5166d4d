"""``vpd serve``: a vLLM server that fits a run, for as long as the command runs."""

import json
import logging
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.bundled import source_of
from vpd.config import Config
from vpd.engines.settings import VLLMSettings
from vpd.engines.vllm_server import MIDDLEWARE, VLLMServer, check_free
from vpd.errors import ConfigError, EngineError

log = logging.getLogger("vpd")

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank
LOGPROBS = 128  # most log-probs a token that a remote teacher may be asked for
PROBE = """
import importlib.util, json
import torch
found = importlib.util.find_spec("vllm") is not None
print(json.dumps([found, torch.cuda.is_available()]))
"""
#: On a CPU a seeded request whose prompt is split by chunked prefill ends the server (vLLM 0.32).
FOR_CPU = ("--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens=8192")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The server's command and what is added to its environment."""

    command: tuple[str, ...]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()


def serve(config: Config) -> None:
    """Start the server, say what was done, and stop it at Ctrl-C, SIGTERM or SIGHUP.

    Raises ConfigError, EngineError and StorageError.
    """
    settings = config.engine
    if not isinstance(settings, VLLMSettings):
        raise ConfigError("vpd serve starts a vLLM server", got="another engine", do="Set engine.name to vllm.")
    check_free(settings.url)
    made = plan(config, settings)
    folder = Path(settings.sync_dir)
    with _stop_signals() as stop, VLLMServer(made.command, made.environment, url=settings.url, folder=folder) as server:
        for line in (*made.notes, f"starting {shlex.join(made.command)}", f"its log is {server.log}"):
            log.info(line)
        started = time.monotonic()
        if server.wait_until_ready(settings.start_timeout, stop.is_set):
            log.info(
                "ready after %.0f s at %s; vpd train and vpd eval with these settings use it. Ctrl-C stops it.",
                *(time.monotonic() - started, settings.url),
            )
        while not stop.wait(0.5):
            server.check_alive()
    log.info("the server is stopped, and no process of it is left")


def plan(config: Config, settings: VLLMSettings) -> Plan:
    """How a server for this run is started."""
    python = settings.python or sys.executable
    on_gpu = _probe(python)
    dtype = settings.dtype or config.model.dtype
    if dtype == "float64":
        raise ConfigError("vLLM serves no float64", got="model.dtype float64", do="Set engine.dtype to float32.")
    at = urllib.parse.urlsplit(settings.url)
    arguments = [
        f"--model={source_of(config.model.name_or_path)}",
        f"--served-model-name={settings.model}",
        f"--host={at.hostname}",
        f"--port={at.port}",
        f"--dtype={dtype}",
        f"--max-num-seqs={config.rollout.max_rows}",
        f"--max-logprobs={LOGPROBS}",
        "--logprobs-mode=processed_logprobs",
        "--generation-config=vllm",
        f"--middleware={MIDDLEWARE}",
    ]
    if settings.max_model_len is not None:
        arguments.append(f"--max-model-len={settings.max_model_len}")
    if config.model.lora is not None:
        rank = next((rank for rank in RANKS if rank >= config.model.lora.r), config.model.lora.r)
        arguments += ["--enable-lora", f"--max-lora-rank={rank}", "--max-loras=2", "--max-cpu-loras=4"]
    arguments += [] if on_gpu else FOR_CPU
    command = (python, "-m", "vllm.entrypoints.openai.api_server", *arguments, *settings.server_args)
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",  # the commands for weights; vpd_token.py guards them
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    where = "on a GPU" if on_gpu else "on the CPU"
    return Plan(command=command, environment=environment, notes=(f"vLLM of {python}, {where}, in {dtype}",))


def _probe(python: str) -> bool:
    """Whether vLLM will run on a GPU.  Raises EngineError: there is no vLLM."""
    hint = "Name the python of an environment that has vllm in engine.python (docs/vllm.md says how to make one)."
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"cannot run {python}", got=str(error), do=hint) from error
    found: list[Any] = [False]
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
    if not found[0]:
        lines = done.stderr.strip().splitlines()
        raise EngineError(f"{python} has no package vllm", got=lines[-1] if lines else None, do=hint)
    return bool(found[1])


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
