"""Runs inside the vLLM server that ``vpd serve`` starts: every request needs the token.

vLLM asks for its API key under ``/v1`` alone; the commands for weights, which run any method of a worker, stand beside
it.  This file is imported in the server's environment and uses nothing but the standard library.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health",)  # what a caller without the token may ask for


class RequireToken:
    """ASGI middleware: ``Authorization: Bearer`` with the value of VLLM_API_KEY, or HTTP 401."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app
        self._wanted = b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN or self._permits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _permits(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._wanted)
