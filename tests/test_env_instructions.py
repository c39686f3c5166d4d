"""Verifiable constraints: each family's complaint and acceptance by hand, and feedback that gives no answer away."""

import random
import time
from typing import Any

import pytest

from vpd.envs import grade_texts
from vpd.envs.instructions import CLASHES, FAMILIES, Instructions, Rule
from vpd.errors import ConfigError
from vpd.types import Grade, Task

HOSTILE = ["word " * 200_000, "\ud800 \x00\x1b[31m", "{" * 100_000, "\u202e" * 1000 + "a", "9" * 100_000]

# family, value, answers that keep it, answers that break it with a piece of the complaint
CASES: list[tuple[str, Any, list[str], dict[str, str]]] = [
    ("max_words", 3, ["one two three", "one - two — three !"], {"one two three four": "has 4 words; at most 3"}),
    (
        "sentences",
        2,
        ["One. Two.", "One! Two", 'He said "go." Then left.'],
        {"One.": "has 1 sentence; it must have exactly 2", "One. Two. Three?": "has 3 sentences"},
    ),
    ("include", "calm", ["Stay calm.", "CALM!"], {"calmly": '"calm" is missing', "": '"calm" is missing'}),
    ("forbid", "the", ["other", "theme"], {"The end of the road": '"the" stands 2 times', "the": "stands 1 time in"}),
    ("no_commas", None, ["one; two"], {"one, two": "has 1 comma;", "a, b, c": "has 2 commas"}),
    (
        "start_with",
        "Well",
        ["Well, yes", '"well" yes', "- WELL"],
        {"Wellness": 'start with the word "Well"', "So well": "start"},
    ),
    ("end_with", "...", ["wait...", "wait...\n"], {"wait..": 'end with "..."', "wait... now": "end"}),
    ("lowercase", None, ["all low 1!"], {"One Two": "has 2 capital letters"}),
    ("uppercase", None, ["ALL UP 1!"], {"One": "has 2 lowercase letters"}),
    (
        "json",
        ("answer", "reason"),
        ['{"answer": "a", "reason": "b"}', ' {"reason": 1, "answer": false}\n'],
        {
            "Sure: {}": "does not begin with {",
            '{"answer": 1,}': "is not valid JSON",
            '{"answer": 1}': 'the key "reason" is missing',
            '{"answer": "", "reason": []}': 'the value of "answer" is empty, the value of "reason" is empty',
            '{"answer": 1, "reason": 2, "more": 3}': "there is 1 key too many",
            '{"answer": ' * 50_000: "no JSON that can be read",
            '{"answer": ' + "9" * 5000 + "}": "no JSON that can be read",
            '{"answer": 1, "reason": 2} and more': "is not valid JSON",
        },
    ),
    (
        "bullets",
        2,
        ["- a\n- b", "- a\n\n  - b  "],
        {
            "- a": 'there is 1 line that begin with "- ", exactly 2 must',
            "- a\n- b\n- c": "there are 3 lines",
            "List:\n- a\n- b": "there is 1 other line",
            "- \n- b": "there is 1 line",
        },
    ),
]


def task_of(*rules: Rule) -> Task:
    return Task(id="t", messages=({"role": "user", "content": "?"},), payload=rules)


def grade(env: Instructions, task: Task, text: str) -> Grade:
    [made] = grade_texts(env, [task], [text])
    return made


def test_every_family_is_tried_here() -> None:
    assert [case[0] for case in CASES] == list(FAMILIES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_family_accepts_and_complains(case: tuple[str, Any, list[str], dict[str, str]]) -> None:
    family, value, kept, broken = case
    rule = Rule(family, value)
    assert [text for text in kept if rule.complaint(text)] == []
    for text, message in broken.items():
        assert message in (rule.complaint(text) or ""), (text[:40], rule.complaint(text))
    for text in HOSTILE:
        rule.complaint(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_request_states_the_value(family: str) -> None:
    rule = Rule(family, FAMILIES[family].draw(random.Random(0), "calm"))
    values = rule.value if isinstance(rule.value, tuple) else () if rule.value is None else (rule.value,)
    assert all(str(value) in rule.ask for value in values)


def test_tasks_depend_on_seed_and_index_alone_and_evaluation_asks_other_questions() -> None:
    env = Instructions(constraints=tuple(FAMILIES), per_prompt=2)
    tasks = [env.task(index, seed=5) for index in range(200)]
    assert tasks == [env.task(index, seed=5) for index in reversed(range(200))][::-1]
    assert tasks != [env.task(index, seed=6) for index in range(200)]
    held_out = env.eval_tasks(None)
    assert list(env.eval_tasks(9)) == list(held_out[:9]) and len({t.id for t in held_out}) == len(held_out)

    def questions(tasks: Any) -> set[str]:
        return {task.messages[0]["content"].partition("?")[0] for task in tasks}

    assert not questions(held_out) & questions(tasks)


def test_no_prompt_holds_rules_that_clash() -> None:
    env = Instructions(constraints=tuple(FAMILIES), per_prompt=3)
    for index in range(500):
        families = [rule.family for rule in env.task(index, seed=0).payload]
        assert len(set(families)) == 3 and not any(b in CLASHES.get(a, ()) for a in families for b in families)


@pytest.mark.parametrize("per_prompt", [1, 2, 3])
def test_its_own_solution_keeps_every_rule(per_prompt: int) -> None:
    env = Instructions(constraints=tuple(FAMILIES), per_prompt=per_prompt)
    for task in [env.task(index, seed=1) for index in range(300)]:
        made = grade(env, task, env.solution(task))
        assert made.success and made.feedback == "All rules are kept." and not made.informative, task


def test_reward_of_several_rules_by_hand() -> None:
    task = task_of(Rule("max_words", 3), Rule("include", "calm"), Rule("no_commas", None))
    every, share = Instructions(per_prompt=3), Instructions(per_prompt=3, reward="share")
    made = grade(share, task, "calm, very calm, indeed calm")
    assert made.reward == pytest.approx(1 / 3) and not made.success and made.metrics == {"rules_kept": made.reward}
    assert made.feedback == "Your answer has 5 words; at most 3 are allowed. Your answer has 2 commas; none is allowed."
    assert grade(every, task, "calm, very calm").reward == 0.0 and grade(every, task, "calm").reward == 1.0


@pytest.mark.parametrize("text", ["", "   \n", "...", "!?", "\x00"])
def test_an_answer_without_a_word_keeps_no_rule(text: str) -> None:
    made = grade(Instructions(reward="share"), task_of(Rule("no_commas", None)), text)
    assert made.reward == 0.0 and made.success is False and made.informative and "empty" in (made.feedback or "")


def test_hostile_answers_are_graded_quickly_and_quoted_nowhere() -> None:
    env = Instructions(constraints=tuple(FAMILIES), per_prompt=1)
    tasks = [env.task(index, seed=2) for index in range(40)]
    started = time.perf_counter()
    for text in HOSTILE:
        for made in grade_texts(env, tasks, [text] * len(tasks)):
            assert len(made.feedback or "") < 200 and (made.feedback or "").isprintable()
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraints": ("max_wrods",)}, "'max_words'"),
        ({"constraints": ("include", "include")}, "twice"),
        ({"per_prompt": 4}, "from 1 to 3"),
        ({"constraints": ("json", "bullets"), "per_prompt": 2}, "fit together"),
        ({"constraints": ()}, "no families"),
        ({"reward": "some"}, "'share'"),
    ],
)
def test_settings_that_leave_no_task(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Instructions(**settings)
