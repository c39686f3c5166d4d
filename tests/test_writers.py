"""Who writes: the model, with which seeds, and an endpoint, what it is sent and how its faults are told."""

import threading
import time
from typing import Any

import pytest
from fakes import RecordingEngine, chat_completion, endpoint, model_writer, scripted_prompter, write

from vpd.errors import FeedbackError
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


@pytest.mark.parametrize(("rest", "tokens"), [({"usage": {"completion_tokens": 3}}, 3), ({"usage": {}}, 0), ({}, 0)])
def test_an_endpoint_that_does_not_count_its_tokens_costs_none(rest: dict[str, Any], tokens: int) -> None:
    with endpoint(lambda body: (200, chat_completion("x", **rest))) as (url, _):
        [written] = write(EndpointWriter(url, "judge"), ["why"])
    assert (written.text, written.tokens) == ("x", tokens)


@pytest.mark.parametrize(
    ("status", "said", "got"),
    [
        (200, b'{"error":\n"no"}', "an answer without choices[0].message.content: {'error': 'no'}"),
        (200, chat_completion("x", usage={"completion_tokens": "?"}), "an answer whose content is no text: {'choices'"),
        (400, b"\xff" + b"x" * 400, "HTTP 400: \N{REPLACEMENT CHARACTER}" + "x" * 299 + ";"),
    ],
)
def test_a_fault_of_an_endpoint_says_what_it_answered(status: int, said: bytes, got: str) -> None:
    with endpoint(lambda body: (status, said)) as (url, posted):
        with pytest.raises(FeedbackError) as caught:
            write(EndpointWriter(url, "judge", retries=1), ["why"])
        assert f"the critic at {url}/chat/completions failed 2 times; got {got}" in str(caught.value)
        assert ". See that the server runs and knows the model's name, then go on with --run.resume true." in str(
            caught.value
        )
        assert len(posted) == 2


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


def test_a_missing_key_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(FeedbackError, match=r"NO_SUCH_KEY is not set.*Set it to the critic's API key"):
        EndpointWriter("http://judge.example/v1", "judge", api_key_env="NO_SUCH_KEY")


def test_an_endpoint_is_sent_both_ends_of_a_text_that_is_too_long() -> None:
    shorten = EndpointWriter("http://judge.example/v1", "judge").shorten
    assert shorten("abcdefgh", 2).text == "abcdefgh"  # four characters a token
    assert shorten("abcdefghi", 2).text == "abcd [...] fghi"


def test_a_failing_endpoint_is_left_alone_for_longer_each_time() -> None:
    asked: list[float] = []

    def failing(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(time.perf_counter())
        return 503, b"overloaded"

    with endpoint(failing) as (url, _), pytest.raises(FeedbackError):
        write(EndpointWriter(url, "judge", retries=2), ["why"])
    first, second, third = asked
    assert second - first >= 0.2 and third - second >= 0.4
