"""A vLLM server in a thread: the requests that vpd makes, answered by a tiny model whose weights it is sent.

It computes what it was sent and nothing else, so a server that is stale or half-updated gives itself away by its
numbers alone.  ``faults`` are what it does instead of answering, by path: each is used up once.
"""

import contextlib
import copy
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vpd.model import lora


@dataclass
class FakeVLLM:
    """What the server is and what it was asked.

    ``keep(name)`` says which tensors a reload leaves as they were, ``alter`` changes an answer before it is sent.
    A fault is "drop" (the link ends without an answer), "half" (it ends in the middle of one), "wait" (no answer while
    the test runs), or (status, text).  A sample waits ``latency`` seconds, beside the others.
    """

    model: Any
    window: int = 64
    dtype: str = "torch.float64"
    logprobs_mode: str = "processed_logprobs"
    development: bool = True
    adapters: bool = True
    token: str | None = None
    instance: str = "one"
    keep: Callable[[str], bool] = lambda name: False
    alter: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
    encode: Callable[[str], list[int]] = lambda text: []
    template: Callable[[list[Any]], list[int]] = lambda messages: []
    latency: float = 0.0
    most_logprobs: int = 100_000
    faults: dict[str, list[Any]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    paused: bool = False
    busy: int = 0
    most_at_once: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked if not path.startswith(("/v1/models", "/server_info"))]

    def bodies(self, *names: str) -> list[Any]:
        """Of the requests for samples (``seed``) or scores (``prompt_logprobs``)."""
        return [body for _, body in self.asked if isinstance(body, dict) and all(name in body for name in names)]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        place = path.partition("?")[0]
        if place == "/v1/models":
            cards = [{"id": name, "max_model_len": self.window} for name in ("policy", *self.loaded)]
            return 200, {"data": cards}
        if place == "/v1/completions":
            return self.complete(body)
        if place in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return self.adapter(place, body) if self.adapters else (404, {"detail": "Not Found"})
        if place == "/tokenize":
            messages = body.get("messages")
            return 200, {"tokens": self.encode(body["prompt"]) if messages is None else self.template(messages)}
        if not self.development:
            return 404, {"detail": "Not Found"}
        if place == "/server_info":
            config = {"dtype": self.dtype, "logprobs_mode": self.logprobs_mode}
            return 200, {"vllm_config": {"model_config": config, "instance_id": self.instance}}
        self.paused = {"/pause": True, "/resume": False}.get(place, self.paused)
        if place == "/collective_rpc":
            return self.reload(Path(body["kwargs"]["weights_path"]))
        return 200, {}

    def reload(self, folder: Path) -> tuple[int, Any]:
        assert self.paused, "weights were changed while requests might run"
        found = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        own = self.model.state_dict()
        for name, value in found.items():
            if not self.keep(name):
                own[name].copy_(value)
        return 200, {"results": [None]}

    def adapter(self, place: str, body: Any) -> tuple[int, Any]:
        name = body["lora_name"]
        if place == "/v1/unload_lora_adapter":
            del self.loaded[name]
            return 200, f"Success: {name} removed"
        if name in self.loaded:
            return 400, {"error": {"message": "has already been loaded"}}
        self.loaded[name] = lora.merge_saved(copy.deepcopy(self.model), body["lora_path"])
        return 200, f"Success: {name} added"

    @torch.no_grad()
    def complete(self, body: Any) -> tuple[int, Any]:
        if body["model"] not in ("policy", *self.loaded):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        model = self.loaded.get(body["model"], self.model)
        tokens = list(body["prompt"])
        if body.get("prompt_logprobs", 0) > self.most_logprobs:
            return 400, {"error": {"message": f"greater than max allowed: {self.most_logprobs}"}}
        if "prompt_logprobs" in body:
            return 200, {"choices": [{"prompt_logprobs": self.score(model, tokens, body["prompt_logprobs"])}]}
        if not 0 <= body["seed"] < 2**63:
            return 400, {"error": {"message": "seed must be a signed 64-bit number"}}
        draw, made, logprobs = torch.Generator().manual_seed(body["seed"]), [], []
        while len(made) < body["max_tokens"] and (not made or made[-1] not in body["stop_token_ids"]):
            logits = model(torch.tensor([tokens + made])).logits[0, -1].double()
            logp = torch.log_softmax(logits / max(body["temperature"], 1e-6), -1)
            made.append(int(torch.multinomial(logp.exp(), 1, generator=draw)))
            logprobs.append(float(logp[made[-1]]))
        return 200, self.alter(
            {
                "choices": [
                    {
                        "token_ids": made,
                        "prompt_token_ids": tokens,
                        "logprobs": {"token_logprobs": logprobs},
                        "finish_reason": "stop" if made[-1] in body["stop_token_ids"] else "length",
                    }
                ]
            }
        )

    def score(self, model: Any, tokens: list[int], k: int) -> list[Any]:
        logp = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
        places: list[Any] = [None]
        for row, token in zip(logp, tokens[1:], strict=False):
            likeliest = dict.fromkeys([token, *row.topk(k).indices.tolist()] if k else [token])
            places.append({str(one): {"logprob": float(row[one])} for one in likeliest})
        return places


def _handler(server: FakeVLLM) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve(None)

        def do_POST(self) -> None:
            self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null"))

        def _serve(self, body: Any) -> None:
            with server.lock:
                server.asked.append((self.path, body))
                faults = server.faults.get(self.path.partition("?")[0], [])
                fault = faults.pop(0) if faults else None
                server.busy += 1
                server.most_at_once = max(server.most_at_once, server.busy)
            status, text = self._answer(body, fault)
            with server.lock:
                server.busy -= 1  # before it is sent: whoever gets it may ask again at once
            if fault != "drop":
                self._send(status, text.encode(), half=fault == "half")

        def _answer(self, body: Any, fault: Any) -> tuple[int, str]:
            if server.token is not None and self.headers["Authorization"] != f"Bearer {server.token}":
                return 401, '{"error": "Unauthorized"}'
            if fault == "wait":
                server.ended.wait(60)
            if fault in ("wait", "drop"):
                return 200, ""
            if isinstance(fault, tuple):
                return fault[0], json.dumps({"error": {"message": fault[1]}})
            if isinstance(body, dict) and "seed" in body:
                time.sleep(server.latency)
            with server.lock:
                status, found = server.answer(self.path, body)
            return status, found if isinstance(found, str) else json.dumps(found)  # a command's may be a sentence

        def _send(self, status: int, data: bytes, *, half: bool = False) -> None:
            with contextlib.suppress(OSError):  # whoever asked may have given up
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if half else data)

        def log_message(self, *arguments: Any) -> None: ...

    return Handler


class _Listening(http.server.ThreadingHTTPServer):
    request_queue_size = 256  # links that wait to be taken; more are refused


@contextlib.contextmanager
def serving(server: FakeVLLM) -> Iterator[str]:
    """The address of the fake while it answers."""
    with _Listening(("127.0.0.1", 0), _handler(server)) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            server.ended.set()
            listening.shutdown()
