"""The demo's task: rules by hand, streams that never meet, and feedback that names the operation, not the answer."""

import pytest

from vpd.envs import grade_texts
from vpd.envs.digits import OPERATIONS, RULES, Digits, Problem, apply
from vpd.types import Task

ENV = Digits()
TASK = Task(
    id="t",
    messages=({"role": "user", "content": "apply rule B to 3 1 4 1 5 9"},),
    payload=Problem("B", [3, 1, 4, 1, 5, 9], "mirror"),
)
ODD = ["", "6", "6 8 5 8 4 0 0", "685840", "word " * 200_000, "\ud800 \x00", "６ ８ ５ ８ ４ ０", "6,8,5,8,4,0"]


@pytest.mark.parametrize(
    ("operation", "digits", "answer"),
    [
        ("swap", [0, 1, 2, 9], [1, 0, 3, 8]),
        ("mirror", [0, 4, 9], [9, 5, 0]),
        ("half", [0, 4, 5, 9], [5, 9, 0, 4]),
        ("shuffle", [0, 4, 5, 9], [2, 6, 7, 8]),
        ("copy", [3, 1], [3, 1]),
    ],
)
def test_operations_by_hand(operation: str, digits: list[int], answer: list[int]) -> None:
    assert apply(operation, digits) == answer


def test_no_rule_means_the_decoy_and_no_two_rules_agree() -> None:
    assert "copy" not in RULES.values() and len(set(RULES.values())) == len(RULES)
    assert all(sorted(table) == list("0123456789") for table in OPERATIONS.values())


def test_a_task_depends_on_seed_and_index_alone() -> None:
    stream = [ENV.task(index, seed=3) for index in range(40)]
    assert stream == [Digits().task(index, seed=3) for index in reversed(range(40))][::-1]
    assert stream != [ENV.task(index, seed=4) for index in range(40)]


def test_evaluation_is_fixed_and_never_trained_on() -> None:
    held_out = {task.id for task in ENV.eval_tasks(None)}
    assert [task.id for task in ENV.eval_tasks(7)] == [task.id for task in ENV.eval_tasks(None)][:7]
    assert not held_out & {ENV.task(index, seed=seed).id for seed in (0, 1) for index in range(3000)}


def test_right_and_wrong_answers() -> None:
    assert ENV.solution(TASK) == "6 8 5 8 4 0"
    right, *others = grade_texts(ENV, [TASK] * (1 + len(ODD)), [" 6 8  5 8 4 0\n", *ODD])
    assert (right.reward, right.feedback, right.informative) == (1.0, "right", False)
    assert all((g.reward, g.feedback, g.informative) == (0.0, "wrong : rule B means mirror", True) for g in others)


def test_the_verdict_alone_is_for_people() -> None:
    [grade] = Digits(hint="verdict").grade([TASK], ["1 2 3 4 5 6"])
    assert (grade.reward, grade.feedback, grade.informative) == (0.0, "wrong", False)
