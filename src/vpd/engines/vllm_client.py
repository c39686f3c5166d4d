"""HTTP to a vLLM server: every fault is one line, and only what may be repeated is.

A seeded sample and a score change nothing at the server and are asked for again after a dropped link, a 5xx or half an
answer.  What changes the server (new weights, a pause) is sent once.  Each request has a link of its own, because
servers drop one that was idle for some seconds, and a request on such a link is neither sent nor refused.
"""

import contextlib
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vpd.errors import EngineError

Result = TypeVar("Result")

ATTEMPTS = 3
AGAIN = "Start the server again (vpd serve --config FILE), then go on with --run.resume true."


class HalfAnswerError(ValueError):
    """An answer that is not whole, or not one to what was asked."""


class RefusedError(EngineError):
    """The server answered with an HTTP status that is no success; ``status`` is it."""

    def __init__(self, what: str, *, status: int, got: str, do: str | None = None):
        super().__init__(what, got=got, do=do)
        self.status = status


@dataclass(frozen=True)
class Question(Generic[Result]):
    """A body to POST, and the function that makes the result of its answer; HalfAnswerError: it is asked again."""

    body: Mapping[str, Any]
    read: Callable[[Any], Result]


class VLLMClient:
    """``api_key`` is the server's token; ``wait`` seconds pass before the first repetition, twice as many after it."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0, wait: float = 0.5):
        self.url = url.rstrip("/")
        self._at = urllib.parse.urlsplit(self.url)
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._wait = wait
        self._open: set[http.client.HTTPConnection] = set()
        self._abandoned = threading.Event()
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        """What the server says at ``path``.  Raises EngineError."""
        return self._repeated("GET", path, Question({}, lambda answer: answer), threading.Event())

    def command(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """POST what changes the server, once.  Raises EngineError, after which nobody knows what the server did."""
        try:
            self._send("POST", path, body or {})
        except (OSError, http.client.HTTPException) as error:
            raise self._unanswered(path, error, 1) from error

    def ask(self, path: str, question: Question[Result]) -> Result:
        """POST what changes nothing at the server, up to ``ATTEMPTS`` times.  Raises EngineError."""
        return self._repeated("POST", path, question, threading.Event())

    def ask_all(self, path: str, questions: Sequence[Question[Result]], *, at_once: int) -> list[Result]:
        """:meth:`ask` for all, ``at_once`` at a time; the first error, or an interrupt, ends all of them at once."""
        if not questions:
            return []
        stop = threading.Event()
        with ThreadPoolExecutor(min(at_once, len(questions)), thread_name_prefix="vllm") as pool:
            futures = [pool.submit(self._repeated, "POST", path, question, stop) for question in questions]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in futures):  # a request may begin while others are ended
                    self._hang_up()
                    time.sleep(0.02)
        return [future.result() for future in futures]

    def abandon(self) -> None:
        """End the requests that other threads wait for; they raise EngineError, as does whatever is asked for later."""
        self._abandoned.set()
        self._hang_up()

    def _repeated(self, method: str, path: str, question: Question[Result], stop: threading.Event) -> Result:
        for attempt in range(1, ATTEMPTS + 1):
            if stop.is_set() or self._abandoned.is_set():
                break
            try:
                data = self._send(method, path, question.body)
                return question.read(json.loads(data) if data else None)
            except TimeoutError as error:
                raise self._unanswered(path, error, attempt) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if attempt == ATTEMPTS:
                    raise self._unanswered(path, error, attempt) from error
            except RefusedError as error:
                if error.status < 500 or attempt == ATTEMPTS:
                    raise
            stop.wait(self._wait * 2 ** (attempt - 1))
        raise EngineError("a request was given up")  # another one's error, or an interrupt, is what is shown

    def _send(self, method: str, path: str, body: Mapping[str, Any]) -> bytes:
        """One request and its answer.  Raises RefusedError, and what a link raises."""
        with self._link() as link:
            payload = json.dumps(body) if method == "POST" else None
            link.request(method, path, payload, self._headers)
            answer = link.getresponse()
            data = answer.read()
        if answer.status != 200:
            raise self._refused(path, answer.status, data)
        return data

    @contextlib.contextmanager
    def _link(self) -> Iterator[http.client.HTTPConnection]:
        kind = http.client.HTTPSConnection if self._at.scheme == "https" else http.client.HTTPConnection
        link = kind(str(self._at.hostname), self._at.port, timeout=self._timeout)
        with self._lock:
            self._open.add(link)
        try:
            yield link
        finally:
            with self._lock:
                self._open.discard(link)
            link.close()

    def _hang_up(self) -> None:
        """End every request in flight; the server drops what nobody waits for."""
        with self._lock:
            for link in self._open:
                if link.sock is not None:
                    with contextlib.suppress(OSError):
                        link.sock.shutdown(2)

    def _refused(self, path: str, status: int, data: bytes) -> RefusedError:
        text = " ".join(_message(data).split())[:300]
        if status in (401, 403):
            return RefusedError(
                f"the vLLM server at {self.url} refuses the token",
                status=status,
                got=f"HTTP {status}",
                do="Set engine.api_key_env to the variable that holds its token, or engine.sync_dir to the folder"
                " of vpd serve.",
            )
        return RefusedError(
            f"the vLLM server at {self.url} refused {path}", status=status, got=f"HTTP {status}: {text}"
        )

    def _unanswered(self, path: str, error: Exception, attempts: int) -> EngineError:
        times = "" if attempts == 1 else f" in {attempts} attempts"
        if isinstance(error, TimeoutError):
            do = "Raise engine.timeout, or look at the server's log."
            return EngineError(f"the vLLM server at {self.url} took more than {self._timeout:g} s for {path}", do=do)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, ConnectionRefusedError):
            return EngineError(f"no vLLM server answers at {self.url}", got=reason, do=AGAIN)
        return EngineError(f"no whole answer to {path} from the server at {self.url}{times}", got=reason, do=AGAIN)


def _message(data: bytes) -> str:
    """The text of an error in the form of OpenAI's API, or whatever there is."""
    text = data.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text
    return str(error["message"]) if isinstance(error, dict) and "message" in error else str(error)
