"""The engine on a vLLM server, against a fake one: what it asks, what it repeats, and that no stale weights pass."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, serving
from helpers import tiny_learner, tiny_model
from vllm_place import EOS, KEYS, PROMPTS, Letters, Place, moved, sample

from vpd.engines.settings import VLLMSettings
from vpd.engines.vllm_client import Question, VLLMClient
from vpd.errors import ConfigError, EngineError, StorageError
from vpd.model import lora
from vpd.model.settings import LoraSettings
from vpd.policy import FixedPolicy


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    server = FakeVLLM(tiny_model(seed=1))  # other weights than those that it will be sent
    with serving(server) as url:
        yield Place(server, url, tmp_path)


def test_rows_come_back_in_order_with_the_learners_log_probs(place: Place) -> None:
    model, answers = tiny_model(), sample(place.loaded(), [1, 6, 3, 6], temperature=0.8)
    for prompt, answer, limit in zip(PROMPTS, answers, [1, 6, 3, 6], strict=True):
        logits = model(torch.tensor([prompt + answer.tokens])).logits[0] / 0.8
        logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        assert answer.logprobs == pytest.approx([logp[t, i].item() for t, i in enumerate(answer.tokens)], abs=1e-9)
        assert (
            1 <= len(answer.tokens) <= limit and answer.version == 7 and answer.sampled == (True,) * len(answer.tokens)
        )
        assert (answer.tokens[-1] in EOS) == (answer.finish == "stop")
        assert answer.text == Letters().decode(answer.tokens)


def test_each_row_is_a_request_with_its_own_seed_and_limit_and_nothing_left_to_the_server(place: Place) -> None:
    sample(place.loaded(), [1, 2, 3, 4], temperature=0.7, top_p=0.9, top_k=5)
    asked = {(*body["prompt"], body["max_tokens"]): body for body in place.server.bodies("seed")}
    assert asked.keys() == {(*prompt, limit) for prompt, limit in zip(PROMPTS, [1, 2, 3, 4], strict=True)}
    assert {body["seed"] for body in asked.values()} == {key.seed(3) for key in KEYS}
    for body in asked.values():
        assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 5)
        assert body["stop_token_ids"] == list(EOS) and body["ignore_eos"] is True
        assert body["repetition_penalty"] == 1.0 and body["min_p"] == body["presence_penalty"] == 0.0


def test_a_row_does_not_depend_on_its_neighbours_or_on_how_many_run_at_once(place: Place) -> None:
    engine = place.loaded(rows=2)
    together = sample(engine)
    assert place.server.most_at_once <= 2
    for row, prompt in enumerate(PROMPTS):
        [alone] = engine.generate([prompt], keys=[KEYS[row]], seed=3, max_tokens=6)
        assert alone == together[row]
    assert together[0].tokens != together[2].tokens  # one prompt, two keys


def test_the_same_weights_are_sent_once_and_others_in_a_fresh_folder(place: Place) -> None:
    engine, model = place.loaded(), tiny_model()
    engine.load(FixedPolicy(model, 7))
    engine.load(FixedPolicy(moved(model), 8))
    folders = [body["kwargs"]["weights_path"] for path, body in place.server.asked if path == "/collective_rpc"]
    assert [Path(folder).name for folder in folders] == ["v7", "v8"] and engine.version == 8
    assert not Path(folders[0]).exists() and Path(folders[1]).is_dir()
    commands = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume", "/v1/completions"]
    assert place.server.paths() == commands * 2
    assert engine.metrics()["engine/canary_difference"] < 1e-9 and engine.metrics()["time/sync"] > 0
    del engine
    assert not list((place.folder / "sync").iterdir())


def test_a_tied_head_is_sent_as_a_tensor_of_its_own(place: Place) -> None:
    """A server that keeps a packed copy of the head, as vLLM does on a CPU."""
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    engine = place.engine()
    engine.load(FixedPolicy(model, 0))
    engine.load(FixedPolicy(moved(model), 1))
    assert torch.equal(place.server.model.lm_head.weight, model.lm_head.weight)
    assert engine.metrics()["engine/canary_difference"] < 1e-9


STALE: dict[str, Callable[[str], bool]] = {
    "all of them": lambda name: True,
    "every second tensor": lambda name: len(name) % 2 == 0,
    "one layer": lambda name: ".layers.1." in name,
    "one matrix": lambda name: "layers.0.mlp.up" in name,
    "the head": lambda name: name.startswith("lm_head"),
}


@pytest.mark.parametrize("kept", sorted(STALE))
def test_a_server_that_keeps_old_weights_is_an_error_and_answers_nothing_more(place: Place, kept: str) -> None:
    engine, model = place.loaded(version=0), tiny_model()
    place.server.keep = STALE[kept]
    with pytest.raises(EngineError, match="does not serve the weights of version 1 that it was sent"):
        engine.load(FixedPolicy(moved(model), 1))
    assert engine.version == -1
    before = len(place.server.bodies("seed"))
    with pytest.raises(EngineError, match="no weights that are known"):
        sample(engine)
    assert len(place.server.bodies("seed")) == before
    place.server.keep = lambda name: False
    engine.load(FixedPolicy(model, 1))
    assert {answer.version for answer in sample(engine)} == {1}


def test_a_step_too_small_for_the_tolerance_is_seen_by_an_answer_that_did_not_change(place: Place) -> None:
    place.server.dtype = "torch.bfloat16"  # whose tolerance is a thousand times larger
    engine, model = place.loaded(version=0), tiny_model()
    engine.load(FixedPolicy(moved(model, 1e-3), 1))
    place.server.keep = lambda name: True
    with pytest.raises(EngineError, match="still serves the weights from before version 2; got the same answer"):
        engine.load(FixedPolicy(moved(model, 1e-3), 2))


def test_weights_that_change_behind_the_run_void_the_batch(place: Place) -> None:
    engine = place.loaded()
    sample(engine)
    moved(place.server.model, 0.1)
    with pytest.raises(EngineError, match="no longer serves the weights of version 7"):
        sample(engine)
    assert engine.version == -1


def test_a_server_that_was_restarted_voids_the_batch_and_is_sent_the_weights_again(place: Place) -> None:
    engine = place.loaded()
    place.server.instance = "two"
    with pytest.raises(EngineError, match="was restarted, and serves version 7 no longer"):
        sample(engine)
    engine.load(FixedPolicy(tiny_model(), 7))
    assert len(sample(engine)) == len(PROMPTS)


@pytest.mark.parametrize("fault", ["drop", "half", (500, "engine is busy"), (503, "later")])
def test_a_seeded_request_is_repeated_with_the_same_result(place: Place, fault: Any) -> None:
    engine = place.loaded()
    whole = sample(engine)
    place.server.faults["/v1/completions"] = [fault, fault]
    assert sample(engine) == whole


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("drop", "no whole answer to /v1/completions from the server at http.* in 3 attempts"),
        ("half", "no whole answer to /v1/completions from the server at http.* in 3 attempts; got IncompleteRead"),
        ((500, "EngineDeadError"), "refused /v1/completions; got HTTP 500: EngineDeadError"),
    ],
)
def test_a_fault_that_stays_is_one_line(place: Place, fault: Any, said: str) -> None:
    engine = place.loaded()
    place.server.faults["/v1/completions"] = [fault] * 30
    with pytest.raises(EngineError, match=said) as caught:
        sample(engine)
    assert "\n" not in str(caught.value)


def test_a_request_that_the_server_refuses_is_not_repeated(place: Place) -> None:
    engine = place.loaded()
    place.server.faults["/v1/completions"] = [(400, "prompt is too long")]
    with pytest.raises(EngineError, match="HTTP 400: prompt is too long"):
        engine.generate(PROMPTS[:1], keys=KEYS[:1], seed=3, max_tokens=6)
    assert len(place.server.bodies("seed")) == 1


@pytest.mark.parametrize("fault", ["drop", "half", (500, "out of memory")])
@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
def test_a_fault_while_weights_are_loaded_leaves_the_server_paused_and_unused(
    place: Place, path: str, fault: Any
) -> None:
    engine, model = place.loaded(), tiny_model()
    place.server.faults[path] = [fault]
    sent = place.server.paths().count(path)
    with pytest.raises(EngineError, match="did not take the new weights and stays paused: it may hold half of them"):
        engine.load(FixedPolicy(moved(model), 8))
    assert place.server.paths().count(path) == sent + 1  # what changes the server is sent once
    assert place.server.paused and engine.version == -1
    with pytest.raises(EngineError, match="no weights that are known"):
        sample(engine)
    engine.load(FixedPolicy(model, 8))  # a server that was mended goes on
    assert not place.server.paused and engine.version == 8


HALF: dict[str, dict[str, Any]] = {
    "cut short": {"finish_reason": "abort", "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}},
    "no ids": {"token_ids": None},
    "fewer log-probs": {"logprobs": {"token_logprobs": [-1.0]}, "token_ids": [5] * 6},
    "no log-probs": {"logprobs": None},
    "NaN": {"token_ids": [5] * 6, "logprobs": {"token_logprobs": [float("nan")] * 6}, "finish_reason": "length"},
    "too many tokens": {"token_ids": [5] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}, "finish_reason": "length"},
    "another prompt": {"prompt_token_ids": [9, 9]},
}


@pytest.mark.parametrize("name", sorted(HALF))
def test_half_an_answer_is_asked_for_again_and_never_learned_from(place: Place, name: str) -> None:
    engine = place.loaded()
    whole = sample(engine)
    left = [2]

    def alter(answer: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        return {"choices": [answer["choices"][0] | HALF[name]]} if left[0] >= 0 else answer

    place.server.alter = alter
    assert sample(engine) == whole and left[0] < 0
    left[0] = 100
    with pytest.raises(EngineError, match="no whole answer to /v1/completions"):
        sample(engine)


def test_an_interrupt_ends_all_requests_at_once(place: Place) -> None:
    client, started = VLLMClient(place.url, wait=0.0), time.monotonic()
    place.server.faults["/v1/completions"] = ["wait"] * 3
    body = {"model": "policy", "prompt": [1, 2], "prompt_logprobs": 0}

    def interrupt(answer: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.ask_all("/v1/completions", [Question(body, interrupt)] * 4, at_once=4)
    assert time.monotonic() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vllm")]


@pytest.mark.parametrize(
    ("server", "settings", "said"),
    [
        ({}, {"model": "qwen"}, "serves no model 'qwen'; got policy. Set engine.model"),
        ({"window": 9}, {}, "too short for this run; got 9 tokens; expected at least 10"),
        ({"development": False}, {}, "takes no weights: it runs without its development mode"),
        ({"logprobs_mode": "raw_logprobs"}, {}, "got --logprobs-mode raw_logprobs; expected processed_logprobs"),
        ({"dtype": "torch.bfloat16"}, {"dtype": "float32"}, "another number type; got bfloat16"),
        ({"token": "x"}, {}, "refuses the token; got HTTP 401. Set engine.api_key_env"),
    ],
)
def test_a_server_that_does_not_fit_is_one_line_before_anything_is_sent(
    place: Place, server: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    vars(place.server).update(server)
    with pytest.raises(EngineError, match=said) as caught:
        place.loaded(**settings)
    assert "\n" not in str(caught.value) and "/collective_rpc" not in place.server.paths()


def test_no_server_is_one_line(tmp_path: Path) -> None:
    with serving(FakeVLLM(None)) as url:
        pass
    with pytest.raises(EngineError, match=f"no vLLM server answers at {url}; got ConnectionRefused.*vpd serve"):
        Place(FakeVLLM(None), url, tmp_path).loaded()


def test_another_server_at_the_address_is_one_line(place: Place) -> None:
    place.server.answer = lambda path, body: (200, {"hello": 1})  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="is no vLLM server"):
        place.loaded()


def test_another_model_under_the_right_name_is_found_out_by_its_numbers(place: Place) -> None:
    place.server.reload = lambda folder: (200, {})  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="does not serve the weights of version 7"):
        place.loaded()


def test_a_row_that_is_too_long_for_the_server_is_refused_before_any_is_asked(place: Place) -> None:
    engine = place.loaded()
    before = len(place.server.asked)
    with pytest.raises(EngineError, match="got 70 tokens; expected at most 64"):
        sample(engine, [1, 2, 3, 64])
    assert len(place.server.asked) == before


def test_a_slow_server_is_not_asked_twice(place: Place) -> None:
    engine = place.loaded(timeout=0.5)
    place.server.faults["/v1/completions"] = ["wait"]
    with pytest.raises(EngineError, match=r"took more than 0.5 s for /v1/completions. Raise engine.timeout"):
        engine.generate(PROMPTS[:1], keys=KEYS[:1], seed=3, max_tokens=6)
    assert len(place.server.bodies("seed")) == 1


def test_an_adapter_has_a_name_of_its_own_for_each_version(place: Place) -> None:
    base = tiny_model(seed=1)
    lora.attach(base, LoraSettings(r=2, target_modules=("q_proj",)), seed=0)
    learner, engine = tiny_learner(base), place.engine()
    for step in range(3):
        for adapter in lora.weights(learner.model).values():
            adapter.data += 0.05
        policy = learner.policy()
        learner._scheduler.last_epoch = step
        engine.load(policy)
        assert engine.metrics()["engine/canary_difference"] < 1e-4  # the adapter is fp32
        [name] = place.server.loaded
        assert name.startswith("vpd-") and name.endswith(f"-v{step}")
        assert {answer.version for answer in sample(engine)} == {step}
    assert {body["model"] for body in place.server.bodies("seed")} == {name[:-1] + str(step) for step in range(3)}
    assert "/pause?mode=wait" not in place.server.paths()
    place.server.loaded.clear()
    with pytest.raises(EngineError, match=r"HTTP 404: The model `vpd-.*` does not exist"):
        sample(engine)


def test_a_server_without_adapters_is_one_line(place: Place) -> None:
    place.server.adapters = False
    base = tiny_model(seed=1)
    lora.attach(base, LoraSettings(r=2, target_modules=("q_proj",)), seed=0)
    with pytest.raises(EngineError, match=r"takes no adapters; got HTTP 404. Start it with --enable-lora"):
        place.engine().load(tiny_learner(base).policy())


def test_the_token_comes_from_the_environment_and_from_nowhere_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.server.token = "abc"
    monkeypatch.setenv("MY_TOKEN", "abc")
    assert sample(place.loaded(api_key_env="MY_TOKEN"))
    with pytest.raises(ConfigError, match="the environment variable NO_TOKEN is not set"):
        place.loaded(api_key_env="NO_TOKEN")


def test_weights_that_cannot_be_written_are_one_line_and_the_server_is_not_touched(place: Place) -> None:
    class Full(FixedPolicy):
        def save(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    engine = place.loaded(version=0)
    sent = len(place.server.paths())
    with pytest.raises(StorageError, match=r"cannot write the weights .*; got No space left on device. Free space"):
        engine.load(Full(moved(tiny_model()), 1))
    assert engine.version == -1 and len(place.server.paths()) == sent


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://x", "http://x:80/v1", "ftp://x:1", "http://x:y"])
def test_an_address_is_a_scheme_a_host_and_a_port(url: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.url is no address of a server"):
        VLLMSettings(url=url)
