"""Who writes: the model being trained, or one behind an OpenAI-compatible endpoint."""

import concurrent.futures
import dataclasses
import http.client
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt

from vpd.engines import Engine
from vpd.errors import ConfigError, FeedbackError
from vpd.feedback import Written
from vpd.prompts import FittedText, Prompter
from vpd.settings import Settings
from vpd.types import Message, SampleKey

LOG = logging.getLogger("vpd")
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English: the endpoint's tokenizer is not known here
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
            written[row] = Written(completion.text, tokens=len(completion.tokens), thinking_open=thinking_open)
        return written

    def excess(self, conversation: Sequence[Message], max_tokens: int) -> int:
        return self._prompter.excess(conversation, max_tokens)

    def shorten(self, text: str, max_tokens: int) -> FittedText:
        return self._prompter.fit(text, max_tokens)


class EndpointWriter:
    """``POST endpoint/chat/completions``.  Raises FeedbackError after the last retry; no text is ever made up."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 2,
        concurrency: int = 8,
    ):
        self._url = endpoint.rstrip("/") + "/chat/completions"
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key_env is not None:
            if api_key_env not in os.environ:
                raise FeedbackError(
                    f"the environment variable {api_key_env} is not set", do="Set it to the critic's API key."
                )
            self._headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        local = urllib.parse.urlsplit(self._url).hostname in ("127.0.0.1", "::1", "localhost")
        no_proxy = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(*no_proxy)
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        keys: Sequence[SampleKey],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        def ask(messages: Sequence[Message]) -> Written:
            body = {
                "model": self._model,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": temperature,
            }
            return self._ask(json.dumps(body).encode())

        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(ask, conversations))

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

    def _ask(self, body: bytes) -> Written:
        for attempt in range(self._retries + 1):
            try:
                return _read(self._post(body))
            except (OSError, http.client.HTTPException, ValueError) as error:
                if attempt == self._retries:
                    raise FeedbackError(
                        f"the critic at {self._url} failed {attempt + 1} times",
                        got=_reason(error),
                        expected="an OpenAI-compatible chat completion",
                        do="See that the server runs and knows the model's name, then go on with --run.resume true.",
                    ) from error
                time.sleep(min(0.2 * 2**attempt, 5.0))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        with self._opener.open(request, timeout=self._timeout) as response:
            return json.loads(response.read())


@dataclass(frozen=True, kw_only=True)
class Endpoint(Settings, section="feedback"):
    """Where another model is asked: settings of every source that can do so."""

    endpoint: Annotated[str, "base URL; /chat/completions is appended"] = "http://127.0.0.1:8000/v1"
    model: Annotated[str, "the model's name at the endpoint"] = "default"
    api_key_env: Annotated[str | None, "environment variable that holds the key; null: none is sent"] = None
    timeout: Annotated[float, Gt(0), "seconds that one request may take"] = 120.0
    retries: Annotated[int, Ge(0), "further tries of a failed request; then the run stops with an error"] = 2
    concurrency: Annotated[int, Ge(1), "requests at once"] = 8

    def check(self) -> None:
        super().check()
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError("feedback: the endpoint is no URL", got=self.endpoint, expected="http://...")

    def endpoint_writer(self) -> EndpointWriter:
        """Who writes there.  Raises FeedbackError: the key's variable is not set."""
        return EndpointWriter(
            self.endpoint,
            self.model,
            api_key_env=self.api_key_env,
            timeout=self.timeout,
            retries=self.retries,
            concurrency=self.concurrency,
        )


def _read(answer: Any) -> Written:
    """The text and its cost.  Raises ValueError if the answer has another shape."""
    try:
        text = answer["choices"][0]["message"]["content"]
        tokens = answer.get("usage", {}).get("completion_tokens", 0)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"an answer without choices[0].message.content: {str(answer)[:120]}") from error
    if not isinstance(text, str) or not isinstance(tokens, int):
        raise ValueError(f"an answer whose content is no text: {str(answer)[:120]}")
    return Written(text, tokens=tokens)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
    return " ".join(str(error).split())[:200] or type(error).__name__
