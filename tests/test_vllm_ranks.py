"""Several training processes and one vLLM server, a fake one; whole runs in shards are in tests/test_ranks.py."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_vllm import FakeVLLM, serving
from helpers import SMALL, metrics_of, tiny_model, vpd_train
from launching import Launch
from transformers import AutoModelForCausalLM
from vllm_place import KEYS, PROMPTS, Place, moved, sample

from vpd.bundled import load_bundled
from vpd.engines.vllm_engine import VLLMEngine
from vpd.errors import EngineError, RankError, VPDError
from vpd.model import lora
from vpd.model.settings import LoraSettings
from vpd.policy import FixedPolicy
from vpd.ranks import ThreadRanks


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    server = FakeVLLM(tiny_model(seed=1))
    with serving(server) as url:
        yield Place(server, url, tmp_path)


class Shared(FixedPolicy):
    """A policy of several ranks, of which the first writes."""

    def __init__(self, model: Any, version: int, rank: int):
        super().__init__(model, version)
        self.rank = rank

    def save(self, folder: Path) -> None:
        if self.rank == 0:
            super().save(folder)


def on_two_ranks(place: Place, program: Callable[[Any, VLLMEngine], Any]) -> list[Any]:
    """What a program returned, or raised, on each of two ranks with an engine each."""
    return ThreadRanks.run(2, lambda ranks: program(ranks, place.engine(ranks=ranks)))


def test_two_ranks_send_the_weights_once_and_ask_for_a_share_of_the_answers_each(place: Place) -> None:
    whole = sample(place.loaded())
    place.server.asked.clear()
    old, new = tiny_model(), moved(tiny_model())

    def program(ranks: Any, engine: VLLMEngine) -> Any:
        engine.load(Shared(old, 7, ranks.rank))
        engine.load(Shared(old, 7, ranks.rank))
        share = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        answers = engine.generate(PROMPTS[share], keys=KEYS[share], seed=3, max_tokens=6)
        ranks.all_gather(None)  # as the loop gathers the answers before it trains
        engine.load(Shared(new, 8, ranks.rank))
        return engine.version, engine.metrics().keys(), answers

    (*first, before), (*second, after) = on_two_ranks(place, program)
    assert first == second and first[0] == 8 and before + after == whole
    for path in ("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"):
        assert place.server.paths().count(path) == 2


def test_two_ranks_share_an_adapters_name(place: Place) -> None:
    bases = [tiny_model(seed=1) for _ in range(2)]
    for base in bases:
        lora.attach(base, LoraSettings(r=2, target_modules=("q_proj",)), seed=0)

    def program(ranks: Any, engine: VLLMEngine) -> Any:
        policy = Adapted(bases[ranks.rank], 0, ranks.rank)
        for version in range(2):
            for adapter in lora.weights(policy.model).values():
                adapter.data += 0.05
            policy.version = version
            engine.load(policy)
        return engine.generate(PROMPTS[:1], keys=KEYS[:1], seed=3, max_tokens=6)

    first, second = on_two_ranks(place, program)
    assert first == second and first[0].version == 1
    [name] = place.server.loaded
    assert name.endswith("-v1") and {body["model"] for body in place.server.bodies("seed")} == {name}


class Adapted(Shared):
    def save(self, folder: Path) -> None:
        if self.rank == 0:
            lora.save(self.model, folder)


def test_a_rank_whose_weights_are_others_is_found_by_its_canary(place: Place) -> None:
    models = [tiny_model(), moved(tiny_model(), 0.1)]

    def program(ranks: Any, engine: VLLMEngine) -> Any:
        policy = Shared(models[ranks.rank], 3, ranks.rank)
        with pytest.raises(VPDError) as caught:
            engine.load(policy)
        assert engine.version == -1
        return caught.value

    first, second = on_two_ranks(place, program)
    assert isinstance(first, RankError) and isinstance(second, EngineError)
    assert "does not serve the weights of version 3" in str(second)


@pytest.mark.parametrize("fault", ["drop", (500, "out of memory")])
def test_a_sync_that_fails_fails_on_all_ranks_and_no_rank_has_a_version(place: Place, fault: Any) -> None:
    old, new = tiny_model(), moved(tiny_model())

    def program(ranks: Any, engine: VLLMEngine) -> Any:
        engine.load(Shared(old, 0, ranks.rank))
        if ranks.rank == 0:
            place.server.faults["/collective_rpc"] = [fault]
        with pytest.raises(VPDError) as caught:
            engine.load(Shared(new, 1, ranks.rank))
        with pytest.raises(EngineError, match="no weights that are known"):
            sample(engine)
        return caught.value

    first, second = on_two_ranks(place, program)
    assert isinstance(first, EngineError) and "stays paused" in str(first) and isinstance(second, RankError)


@pytest.fixture
def server() -> Iterator[tuple[FakeVLLM, dict[str, object]]]:
    fake = FakeVLLM(AutoModelForCausalLM.from_pretrained(load_bundled()), window=512, dtype="torch.float32")
    with serving(fake) as url:
        yield fake, {"engine.name": "vllm", "engine.url": url}


def words_of(folder: Path, settings: dict[str, object]) -> list[str]:
    """``vpd train`` with these settings, as the words of a command of Python."""
    found = SMALL | settings | {"run.output_dir": folder}
    return ["-m", "vpd", "train", *(word for key, value in found.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize(
    ("path", "good", "fault", "line"),
    [
        ("/collective_rpc", 2, (500, "out of memory"), "did not take the new weights and stays paused"),
        ("/v1/completions", 25, (400, "too long"), "refused /v1/completions; got HTTP 400: too long"),
    ],
)
def test_two_processes_end_with_one_line_of_the_server_and_go_on_as_one_process(
    server: tuple[FakeVLLM, dict[str, object]],
    tmp_path: Path,
    path: str,
    good: int,
    fault: tuple[int, str],
    line: str,
) -> None:
    """The fault comes after the second step, while weights are sent, or in it, while one process gets its answers."""
    fake, engine = server
    settings = engine | {"engine.sync_dir": tmp_path / "sync", "run.save_steps": 1, "run.max_steps": 3}
    settings |= {"run.eval_steps": 0, "run.rank_timeout": 60}
    assert vpd_train(tmp_path / "one", **settings) == 0
    fake.faults[path] = [None] * good + [fault]
    first = Launch(words_of(tmp_path / "two", settings), 2, tmp_path)
    assert first.end(150) == [2, 2], first.outputs
    found = [text for output in first.outputs for text in re.findall("^vpd: .*", output, re.MULTILINE)]
    assert len(found) == 1 and line in found[0], first.outputs
    assert not fake.faults[path] and len(metrics_of(tmp_path / "two")) == 1
    again = Launch(words_of(tmp_path / "two", settings | {"run.resume": "true"}), 2, tmp_path)
    assert again.end(150) == [0, 0], again.outputs
    one, two = (pq.read_table(tmp_path / run / "rollouts").to_pylist() for run in ("one", "two"))
    assert [row["completion"] for row in one] == [row["completion"] for row in two] and len(one) == 48
    assert not list((tmp_path / "sync").iterdir())
