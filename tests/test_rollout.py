"""From tasks to graded rollouts, with an engine that keeps what it was asked: seeds, rows, grades and turns."""

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from fakes import LetterTokenizer, RecordingEngine, ScriptedChat, ScriptedEnv, collect_groups, in_turn

from vpd.errors import EngineError, EnvError
from vpd.policy import FixedPolicy
from vpd.types import Completion, Grade, Group, Rollout, Task


def named(prompt: str, seed: int) -> str:
    """An answer that no other prompt and no other seed gives."""
    return f"{prompt}#{seed}"


def by_text(task: Task, text: str) -> Grade:
    return Grade(reward=float(1000 * len(task.id) + sum(map(ord, text)) % 997))


def seeds_of(questions: list[str], **options: int) -> list[int]:
    engine = RecordingEngine(named)
    collect_groups(ScriptedEnv(by_text), engine, questions, **options)
    return [sample.seed for sample in engine.samples]


def rows(groups: list[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def test_every_attempt_at_a_task_has_a_seed_of_its_own() -> None:
    groups = collect_groups(ScriptedEnv(by_text), RecordingEngine(named), ["a", "b"], group=4)
    assert [len(group.rollouts) for group in groups] == [4, 4]
    assert len({rollout.completion.text for rollout in rows(groups)}) == 8
    assert len(set(seeds_of(["a", "a", "a"], group=4))) == 12  # also where the prompts are equal


def test_seeds_differ_by_step_and_by_the_runs_seed_and_are_the_same_again() -> None:
    drawn = [seeds_of(["a", "b"], step=step, seed=seed) for step in (0, 1, 2) for seed in (0, 1)]
    assert len({seed for seeds in drawn for seed in seeds}) == 6 * 4
    assert seeds_of(["a", "b"], step=2, seed=1) == drawn[-1]


def test_a_seed_does_not_depend_on_how_many_tasks_come_after_it() -> None:
    assert seeds_of(["a", "b", "c"])[:4] == seeds_of(["a", "b"])


def test_each_group_holds_its_own_task_prompt_answers_and_grades() -> None:
    engine = RecordingEngine(named)
    groups = collect_groups(ScriptedEnv(by_text), engine, ["a", "bb", "ccc"], group=2)
    assert [rollout.task.id for rollout in rows(groups)] == ["a", "a", "bb", "bb", "ccc", "ccc"]
    for rollout, sample in zip(rows(groups), engine.samples, strict=True):
        assert LetterTokenizer().decode(rollout.prompt) == sample.prompt == f"[user]{rollout.task.id}[assistant]"
        assert rollout.completion.text == sample.text
        assert rollout.grade.reward == by_text(rollout.task, sample.text).reward


def test_the_success_threshold_decides_only_what_the_grader_left_open() -> None:
    grades = {
        "below": Grade(reward=0.69), "at": Grade(reward=0.7), "above": Grade(reward=2.0),
        "refused": Grade(reward=2.0, success=False), "granted": Grade(reward=-1.0, success=True),
    }  # fmt: skip
    [group] = collect_groups(
        ScriptedEnv(lambda task, text: grades[text]),
        RecordingEngine(in_turn({"q": list(grades)})),
        ["q"],
        group=5,
        threshold=0.7,
    )
    assert [rollout.success for rollout in group.rollouts] == [False, True, True, False, True]
    assert [rollout.grade.reward for rollout in group.rollouts] == [0.69, 0.7, 2.0, 2.0, -1.0]


def test_the_engine_is_asked_once_with_the_sampling_settings() -> None:
    engine = RecordingEngine(named)
    collect_groups(
        ScriptedEnv(by_text), engine, ["a", "b"], max_completion_length=7, temperature=0.3, top_p=0.8, top_k=5
    )
    assert len(engine.calls) == 1
    assert {(s.max_tokens, s.temperature, s.top_p, s.top_k) for s in engine.samples} == {(7, 0.3, 0.8, 5)}


def test_a_rollout_carries_the_version_that_sampled_it() -> None:
    engine = RecordingEngine(named)
    engine.load(FixedPolicy("weights", 17))
    assert {rollout.completion.version for rollout in rows(collect_groups(ScriptedEnv(by_text), engine, ["a"]))} == {17}


def until_right(task: Task, said: list[str]) -> str | None:
    """Two complaints at most, each of which names the answer and its number."""
    return None if said[-1] == "right" or len(said) == 3 else f"{said[-1]}{len(said)}?"


def between(reply: str) -> str:
    """What the template puts between two answers."""
    return f"[user]{reply}[assistant]"


def test_each_row_goes_on_from_its_own_turns_and_finished_rows_are_left_alone() -> None:
    script = {
        "[user]a[assistant]": "right",
        "[user]b[assistant]": "x",
        "[user]c[assistant]": "yy",
        f"[user]b[assistant]x{between('x1?')}": "z",
        f"[user]c[assistant]yy{between('yy1?')}": "right",
        f"[user]b[assistant]x{between('x1?')}z{between('z2?')}": "w",
    }
    engine = RecordingEngine(lambda prompt, seed: script[prompt])
    env = ScriptedChat(lambda task, text: Grade(reward=float(text == "right")), until_right)
    a, b, c = rows(collect_groups(env, engine, ["a", "b", "c"], group=1))
    assert [[s.text for s in call] for call in engine.calls] == [["right", "x", "yy"], ["z", "right"], ["w"]]
    assert [r.completion.turns for r in (a, b, c)] == [1, 3, 2] and [r.success for r in (a, b, c)] == [
        True,
        False,
        True,
    ]
    spoken = f"yy{between('yy1?')}right"
    assert LetterTokenizer().decode(c.completion.tokens) == spoken and c.completion.text == "right"
    mask = (True,) * 2 + (False,) * len(between("yy1?")) + (True,) * 5
    assert c.completion.sampled == mask
    assert c.completion.logprobs == tuple(-0.5 if mine else 0.0 for mine in mask)
    assert [{s.key.turn for s in call} for call in engine.calls] == [{0}, {1}, {2}]
    # one budget for the whole attempt, less its own answers and replies so far
    assert [[s.max_tokens for s in call] for call in engine.calls] == [
        [100, 100, 100],
        [100 - len("x" + between("x1?")), 100 - len("yy" + between("yy1?"))],
        [100 - len("xz" + between("x1?") + between("z2?"))],
    ]
    [last] = [conversation for conversation in env.conversations if conversation[-1]["content"] == "w"]
    assert [m["content"] for m in last] == ["b", "x", "x1?", "z", "z2?", "w"]  # the environment reads it all
    assert [m["role"] for m in last] == ["user", "assistant"] * 3


def test_every_turn_has_a_seed_of_its_own_that_does_not_depend_on_other_rows() -> None:
    env = ScriptedChat(lambda task, text: Grade(reward=0.0), until_right)

    def seeds(right_at_once: str) -> dict[str, int]:
        engine = RecordingEngine(lambda prompt, seed: "right" if prompt.startswith(f"[user]{right_at_once}[") else "x")
        collect_groups(env, engine, ["a", "b", "c"], group=1)
        return {sample.prompt: sample.seed for sample in engine.samples}

    all_go_on, without_a = seeds("nobody"), seeds("a")
    assert len(set(all_go_on.values())) == 9
    assert len(without_a) == 7 and without_a.items() <= all_go_on.items()


@pytest.mark.parametrize(
    ("length", "turns", "finish", "tokens"),
    [
        (100, 3, "stop", 3 * 1 + 2 * len(between("x1?"))),
        (3 + 2 * len(between("x1?")), 3, "stop", 3 + 2 * len(between("x1?"))),  # exactly enough
        (2 + 2 * len(between("x1?")), 2, "length", 2 + len(between("x1?"))),  # the last reply leaves no room
        (1 + len(between("x1?")), 1, "length", 1),
    ],
)
def test_an_attempt_ends_where_its_tokens_end(length: int, turns: int, finish: str, tokens: int) -> None:
    env = ScriptedChat(lambda task, text: Grade(reward=0.0), until_right)
    [[rollout]] = [
        group.rollouts
        for group in collect_groups(
            env, RecordingEngine(lambda prompt, seed: "x"), ["q"], group=1, max_completion_length=length
        )
    ]
    assert (rollout.completion.turns, rollout.completion.finish) == (turns, finish)
    assert len(rollout.completion.tokens) == tokens


def test_an_answer_that_was_cut_gets_no_reply() -> None:
    asked: list[str] = []

    def reply(task: Task, said: list[str]) -> str | None:
        asked.append(said[-1])
        return None

    env = ScriptedChat(lambda task, text: Grade(reward=0.0), reply)
    collect_groups(env, RecordingEngine(in_turn({"q": ["x" * 50, "short"]})), ["q"], group=2, max_completion_length=20)
    assert asked == ["short"]


def test_max_turns_counts_the_models_answers() -> None:
    env = ScriptedChat(lambda task, text: Grade(reward=0.0), lambda task, said: "again")
    for most in (1, 2, 4):
        engine = RecordingEngine(lambda prompt, seed: "x")
        [group] = collect_groups(env, engine, ["q"], group=1, max_turns=most)
        assert group.rollouts[0].completion.turns == len(engine.calls) == most


def prompts_of_turns(answers: list[str]) -> list[str]:
    """What the model reads before each answer, where the environment says "go on" to each but the last."""
    env = ScriptedChat(
        lambda task, text: Grade(reward=0.0), lambda task, said: "go on" if len(said) < len(answers) else None
    )
    left = iter(answers)
    engine = RecordingEngine(lambda prompt, seed: next(left))
    collect_groups(env, engine, ["q"], group=1)
    return [sample.prompt for sample in engine.samples]


def test_an_empty_answer_gets_a_reply_too() -> None:
    assert prompts_of_turns(["", "x"])[1] == f"[user]q[assistant]{between('go on')}"


def test_what_the_model_sampled_of_the_templates_end_does_not_stand_twice() -> None:
    # the template goes on with "[user]": the answer's last token is taken for its beginning
    assert prompts_of_turns(["x[", "y"])[1] == "[user]q[assistant]x[user]go on[assistant]"


class LosesAnswers(RecordingEngine):
    """Gives one answer less than it was asked for, after the first call."""

    def generate(self, *arguments: Any, **options: Any) -> list[Completion]:
        return super().generate(*arguments, **options)[: -1 if len(self.calls) > 1 else None]


def test_an_engine_that_loses_an_answer_is_not_passed_over() -> None:
    env = ScriptedChat(lambda task, text: Grade(reward=0.0), lambda task, said: "again")
    with pytest.raises(EngineError, match=r"LosesAnswers.generate returned .* got \d of Completion"):
        collect_groups(env, LosesAnswers(named), ["a", "b"])


@pytest.mark.parametrize("reward", [1e308, -1e31, 10**400, float("inf"), float("nan"), True, "1"])
def test_a_reward_is_a_number_that_can_be_squared(reward: Any) -> None:
    with pytest.raises(EnvError, match=r"not a finite number|too large to compute with"):
        Grade(reward=reward)
    assert Grade(reward=-1e30).reward == -1e30


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"informative": "no"}, "informative has the wrong type; got 'no'; expected bool"),
        ({"informative": None}, "informative has the wrong type"),
        ({"graded": 1}, "graded has the wrong type"),
        ({"metrics": {"m": "abc"}}, "metric 'm' is not a finite number; got 'abc'"),
        ({"metrics": {"m": math.nan}}, "metric 'm' is not a finite number; got nan"),
        ({"metrics": {"m": None}}, "metric 'm' is not a finite number; got None"),
        ({"metrics": {"m": np.array([1, 2])}}, "metric 'm' is not a finite number; got array"),
        ({"metrics": {"m": 10**400}}, "metric 'm' is not a finite number"),
        ({"metrics": {"reward": 1.0, 7: 1.0}}, "metrics are no mapping of names; got {"),
        ({"metrics": [1.0]}, "metrics are no mapping of names"),
        ({"reward": np.array([1.0, 2.0])}, "reward is not a finite number; got array"),
    ],
)
def test_a_grade_of_another_form_is_refused_where_it_is_made(part: Any, message: str) -> None:
    with pytest.raises(EnvError, match=re.escape(f"a grade's {message}")):
        Grade(**{"reward": 0.0} | part)


def test_a_grade_holds_numbers_of_python() -> None:
    metrics: Any = {"n": np.int64(3), "x": np.float32(0.5), "t": torch.tensor(2.0), "share": Fraction(1, 4), "ok": True}
    made = Grade(reward=np.float64(1), informative=np.False_, graded=np.True_, metrics=metrics)  # type: ignore[arg-type]
    assert made.metrics == {"n": 3, "x": 0.5, "t": 2.0, "share": 0.25, "ok": True}
    assert [type(value) for value in made.metrics.values()] == [int, float, float, float, bool]
    assert made.informative is False and made.graded is True
