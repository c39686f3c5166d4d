"""The demo's task: rules by hand, streams that never meet, and feedback that names the operation, not the answer."""

import pytest

from vpd.envs import grade_texts
from vpd.envs.digits import OPERATIONS, RULES, Digits, Problem, apply
from vpd.errors import ConfigError
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


def named(env: Digits, count: int = 2000, first: int = 0) -> list[tuple[str, str]]:
    """(the letter's operation, what the feedback names) of training tasks."""
    tasks = [env.task(index, seed=3) for index in range(first, first + count)]
    texts = [grade.feedback or "" for grade in grade_texts(env, tasks, ["0"] * count)]
    assert all(
        text.startswith(f"wrong : rule {task.payload.rule} means ") for task, text in zip(tasks, texts, strict=True)
    )
    return [(RULES[task.payload.rule], text.split()[-1]) for task, text in zip(tasks, texts, strict=True)]


def test_noisy_text_is_wrong_as_often_as_declared() -> None:
    pairs = named(Digits(wrong_share=0.3))
    wrong = sum(true != stated for true, stated in pairs) / len(pairs)
    assert abs(wrong - 0.3) < 4 * (0.3 * 0.7 / len(pairs)) ** 0.5
    assert all(stated in OPERATIONS for _, stated in pairs)
    held_out = Digits(wrong_share=0.3).eval_tasks(512)
    assert 0.2 < sum(task.payload.named != RULES[task.payload.rule] for task in held_out) / 512 < 0.4


def test_partial_text_helps_some_letters_only() -> None:
    pairs = named(Digits(helped_rules="AB"))
    for rule, true in RULES.items():
        stated = [t for other, t in pairs if other == true]
        right = sum(t == true for t in stated) / len(stated)
        assert right == 1.0 if rule in "AB" else abs(right - 1 / len(OPERATIONS)) < 0.08


def test_changing_text_is_right_then_wrong_then_right() -> None:
    env = Digits(wrong_from=100, wrong_until=200)
    assert [sum(true == stated for true, stated in named(env, 100, first)) for first in (0, 100, 200)] == [100, 0, 100]
    assert sum(true == stated for true, stated in named(Digits(wrong_from=100), 100, 10_000)) == 0
    assert all(task.payload.named == RULES[task.payload.rule] for task in env.eval_tasks(64))


def test_worse_text_changes_no_task_and_is_a_function_of_its_place() -> None:
    noisy, plain = Digits(wrong_share=0.5), Digits()
    for index in (0, 7, 400):
        assert noisy.task(index, seed=1).messages == plain.task(index, seed=1).messages
        assert noisy.task(index, seed=1) == Digits(wrong_share=0.5).task(index, seed=1)


def test_empty_text_names_nothing_and_longer_tasks_are_longer() -> None:
    env = Digits(hint="empty", length=10)
    task = env.task(0, seed=0)
    [grade] = env.grade([task], ["0"])
    assert grade.informative and grade.feedback == f"wrong : rule {task.payload.rule} means ?"
    assert len(task.payload.digits) == len(env.solution(task).split()) == 10


@pytest.mark.parametrize("wrong", [{"length": 0}, {"wrong_share": 1.5}, {"helped_rules": "AX"}, {"wrong_until": 3}])
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"env.{next(iter(wrong))} is out of range"):
        Digits(**wrong)  # type: ignore[arg-type]
