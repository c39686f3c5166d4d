"""Who writes: the model being trained, or one behind an OpenAI-compatible endpoint."""

import concurrent.futures
import dataclasses
import http.client
import json
import logging
import math
import os
import re
import threading
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from vpd.engines import Engine
from vpd.errors import ConfigError, FeedbackError
from vpd.feedback import Written, chat
from vpd.prompts import FittedText, Prompter
from vpd.settings import Settings
from vpd.types import Message, SampleKey

LOG = logging.getLogger("vpd")
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English: the endpoint's tokenizer is not known here
LONGEST_PAUSE = 60.0  # seconds before a request is repeated
CONTROL = re.compile(  # control tokens of Llama, Qwen, DeepSeek, Gemma and Mistral, for the same reason
    r"<[|\N{FULLWIDTH VERTICAL LINE}][^<>\s]{1,60}[|\N{FULLWIDTH VERTICAL LINE}]>|</?s>|<(?:bos|eos|pad|unk)>"
    r"|</?think>|</?tool_(?:call|response)>|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK)\]"
)


class ModelWriter:
    """The current model, writing for the feedback source of number ``source``.

    ``seed`` is the run's.  A text samples with it, with the key of the attempt that it is about, and with the source's
    number, so that two sources never share their randomness.
    """

    def __init__(self, engine: Engine, prompter: Prompter, *, seed: int, source: int = 0):
        self._engine = engine
        self._prompter = prompter
        self._seed = seed
        self._source = source

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        keys: Sequence[SampleKey],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        """As in :class:`Writer`; where a prompt leaves no room in the window, no text, and a warning says so."""
        fitting = [row for row, messages in enumerate(conversations) if not self.excess(messages, max_tokens)]
        if len(fitting) < len(conversations):
            LOG.warning(
                "feedback source %d: %d of %d prompts leave no room for %d tokens in the model's window: no text",
                *(self._source + 1, len(conversations) - len(fitting), len(conversations), max_tokens),
            )
        if not fitting:
            return [Written("") for _ in conversations]
        prompts = [self._prompter.conversation(conversations[row], max_tokens) for row in fitting]
        completions = self._engine.generate(
            prompts,
            keys=[
                dataclasses.replace(keys[row], phase=f"{keys[row].phase}/feedback-{self._source}") for row in fitting
            ],
            seed=self._seed,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        written = [Written("") for _ in conversations]
        for row, completion, prompt in zip(fitting, completions, prompts, strict=True):
            thinking_open = self._prompter.opens_thinking(prompt)
            clipped = completion.finish == "length"
            written[row] = Written(
                completion.text, tokens=len(completion.tokens), thinking_open=thinking_open, clipped=clipped
            )
        return written

    def excess(self, conversation: Sequence[Message], max_tokens: int) -> int:
        return self._prompter.excess(conversation, max_tokens)

    def shorten(self, text: str, max_tokens: int) -> FittedText:
        return self._prompter.fit(text, max_tokens)


class EndpointWriter:
    """``POST endpoint/chat/completions``.  Raises FeedbackError after the last retry; no text is ever made up.

    ``role`` is what errors call the model there; ``begun``: a run is under way, which errors say how to continue.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 2,
        concurrency: int = 8,
        role: str = "critic",
        begun: bool = True,
    ):
        self._url = endpoint.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key_env is not None:
            self._headers["Authorization"] = f"Bearer {_key_in(api_key_env, role)}"
        self._opener = chat.opener_for(self._url)
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._role = role
        self._begun = begun

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        keys: Sequence[SampleKey],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        """As in :class:`Writer`; the first error, or an interrupt, ends the pauses of the other requests."""
        options = {"max_tokens": max_tokens, "temperature": temperature}
        bodies = [{"model": self._model, "messages": list(messages), **options} for messages in conversations]
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            asked = [pool.submit(self._ask, json.dumps(body).encode(), stop) for body in bodies]
            try:
                for one in concurrent.futures.as_completed(asked):
                    one.result()
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return [one.result() for one in asked]

    def excess(self, conversation: Sequence[Message], max_tokens: int) -> int:
        """0: the window of a model behind an endpoint is not known here."""
        return 0

    def shorten(self, text: str, max_tokens: int) -> FittedText:
        """Lengths are estimates; what looks like a control token of a common chat template gets a gap."""
        text, control = CONTROL.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        room, length = max_tokens * CHARACTERS_PER_TOKEN, math.ceil(len(text) / CHARACTERS_PER_TOKEN)
        if len(text) <= room:
            return FittedText(text=text, length=length, control_tokens=control)
        shortened = f"{text[: room // 2]} [...] {text[len(text) - room // 2 :]}"
        return FittedText(text=shortened, length=max_tokens, cut=length - max_tokens, control_tokens=control)

    def _ask(self, body: bytes, stop: threading.Event) -> Written:
        for attempt in range(self._retries + 1):
            # one for each try: urllib changes a request that goes by a proxy, and the third would go unencrypted
            request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
            try:
                return chat.post(self._opener, request, timeout=self._timeout)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if attempt == self._retries or (isinstance(error, chat.RefusedError) and error.final):
                    raise self._failed(error, attempt + 1) from error
                pause(stop, _seconds_before(attempt + 1, error))
            if stop.is_set():
                break
        raise FeedbackError("a request was given up")  # another one's error, or an interrupt, is what is shown

    def _failed(self, error: Exception, attempts: int) -> FeedbackError:
        times = "once" if attempts == 1 else f"{attempts} times"
        refused = isinstance(error, chat.RefusedError) and error.final
        resume = "; a run that has begun goes on with --run.resume true" if self._begun else ""
        return FeedbackError(
            f"the {self._role} at {self._url} {'refused the request' if refused else f'failed {times}'}",
            got=_reason(error),
            expected="an OpenAI-compatible chat completion",
            do=f"{_advice(error)}{resume}.",
        )


def pause(stop: threading.Event, seconds: float) -> None:
    """Wait before a request is repeated; ``stop`` ends it."""
    stop.wait(seconds)


@dataclass(frozen=True, kw_only=True)
class Endpoint(Settings, section="feedback"):
    """Where another model is asked: settings of every source that can do so."""

    endpoint: Annotated[str, "base URL; /chat/completions is appended"] = "http://127.0.0.1:8000/v1"
    model: Annotated[str, "the model's name at the endpoint"] = "default"
    api_key_env: Annotated[str | None, "environment variable that holds the key; null: none is sent"] = None
    timeout: Annotated[float, Gt(0), "seconds that one request may take, to the last byte of its answer"] = 120.0
    retries: Annotated[int, Ge(0), "further tries of a failed request; then the run stops with an error"] = 2
    concurrency: Annotated[int, Ge(1), "requests at once"] = 8

    def check(self) -> None:
        super().check()
        if not _is_url(self.endpoint):
            raise ConfigError(
                "feedback: the endpoint is no URL",
                got=self.endpoint.rpartition("@")[2],  # without a password
                expected="http://HOST:PORT/v1 or the like, without user and query",
            )

    def endpoint_writer(self, role: str, *, begun: bool = True) -> EndpointWriter:
        """Who writes there.  Raises FeedbackError: the key's variable is not set."""
        return EndpointWriter(
            self.endpoint,
            self.model,
            api_key_env=self.api_key_env,
            timeout=self.timeout,
            retries=self.retries,
            concurrency=self.concurrency,
            role=role,
            begun=begun,
        )

    def try_endpoint(self, role: str, prompt: Sequence[Message], *, max_tokens: int, temperature: float) -> None:
        """Ask for one text, so that a wrong address is known before any answer is sampled.  Raises FeedbackError."""
        key = SampleKey(phase="contact", step=0, task=0, sample=0)
        writer = self.endpoint_writer(role, begun=False)
        writer.write([prompt], keys=[key], max_tokens=max_tokens, temperature=temperature)


def _is_url(text: str) -> bool:
    """Whether requests can be sent to what ``/chat/completions`` is appended to."""
    try:
        at = urllib.parse.urlsplit(text)
        place = at.hostname and at.port != 0
    except ValueError:  # an open bracket, or a port that is no number
        return False
    plain = text.isascii() and text.isprintable() and not {" ", "?", "#", "@"} & {*text}
    return at.scheme in ("http", "https") and bool(place) and plain


def _key_in(variable: str, role: str) -> str:
    """The API key in an environment variable; the error for one that no header can hold does not show it."""
    do = f"Set it to the {role}'s API key."
    if variable not in os.environ:
        raise FeedbackError(f"the environment variable {variable} is not set", do=do)
    key = os.environ[variable].strip()
    if not (key and key.isascii() and key.isprintable()):
        raise FeedbackError(f"the environment variable {variable} holds no API key", do=do)
    return key


def _seconds_before(repetition: int, error: Exception) -> float:
    """How long to wait before a request is repeated: as the endpoint says, else 1, 2, 4 ... seconds."""
    asked = error.retry_after if isinstance(error, chat.RefusedError) else None
    return min(2.0 ** min(repetition - 1, 6) if asked is None else asked, LONGEST_PAUSE)


def _advice(error: Exception) -> str:
    status = error.status if isinstance(error, chat.RefusedError) else None
    if isinstance(error, TimeoutError):
        return "See that the server is not too busy (concurrency), or raise timeout"
    if status in (401, 403):
        return "See that api_key_env names the environment variable with a key for this model"
    if status == 429:
        return "Lower concurrency, or raise retries"
    return "See that the server runs and knows the model's name"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[: chat.SHOWN + 20] or type(error).__name__
