"""``vpd.train`` and ``vpd.evaluate`` with objects of Python, and ``vpd.Run``."""

import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow as pa
import pytest
import torch
import yaml
from helpers import tiny_model
from transformers import TrainerCallback

import vpd
from vpd.algorithms.distill import SDPOSettings
from vpd.algorithms.examples import to_examples, with_loss_weights
from vpd.api.arguments import read_arguments
from vpd.api.callbacks import as_observers
from vpd.config import RunSettings
from vpd.envs.digits import Digits
from vpd.envs.given import MOST_ENTRIES, as_function, read_entries
from vpd.errors import Interrupted
from vpd.feedback import extend
from vpd.learners.settings import OptimSettings
from vpd.model.settings import ModelSettings
from vpd.recipes.assemble import load_model
from vpd.run_folder.files import FileSystem
from vpd.run_folder.state import Phase, Recorder
from vpd.types import Comparison, Completion, Group

TASKS = [{"prompt": f"apply rule A to {n} 2 3", "answer": f"3 2 {n}"} for n in range(6)]
SMALL = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6}


def grade(text: str, task: dict[str, str]) -> Any:
    right = text.strip() == task["answer"]
    return 1.0 if right else (0.0, f"wrong : {task['answer']}")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small_run(*arguments: Any, **more: Any) -> vpd.Run:
    return vpd.train("tiny", *arguments, **{"rollout": SMALL, "run": {"max_steps": 1}, **more})


# tasks


def generated() -> Iterator[str]:
    yield from ("apply rule A to 1", "apply rule B to 2")


FORMS: dict[str, Any] = {
    "texts": ["apply rule A to 1", "apply rule B to 2"],
    "a generator": generated,
    "messages": [[{"role": "user", "content": "apply rule A to 1"}], [{"role": "user", "content": "2"}]],
    "mappings with messages": [{"messages": [{"role": "user", "content": "apply rule A to 1"}], "answer": 1}],
    "tasks": [vpd.Task(id="one", messages=({"role": "user", "content": "apply rule A to 1"},), payload=5)],
    "a Dataset": lambda: datasets.Dataset.from_list([{"prompt": "apply rule A to 1", "answer": "1"}]),
    "a DataFrame": lambda: pandas.DataFrame([{"prompt": "apply rule A to 1", "answer": "1"}]),
    "an Arrow table": lambda: pa.table({"prompt": ["apply rule A to 1"], "answer": ["1"]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_grader_gets_every_entry_as_it_was_passed(form: str) -> None:
    made = FORMS[form]() if callable(FORMS[form]) else FORMS[form]
    seen: list[Any] = []

    def note(text: str, task: Any) -> float:
        seen.append(task)
        return 0.5

    result = vpd.evaluate("tiny", made, note, options={"num_samples": 1}, rollout=SMALL)
    assert result.student["reward"] == 0.5
    rows = list(generated()) if form == "a generator" else FORMS[form]() if callable(FORMS[form]) else FORMS[form]
    expected = [{"prompt": "apply rule A to 1", "answer": "1"}] if form.startswith(("a Data", "an Arrow")) else rows
    assert sorted(map(str, seen)) == sorted(map(str, expected))


def test_a_file_of_records_is_read(folder: Path) -> None:
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    result = vpd.evaluate("tiny", "tasks.jsonl", grade, options=vpd.EvalOptions(num_samples=1, limit=2), rollout=SMALL)
    assert result.student["tasks"] == 2 and {r.grade.feedback for g in result.groups for r in g.rollouts} != {None}


def test_a_result_shows_its_numbers_and_no_tokens(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(text: str, task: Any) -> Any:
        return 0.0, "wrong : rule A"

    options = {"num_samples": 2, "teacher": True}
    with caplog.at_level(logging.INFO, "vpd"):
        result = vpd.evaluate("tiny", TASKS, wrong, options=options, rollout=SMALL)
    assert str(result) == repr(result) and "\n" not in repr(result)
    assert repr(result).startswith(
        "Evaluation(student: avg@2 0.000 ± 0.000, pass@2 0.000 ± 0.000, reward 0.000, tasks 6,"
    )
    assert "; teacher: " in repr(result) and "gain 0.000 ± 0.000" in repr(result) and "tokens" not in repr(result)
    assert "evaluating tiny: 6 tasks, 2 answers each, failed ones again with their feedback" in caplog.messages


def endless() -> Iterator[str]:
    while True:
        yield "apply rule A to 1"


def broken() -> Iterator[str]:
    yield "apply rule A to 1"
    raise OSError("the disk is gone")


BAD_TASKS: dict[str, tuple[Any, str]] = {
    "none": ([], "tasks is empty"),
    "a number": (3, "tasks is no list of tasks; got int"),
    "one mapping": (TASKS[0], "tasks is no list of tasks; got dict"),
    "an environment's name": ("digits", "Write env='digits'"),
    "no such file": ("tasks.jsonl", "cannot read tasks.jsonl"),
    "no prompt": ([{"question": "1"}], r"tasks\[0\] has no prompt; got the keys question; expected 'prompt'"),
    "an empty text": (["apply rule A to 1", " "], r"tasks\[1\] has no text 'prompt'"),
    "no user": ([[{"role": "assistant", "content": "1"}]], r"tasks\[0\]: 'prompt' does not end with the user's"),
    "neither": ([5], r"tasks\[0\] is no task; got 5"),
    "a generator that raises": (broken, r"iterating over tasks raised OSError at .*; got the disk is gone"),
}


@pytest.mark.parametrize("what", BAD_TASKS)
def test_tasks_that_cannot_be_used_are_one_line_and_no_folder(what: str) -> None:
    tasks, message = BAD_TASKS[what]
    with pytest.raises(vpd.VPDError, match=message):
        small_run(tasks() if callable(tasks) else tasks, lambda text, task: 0.0)
    assert not Path("out").exists()


def test_an_endless_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_ENTRIES >= 100_000
    monkeypatch.setattr("vpd.envs.given.MOST_ENTRIES", 10)
    with pytest.raises(vpd.DataError, match=r"tasks does not end; got more than 10 entries; .* itertools.islice"):
        read_entries(endless(), "tasks")


# graders


def trl(prompts: Any, completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


async def slow(text: str, task: Any) -> vpd.Grade:
    return vpd.Grade(reward=0.25, feedback="asked a server")


class Judge:
    def __call__(self, text: str, task: Any) -> dict[str, float]:
        return {"score": 0.75, "words": len(text.split())}


@pytest.mark.parametrize(("grader", "reward"), [(trl, 0.0), (slow, 0.25), (Judge(), 0.75), ([Judge(), slow], 1.0)])
def test_graders_of_every_form(grader: Any, reward: float) -> None:
    result = vpd.evaluate("tiny", TASKS, grader, options={"num_samples": 1, "limit": 2}, rollout=SMALL)
    assert result.student["reward"] == reward


BAD_GRADERS: dict[str, tuple[Any, str]] = {
    "no function": (3, "env.reward has an entry that cannot be read"),
    "a class": (Judge, "grader is no function"),
    "one argument": (
        lambda text: 0.0,
        r"the grader <lambda> takes other arguments; got \(text\); expected \(text, task\)",
    ),
    "the wrong way round": (lambda task, text: 0.0, r"got \(task, text\); expected \(text, task\)"),
    "nothing returned": (lambda text, task: None, r"<lambda> returned None"),
    "a text": (lambda text, task: "good", r"<lambda> on row 0 returned no number; got 'good'"),
    "feedback of another kind": (
        lambda text, task: (0.0, {"a": 1}),
        r"<lambda> on row 0 returned feedback that is no text; got \{'a': 1\}; expected \(number, text\)",
    ),
    "an exception": (lambda text, task: task["nothing"], r"<lambda> on row 0 raised KeyError at .*test_api.py"),
}


@pytest.mark.parametrize("what", BAD_GRADERS)
def test_graders_that_cannot_be_used_are_one_line(what: str) -> None:
    grader, message = BAD_GRADERS[what]
    with pytest.raises(vpd.VPDError, match=message):
        vpd.evaluate("tiny", TASKS, grader, options={"num_samples": 1}, rollout=SMALL)


def test_builtins_and_names_are_graders(folder: Path) -> None:
    (folder / "rewards.py").write_text("def one(text, task):\n    return 1.0\n")
    assert as_function("rewards.py:one")([_row()], ["x"]) == [1.0]
    assert as_function(max)([_row("a")], ["b"]) == ["b"]  # a function in C


def _row(entry: Any = None) -> Any:
    from vpd.envs.given import GivenRow

    return GivenRow(prompt="", columns={}, entry=entry)


# settings


def test_sections_are_the_file_s_and_what_was_passed_is_recorded() -> None:
    run = small_run(
        TASKS, grade, algorithm={"name": "vpd", "e_every": 2}, optim=OptimSettings(learning_rate=3e-4),
        prompts={"max_feedback_length": 32}, feedback=["environment", {"name": "sibling", "when": "missing"}],
    )  # fmt: skip
    kept = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert kept["algorithm"]["e_every"] == 2 and kept["optim"]["learning_rate"] == 3e-4
    assert kept["prompts"]["max_feedback_length"] == 32 and kept["feedback"][1]["when"] == "missing"
    assert kept["env"]["object"].startswith("6 tasks (") and kept["env"]["object"].endswith("graded by test_api.grade")
    assert "digits" not in json.dumps(kept)


def test_a_config_goes_below_the_other_arguments(caplog: pytest.LogCaptureFixture) -> None:
    config = vpd.parse_config(
        {"algorithm": {"name": "vpd", "e_every": 3, "distillation_alpha": 0.25}, "rollout": SMALL}
    )
    with caplog.at_level(logging.WARNING, "vpd"):
        run = vpd.train(config, TASKS, grade, algorithm="sdpo", run={"max_steps": 1, "output_dir": "first"})
    assert [message for message in caplog.messages if "instead of" in message] == [
        "algorithm.name is sdpo instead of vpd; kept: distillation_alpha; dropped, as sdpo has no such setting: e_every"
    ]
    assert run.settings["algorithm"]["name"] == "sdpo" and run.settings["algorithm"]["distillation_alpha"] == 0.25
    assert run.settings["optim"]["learning_rate"] == 2e-4  # the shipped base's
    run = vpd.train(config=config, env="digits", run={"max_steps": 1, "output_dir": "second"})
    assert run.settings["env"]["name"] == "digits" and run.settings["algorithm"]["e_every"] == 3
    with pytest.raises(vpd.ConfigError, match="two configs"):
        vpd.train(config, config=config)


def test_a_tiny_model_is_trained_and_evaluated_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)

    def counting(text: str, task: Any) -> float:
        threads.append(torch.get_num_threads())
        return 0.0

    try:
        vpd.train("tiny", TASKS, counting, rollout=SMALL, run={"max_steps": 1})
        vpd.evaluate("tiny", TASKS[:1], counting, options={"num_samples": 1}, rollout={"max_completion_length": 2})
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


async def notice(step: int, metrics: Any, groups: Any) -> None:
    raise AssertionError("nobody would await it")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "flat": ({"learning_rate": 1e-5}, r"unknown argument learning_rate; .* That is optim.learning_rate here"),
    "another library's": ({"num_train_epochs": 1}, "unknown argument num_train_epochs"),
    "mistyped": ({"optm": {}}, "Did you mean 'optim'"),
    "renamed": ({"observers": []}, "That is callbacks= here"),
    "a section that is none": ({"optim": 3}, "optim= is no section; got 3"),
    "an unknown key": ({"optim": {"learning_rat": 1}}, "unknown key optim.learning_rat. Did you mean 'learning_rate'"),
    "an unknown method": ({"algorithm": "vdp"}, "unknown algorithm 'vdp'. Did you mean 'vpd'"),
    "no method": ({"algorithm": object()}, "object is no algorithm; got object without needs and build"),
    "no source": ({"feedback": [3]}, "a feedback source cannot be called"),
    "no feedback": ({"feedback": []}, "needs feedback"),
    "no callback": ({"callbacks": [3]}, "a callback cannot be used; got 3"),
    "both": ({"env": "digits"}, "what to train on is not clear; got tasks and grader and env"),
    "no held-out tasks": ({"run": {"eval_steps": 1}}, "run.eval_steps needs held-out tasks. Pass eval_tasks="),
    "more than all held out": ({"eval_tasks": 1.5}, "^eval_tasks is out of range; got 1.5; expected tasks, or a share"),
    "held-out tasks that are trained on": (
        {"eval_tasks": TASKS[:1]},
        r"tasks and eval_tasks share 1 questions; .* or pass eval_tasks=0.1: that share of tasks is then held out",
    ),
    "a folder that cannot be": ({"run": {"output_dir": "/proc/self/out"}}, "cannot write to /proc/self/out"),
    "no tokenizer": ({"tokenizer": 5}, "tokenizer= is no tokenizer; got int without chat_template"),
    "an async callback": ({"callbacks": notice}, "the callback notice is async; expected a plain function"),
    "a callback of one argument": ({"callbacks": lambda step: None}, r"takes other arguments; got \(step\); expected"),
    "grading that is unknown": ({"env": {"max_fail": 1.0}}, "what to train on is not clear; got tasks and"),
    "a share that is none": ({"env": {"max_failed": 2.0}}, "max_failed is out of range"),
    "no model": ({"tokenizer": None, "engine": 3}, "3 is no engine|int is no engine|no engine"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_one_line_and_no_folder(what: str) -> None:
    more, message = WRONG[what]
    with pytest.raises(vpd.VPDError, match=message):
        small_run(TASKS, grade, **more)
    assert not Path("out").exists()


@pytest.mark.parametrize("given", [{"tasks": TASKS}, {"grader": grade}, {"eval_tasks": TASKS}])
def test_half_of_what_to_train_on_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(vpd.ConfigError, match=r"what to train on is not clear|eval_tasks= without"):
        vpd.train("tiny", **given)


# objects


class Imitate:
    """Settings and method in one."""

    needs = vpd.Needs()

    def build(self, prompter: Any) -> "Imitate":
        return self

    def step(self, groups: Any, learner: Any) -> Any:
        examples = to_examples(groups)
        return learner.update(
            "imitate",
            with_loss_weights(examples, nll=[0.1] * len(examples)),
            {"nll": lambda s, b: -s.logprobs("student")},
        )

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


class Shouting:
    """An engine that answers the same to everything."""

    def build(self, parts: vpd.EngineParts) -> Any:
        from vpd.engines import ScriptedEngine

        return ScriptedEngine(parts.tokenizer, answer=lambda prompt, key: "3 2 1")


def say(groups: list[Group], writer: vpd.Writer) -> list[Group]:
    section = vpd.Section(kind="feedback", source="say", text="wrong")
    return [vpd.extend(group, [[section] for _ in group.rollouts]) for group in groups]


def test_objects_of_every_kind_train_and_a_resume_needs_them_again() -> None:
    model, tokenizer = load_model(vpd.parse_config({}).model)
    objects: dict[str, Any] = {"tokenizer": tokenizer, "algorithm": Imitate(), "feedback": say}
    settings: dict[str, Any] = {"rollout": SMALL, "run": {"max_steps": 1}}
    before = model.get_input_embeddings().weight.detach().clone()
    run = vpd.train(model, TASKS, grade, **objects, **settings)
    assert run.metrics["imitate/rows"].iloc[-1] == 4 and run.metrics["teacher/from_say"].iloc[-1] == 1
    assert not (before == model.get_input_embeddings().weight).all()  # trained in place
    kept = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert kept["algorithm"] == {"object": "test_api.Imitate"} and kept["feedback"] == [{"object": "test_api.say"}]
    again = {"max_steps": 2, "resume": True}
    for absent, message in (
        ({}, "the algorithm was passed as an object .*Imitate.* Pass algorithm= again"),
        ({"algorithm": Imitate()}, "Pass env= .or tasks= and grader=. again"),
    ):
        with pytest.raises(vpd.ConfigError, match=message):
            vpd.train(run={**again}, **absent)
    with pytest.raises(vpd.ConfigError, match="Pass feedback= again"):
        vpd.train(None, TASKS, grade, algorithm=Imitate(), run=again)
    with pytest.raises(vpd.ConfigError, match="Pass model= and tokenizer= again"):
        vpd.train(None, TASKS, grade, algorithm=Imitate(), feedback=say, run=again)
    with pytest.raises(vpd.StorageError, match=r"env.object \"6 tasks .* -> \"5 tasks"):
        vpd.train(model, TASKS[:5], grade, **objects, run=again)
    continued = vpd.train(model, TASKS, grade, **objects, run=again)
    assert continued.step == 2 and continued.settings["rollout"]["num_generations"] == 2


def test_a_model_with_adapters_an_engine_and_shipped_settings() -> None:
    model, tokenizer = load_model(vpd.parse_config({}).model)
    named = {"name_or_path": model, "lora": {"r": 2}}
    run = vpd.train(
        named,
        TASKS,
        grade,
        tokenizer=tokenizer,
        algorithm=SDPOSettings(distillation_alpha=0.5),
        rollout=SMALL,
        run={"max_steps": 1},
    )
    assert run.settings["algorithm"]["distillation_alpha"] == 0.5 and (run.folder / "adapter").is_dir()
    with pytest.raises(vpd.ConfigError, match="needs its tokenizer"):
        vpd.train(tiny_model(), TASKS, grade)


def test_an_engine_that_was_passed_answers() -> None:
    result = vpd.evaluate("tiny", TASKS, grade, engine=Shouting(), options={"num_samples": 1}, rollout=SMALL)
    assert result.student["reward"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"env": Digits}, r"env is a class; got Digits; expected an object of it. Pass Digits\(...\)"),
        ({"algorithm": SDPOSettings}, r"algorithm is a class; .*Pass SDPOSettings\("),
        ({"engine": Shouting}, r"engine is a class; .*Pass Shouting\("),
        ({"feedback": Imitate}, r"a feedback source is a class; .*Pass Imitate\("),
    ],
)
def test_a_class_in_the_place_of_an_object_is_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(vpd.ConfigError, match=message):
        small_run(**({} if "env" in more else {"tasks": TASKS, "grader": grade}), **more)


def test_an_engine_that_answers_something_else_is_named() -> None:
    class Says:
        def __init__(self, made: Any):
            self.made = made

        def load(self, policy: Any) -> None: ...

        def generate(self, prompts: Any, **more: Any) -> Any:
            return self.made

    one = Completion(tokens=(1,), sampled=(True,), logprobs=(0.0,), text="1", finish="stop")
    for made, got in (([one] * 5, "5 of Completion"), (["hello"] * 6, "6 of str"), (None, "NoneType")):
        with pytest.raises(vpd.VPDError, match=rf"generate returned something else; got {got}; expected 6 of"):
            vpd.evaluate("tiny", TASKS, grade, engine=Says(made), options={"num_samples": 1}, rollout=SMALL)


def test_a_method_that_returns_no_update_is_named() -> None:
    class Forgets(Imitate):
        def step(self, groups: Any, learner: Any) -> Any:
            super().step(groups, learner)

    with pytest.raises(vpd.VPDError, match=r"the method's step returned something else; got NoneType; expected vpd"):
        small_run(TASKS, grade, algorithm=Forgets())


def test_a_loss_that_is_not_one_for_each_token_or_row_is_refused() -> None:
    class Mean(Imitate):
        def step(self, groups: Any, learner: Any) -> Any:
            rows = with_loss_weights(to_examples(groups), nll=[0.1] * 4)
            return learner.update("imitate", rows, {"nll": lambda s, b: -s.logprobs("student").mean()})

    with pytest.raises(vpd.VPDError, match=r"the loss 'nll' is not one for each token or row; got the shape \[\]"):
        small_run(TASKS, grade, algorithm=Mean())


def test_sections_that_are_texts_are_an_error_of_the_source() -> None:
    def says(groups: Any, writer: Any) -> Any:
        return [extend(group, [["a text"] for _ in group.rollouts]) for group in groups]

    with pytest.raises(vpd.VPDError, match="not a list of sections for each rollout; got 'a text'; expected Section"):
        small_run(TASKS, grade, feedback=says)


def test_rows_that_cannot_be_graded_may_be_a_share_beside_tasks() -> None:
    def fails(text: str, task: dict[str, str]) -> Any:
        raise ValueError("no")

    def lists(text: str, task: dict[str, str]) -> Any:
        return numpy.array([1.0])

    run = small_run(TASKS, fails, env={"max_failed": 1.0})
    assert run.metrics["env/grader_failed"].iloc[-1] == 1.0
    with pytest.raises(vpd.EnvError, match=r"returned no number; got array\(\[1.\]\)"):
        vpd.evaluate("tiny", TASKS[:1], lists, rollout=SMALL)


def test_models_that_cannot_be_trained_are_one_line() -> None:
    model, tokenizer = load_model(ModelSettings())
    with pytest.raises(vpd.ModelError, match=r"the model has no weight to train; got requires_grad False"):
        vpd.train(model.requires_grad_(False), TASKS, grade, tokenizer=tokenizer, rollout=SMALL)
    with pytest.raises(vpd.ModelError, match=r"has weights without data; got .* on the device meta"):
        vpd.train(model.to("meta"), TASKS, grade, tokenizer=tokenizer, rollout=SMALL)
    with torch.inference_mode(), pytest.raises(vpd.ConfigError, match=r"inside of torch.inference_mode"):
        small_run(TASKS, grade, run={"max_steps": 1, "output_dir": "inference"})
    with torch.no_grad():
        assert small_run(TASKS, grade, run={"max_steps": 1, "output_dir": Path("no_grad")}).step == 1


def test_models_are_loaded_in_threads_one_after_the_other() -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(load_model(ModelSettings()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights = [dict(model.named_parameters()) for model, _ in found]
    assert len(weights) == 4
    assert all(torch.equal(one, weights[0][name]) for other in weights for name, one in other.items())


def test_a_feedback_source_that_raises_is_named() -> None:
    def careless(groups: Any, writer: Any) -> Any:
        return groups[0].nothing

    with pytest.raises(vpd.EnvError, match=r"the feedback source test_api.*careless raised AttributeError at"):
        small_run(TASKS, grade, feedback=careless)


# the neighbours

ROWS = [{"prompt": task["prompt"], "completion": task["answer"], "feedback": "wrong : rule A"} for task in TASKS]


def compare(groups: list[Group], writer: vpd.Writer) -> list[Group]:
    """A judge of one's own: of the first two attempts the first is better."""
    better = (Comparison(other=1, preferred=True),)
    pairs = [(group.rollouts[0], group.rollouts[1:]) for group in groups]
    return [Group(rollouts=(dataclasses.replace(first, comparisons=better), *rest)) for first, rest in pairs]


NEIGHBOURS: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"algorithm": "sft"}, "sft/rows"),
    "ldd": ({"algorithm": "ldd"}, "ldd/rows"),
    "the auxiliary term": ({"algorithm": "sdpo", "dynamics": {"weight": 0.5}}, "m_step/dynamics_loss"),
    "plare": ({"algorithm": "plare", "feedback": {"name": "judge", "judge": "reward"}}, "preference/pairs"),
    "plare, a judge of one's own": ({"algorithm": "plare", "feedback": compare}, "preference/pairs"),
    "recorded": ({"algorithm": "sdpo", "env": {"name": "recorded", "path": ROWS}}, "recorded/rows"),
}


@pytest.mark.parametrize("which", NEIGHBOURS)
def test_every_neighbour_is_trained_from_python(which: str) -> None:
    more, metric = NEIGHBOURS[which]

    def by_digit(text: str, task: dict[str, str]) -> Any:
        same = sum(a == b for a, b in zip(text.split(), task["answer"].split(), strict=False))
        return same / 3, "wrong : rule A means swap"

    run = small_run(TASKS, by_digit, **{"rollout": SMALL | {"success_threshold": 0.3}, **more})
    assert run.record.metrics[-1][metric] > 0 or metric == "m_step/dynamics_loss"
    again = vpd.train(run, TASKS, by_digit, algorithm="sdpo", rollout=SMALL, run={"max_steps": 1, "output_dir": "next"})
    assert again.settings["model"]["name_or_path"] == str(run.folder / "model")


def test_a_run_teaches_and_tasks_hold_the_data_s_answers() -> None:
    teacher = small_run(TASKS, grade, algorithm="sft", run={"max_steps": 1, "output_dir": "teacher"})
    mixed = {"name": "gkd", "teacher_model": teacher, "student_fraction": 0.0, "other_answers": "data"}
    with pytest.raises(vpd.DataError, match="tasks from Python hold it as 'completion'"):
        small_run(TASKS, grade, algorithm=mixed)
    run = small_run([task | {"completion": task["answer"]} for task in TASKS], grade, algorithm=mixed)
    rows = run.rollouts_table().to_pylist()
    assert len(rows) == 4 and all(row["reward"] == 1 for row in rows)


def test_records_may_be_objects_a_file_or_a_run_beside_tasks_that_are_answered_now(folder: Path) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first = small_run(TASKS, grade, run={"max_steps": 1, "output_dir": "first"})
    wanted = small_run(env={"name": "recorded", "path": "log.jsonl"}, algorithm="sdpo")
    for number, path in enumerate((ROWS, datasets.Dataset.from_list(ROWS), "log.jsonl", first)):
        section = {"name": "recorded", "path": path, "fresh_share": 0.5}
        run = small_run(
            TASKS[:3], grade, env=section, eval_tasks=TASKS[3:], algorithm="sdpo",
            run={"max_steps": 2, "eval_steps": 2, "eval_samples": 1, "output_dir": f"out-{number}"},
        )  # fmt: skip
        last = run.record.metrics[-1]
        assert last["recorded/rows"] == (2 if number == 3 else 1) and last["eval/accuracy"] >= 0
        assert run.settings["algorithm"]["importance_reference"] == "sampler"
    assert run.settings["env"]["object"].startswith("first beside 3 tasks (")
    alone = small_run(env={"name": "recorded", "path": ROWS}, algorithm="sdpo", run={"max_steps": 1, "output_dir": "a"})
    assert alone.record.metrics[-1]["m_step/loss"] == wanted.record.metrics[-1]["m_step/loss"]
    settings = {"max_steps": 2, "output_dir": "a", "resume": True}
    with pytest.raises(vpd.StorageError, match=r'env.object "6 records \(\w+\)" -> "5 records'):
        vpd.train(env={"name": "recorded", "path": ROWS[:5]}, run=settings)


BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"path": 3}, "env.path is no list of tasks; got int"),
    "a row without an answer": ({"path": [{"prompt": "1"}]}, r"data\[0\] has no answer"),
    "an unknown key": ({"path": ROWS, "fresh_sare": 0.5}, "unknown key env.fresh_sare. Did you mean 'fresh_share'"),
    "a share of nothing": ({"path": ROWS, "fresh_share": 0.5}, "env.fresh_share without an environment"),
    "no path": ({}, "env.path is missing"),
}


@pytest.mark.parametrize("what", BAD_RECORDS)
def test_records_that_cannot_be_used_are_one_line_and_no_folder(what: str) -> None:
    section, message = BAD_RECORDS[what]
    with pytest.raises(vpd.VPDError, match=message):
        small_run(env={"name": "recorded", **section}, algorithm="sdpo")
    both = {"name": "recorded", "path": ROWS, "fresh": {"name": "digits"}}
    with pytest.raises(vpd.ConfigError, match="what is answered now is not clear"):
        small_run(TASKS, grade, env=both, algorithm="sdpo")
    assert not Path("out").exists()


def test_a_run_of_objects_that_was_stopped_goes_on_from_python() -> None:
    calls: list[str] = []

    def stopping(text: str, task: dict[str, str]) -> Any:
        calls.append(text)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGTERM)
        return 0.0, "wrong : rule A"

    with pytest.raises(Interrupted, match=r"checkpoint-1 is saved. Continue with: the same call with run={'resume'"):
        small_run(TASKS, stopping, run={"max_steps": 2})
    assert small_run(TASKS, stopping, run={"max_steps": 2, "resume": True}).step == 2


def test_a_collection_that_fails_at_once_leaves_no_file() -> None:
    def fails(text: str, task: Any) -> float:
        raise OSError("down")

    with pytest.raises(vpd.EnvError, match="down"):
        vpd.collect("log.jsonl", "tiny", TASKS, fails, rollout=SMALL)
    vpd.collect("log.jsonl", "tiny", TASKS, grade, rollout=SMALL)
    assert Path("log.jsonl").read_text().count("\n") == 12


def test_a_list_of_tasks_is_collected_once() -> None:
    vpd.collect("log.jsonl", "tiny", TASKS, grade, rollout=SMALL)
    assert len(Path("log.jsonl").read_text().splitlines()) == 2 * len(TASKS)


def test_a_long_wrong_value_is_cut_in_its_line() -> None:
    with pytest.raises(vpd.ConfigError) as caught:
        vpd.parse_config({"env": {"name": "recorded", "path": ROWS * 100}})
    assert len(str(caught.value)) < 500


# callbacks


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen.append(("begin", args.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen.append(("step", state.global_step))
        control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.seen.append(("log", len(state.log_history)))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        self.seen.append(("evaluate", round(metrics["eval/tasks"])))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen.append(("end", state.global_step))


def test_functions_observers_and_transformers_callbacks_watch(caplog: pytest.LogCaptureFixture) -> None:
    steps: list[int] = []
    watch = Watch()
    evaluated = {"eval_steps": 2, "eval_samples": 1, "eval_limit": 1, "eval_control": False}
    small_run(
        TASKS[:4], grade, eval_tasks=TASKS[4:], run={"max_steps": 2, **evaluated},
        callbacks=[lambda step, metrics, groups: steps.append(step), watch],
    )  # fmt: skip
    assert steps == [0, 1, 2]
    expected = [("begin", 2), ("log", 1), ("evaluate", 1), ("step", 1), ("log", 2), ("step", 2), ("log", 3)]
    assert watch.seen == [*expected, ("evaluate", 1), ("end", 2)]
    assert "Watch asked to stop" in caplog.text


def test_a_callback_that_raises_is_named_and_an_observer_is_itself() -> None:
    def careless(step: int, metrics: Any, groups: Any) -> None:
        raise ValueError("no room")

    with pytest.raises(
        vpd.EnvError, match=r"the callback careless raised ValueError at .*test_api.py:\d+; got no room"
    ):
        small_run(TASKS, grade, callbacks=careless)

    class Keeps:
        def on_step(self, step: int, metrics: Any, groups: Any) -> None: ...
        def rewind(self, step: int) -> None: ...
        def state(self) -> dict[str, Any]:
            return {}

        def restore(self, state: dict[str, Any]) -> None: ...

    keeps = Keeps()
    assert as_observers([keeps], RunSettings()) == (keeps,) == as_observers(keeps, RunSettings())


# runs


def test_a_run_gives_tables_the_best_step_and_the_model() -> None:
    evaluated = {"eval_steps": 1, "eval_samples": 1, "eval_limit": 2, "save_steps": 1}
    run = small_run(TASKS[:4], grade, eval_tasks=TASKS[4:], run={"max_steps": 2, **evaluated})
    assert Path(run) == Path("out") and run.step == 2
    assert list(run.metrics.index) == [0, 1, 2] and run.metrics["eval/accuracy"].notna().all()
    assert len(run.rollouts) == 8 and set(run.rollouts["step"]) == {1, 2}
    assert run.rollouts_table([2]).num_rows == 4
    best = run.best
    assert (
        best is not None and best.metric == "eval/accuracy" and best.checkpoint == Path(f"out/checkpoint-{best.step}")
    )
    tokens = run.tokenizer("apply rule A", return_tensors="pt")
    assert run.model()(**tokens).logits.shape[-1] == run.model(best.checkpoint).config.vocab_size
    assert repr(run).startswith("Run('out': done, step 2, best eval/accuracy")
    Path("out/model/model.safetensors").rename("out/weights")  # the tokenizer alone needs no weights
    assert vpd.Run("out").tokenizer.get_vocab() == run.tokenizer.get_vocab()
    Path("out/weights").rename("out/model/model.safetensors")
    assert vpd.evaluate(run, TASKS, grade, options={"num_samples": 1}, rollout=SMALL).student["answers"] == 6


def write_run(
    folder: Path, lines: list[dict[str, Any]], run: dict[str, Any] | None = None, phase: Phase = "done"
) -> vpd.Run:
    settings = {"run": run or {}, "algorithm": {"name": "<b>vpd</b>"}}
    Recorder(folder=folder, files=FileSystem(), settings=settings).record(phase, len(lines))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return vpd.Run(folder)


def test_the_best_step_is_by_the_run_s_own_metric(folder: Path) -> None:
    lines = [
        {"step": step, "eval/accuracy": a, "x/loss": b} for step, a, b in ((0, 9, 0), (1, 2, 3), (2, 2, 1), (3, 1, 1))
    ]
    best = write_run(folder / "usual", lines).best
    assert best is not None and (best.step, best.value, best.checkpoint) == (1, 2, None)
    best = write_run(folder / "loss", lines, {"metric_for_best_model": "x/loss"}).best
    assert best is not None and (best.step, best.value) == (2, 1)
    best = write_run(folder / "greater", lines, {"metric_for_best_model": "x/loss", "greater_is_better": True}).best
    assert best is not None and best.step == 1
    assert write_run(folder / "never", [{"step": 1, "reward": 1.0}]).best is None


def test_a_run_in_a_notebook_is_html_without_text_from_outside(folder: Path) -> None:
    lines = [{"step": step, "reward": step / 10, "eval/accuracy": step / 20} for step in range(1, 5)]
    run = write_run(folder / "<img src=x>", lines)
    (run.folder / "alarms.jsonl").write_text(
        json.dumps({"step": 2, "rule": "r", "saw": "<script>x</script>", "do": ""})
    )
    html = run._repr_html_()
    assert "<script" not in html and "<img" not in html and "<b>vpd" not in html
    assert html.count("<svg") == 2 and html.count("<polyline") == 2 and ">0.4<" in html
    first, last = [p.split(",") for p in html.split('points="')[1].split('"')[0].split()][::3]
    assert float(first[0]) < float(last[0]) and float(first[1]) > float(last[1])  # it rises


def test_without_pandas_tables_say_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(folder / "run", [{"step": 1, "reward": 1.0}])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(vpd.ConfigError, match=r"Run.metrics is a DataFrame, and pandas is missing. pip install"):
        _ = run.metrics
    assert run.rollouts_table().num_rows == 0 and run.record.last("reward") == 1.0


def test_no_run_and_no_model_are_one_line(folder: Path) -> None:
    with pytest.raises(vpd.StorageError, match="nowhere holds no run"):
        vpd.Run("nowhere")
    with pytest.raises(vpd.StorageError, match="has no model; got a run in phase training"):
        write_run(folder / "run", [{"step": 1}], phase="training").model()


def test_a_report_is_written_into_the_run_folder_or_where_it_is_asked_for(folder: Path) -> None:
    run = small_run(TASKS, grade)
    assert run.report() == Path("out/report.html") and run.report(folder / "mine.html") == folder / "mine.html"
    for path in ("out/report.html", "mine.html"):
        assert '<h1 id="overview-title">evidence-gated VPD</h1>' in (folder / path).read_text()


def test_tasks_of_ones_own_need_a_model_that_is_named(folder: Path) -> None:
    """A variable that is None by mistake must not train the base that ships with the package."""
    for call in (vpd.train, vpd.evaluate, vpd.solve):
        with pytest.raises(vpd.ConfigError, match="no model was passed; expected a Hub id"):
            call(None, TASKS, grade)
    assert not list(folder.iterdir())


def test_a_share_of_no_held_out_tasks_may_be_a_whole_number() -> None:
    for none in (0, 0.0):
        found = read_arguments(
            "tiny", TASKS, grade, tokenizer=None, algorithm=None, feedback=None, more={"eval_tasks": none}
        )
        assert not found.objects["env"].eval_tasks(None) and len(found.objects["env"].train_tasks()) == len(TASKS)
    with pytest.raises(vpd.ConfigError, match="eval_tasks is out of range; got 1;"):
        small_run(TASKS, grade, eval_tasks=1)
