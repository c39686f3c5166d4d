"""Who writes: the model, with which seeds, and an endpoint, what it is sent and how its faults are told."""

import contextlib
import email.utils
import http.server
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import RecordingEngine, chat_completion, endpoint, model_writer, scripted_prompter, write

from vpd.errors import ConfigError, FeedbackError
from vpd.feedback import Written, chat
from vpd.feedback.critique import Critic
from vpd.feedback.judge import Judge
from vpd.feedback.writers import EndpointWriter, ModelWriter
from vpd.types import SampleKey


def named(prompt: str, seed: int) -> str:
    return f"{prompt}#{seed}"


def seeds(*, source: int = 0, step: int = 0, seed: int = 0) -> list[int]:
    """The seeds of three texts with equal prompts, each about an attempt of its own."""
    engine = RecordingEngine(lambda prompt, seed: "x")
    keys = [SampleKey(phase="train", step=step, task=n // 2, sample=n % 2) for n in range(3)]
    write(ModelWriter(engine, scripted_prompter(), seed=seed, source=source), ["b", "b", "b"], keys)
    return [sample.seed for sample in engine.samples]


def test_every_text_has_a_seed_of_its_own_also_where_the_prompts_are_equal() -> None:
    assert len(set(seeds())) == 3


def test_seeds_differ_by_source_and_step_and_by_the_runs_seed_and_are_the_same_again() -> None:
    drawn = [seeds(source=n, step=step, seed=seed) for n in (0, 1) for step in (0, 1) for seed in (0, 1)]
    assert len({seed for texts in drawn for seed in texts}) == 24
    assert seeds(source=1, step=1, seed=1) == drawn[-1]


def test_a_text_does_not_share_its_randomness_with_the_attempt_that_it_is_about() -> None:
    assert not {SampleKey(phase="train", step=0, task=n // 2, sample=n % 2).seed(0) for n in range(3)} & set(seeds())


def test_texts_come_back_in_order_with_their_cost() -> None:
    engine = RecordingEngine(lambda prompt, seed: prompt.removeprefix("[user]").removesuffix("[assistant]").upper())
    written = write(model_writer(engine), ["why", "because"])
    assert [(w.text, w.tokens) for w in written] == [("WHY", 3), ("BECAUSE", 7)]


def test_the_engine_is_asked_once_for_all_texts_with_the_sources_settings() -> None:
    engine = RecordingEngine(named)
    writer = model_writer(engine)
    assert write(writer, []) == [] and engine.calls == []
    [cut, _] = write(writer, ["a", "b"], max_tokens=4, temperature=0.3)
    assert len(engine.calls) == 1
    assert {(s.max_tokens, s.temperature, s.top_p, s.top_k) for s in engine.samples} == {(4, 0.3, 1.0, None)}
    assert cut.text == "[use" and cut.tokens == 4


def test_an_endpoint_is_sent_each_conversation_whole() -> None:
    with endpoint(lambda body: (200, chat_completion(body["messages"][0]["content"].upper()))) as (url, posted):
        written = write(EndpointWriter(url + "//", "judge"), ["why", "how"], max_tokens=7, temperature=0.3)
    assert [w.text for w in written] == ["WHY", "HOW"]
    assert {one.path for one in posted} == {"/v1/chat/completions"}
    assert {one.headers["content-type"] for one in posted} == {"application/json"}
    assert not any("authorization" in one.headers for one in posted)
    assert sorted((one.body for one in posted), key=str) == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 7,
            "temperature": 0.3,
        }
        for text in ("how", "why")
    ]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before repeated requests, which take no time here."""
    made: list[float] = []
    monkeypatch.setattr("vpd.feedback.writers.pause", lambda stop, seconds: made.append(seconds))
    return made


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [({"completion_tokens": 3}, 3), ({}, 0), (None, 0), ([5], 0), ("5", 0)]
    + [({"completion_tokens": odd}, 0) for odd in (None, "?", -7, 1.5, True, 10**400, float("nan"))],
)
def test_a_good_answer_is_taken_whatever_it_says_that_it_cost(usage: Any, tokens: int) -> None:
    with endpoint(lambda body: (200, chat_completion("x", usage=usage))) as (url, _):
        [written] = write(EndpointWriter(url, "judge", retries=0), ["why"])
    assert written == Written("x", tokens=tokens)


def test_an_endpoint_that_does_not_count_its_tokens_costs_none() -> None:
    with endpoint(lambda body: (200, chat_completion("x"))) as (url, _):
        assert write(EndpointWriter(url, "judge"), ["why"]) == [Written("x")]


def of_message(message: Any, **choice: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, **choice}]}).encode()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "Mind "}, {"type": "text", "text": "the sign."}]}, "Mind the sign."),
        ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "No."}]}, "No."),
        ({"content": []}, ""),
        ({"content": None, "refusal": "I cannot."}, ""),
        ({"content": None}, ""),
        ({"tool_calls": [{"id": "1"}]}, ""),
    ],
)
def test_the_text_of_an_answer_may_be_in_parts_or_missing(message: Any, text: str) -> None:
    with endpoint(lambda body: (200, of_message(message))) as (url, posted):
        [written] = write(EndpointWriter(url, "judge", retries=0), ["why"])
    assert (written.text, len(posted)) == (text, 1)


def test_a_text_that_the_limit_of_tokens_ended_says_so() -> None:
    with endpoint(lambda body: (200, of_message({"content": "x"}, finish_reason="length"))) as (url, _):
        assert write(EndpointWriter(url, "judge"), ["why"]) == [Written("x", clipped=True)]
    engine = RecordingEngine(lambda prompt, seed: "long")
    assert [w.clipped for w in write(model_writer(engine), ["why"], max_tokens=2)] == [True]
    assert [w.clipped for w in write(model_writer(engine), ["why"], max_tokens=9)] == [False]


NO_CONTENT = "an answer without choices[0].message.content: "
NO_TEXT = "an answer whose content is neither text nor a list of parts: "


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (b'{"error":\n"no"}', NO_CONTENT + "{'error': 'no'}"),
        (of_message({}), NO_CONTENT),
        (of_message("x"), NO_CONTENT),
        (of_message({"content": 5}), NO_TEXT + "5"),
        (of_message({"content": ["x"]}), NO_TEXT + "['x']"),
        (of_message({"content": [{"type": "text"}]}), "an answer with a part of type text without text: "),
        (b"<html>\nhello", r"an answer that is no JSON: '<html>\nhello'"),
        (b"\xff", "an answer that is no JSON: "),
        (b"[" * 100_000, "an answer that is no JSON: "),
        (b" " * (2**24 + 1), "an answer of more than 16777216 bytes"),
    ],
    ids=range(10),
)
def test_a_fault_of_an_answer_is_named_after_the_last_repetition(answer: bytes, got: str, pauses: list[float]) -> None:
    with endpoint(lambda body: (200, answer)) as (url, posted):
        with pytest.raises(FeedbackError) as caught:
            write(EndpointWriter(url, "judge", retries=1), ["why"])
        assert str(caught.value).startswith(f"the critic at {url}/chat/completions failed 2 times; got {got}")
        assert str(caught.value).endswith(
            "; expected an OpenAI-compatible chat completion. See that the server runs and knows the model's name;"
            " a run that has begun goes on with --run.resume true."
        )
        assert len(posted) == 2 and pauses == [1.0]


@pytest.mark.parametrize(
    ("status", "do"),
    [
        (400, "See that the server runs"),
        (401, "See that api_key_env names"),
        (403, "See that api_key_env names"),
        (404, "See that the server runs and knows the model's name"),
        (302, "See that the server runs"),
    ],
)
def test_a_refusal_is_final(status: int, do: str, pauses: list[float]) -> None:
    with endpoint(lambda body: (status, b"\xff" + b"x" * 400), Location="http://127.0.0.1:9/") as (url, posted):
        with pytest.raises(FeedbackError) as caught:
            write(EndpointWriter(url, "judge", retries=5, api_key_env="PATH"), ["why"])
        got = f"got HTTP {status}: \N{REPLACEMENT CHARACTER}" + "x" * 299 + ";"
        assert f"the critic at {url}/chat/completions refused the request; {got}" in str(caught.value)
        assert do in str(caught.value) and len(posted) == 1 and pauses == []


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503])
def test_what_may_pass_is_asked_again_after_longer_and_longer_pauses(status: int, pauses: list[float]) -> None:
    with endpoint(lambda body: (status, b"busy")) as (url, posted), pytest.raises(FeedbackError) as caught:
        write(EndpointWriter(url, "judge", retries=8), ["why"])
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0] and len(posted) == 9
    assert "failed 9 times" in str(caught.value) and ("raise retries" in str(caught.value)) == (status == 429)


def test_each_try_is_a_request_of_its_own(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib rewrites one that goes by a proxy: sent again, an https request would go to the proxy as http."""
    tries: list[tuple[str, str]] = []

    def post(opener: Any, request: urllib.request.Request, *, timeout: float) -> Written:
        tries.append((request.type, request.selector))
        request.set_proxy("127.0.0.1:1", "http")  # as urllib's ProxyHandler
        raise chat.RefusedError(503, "busy")

    monkeypatch.setattr(chat, "post", post)
    with pytest.raises(FeedbackError, match="failed 3 times"):
        write(EndpointWriter("https://example.invalid/v1", "judge"), ["why"])
    assert tries == [("https", "/v1/chat/completions")] * 3


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("3", 3, 3), ("0", 0, 0), ("600", 60, 60), (30, 1, 30), (-30, 0, 0), (9e5, 60, 60)]
    + [(odd, 1, 1) for odd in ("soon", "nan", "inf", "", "Mon, 99 Foo 2024 00:00:00 GMT")],
)
def test_an_endpoint_says_when_it_may_be_asked_again(
    header: str | float, least: int, most: int, pauses: list[float]
) -> None:
    if not isinstance(header, str):  # seconds from now, said as a date
        header = email.utils.formatdate(time.time() + header, usegmt=True)
    answers = iter([(429, b"slow down"), (200, chat_completion("x"))])
    with endpoint(lambda body: next(answers), Retry_After=header) as (url, _):
        assert write(EndpointWriter(url, "judge"), ["why"]) == [Written("x")]
    assert len(pauses) == 1 and least <= pauses[0] <= most


def test_the_error_of_one_request_does_not_wait_for_the_pause_of_another() -> None:
    def busy_or_refused(body: dict[str, Any]) -> tuple[int, bytes]:
        return (429, b"later") if body["messages"][0]["content"] == "slow" else (401, b"no key")

    began = time.perf_counter()
    with endpoint(busy_or_refused, Retry_After="30") as (url, _), pytest.raises(FeedbackError, match="HTTP 401"):
        write(EndpointWriter(url, "judge", concurrency=2), ["slow", "bad", "slow", "slow"])
    assert time.perf_counter() - began < 10


@contextlib.contextmanager
def dripping(status: bytes) -> Iterator[str]:
    """The URL of a server that sends ``status`` at once, and then a byte every 20 ms without an end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with contextlib.suppress(OSError):
                self.wfile.write(status)
                for _ in range(250):
                    self.wfile.write(b"x")
                    time.sleep(0.02)

        def log_message(self, *arguments: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", "timed out: no whole answer in 0.2 seconds; .* raise timeout"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n", "timed out"),
        (b"HTTP/1.0 200 OK\r\nX-Header: ", "timed out"),
        (b"HTTP/1.0 2", "timed out"),
        (b"HTTP/1.0 400 No\r\n\r\n", "HTTP 400"),
    ],
    ids=["body", "chunk", "header", "status", "refusal"],
)
def test_a_request_takes_no_longer_than_its_timeout_however_an_answer_drips(status: bytes, match: str) -> None:
    with dripping(status) as url:
        began = time.perf_counter()
        with pytest.raises(FeedbackError, match=match):
            write(EndpointWriter(url, "judge", timeout=0.2, retries=0), ["why"])
        assert time.perf_counter() - began < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]  # none is left


def test_an_endpoint_that_does_not_answer_is_given_up() -> None:
    answering = threading.Event()

    def late(body: dict[str, Any]) -> tuple[int, bytes]:
        answering.wait(5.0)
        return 200, chat_completion("too late")

    with endpoint(late) as (url, _):
        with pytest.raises(FeedbackError, match="timed out"):
            write(EndpointWriter(url, "judge", timeout=0.1, retries=0), ["why"])
        answering.set()


def test_no_more_requests_run_at_once_than_allowed() -> None:
    running: list[int] = [0]
    most: list[int] = []

    def counted(body: dict[str, Any]) -> tuple[int, bytes]:
        running[0] += 1
        most.append(running[0])
        time.sleep(0.02)
        running[0] -= 1
        return 200, chat_completion("x")

    with endpoint(counted) as (url, _):
        write(EndpointWriter(url, "judge", concurrency=1), ["why"] * 6)
    assert most == [1] * 6


@pytest.mark.parametrize("host", ["127.0.0.1:9", "[::1]:9", "localhost:9"])
def test_a_proxy_is_asked_for_what_is_elsewhere_and_not_for_what_is_here(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with endpoint(lambda body: (200, chat_completion("by proxy"))) as (proxy, posted):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        with pytest.raises(FeedbackError):
            write(EndpointWriter(f"http://{host}/v1", "judge", retries=0, timeout=1.0), ["why"])
        assert posted == []
        [written] = write(EndpointWriter("http://judge.example/v1", "judge"), ["why"])
        assert written.text == "by proxy" and posted[0].path == "http://judge.example/v1/chat/completions"


@pytest.mark.parametrize("role", ["critic", "judge"])
def test_a_missing_key_is_an_error_that_says_what_to_do(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://judge.example/v1"
    with pytest.raises(FeedbackError, match=rf"NO_SUCH_KEY is not set.*Set it to the {role}'s API key"):
        EndpointWriter(url, "judge", api_key_env="NO_SUCH_KEY", role=role)
    for odd in ("", " \n", "sk-1\nsk-2", "sk-\u2026"):
        monkeypatch.setenv("ODD_KEY", odd)
        with pytest.raises(FeedbackError, match="ODD_KEY holds no API key") as caught:
            EndpointWriter(url, "judge", api_key_env="ODD_KEY", role=role)
        assert "sk-" not in str(caught.value)


def test_a_key_from_a_file_may_end_in_a_new_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-1\n")
    with endpoint(lambda body: (200, chat_completion("x"))) as (url, posted):
        write(EndpointWriter(url, "judge", api_key_env="KEY"), ["why"])
    assert posted[0].headers["authorization"] == "Bearer sk-1"


@pytest.mark.parametrize("kind", [Critic, Judge])
@pytest.mark.parametrize(
    "url",
    [
        "http://[bad/v1", "http://host:port/v1", "http://h:0/v1", "http://", "http:///v1", "ftp://host/v1", "host:1",
        "http://host/v 1", "http://host/v1\n", "http://h\xf6st/v1", "http://host/v1?api-version=1", "http://host/v1#a",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_when_settings_are_read(kind: Any, url: str) -> None:
    with pytest.raises(ConfigError, match=r"feedback: the endpoint is no URL; got .*; expected http://HOST:PORT/v1"):
        kind(endpoint=url)


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match=r"got host/v1; expected .* without user") as caught:
        Critic(endpoint="http://me:secret@host/v1")
    assert "secret" not in str(caught.value)
    assert Critic(endpoint="https://[::1]:8000/v1/").endpoint == "https://[::1]:8000/v1/"


@pytest.mark.parametrize(("source", "role"), [(Critic(), "critic"), (Judge(judge="endpoint"), "judge")])
def test_errors_name_the_role_and_before_a_run_advise_no_resume(source: Any, role: str) -> None:
    with endpoint(lambda body: (404, b"no such model")) as (url, _):
        asked = type(source)(**vars(source) | {"endpoint": url})
        with pytest.raises(FeedbackError) as before:
            asked.contact()
        with pytest.raises(FeedbackError) as within:
            write(asked.endpoint_writer(role), ["why"])
    assert str(before.value).startswith(f"the {role} at {url}/chat/completions refused the request; got HTTP 404")
    assert "resume" not in str(before.value) and str(before.value).endswith("knows the model's name.")
    assert str(within.value).startswith(f"the {role} at") and str(within.value).endswith("--run.resume true.")


def test_an_endpoint_is_sent_both_ends_of_a_text_that_is_too_long() -> None:
    shorten = EndpointWriter("http://judge.example/v1", "judge").shorten
    assert shorten("abcdefgh", 2).text == "abcdefgh"  # four characters a token
    assert shorten("abcdefghi", 2).text == "abcd [...] fghi"
