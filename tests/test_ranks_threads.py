"""What holds ranks together, in threads: failures and requests to stop travel, and data that differ are found."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ScriptedEnv, ScriptedRun, endpoint, scripted_run
from helpers import random_groups, tiny_learner, tiny_model
from test_source import source

from vpd.algorithms.examples import to_examples
from vpd.config import check_together, parse
from vpd.errors import Abandoned, ConfigError, EnvError, RankError, StorageError, TrainingError
from vpd.feedback.critique import Critic
from vpd.learners.agreement import digests
from vpd.learners.settings import OptimSettings, TeacherSettings
from vpd.learners.sharding import Replicas, SafeReader
from vpd.loop import StopRequest
from vpd.ranks import OneProcess, Ranks, ThreadRanks, agree, divide, gather, largest, on_first, start_ranks, together
from vpd.recipes.endings import StopSignals
from vpd.run_folder import checkpoint
from vpd.run_folder.files import FileSystem
from vpd.types import Example, Grade, Group, Metrics


def failing(ranks: Ranks, *failing_ranks: int) -> int:
    if ranks.rank in failing_ranks:
        raise EnvError(f"broken on {ranks.rank}")
    return ranks.rank


def test_the_lowest_rank_that_failed_raises_its_own_error_and_the_others_pass_it_on() -> None:
    assert ThreadRanks.run(3, lambda ranks: together(ranks, "work", lambda: failing(ranks))) == [0, 1, 2]
    results = ThreadRanks.run(3, lambda ranks: together(ranks, "work", lambda: failing(ranks, 1, 2)))
    assert [type(result) for result in results] == [RankError, EnvError, RankError]
    passed_on = "rank 1 failed: broken on 1"
    assert [str(result) for result in results] == [passed_on, "broken on 1", passed_on]


def test_a_failure_keeps_its_owner_through_every_level() -> None:
    def program(ranks: Ranks) -> Any:
        return together(ranks, "outer", lambda: divide(ranks, range(3), lambda share: [failing(ranks, 2)]))

    results = ThreadRanks.run(3, program)
    assert [type(result) for result in results] == [RankError, RankError, EnvError]
    assert str(results[0]) == "rank 2 failed: broken on 2"


def test_a_rank_that_fails_outside_ends_those_that_gather_elsewhere() -> None:
    def program(ranks: Ranks) -> Any:
        def work() -> Any:
            failing(ranks, 1)
            return divide(ranks, range(4), lambda share: share)

        return together(ranks, "the run", work)

    first, second = ThreadRanks.run(2, program)
    assert isinstance(second, EnvError)
    assert isinstance(first, RankError) and str(first) == "rank 1 failed: broken on 1"


@pytest.mark.parametrize("deeper", [0, 1])
def test_two_ranks_that_fail_at_different_places_end_both(deeper: int) -> None:
    def program(ranks: Ranks) -> Any:
        def work() -> Any:
            if ranks.rank != deeper:
                return failing(ranks, 0, 1)
            return together(ranks, "inner", lambda: together(ranks, "innermost", lambda: failing(ranks, 0, 1)))

        return together(ranks, "the run", work)

    first, second = ThreadRanks.run(2, program)
    assert isinstance(first, EnvError) and isinstance(second, RankError)


def test_a_desync_ends_all_with_one_message() -> None:
    def program(ranks: Ranks) -> Any:
        return together(ranks, "the run", lambda: gather(ranks, f"place {ranks.rank}", None))

    first, second = ThreadRanks.run(2, program)
    assert isinstance(first, TrainingError) and isinstance(second, RankError)


def test_work_of_the_first_rank_reaches_all() -> None:
    done: list[int] = []

    def program(ranks: Ranks) -> Any:
        return on_first(ranks, "once", lambda: done.append(ranks.rank) or {"found": ranks.rank})

    assert ThreadRanks.run(3, program) == [{"found": 0}] * 3 and done == [0]
    results = ThreadRanks.run(2, lambda ranks: on_first(ranks, "once", lambda: failing(ranks, 0)))
    assert [type(result) for result in results] == [EnvError, RankError]


def test_ranks_at_other_places_of_the_program_are_an_error() -> None:
    first, second = ThreadRanks.run(2, lambda ranks: gather(ranks, "abc"[ranks.rank], None))
    assert isinstance(first, TrainingError) and "'a' on rank 0, 'b' on rank 1" in str(first)
    assert isinstance(second, RankError)


def test_work_that_one_rank_gives_up_is_given_up_by_all_even_if_another_failed() -> None:
    def work(ranks: Ranks) -> int:
        if ranks.rank == 2:
            raise Abandoned
        return failing(ranks, 0)

    assert [
        type(result) for result in ThreadRanks.run(3, lambda ranks: together(ranks, "work", lambda: work(ranks)))
    ] == [Abandoned] * 3


def test_the_largest_value_of_any_rank_counts() -> None:
    own: list[Metrics] = [{"time/rollout": 1.0, "loss": 5.0}, {"time/rollout": 3.0, "time/retries": 2.0, "loss": 6.0}]
    found = ThreadRanks.run(2, lambda ranks: largest(ranks, own[ranks.rank], ("time/", "memory/")))
    assert found == [{"time/rollout": 3.0, "time/retries": 2.0}] * 2


ROWS = to_examples(random_groups(8, groups=2, size=3))
CHANGES: dict[str, dict[str, Any]] = {
    "a token": {"completion": (*ROWS[1].completion[:-1], 22)},
    "the teacher's prompt": {"teacher": (1, 2)},
    "a mask": {"mask": (False,) * len(ROWS[1].mask)},
    "a weight": {"loss_weights": {"policy": 1.0}},
    "a log-prob": {"behaviour": tuple(value - 1e-12 for value in ROWS[1].behaviour)},
    "a reference": {"reference": (0.0,) * len(ROWS[1].completion)},
    "an advantage": {"advantage": 0.5},
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_differ_are_named(name: str) -> None:
    def program(ranks: Ranks) -> None:
        rows: list[Example] = list(ROWS)
        if ranks.rank == 2:
            rows[1] = dataclasses.replace(rows[1], **CHANGES[name])
        agree(ranks, "the rows", lambda: digests(rows))

    first, *others = ThreadRanks.run(3, program)
    assert isinstance(first, TrainingError) and all(isinstance(other, RankError) for other in others)
    assert "rank 2 differs from rank 0 in the rows" in str(first) and "(place 1)" in str(first)
    assert "hash() of a text" in str(first)


def test_equal_rows_agree_and_one_process_computes_no_digest() -> None:
    assert ThreadRanks.run(3, lambda ranks: agree(ranks, "the rows", lambda: digests(list(ROWS)))) == [None] * 3
    agree(OneProcess(), "the rows", lambda: pytest.fail("computed"))


def test_an_external_critic_is_asked_once_for_each_row_whatever_the_number_of_ranks() -> None:
    def say(body: dict[str, Any]) -> tuple[int, bytes]:
        return 200, json.dumps({"choices": [{"message": {"content": "Count again."}}]}).encode()

    with endpoint(say) as (url, posted):

        def program(ranks: Ranks) -> list[Group]:
            return dataclasses.replace(source(ranks), feedback=[Critic(endpoint=url)]).take(0)[0]

        first, second = ThreadRanks.run(2, program)
        failed = [r for group in first for r in group.rollouts if not r.success]
        assert first == second and len(posted) == len(failed) > 0
        assert all(r.context[0].text == "Count again." for r in failed)


class Asks(StopRequest):
    """One rank is asked to stop while it makes the rollouts of a step."""

    def __init__(self, rank: int, at: int):
        self.rank, self.at, self.calls = rank, at, 0

    def abandonable(self) -> Any:
        self.calls += 1
        if self.rank == 1 and self.calls == self.at:
            self.signal = signal.SIGTERM
        return super().abandonable()


def looped(ranks: Ranks, env: Any, **run: Any) -> ScriptedRun:
    made = scripted_run(env, lambda prompt, seed: f"right {seed}", tasks=3, **run)
    made.loop.ranks, made.loop.source = ranks, dataclasses.replace(made.loop.source, ranks=ranks)
    if ranks.rank:
        made.loop.observers = ()
    return made


def judge(task: Any, text: str) -> Grade:
    return Grade(reward=1.0)


def test_a_request_that_reaches_one_rank_stops_all_after_the_same_step() -> None:
    def program(ranks: Ranks) -> tuple[int, int | None, int]:
        made = looped(ranks, ScriptedEnv(judge), max_steps=5)
        made.loop.stop = Asks(ranks.rank, at=3)
        made.run()
        return made.loop.step, made.loop.stop.signal, len(made.algorithm.seen)

    assert ThreadRanks.run(2, program) == [(2, signal.SIGTERM, 2)] * 2


class AsksBefore(Asks):
    """The same, and the rank gives up before it begins, as :class:`StopSignals` does."""

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        with super().abandonable():
            if self.signal is not None:
                raise Abandoned
            yield


def test_a_rank_that_gives_up_before_it_begins_meets_the_others_in_their_work() -> None:
    def program(ranks: Ranks) -> tuple[int, int | None]:
        made = looped(ranks, ScriptedEnv(judge), max_steps=5)
        made.loop.stop = AsksBefore(ranks.rank, at=3)
        made.run()
        return made.loop.step, made.loop.stop.signal

    assert ThreadRanks.run(2, program) == [(2, signal.SIGTERM)] * 2


def test_an_exception_of_a_signal_leaves_the_depth_right() -> None:
    class Interrupted(OneProcess):
        """Its first way out of the work is interrupted, as a signal's handler can do it."""

        world, interrupt = 2, True

        def __setattr__(self, name: str, value: int) -> None:
            if name == "depth" and value == 1 and self.depth == 2 and self.interrupt:
                object.__setattr__(self, "interrupt", False)
                raise Abandoned
            object.__setattr__(self, name, value)

        def all_gather(self, value: Any) -> list[Any]:
            return [value, value]

    ranks = Interrupted()
    with pytest.raises(Abandoned):
        together(ranks, "outside", lambda: together(ranks, "inside", lambda: 1))
    assert ranks.depth == 0 and not ranks.interrupt


def test_every_rank_trains_on_all_groups_and_the_first_alone_has_observers() -> None:
    runs = ThreadRanks.run(2, lambda ranks: looped(ranks, ScriptedEnv(judge), max_steps=2, eval_steps=1).run())
    alone = looped(OneProcess(), ScriptedEnv(judge), max_steps=2, eval_steps=1).run()
    assert [run.algorithm.seen for run in runs] == [alone.algorithm.seen] * 2
    assert "observe 0" in runs[0].log and not [line for line in runs[1].log if line.startswith("observe")]


class Full(FileSystem):
    """A disk that is full when a folder is to be put in its place, on the first rank."""

    def rename(self, source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_on_the_first_rank_ends_all(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> None:
        files = Full() if ranks.rank == 0 else FileSystem()
        files.write_folder(tmp_path / "model", lambda folder: None, ranks)

    first, second = ThreadRanks.run(2, program)
    assert isinstance(first, StorageError) and "No space left" in str(first)
    assert isinstance(second, RankError) and "rank 0 failed" in str(second)


class Part:
    """A learner of which every rank writes a part."""

    def __init__(self, rank: int):
        self.rank = rank

    def save(self, folder: Path) -> None:
        (folder / "shards").mkdir(exist_ok=True)
        (folder / "shards" / f"part-{self.rank}").write_text(str(self.rank))
        if self.rank == 0:
            (folder / "state.pt").write_bytes(b"")


def test_a_checkpoint_holds_what_every_rank_wrote_and_its_hashes(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> None:
        written: list[Sequence[str]] = []
        checkpoint.save(
            tmp_path,
            7,
            Part(ranks.rank),  # type: ignore[arg-type]
            {"algorithm": {}, "observers": {}},
            save_rest=lambda folder: written.append([path.name for path in folder.iterdir()]),
            keep=None,
            files=FileSystem(),
            ranks=ranks,
        )
        assert len(written) == (ranks.rank == 0)

    assert ThreadRanks.run(3, program) == [None] * 3
    data = json.loads((tmp_path / "checkpoint-7" / "trainer.json").read_text())
    assert set(data["files"]) == {"shards/part-0", "shards/part-1", "shards/part-2", "state.pt"}
    (tmp_path / "checkpoint-7" / "shards" / "part-2").write_text("3")
    assert checkpoint.newest_good(tmp_path) == (None, ["checkpoint-7: shards/part-2 has changed"])


def test_sharding_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"set optim.sharding to fsdp2"):
        start_ranks()


def test_a_request_waits_while_ranks_gather() -> None:
    ranks = ThreadRanks.run(1, lambda ranks: ranks)[0]
    with StopSignals(ranks=ranks) as stop:
        ranks.gathering = True
        with pytest.raises(Abandoned), stop.abandonable():
            signal.raise_signal(signal.SIGTERM)
            ranks.gathering = False  # reached: nothing was raised inside


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_the_table_of_shards_is_read_without_executing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="which torch does not write"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": {"cpu_offload": True}}, "optim.cpu_offload is of weights in shards"),
        (
            {"model": {"dtype": "bfloat16"}, "optim": {"sharding": "fsdp2"}},
            "one number type of at least 32 bits; got bfloat16",
        ),
        (
            {
                "algorithm": {"name": "sdpo", "teacher": "frozen", "teacher_dtype": "bfloat16"},
                "optim": {"sharding": "fsdp2"},
            },
            "one number type of at least 32 bits; got bfloat16, float32",
        ),
    ],
)
def test_settings_that_do_not_go_with_shards_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_together(parse(settings))


@pytest.mark.parametrize(("dtype", "teacher_dtype"), [(torch.bfloat16, None), (torch.float64, "float32")])
def test_weights_of_16_bits_or_of_two_types_are_not_sharded(dtype: torch.dtype, teacher_dtype: Any) -> None:
    teacher = TeacherSettings(kind="frozen", dtype=teacher_dtype)
    with pytest.raises(ConfigError, match=r"one number type of at least 32 bits; got .*float"):
        tiny_learner(tiny_model(dtype=dtype), teacher=teacher, sharding="fsdp2")


def test_the_model_that_shards_are_sampled_from_in_16_bits_has_the_positions_of_the_learner() -> None:
    model = tiny_model(dtype=torch.float32)
    replica = Replicas(OptimSettings(sharding="fsdp2", mixed_precision="bf16"), torch.device("cpu")).of(model)
    assert {parameter.dtype for parameter in replica.parameters()} == {torch.bfloat16}
    buffers, own = dict(replica.named_buffers()), dict(model.named_buffers())
    assert own and buffers.keys() == own.keys() and replica.state_dict().keys() == model.state_dict().keys()
    for name, buffer in own.items():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
