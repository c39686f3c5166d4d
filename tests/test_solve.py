"""One task at test time: what counts, when it ends, and that the model on disk stays as it is."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ScriptedEnv
from test_critique import rollout
from transformers import AutoModelForCausalLM, AutoTokenizer

import vpd
from vpd import solving
from vpd.bundled import ASSETS, load_bundled
from vpd.cli import main
from vpd.config import parse
from vpd.envs.digits import Digits
from vpd.errors import ConfigError, EnvError, StorageError
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.assemble import load_model
from vpd.recipes.solve import Solution, solve
from vpd.solving import SolveOptions, Try
from vpd.types import Comparison, Grade, Group, Rollout, Section, Task, Tokens

SMALL: dict[str, Any] = {
    "model": {"name_or_path": "tiny"},
    "algorithm": {"name": "sdpo", "teacher": "live"},
    "rollout": {"num_generations": 4, "max_completion_length": 6},
    "optim": {"learning_rate": 1e-3},
}


def attempt(success: bool, tokens: int = 1, **changes: Any) -> Rollout:
    made = rollout(success, "right" if success else "wrong")
    completion = dataclasses.replace(
        made.completion, tokens=(5,) * tokens, sampled=(True,) * tokens, logprobs=(0.0,) * tokens
    )
    return dataclasses.replace(made, completion=completion, **changes)


def first(groups: Sequence[Group], budget: int) -> Try:
    return solving._first_success(solving.in_order(groups), budget)


def test_attempts_and_tokens_up_to_the_first_success_by_hand() -> None:
    group = Group(rollouts=(attempt(False, 3), attempt(False, 2), attempt(True, 4), attempt(True, 9)))
    assert first([group], 100) == Try(solved=True, attempts=3, tokens=9, answer="right")
    assert first([group], 9).solved and not first([group], 8).solved  # it must end within the budget
    assert first([group], 8) == Try(solved=False, attempts=2, tokens=5)


def test_what_is_written_about_attempts_is_paid_for_and_retries_are_attempts() -> None:
    critique = Section(kind="feedback", source="self_critique", text="no", tokens=10)
    failed = attempt(False, 3, context=(critique,), retries=(attempt(True, 2),))
    compared = attempt(False, 1, comparisons=(Comparison(other=0, preferred=None, tokens=20),))
    group = Group(rollouts=(failed, compared))
    assert first([group], 100) == Try(solved=True, attempts=3, tokens=3 + 1 + 10 + 20 + 2, answer="right")
    assert first([group], 33) == Try(solved=False, attempts=2, tokens=4)


def test_a_comparison_that_is_also_context_is_paid_for_once() -> None:
    said = Section(kind="feedback", source="judge", text="better", tokens=10)
    both = attempt(False, 1, context=(said,), comparisons=(Comparison(other=1, preferred=True, tokens=20),))
    assert first([Group(rollouts=(both,))], 100).tokens == 21


def test_a_replied_token_is_not_sampled() -> None:
    made = attempt(True, 3)
    spoken = dataclasses.replace(made.completion, sampled=(True, False, True))
    assert first([Group(rollouts=(dataclasses.replace(made, completion=spoken),))], 9).tokens == 2


def result_of(**options: Any) -> Solution:
    return solve(parse(SMALL), SolveOptions(**options))


def test_each_way_keeps_to_the_budget_and_counts_what_it_made(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vpd"):
        found = result_of(task=1, budget=240)
    said = [message for message in caplog.messages if message.startswith("run 1 of 1, ")]
    assert [message.split(": ")[0] for message in said] == [
        f"run 1 of 1, {title}" for title in ("best of k", "repair in turns", "adapted")
    ]
    assert said[0].endswith(
        f"in {found.tries['best_of'][0].attempts} attempts, {found.tries['best_of'][0].tokens} tokens"
    )
    for way, (one,) in found.tries.items():
        assert one.tokens <= 240 and one.tokens == 6 * one.attempts, way
        assert one.solved == (one.answer is not None)
        assert one.solved or one.tokens + 6 > 240
    (adapted,) = found.tries["adapt"]
    assert adapted.steps == (adapted.attempts - 1) // 4  # a step after every four that fail
    assert set(found.numbers()) == {"adapt", "best_of", "repair"}
    assert found.task.id.startswith("eval") or found.task.payload is not None


def test_the_answer_is_the_adapted_models_before_another_ways() -> None:
    won, lost = (Try(solved=won, attempts=1, tokens=1, answer="a" if won else None) for won in (True, False))
    other = dataclasses.replace(won, answer="b")
    made = Solution(task=Task(id="t", messages=()), budget=9, tries={"best_of": [lost, other], "adapt": [lost, won]})
    assert made.answer == "a"
    assert dataclasses.replace(made, tries={"best_of": [lost, other], "adapt": [lost]}).answer == "b"
    assert dataclasses.replace(made, tries={"adapt": [lost]}).answer is None


def test_adapting_to_a_task_solves_what_the_model_as_it_is_does_not() -> None:
    """The shipped base answers one task in a thousand, and reads feedback."""
    found = result_of(budget=4000)
    numbers = found.numbers()
    assert numbers["adapt"]["solved"] == 1.0
    assert numbers["adapt"]["attempts"] < 300
    assert numbers["best_of"]["solved"] < 1.0 or numbers["best_of"]["attempts"] > numbers["adapt"]["attempts"]


def test_repeats_start_from_the_same_weights_and_are_the_same_again() -> None:
    twice, once = result_of(budget=200, repeats=2), result_of(budget=200)
    assert [way[0] for way in twice.tries.values()] == [way[0] for way in once.tries.values()]
    again = solve(parse(SMALL | {"run": {"seed": 1}}), SolveOptions(budget=200))
    assert twice.tries["best_of"][1] == again.tries["best_of"][0]


def test_a_conversation_reads_its_answers_and_the_feedback_and_forgets_the_oldest() -> None:
    asked: list[tuple[str, ...]] = []

    class Room(Prompter):
        """A token for each message, whatever its length, and room for five."""

        def prompt_of(self, task: Task) -> Tokens:
            return (0,) * len(task.messages)

    class Source:
        prompter = Room(
            AutoTokenizer.from_pretrained(load_bundled()), PromptSettings(), window=7, max_completion_length=2
        )
        settings = type("S", (), {"sampling": None, "num_generations": 4})()

        def generate_groups(self, keys: Any, tasks: Sequence[Task], sampling: Any, count: int) -> list[Group]:
            asked.append(tuple(message["content"] for message in tasks[0].messages))
            made = attempt(len(asked) == 4, 2)
            grade = dataclasses.replace(made.grade, feedback=f"hint {len(asked)}")
            return [Group(rollouts=(dataclasses.replace(made, grade=grade),))]

    task = Task(id="t", messages=({"role": "user", "content": "?"},))
    source: Any = Source()
    assert solving.repair(source, task, budget=99) == Try(solved=True, attempts=4, tokens=8, answer="right")
    again = "That is not right.\n\nhint {}\n\nAnswer the task again."
    assert asked[1] == ("?", "wrong", again.format(1))
    assert asked[3] == ("?", "wrong", again.format(2), "wrong", again.format(3))  # no room for the first


@pytest.mark.parametrize(("window", "limit"), [(40, None), (None, 34)])
def test_long_feedback_is_cut_so_that_a_conversation_stays_one(window: int | None, limit: int | None) -> None:
    """By the window, and by ``max_prompt_length``, which the prompt of the next turn would exceed."""
    prompter = Prompter(
        AutoTokenizer.from_pretrained(load_bundled()),
        PromptSettings(max_prompt_length=limit),
        window=window,
        max_completion_length=6,
    )
    task = Task(id="t", messages=({"role": "user", "content": "apply rule A to 1 2 3"},))
    (turn,) = solving._kept(prompter, task, [("3 2 1", "rule A means swap " * 50)])
    assert turn[0] == "3 2 1" and turn[1].startswith("rule A means") and len(turn[1]) < 200
    assert 0 <= 34 - len(prompter.prompt_of(solving._with_turns(task, [turn]))) < 4
    assert solving._kept(prompter, task, [("3 2 1 " * 50, "rule A means swap")]) == []


def test_a_budget_below_one_attempt_and_an_environment_that_does_not_grade_are_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ConfigError, match=r"the budget is less than one attempt takes; got 3 tokens"):
        result_of(budget=3)
    env = ScriptedEnv(lambda task, text: Grade(reward=0.0, graded=False), held_out=1)
    with pytest.raises(EnvError, match=r"grades no new attempt at this task; got 8 attempts without a grade"):
        solve(parse(SMALL), SolveOptions(budget=400), env=env)


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_the_model_on_disk_stays_and_output_has_the_adapted_one(tmp_path: Path, capsys: Any) -> None:
    before = files_of(ASSETS / "tiny")
    words = ["solve", "--rollout.num_generations", "4", "--algorithm.name", "sdpo", "--optim.learning_rate", "1e-3"]
    words += ["--budget", "60", "--no_compare", "--task", "1"]
    assert main([*words, "--output", str(tmp_path / "solved")]) == 0
    assert "adapted" in capsys.readouterr().out
    assert files_of(ASSETS / "tiny") == before
    new, old = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "solved" / "model", load_bundled()))
    assert any(bool((a != b).any()) for a, b in zip(new.parameters(), old.parameters(), strict=True))
    assert main([*words, "--output", str(tmp_path / "solved")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == {"adapt"} and numbers["adapt"]["tokens_sampled"] <= 60


def grade(text: str, task: dict[str, str]) -> Any:
    return 1.0 if text == task["answer"] else (0.0, "wrong : rule A means swap")


HARD = [
    {"prompt": "apply rule A to 6 5 4 3 2 1", "answer": "never"},
    {"prompt": "apply rule A to 1 2 3 4 5 6", "answer": "0 3 2 5 4 7"},
]
FROM_PYTHON: dict[str, Any] = {name: SMALL[name] for name in ("algorithm", "rollout", "optim")}


def test_from_python_one_of_the_tasks_is_solved_and_the_numbers_are_the_command_lines(tmp_path: Path) -> None:
    solution = vpd.solve("tiny", HARD, grade, options={"task": 1, "budget": 1000, "compare": False}, **FROM_PYTHON)
    assert isinstance(solution, vpd.Solution) and solution.task.messages[-1]["content"] == HARD[1]["prompt"]
    assert solution.answer == HARD[1]["answer"] and set(solution.tries) == {"adapt"}
    [one] = solution.tries["adapt"]
    assert one == vpd.Try(solved=True, attempts=one.attempts, tokens=one.tokens, steps=one.steps, answer=one.answer)
    assert solution.numbers()["adapt"]["attempts"] == one.attempts <= 1000 / 6
    named = vpd.solve(
        "tiny", env="digits", options=vpd.SolveOptions(task=1, budget=240), output=tmp_path / "solved", **FROM_PYTHON
    )
    assert named == solve(parse(SMALL), SolveOptions(task=1, budget=240))
    assert (tmp_path / "solved" / "model" / "config.json").is_file()


def test_from_python_a_model_that_was_passed_is_adapted_in_place() -> None:
    model, tokenizer = load_model(parse(SMALL).model)
    before = model.get_input_embeddings().weight.detach().clone()
    options = {"budget": 60, "compare": False}
    solution = vpd.solve(model, HARD[:1], grade, tokenizer=tokenizer, options=options, **FROM_PYTHON)
    assert solution.answer is None and "attempts" not in solution.numbers()["adapt"]
    assert not torch.equal(before, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eval_tasks": HARD}, r"vpd.solve solves one of tasks=; got eval_tasks=. Pass it in tasks"),
        ({"options": 3}, r"options cannot be used; got 3; expected a mapping of task, train, budget, repeats, compare"),
        ({"options": {"bugdet": 3}}, r"unknown key options.bugdet. Did you mean 'budget'"),
        ({"options": {"task": 2}}, r"there is no held-out task 2; got 2 tasks"),
        ({"grader": None}, r"what to train on is not clear; got tasks; expected tasks and grader, or env="),
    ],
)
def test_from_python_wrong_arguments_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vpd.solve(**{"model": "tiny", "tasks": HARD, "grader": grade, **given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"repeats": 0}, "repeats"),
        ({"task": -1}, "task"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SolveOptions(**options)


def test_one_adapted_model_comes_of_one_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one adapted model can be written"):
        solve(parse(SMALL), SolveOptions(repeats=2), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_for_the_adapted_model_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write to .*; got Not a directory\. Name a folder"):
        solve(parse(SMALL | {"model": {"name_or_path": "no/such"}}), SolveOptions(), output=tmp_path / "file" / "out")


def test_a_task_that_is_not_there_is_one_line() -> None:
    class Two(ScriptedEnv):
        pass

    env = Two(lambda task, text: Grade(reward=0.0, feedback="no"), held_out=2)
    with pytest.raises(ConfigError, match=r"there is no held-out task 5; got 2 tasks; expected 0 to 1"):
        solve(parse(SMALL), SolveOptions(task=5), env=env)


def test_what_adapts_has_the_term_of_the_section_dynamics(tmp_path: Path) -> None:
    class Never(Digits):
        def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
            return [Grade(reward=0.0, feedback="That is not what was asked for.") for _ in tasks]

    weights = []
    for weight in (0.0, 5.0):
        output = tmp_path / str(weight)
        config = parse(SMALL | {"dynamics": {"weight": weight}})
        found = solve(config, SolveOptions(budget=120, compare=False), output=output, env=Never())
        assert found.tries["adapt"][0].steps > 2
        weights.append((output / "model" / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]
