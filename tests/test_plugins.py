"""A user's own method, feedback source, engine and environment: each from one file, through ``vpd train``."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from helpers import metrics_of, vpd_train

import vpd
from vpd.algorithms.distill import SDPOSettings
from vpd.config import parse
from vpd.engines.torch_engine import TorchEngine
from vpd.envs import user_code

METHOD = """
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from vpd import Needs, Settings
from vpd.algorithms.examples import to_examples, with_loss_weights


@dataclass(frozen=True, kw_only=True)
class Imitate(Settings, section="algorithm"):
    keep: Annotated[int, Ge(1), "answers of each group that are imitated"] = 1

    @property
    def needs(self):
        return Needs(group=True)

    def build(self, prompter):
        return Imitation(self.keep)


class Imitation:
    def __init__(self, keep):
        self.keep = keep

    def step(self, groups, learner):
        chosen = [i < self.keep for group in groups for i, _ in enumerate(group.rollouts)]
        examples = with_loss_weights(to_examples(groups), nll=[c / sum(chosen) for c in chosen])
        return learner.update("imitation", examples, {"nll": self.loss})

    def loss(self, scorer, batch):
        return -scorer.logprobs("student")

    def state(self):
        return {}

    def restore(self, state): ...


@dataclass(frozen=True, kw_only=True)
class OnlySettings:
    average: str = "token_mean"
"""

SOURCE = """
from dataclasses import dataclass

from vpd import Section, extend


@dataclass(frozen=True)
class Hint:
    word: str = "right"

    def __call__(self, groups, writer):
        section = Section(kind="feedback", source="hint", text=self.word)
        return [extend(g, [[] if r.success else [section] for r in g.rollouts]) for g in groups]


def wrong(groups, writer):
    return [extend(g, [[Section(kind="feedback", source="plain", text="wrong")] for _ in g.rollouts]) for g in groups]


def broken(groups, writer):
    return None


def raises(groups, writer):
    raise KeyError("no such row")
"""

ENGINE = """
from vpd import Completion


class Constant:
    def __init__(self, answer="1 2 3 4 5 6", tokenizer=None):
        self.answer = answer
        self.tokenizer = tokenizer

    def build(self, parts):
        return Constant(self.answer, parts.tokenizer)

    def load(self, policy): ...

    def generate(self, prompts, **sampling):
        ids = tuple(self.tokenizer.encode(self.answer, add_special_tokens=False))
        one = Completion(
            tokens=ids, sampled=(True,) * len(ids), logprobs=(-1.0,) * len(ids), text=self.answer, finish="stop"
        )
        return [one] * len(prompts)


class NoEngine: ...
"""

ENV = """
from vpd import Grade, Task, per_row


class Copy:
    def __init__(self, digit: int = 3):
        self.digit = digit

    def task(self, index, *, seed):
        return Task(id=str(index), messages=({"role": "user", "content": f"apply rule A to {self.digit}"},))

    def eval_tasks(self, limit):
        return [self.task(-1, seed=0)][:limit]

    @per_row
    def grade(self, task, text):
        return Grade(reward=float(text.startswith(str(self.digit))), feedback="wrong")
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("algo", METHOD), ("source", SOURCE), ("engine", ENGINE), ("world", ENV)):
        (tmp_path / f"toy_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config_of(run: Path) -> dict[str, object]:
    data: dict[str, object] = yaml.safe_load((run / "config.yaml").read_text())
    return data


def test_a_method_from_one_file(files: Path) -> None:
    name = f"{files}/toy_algo.py:Imitate"
    assert vpd_train(files / "run", algorithm__name=name, algorithm__keep=2, run__max_steps=2, feedback="[]") == 0
    steps = metrics_of(files / "run")
    assert [step["imitation/rows"] for step in steps] == [8.0, 8.0]
    assert steps[1]["imitation/loss"] != steps[0]["imitation/loss"] and steps[0]["imitation/grad_norm"] > 0
    assert config_of(files / "run")["algorithm"] == {"name": name, "keep": 2}


def test_a_source_from_one_file(files: Path) -> None:
    feedback = f"[environment, {{name: {files}/toy_source.py:Hint, word: mirror}}, toy_source:wrong]"
    assert vpd_train(files / "run", feedback=feedback, run__max_steps=1) == 0
    assert metrics_of(files / "run")[0]["teacher/from_environment+hint+plain"] == 1.0
    row = pq.read_table(files / "run" / "rollouts").to_pylist()[0]
    assert "mirror wrong" in row["teacher_prompt"]
    assert config_of(files / "run")["feedback"] == [
        {"name": "environment", "when": "always"},
        {"name": f"{files}/toy_source.py:Hint", "word": "mirror"},
        {"name": "toy_source:wrong"},
    ]


def test_a_run_with_a_source_of_ones_own_goes_on(files: Path) -> None:
    changes = {"feedback": f"[environment, {{name: {files}/toy_source.py:Hint, word: mirror}}]", "run__save_steps": 1}
    assert vpd_train(files / "run", run__max_steps=1, **changes) == 0
    assert vpd_train(files / "run", run__max_steps=2, run__resume="true", **changes) == 0


def test_an_engine_of_ones_own_declares_what_it_changes_of_a_methods_defaults(files: Path) -> None:
    """As engine vllm does: its log-probs are not the learner's."""
    declared = '{"importance_reference": "sampler", "other": 1}'
    text = f"{ENGINE}\n\nclass Elsewhere(Constant):\n    algorithm_defaults = {declared}\n"
    (files / "elsewhere.py").write_text(text)

    def reference(engine: str, **algorithm: str) -> str:
        data = {"engine": {"name": f"{files}/elsewhere.py:{engine}"}, "algorithm": {"name": "sdpo", **algorithm}}
        made = parse(data).algorithm
        assert isinstance(made, SDPOSettings)
        return made.importance_reference

    assert (reference("Elsewhere"), reference("Constant")) == ("sampler", "own")
    assert reference("Elsewhere", importance_reference="own") == "own"
    method = {"name": f"{files}/toy_algo.py:Imitate"}
    parse({"engine": {"name": f"{files}/elsewhere.py:Elsewhere"}, "algorithm": method})  # it has no such setting


def test_an_engine_from_one_file(files: Path) -> None:
    name = f"{files}/toy_engine.py:Constant"
    assert vpd_train(files / "run", engine__name=name, engine__answer="'7 7 7'", run__max_steps=1) == 0
    assert {row["completion"] for row in pq.read_table(files / "run" / "rollouts").to_pylist()} == {"7 7 7"}
    assert config_of(files / "run")["engine"] == {"name": name, "answer": "7 7 7"}


def test_an_environment_from_one_module_and_the_length_that_is_decided_for_it(files: Path) -> None:
    extra = {"env__name": "toy_world:Copy", "env__digit": 5, "run__max_steps": 1}
    assert vpd_train(files / "run", **extra, rollout__max_completion_length="null") == 0
    config = config_of(files / "run")
    assert config["env"] == {"name": "toy_world:Copy", "digit": 5}
    assert config["rollout"]["max_completion_length"] == (96 - 7) // 2  # type: ignore[index]


MISTAKES = {
    "method option": ({"algorithm.name": "toy_algo:Imitate", "algorithm.kep": 2}, ["algorithm.kep", "'keep'"]),
    "method range": ({"algorithm.name": "toy_algo:Imitate", "algorithm.keep": 0}, ["algorithm.keep", "at least 1"]),
    "method needs": ({"algorithm.name": "toy_algo:Imitate", "rollout.num_generations": 1}, ["compares", "at least 2"]),
    "no method": ({"algorithm.name": "toy_algo:OnlySettings"}, ["is no algorithm", "needs and build"]),
    "source option": ({"feedback": "{name: toy_source:Hint, wrd: a}"}, ["wrd", "Did you mean 'word'"]),
    "source result": ({"feedback": "[toy_source:broken]"}, ["toy_source:broken", "NoneType", "4 groups"]),
    "source raises": ({"feedback": "[toy_source:raises]"}, ["toy_source:raises", "KeyError", "no such row"]),
    "engine option": ({"engine.name": "toy_engine:Constant", "engine.answr": 1}, ["engine.answr", "'answer'"]),
    "no engine": ({"engine.name": "toy_engine:NoEngine"}, ["is no engine", "load and generate"]),
    "env option": ({"env.name": "toy_world:Copy", "env.digt": 1}, ["env.digt", "'digit'"]),
    "no such class": ({"algorithm.name": "toy_algo:Imitat"}, ["has no Imitat", "Did you mean 'Imitat"]),
    "no such module": ({"engine.name": "toy_engin:Constant"}, ["no module 'toy_engin'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_a_part_of_ones_own_is_one_line(
    mistake: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = MISTAKES[mistake]
    assert vpd_train(files / "run", **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(piece in error for piece in said), error
    assert not (files / "run" / "model").exists()


CALLED = """
class Breaks(Constant):
    def generate(self, prompts, **sampling):
        return {}["no such prompt"]

    def build(self, parts):
        return Breaks()
"""
KEEPS = """
class Keeping(Imitation):
    def state(self):
        return {"seen": {1, 2}}


@dataclass(frozen=True, kw_only=True)
class Keeps(Imitate):
    def build(self, prompter):
        return Keeping(self.keep)
"""


def test_the_traceback_of_a_part_of_ones_own_ends_with_its_place(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What raises inside of vpd names nobody else."""
    (files / "breaks.py").write_text(ENGINE + CALLED)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    line = (ENGINE + CALLED).splitlines().index('        return {}["no such prompt"]') + 1

    def shown(**changes: str) -> str:
        with pytest.raises(KeyError, match="no such") as raised:
            vpd_train(files / "run", run__max_steps=1, **changes)
        sys.excepthook(raised.type, raised.value, raised.tb)
        return capsys.readouterr().err

    said = shown(engine__name=f"{files}/breaks.py:Breaks")
    assert said.endswith(
        f"vpd: error: this was raised at {files}/breaks.py:{line}, which vpd called and is no part of it\n"
    )
    monkeypatch.setattr(TorchEngine, "generate", lambda *_, **__: dict[str, int]()["no such answer"])
    monkeypatch.setattr(user_code, "OURS", "/")  # as if this file were a part of vpd
    assert shown().endswith("KeyError: 'no such answer'\n")


def test_a_state_that_no_checkpoint_can_hold_is_told_of_before_the_first_step(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "keeps.py").write_text(METHOD + KEEPS)
    name = f"{files}/keeps.py:Keeps"
    assert vpd_train(files / "run", algorithm__name=name, run__max_steps=2, feedback="[]") == 2
    error = capsys.readouterr().err
    assert "the state of the method cannot be kept" in error and "set is not JSON serializable" in error
    assert error.count("\n") == 1 and not (files / "run" / "metrics.jsonl").exists()


SMALL = {
    "rollout": {"prompts_per_step": 2, "num_generations": 2},
    "run": {"max_steps": 1, "eval_limit": 4},
}


class Watcher:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step(self, step: int, metrics: vpd.Metrics, groups: object) -> None:
        self.steps.append(step)

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: dict[str, object]) -> None: ...


class Mine:
    """An environment that no file names."""

    def task(self, index: int, *, seed: int) -> vpd.Task:
        return vpd.Task(id=str(index), messages=({"role": "user", "content": "apply rule A to 1"},))

    def eval_tasks(self, limit: int | None) -> list[vpd.Task]:
        return [self.task(0, seed=0)][:limit]

    @vpd.per_row
    def grade(self, task: vpd.Task, text: str) -> vpd.Grade:
        return vpd.Grade(reward=0.0)


def say(groups: list[vpd.Group], writer: vpd.Writer) -> list[vpd.Group]:
    section = vpd.Section(kind="feedback", source="said", text="wrong")
    return [vpd.extend(group, [[section] for _ in group.rollouts]) for group in groups]


def test_objects_take_the_place_of_sections_and_the_run_folder_says_so(tmp_path: Path) -> None:
    from vpd.recipes.assemble import load_model

    run = tmp_path / "run"
    config = parse({**SMALL, "run": {**SMALL["run"], "output_dir": str(run)}})
    model, tokenizer = load_model(config.model)
    watcher = Watcher()
    found = vpd.train(model, config=config, tokenizer=tokenizer, env=Mine(), feedback=[say], callbacks=[watcher])
    assert found.folder == run and watcher.steps == [1]
    assert metrics_of(run)[0]["teacher/from_said"] == 1.0
    kept = config_of(run)
    assert kept["env"] == {"object": "test_plugins.Mine"} and kept["feedback"] == [{"object": "test_plugins.say"}]
    assert kept["model"]["name_or_path"].endswith("LlamaForCausalLM")  # type: ignore[index]
    assert "feedback : wrong" in pq.read_table(run / "rollouts").to_pylist()[0]["teacher_prompt"]
    again = vpd.load_config(str(run / "config.yaml"))
    with pytest.raises(
        vpd.ConfigError, match=r"environment was passed as an object \(test_plugins.Mine\) that no file"
    ):
        vpd.assemble(again)
    with pytest.raises(vpd.ConfigError, match="needs its tokenizer"):
        vpd.assemble(parse(SMALL), model=model)
    with pytest.raises(vpd.ConfigError, match=r"model was passed as an object \(.*LlamaForCausalLM\) .* Pass model="):
        vpd.assemble(again, env=Mine(), feedback=[say])
    assert kept["optim"]["learning_rate"] == 1e-5  # type: ignore[index]  # a shipped base's default is not this model's
    parts = vpd.assemble(parse(SMALL), env=Mine())
    assert parts.given == ("env",) and parts.config.rollout.max_completion_length == (96 - 7) // 2
