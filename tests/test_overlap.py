"""Overlap: the next step's rollouts are made while the learner updates; nothing else about a run changes."""

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_vllm import FakeVLLM, serving
from fakes import ScriptedEnv, ScriptedRun, scripted_run
from helpers import metrics_of, random_groups, tiny_learner, tiny_model, vpd_train
from test_run_folder import BASE
from test_source import Counting, source
from transformers import AutoModelForCausalLM

from vpd.algorithms.examples import own_logprobs, student_logprobs, to_examples
from vpd.cli import main
from vpd.config import Config, parse
from vpd.engines import ScriptedEngine
from vpd.errors import EngineError, EnvError, Interrupted, RankError, StorageError
from vpd.estimate.settings import DryRunSettings
from vpd.overlap import OverlappedSource
from vpd.ranks import Ranks, ThreadRanks
from vpd.recipes.dry_run import dry_run
from vpd.recipes.train import train
from vpd.run_folder import groups_file
from vpd.types import Grade, Group, Metrics, Section, Task, TopKLogprobs


def answer(prompt: str, seed: int) -> str:
    return f"{'right' if seed % 3 == 0 else 'wrong'} {seed}"


def judge(task: Task, text: str) -> Grade:
    return Grade(reward=float(text.startswith("right")))


def of_fakes(overlap: bool, env: Any = None, **options: Any) -> ScriptedRun:
    made = scripted_run(env or ScriptedEnv(judge), answer, **options)
    if overlap:
        made.loop.source = OverlappedSource(made.loop.source)
    return made


def unversioned(groups: Sequence[Group]) -> list[Any]:
    return [
        dataclasses.replace(r, completion=dataclasses.replace(r.completion, version=0))
        for g in groups
        for r in g.rollouts
    ]


def shown(metrics: Metrics) -> Metrics:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/")) and k != "rollout/staleness"}


def test_a_run_whose_engine_ignores_the_weights_is_the_same_with_overlap() -> None:
    options = {"max_steps": 4, "eval_steps": 2}
    plain, ahead = (of_fakes(overlap, **options).run() for overlap in (False, True))
    assert [unversioned(groups) for groups in ahead.algorithm.seen] == [unversioned(g) for g in plain.algorithm.seen]
    assert [(step, shown(m)) for step, m, _ in ahead.observer.seen] == [
        (step, shown(m)) for step, m, _ in plain.observer.seen
    ]
    staleness = [m["rollout/staleness"] for step, m, _ in ahead.observer.seen if step]
    versions = [groups[0].rollouts[0].completion.version for groups in ahead.algorithm.seen]
    assert staleness == [0, 1, 1, 1] and versions == [0, 0, 1, 2]
    assert all("time/rollout_wait" in metrics for step, metrics, _ in ahead.observer.seen if step)


def test_weights_are_loaded_only_when_nothing_is_sampled_and_an_evaluation_has_the_newest() -> None:
    made = of_fakes(True, max_steps=3, eval_steps=1).run()
    order = [entry for entry in made.log if entry.startswith(("load", "generate", "end_iteration"))]
    evaluations = [call[0].loaded for call in made.engine.calls if call[0].key.phase == "eval"]
    assert evaluations == [0, 1, 2, 3]
    # between two loads: the evaluation's answers, and in any order with the update those of the next step
    loads = [place for place, entry in enumerate(order) if entry.startswith("load")]
    between = [sorted(order[low + 1 : high]) for low, high in itertools.pairwise(loads)]
    assert between == [["end_iteration", *["generate"] * n] for n in (3, 2, 1)]


class Gated(ScriptedEngine):
    """Answers when ``go`` is set, or raises when it is given up."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, lambda prompt, key: "4")
        self.go, self.given_up = threading.Event(), False

    def abandon(self) -> None:
        self.given_up = True
        super().abandon()
        self.go.set()

    def generate(self, *arguments: Any, **options: Any) -> Any:
        assert self.go.wait(20)
        return super().generate(*arguments, **options)


def gated() -> tuple[Gated, OverlappedSource]:
    plain = source()
    engine = Gated(plain.prompter.tokenizer)
    return engine, OverlappedSource(dataclasses.replace(plain, engine=engine))


def test_a_step_is_made_while_the_caller_does_something_else() -> None:
    engine, ahead = gated()
    ahead.start(2)
    assert not engine.asked and ahead.state(2) is None  # start() has returned, and nothing is made yet
    engine.go.set()
    groups, metrics = ahead.take(2)
    assert len(groups) == 5 and metrics["rows/drawn"] == 15 and metrics["time/rollout_wait"] > 0
    assert ahead.take(2)[0] is groups and ahead.state(3) is None


def test_what_is_in_the_making_is_given_up_at_once() -> None:
    engine, ahead = gated()
    ahead.start(0)
    began = time.perf_counter()
    ahead.close()
    assert engine.given_up and time.perf_counter() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "step 0"]
    with pytest.raises(EngineError, match="given up"):
        ahead.take(0)


def test_what_is_finished_is_not_given_up() -> None:
    engine, ahead = gated()
    engine.go.set()
    ahead.start(0)
    ahead.finish()
    ahead.close()
    assert not engine.given_up and len(ahead.take(0)[0]) == 5


def test_a_failure_is_raised_where_the_step_is_taken_or_saved_and_not_before() -> None:
    ahead = OverlappedSource(source(env=Counting(fails_on=2)))
    ahead.start(0)
    ahead.finish()
    for ask in (lambda: ahead.take(0), lambda: ahead.state(0)):
        with pytest.raises(EnvError, match="raised KeyError"):
            ask()


class Fails:
    """A grader that fails on the tasks of step ``step``."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, task: Task, text: str) -> Grade:
        if task.id in [f"train{number}" for number in range(3 * self.step, 3 * self.step + 3)]:
            raise KeyError("no such rubric")
        return judge(task, text)


def test_the_step_that_was_trained_meanwhile_is_reported_before_a_failure_ends_the_run() -> None:
    made = of_fakes(True, env=ScriptedEnv(Fails(2)), max_steps=4)
    with pytest.raises(EnvError, match="raised KeyError"):
        made.run()
    assert [step for step, _, _ in made.observer.seen] == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("step")]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_each_rank_makes_its_share_in_its_thread(world: int) -> None:
    alone = source().take(2)[0]

    def program(ranks: Ranks) -> Any:
        ahead = OverlappedSource(source(ranks))
        ahead.start(2)
        ahead.finish()
        return ahead.take(2)[0]

    assert all(groups == alone for groups in ThreadRanks.run(world, program))


def test_a_failure_in_the_thread_of_one_rank_ends_all_ranks_with_its_line() -> None:
    def program(ranks: Ranks) -> Any:
        ahead = OverlappedSource(source(ranks, Counting(fails_on=4)))
        ahead.start(0)
        ahead.finish()
        return ahead.take(0)

    first, second = ThreadRanks.run(2, program)
    assert isinstance(second, EnvError) and "KeyError" in str(second)
    assert isinstance(first, RankError) and "rank 1 failed" in str(first)


def rich_groups() -> list[Group]:
    """Groups with everything that a rollout may have."""
    groups = []
    for group in random_groups(3, groups=2, size=2):
        first, *others = group.rollouts
        length = len(first.completion.tokens)
        full = dataclasses.replace(
            first,
            task=dataclasses.replace(first.task, payload=object()),
            retries=(others[0],),
            context=(Section(kind="feedback", source="comment", text='half a pair: \ud800 and "quotes"', cut=2),),
            grade=dataclasses.replace(first.grade, metrics={"f1": 0.1}, feedback="no"),
            teacher_logprobs=TopKLogprobs(ids=((1, 2),) * length, logprobs=((-0.1, -3.0),) * length),
        )
        groups.append(Group(rollouts=(full, *others)))
    return groups


def test_groups_come_back_from_their_file_but_for_what_is_the_environments(tmp_path: Path) -> None:
    groups = rich_groups()
    metrics = {"rows/drawn": 4.0, "time/rollout": 0.1}
    groups_file.write(tmp_path, groups, metrics)
    assert groups_file.read(tmp_path) == (list(map(groups_file.without_payloads, groups)), metrics)
    assert groups[0].rollouts[0].task.payload is not None and groups_file.read(tmp_path / "other") is None
    (tmp_path / groups_file.FILE).write_text('{"groups": [{}], "metrics": {}}')
    with pytest.raises(StorageError, match="holds no groups of rollouts"):
        groups_file.read(tmp_path)


def test_groups_that_were_saved_get_their_tasks_anew_and_are_not_made_again(tmp_path: Path) -> None:
    class WithPayload(Counting):
        def task(self, index: int, *, seed: int) -> Task:
            return dataclasses.replace(super().task(index, seed=seed), payload={index})

    made = source(env=WithPayload()).take(3)
    groups_file.write(tmp_path, *made)
    saved = groups_file.read(tmp_path)
    assert saved is not None
    env = WithPayload()
    ahead = OverlappedSource(source(env=env))
    ahead.restore(3, saved)
    ahead.start(3)
    assert ahead.take(3) == made and ahead.state(3) == made and not env.graded
    moved = OverlappedSource(dataclasses.replace(source(env=env), seed=8))
    with pytest.raises(StorageError, match="draws another task than when the checkpoint was written; got '8/15'"):
        moved.restore(3, saved)


# Whole runs on a fake vLLM server.


@pytest.fixture
def server() -> Iterator[tuple[FakeVLLM, str]]:
    fake = FakeVLLM(AutoModelForCausalLM.from_pretrained(BASE), window=512, dtype="torch.float32")
    with serving(fake) as url:
        yield fake, url


def config(folder: Path, url: str, *, overlap: bool = True, rate: float = 0.05, **run: Any) -> Config:
    """Four steps of VPD on the smallest base, with an evaluation and an E-step every second one."""
    resume = {"resume": True} if folder.exists() else {}
    return parse(
        {
            "model": {"name_or_path": str(BASE)},
            "rollout": {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6, "overlap": overlap},
            "engine": {"name": "vllm", "url": url, "sync_dir": str(folder.parent / "sync")},
            "algorithm": {"name": "vpd", "e_every": 2, "teacher_beta": 1000.0},
            "optim": {"learning_rate": rate},
            "run": {"max_steps": 4, "save_steps": 1, "eval_steps": 2, "eval_limit": 8, "eval_samples": 1}
            | {"save_total_limit": None, "output_dir": str(folder)}
            | resume
            | run,
        }
    )


@dataclasses.dataclass
class Left:
    """What a run left behind, without times and the server's numbers."""

    metrics: list[dict[str, float]]
    rollouts: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    weights: dict[str, Any]


def left(folder: Path) -> Left:
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    return Left(
        metrics=[{k: v for k, v in line.items() if not k.startswith("engine/")} for line in metrics_of(folder)],
        rollouts=pq.read_table(folder / "rollouts").to_pylist(),
        tokens=pq.read_table(folder / "tokens").to_pylist(),
        weights={name: tensor.tolist() for name, tensor in weights.items()},
    )


class Signals:
    """An observer that sends a signal after a step."""

    def __init__(self, at: int):
        self.at = at

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def test_with_a_learning_rate_of_0_a_run_is_the_same_with_overlap(server: tuple[FakeVLLM, str], tmp_path: Path) -> None:
    plain, ahead = (
        left(train(config(tmp_path / name, server[1], overlap=name == "ahead", rate=0.0)))
        for name in ("plain", "ahead")
    )
    assert [line.pop("rollout/staleness", 0) for line in plain.metrics] == [0] * 5
    assert [line.pop("rollout/staleness", 0) for line in ahead.metrics] == [0, 0, 1, 1, 1]
    scored = [[line.pop("e_step/rows_scored", 0) for line in run.metrics] for run in (plain, ahead)]
    assert scored[0][1] == scored[1][1] < 4 and scored[0][3] < 4 == scored[1][3]  # stale rows are all scored
    assert [row.pop("version") for row in plain.rollouts] != [row.pop("version") for row in ahead.rollouts]
    for ours, theirs in zip(plain.metrics, ahead.metrics, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-3)
    assert plain.rollouts == ahead.rollouts and plain.weights == ahead.weights


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_was_interrupted_is_the_one_that_was_not(
    at: int, server: tuple[FakeVLLM, str], tmp_path: Path
) -> None:
    whole = train(config(tmp_path / "whole", server[1]))
    held = [(tmp_path / "whole" / f"checkpoint-{step}" / "groups.json").is_file() for step in (1, 2, 3, 4)]
    assert held == [True, True, True, False]
    with pytest.raises(Interrupted, match=f"checkpoint-{at} is saved"):
        train(config(tmp_path / "parts", server[1], save_steps=0), observers=[Signals(at)])
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == [f"checkpoint-{at}"]
    train(config(tmp_path / "parts", server[1], save_steps=0))
    assert left(tmp_path / "parts") == left(whole)
    versions = [row["version"] for row in pq.read_table(whole / "rollouts").to_pylist() if row["role"] == "student"]
    assert versions == [0] * 8 + [1] * 4 + [2] * 4


def test_a_server_that_fails_during_the_update_ends_the_run_with_its_line_and_nothing_is_lost(
    server: tuple[FakeVLLM, str], tmp_path: Path
) -> None:
    fake, url = server
    whole = left(train(config(tmp_path / "whole", url)))

    class Breaks(Signals):
        """After a step the server refuses a sample, so one of the step after the next."""

        def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
            if step == self.at:
                fake.faults["/v1/completions"] = [(400, "out of luck")]

    with pytest.raises(EngineError, match="out of luck"):
        train(config(tmp_path / "parts", url), observers=[Breaks(1)])
    assert [line["step"] for line in metrics_of(tmp_path / "parts")] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-1"]
    train(config(tmp_path / "parts", url))
    assert left(tmp_path / "parts") == whole


def test_a_damaged_file_of_groups_makes_the_checkpoint_a_damaged_one(
    server: tuple[FakeVLLM, str], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(config(tmp_path / "run", server[1]), observers=[Signals(2)])
    (tmp_path / "run" / "checkpoint-2" / "groups.json").unlink()
    train(config(tmp_path / "run", server[1]))
    assert left(tmp_path / "run") == left(train(config(tmp_path / "whole", server[1])))  # it went on from checkpoint-1


def test_requests_in_another_thread_are_given_up(server: tuple[FakeVLLM, str], tmp_path: Path) -> None:
    from vpd.engines.vllm_client import VLLMClient

    fake, url = server
    fake.faults["/v1/models"] = ["wait"]
    client, raised = VLLMClient(url), []

    def ask() -> None:
        try:
            client.get("/v1/models")
        except EngineError as error:
            raised.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not fake.busy:
        time.sleep(0.01)
    client.abandon()
    thread.join(5)
    assert not thread.is_alive() and raised == ["a request was given up"]


# What is refused, and what follows from the setting.


def test_the_embedded_engine_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "out", rollout__overlap="true") == 2
    error = capsys.readouterr().err
    assert "the embedded engine samples on the very weights that the learner is changing" in error
    assert "Set engine.name to vllm" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


ENGINES = """
from vpd.engines import ScriptedEngine

class Plain:
    def load(self, policy): ...
    def generate(self, prompts, **options): ...

class Settings:
    def build(self, parts):
        return Plain()

class OwnWeights:
    def build(self, parts):
        return ScriptedEngine(parts.tokenizer, lambda prompt, key: "1 2 3")
"""


def test_an_engine_of_ones_own_must_say_that_it_has_its_own_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "engines.py").write_text(ENGINES)
    options: dict[str, object] = {"rollout.overlap": "true", "run.max_steps": 2}
    assert vpd_train(tmp_path / "out", **options, engine__name=f"{tmp_path}/engines.py:Settings") == 2
    assert "does not say that it samples on weights of its own; got Plain" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert vpd_train(tmp_path / "out", **options, engine__name=f"{tmp_path}/engines.py:OwnWeights") == 0


@pytest.mark.parametrize(
    ("rollout", "given", "expected"),
    [({}, {}, "own"), ({"overlap": True}, {}, "sampler"), ({"overlap": True}, {"importance_reference": "own"}, "own")],
)
def test_the_ratio_is_against_the_version_that_sampled(rollout: Any, given: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "engines.py").write_text(ENGINES)
    engine = {"name": f"{tmp_path}/engines.py:OwnWeights"}
    for method in ("vpd", "sdpo", "grpo", "gated", "hybrid"):
        made = parse({"rollout": rollout, "engine": engine, "algorithm": {"name": method, **given}})
        assert made.algorithm.importance_reference == expected


def test_the_dry_run_counts_the_longer_of_sampling_and_update_and_scores_stale_rows(tmp_path: Path) -> None:
    settings = {"model": {"name_or_path": str(BASE)}, "engine": {"name": "vllm"}, "run": {"max_steps": 2}}
    plain, ahead = (
        dry_run(parse({**settings, "rollout": {"overlap": overlap}}), DryRunSettings(server_gpus=1)).estimate
        for overlap in (False, True)
    )
    assert plain.seconds == pytest.approx(sum(phase.seconds for phase in plain.phases))
    spent = {part: sum(p.seconds for p in ahead.phases if p.part == part) for part in ("sampling", "update", "sync")}
    assert ahead.seconds == pytest.approx(max(spent["sampling"], spent["update"]) + spent["sync"])
    scored = [sum(p.work.tokens for p in found.phases if p.work.name.startswith("score")) for found in (plain, ahead)]
    assert min(spent.values()) > 0 and scored[1] > scored[0]


def test_log_probs_of_older_weights_are_not_taken_for_the_students_own() -> None:
    learner = tiny_learner(tiny_model())
    examples = to_examples(random_groups(1, groups=8, size=4))
    now = learner.score(examples, student_logprobs)
    same = [dataclasses.replace(e, behaviour=tuple(row)) for e, row in zip(examples, now, strict=True)]
    behind = [dataclasses.replace(e, version=-1, behaviour=tuple(x - 1e-5 for x in e.behaviour)) for e in same]
    assert own_logprobs(same, learner)[1]["rows_scored"] < len(examples)
    found, metrics = own_logprobs(behind, learner)
    assert metrics["rows_scored"] == len(examples)
    assert all(row == pytest.approx(own, abs=1e-9) for row, own in zip(found, now, strict=True))


def test_an_iteration_that_stops_the_run_is_replayed(
    server: tuple[FakeVLLM, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, object] = {"engine.name": "vllm", "engine.url": server[1], "engine.sync_dir": tmp_path / "sync"}
    huge = {"optim.learning_rate": 1e29, "optim.optimizer": "sgd", "rollout.overlap": "true", "run.eval_steps": 0}
    assert vpd_train(tmp_path / "out", **settings, **huge, model__name_or_path=BASE) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite" in error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("step")]
    assert main(["replay", str(tmp_path / "out" / "nonfinite-step-000001")]) == 0
    assert "  first " in capsys.readouterr().out
