"""One request to an OpenAI-compatible endpoint: bounded in time as a whole, and its answer read strictly.

urllib's timeout is one of each read, so that an endpoint that sends a byte a second would hold a run for ever.  Here
every read gets what is left of the request's time.  Redirects are not followed: a POST that is redirected is no POST
any more, and the key would go along to wherever they lead.
"""

import contextlib
import datetime
import email.utils
import functools
import http.client
import io
import json
import math
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from vpd.feedback import Written

AGAIN = (408, 409, 425, 429)  # the client errors that may pass; all others are final
SHOWN = 300  # bytes of a refusal
MOST_TOKENS = 2**31  # a larger count is none
MOST_BYTES = 2**24  # of an answer


class RefusedError(OSError):
    """The endpoint answered with an HTTP status that is no success.

    ``retry_after``: the seconds after which it wants to be asked again, None where it does not say.
    """

    def __init__(self, status: int, text: str, retry_after: float | None = None):
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.retry_after = retry_after

    @property
    def final(self) -> bool:
        """Whether the same request would be refused again."""
        return self.status < 500 and self.status not in AGAIN


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """What opens requests to ``url``; a proxy of the environment is asked for what is not on this machine."""
    local = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    no_proxy = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_HTTP, _HTTPS, _NoRedirects, *no_proxy)


def post(opener: urllib.request.OpenerDirector, request: urllib.request.Request, *, timeout: float) -> Written:
    """The text that answers a request, within ``timeout`` seconds.

    Raises RefusedError, what a link raises (OSError, HTTPException), and ValueError for an answer of another shape.
    """
    try:
        with opener.open(request, timeout=timeout) as response:
            body = response.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        text = b""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            text = error.read(SHOWN)
        wait = seconds_of(error.headers.get("Retry-After"))
        raise RefusedError(error.code, text.decode(errors="replace"), wait) from error
    except TimeoutError as error:
        raise TimeoutError(f"timed out: no whole answer in {timeout:g} seconds") from error
    if len(body) > MOST_BYTES:
        raise ValueError(f"an answer of more than {MOST_BYTES} bytes")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"an answer that is no JSON: {body[:120].decode(errors='replace')!r}") from error
    return read_answer(answer)


def read_answer(answer: Any) -> Written:
    """The text of a chat completion and its cost (0: unknown).  Raises ValueError if the answer has another shape.

    No content, as in a refusal or a call of a tool, is an empty text.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content") if {"tool_calls", "refusal"} & message.keys() else message["content"]
        usage, ended = answer.get("usage"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer without choices[0].message.content: {str(answer)[:120]}") from error
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = count if type(count) is int and 0 < count < MOST_TOKENS else 0
    return Written(_text(content), tokens=tokens, clipped=ended == "length")


def _text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, of which those of type text count, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"an answer whose content is neither text nor a list of parts: {str(content)[:120]}")
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"an answer with a part of type text without text: {str(content)[:120]}")
    return "".join(map(str, texts))


def seconds_of(header: str | None) -> float | None:
    """The header Retry-After, seconds or a date of HTTP, as seconds from now; None where it says nothing.

    >>> seconds_of("3"), seconds_of("soon")
    (3.0, None)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        seconds = date.timestamp() - time.time()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


class _Receiver(io.RawIOBase):
    """What a socket receives until a deadline; then TimeoutError."""

    def __init__(self, received: io.RawIOBase, link: socket.socket, deadline: float):
        self._received = received
        self._link = link
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._link.settimeout(left)
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer whose status, headers and body are all read before the deadline."""

    def __init__(self, sock: socket.socket, *arguments: Any, deadline: float, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Receiver(self.fp.detach(), sock, deadline))


class _Bounded(urllib.request.AbstractHTTPHandler):
    """Opens links whose answers have a deadline."""

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        def link(host: str, *, timeout: float = 0.0, **rest: Any) -> Any:
            made = http_class(host, timeout=timeout, **rest)
            made.response_class = functools.partial(_Response, deadline=time.monotonic() + timeout)
            return made

        return super().do_open(link, req, **options)


class _HTTP(_Bounded, urllib.request.HTTPHandler): ...


class _HTTPS(_Bounded, urllib.request.HTTPSHandler): ...


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None
