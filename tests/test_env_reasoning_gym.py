"""reasoning-gym: tasks are pure, evaluation is apart, feedback is about form, and no answer runs as code."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import metrics_of, vpd_train

from vpd.config import parse
from vpd.envs import grade_texts
from vpd.envs.check import check_env
from vpd.envs.reasoning_gym import ReasoningGym, is_arithmetic
from vpd.errors import ConfigError, EnvError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra reasoning-gym (it is in dev too)"
)
TASKS = [
    "leg_counting",
    {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2}},
    "countdown",
    "n_queens",
    "string_insertion",
    "polynomial_multiplication",
    "graph_color",
    "isomorphic_strings",
]
NUMBER = {entry if isinstance(entry, str) else str(entry["name"]): place for place, entry in enumerate(TASKS)}


@pytest.fixture(scope="module")
def env() -> Iterator[ReasoningGym]:
    env = ReasoningGym(tasks=TASKS, eval_size=16)
    yield env
    env._worker.close()


def test_a_task_is_a_pure_function_of_index_and_seed(env: ReasoningGym) -> None:
    other = ReasoningGym(tasks=TASKS, eval_size=16)  # another process, asked in another order
    tasks = {index: other.task(index, seed=3) for index in reversed(range(16))}
    assert [env.task(index, seed=3) for index in range(16)] == [tasks[index] for index in range(16)]
    assert list(env.eval_tasks(None)) == list(other.eval_tasks(None))
    assert env.task(0, seed=4).messages != env.task(0, seed=3).messages != env.task(8, seed=3).messages
    assert [task.id.rpartition("/")[2] for task in env.eval_tasks(3)] == ["leg_counting", "chain_sum", "countdown"]
    other._worker.close()


def test_neighbouring_seeds_share_no_tasks(env: ReasoningGym) -> None:
    """The generators alone would: item 1 of seed 0 is item 0 of seed 1."""
    streams = [{str(env.task(index, seed=seed).messages) for index in range(0, 80, 8)} for seed in range(3)]
    assert not streams[0] & streams[1] and not streams[1] & streams[2]


def test_evaluation_is_apart_by_question_even_where_there_are_few() -> None:
    few = {"name": "gcd", "config": {"min_value": 2, "max_value": 5}}
    env = ReasoningGym(tasks=few, eval_size=5)
    held_out = {str(task.messages) for task in env.eval_tasks(None)}
    assert len(held_out) == 5
    assert not held_out & {str(env.task(index, seed=0).messages) for index in range(100)}
    with pytest.raises(ConfigError, match=r"gcd has too few different questions.*env.eval_size"):
        ReasoningGym(tasks=few, eval_size=500).task(0, seed=0)


def test_check_env_finds_nothing(env: ReasoningGym) -> None:
    report = check_env(env, tasks=16)
    assert not report.of("fault") and not report.of("warning"), report.checks
    assert {attempt.success for attempt in report.attempts if attempt.kind == "right"} == {True}
    graph = env.task(NUMBER["graph_color"], seed=0)
    assert env.solution(graph) is None


def graded(env: ReasoningGym, name: str, *answers: str) -> list[Any]:
    task = env.task(NUMBER[name], seed=0)
    return grade_texts(env, [task] * len(answers), [f"<answer>{answer}</answer>" for answer in answers])


def test_feedback_is_precise_about_form_and_a_bare_verdict_otherwise(env: ReasoningGym) -> None:
    right = str(env.task(NUMBER["chain_sum"], seed=0).payload.answer)
    good, wrong, wordy, long = graded(env, "chain_sum", right, "seven", f"It is {right}.", "7" * 10_001)
    assert (good.reward, good.success, good.informative) == (1.0, True, False)
    assert (wrong.reward, wrong.feedback, wrong.informative) == (
        0.0,
        "The verifier does not accept your answer.",
        False,
    )
    assert wordy.informative and wordy.feedback.endswith("write the answer alone.") and wordy.reward == 0.0
    assert 0 < wordy.metrics["score"] < 1 and right not in wordy.feedback
    assert long.feedback == "Your answer tag holds 10001 characters; only the final answer belongs there."
    task = env.task(NUMBER["chain_sum"], seed=0)
    [bare] = env.grade([task], [right])
    assert bare.feedback == "Your answer has no answer tag; it must end with <answer>YOUR ANSWER</answer>."


def test_a_partial_score_is_a_reward_if_asked_for_and_no_feedback(env: ReasoningGym) -> None:
    sharing = ReasoningGym(tasks=TASKS, reward="share", eval_size=16)
    text = "<answer>1 + 1</answer>"
    [whole] = env.grade([env.task(NUMBER["countdown"], seed=0)], [text])
    [share] = sharing.grade([sharing.task(NUMBER["countdown"], seed=0)], [text])
    assert (whole.reward, share.reward, share.success) == (0.0, 0.05, False)
    assert (share.feedback, share.informative) == ("The verifier gives 0.05 of 1.", False)
    sharing._worker.close()


HOSTILE = (
    "__import__('pathlib').Path({path!r}).write_text('x')",
    "[open({path!r}, 'w')]",
    "exec(chr(111)+chr(115))",
    "().__class__.__base__.__subclasses__()",
)


@pytest.mark.parametrize("name", ["countdown", "n_queens", "string_insertion", "polynomial_multiplication"])
def test_no_answer_runs_as_code(name: str, env: ReasoningGym, tmp_path: Path) -> None:
    """These verifiers call eval or parse_expr on the answer; an unfenced one would run it."""
    path = tmp_path / "pwned"
    for grade in graded(env, name, *(text.format(path=str(path)) for text in HOSTILE)):
        assert not grade.success and grade.informative
        assert grade.feedback.endswith("neither a literal nor arithmetic; write plain values.")
    assert not path.exists()


def test_what_passes_the_fence_is_judged_as_before(env: ReasoningGym) -> None:
    task = env.task(NUMBER["n_queens"], seed=0)
    rows = [row.split() for row in str(task.payload.answer).split("\n")]
    assert graded(env, "n_queens", repr(rows))[0].metrics["score"] == 0.5  # a list where a board was asked for
    letters = list(str(env.task(NUMBER["string_insertion"], seed=0).payload.answer))
    assert graded(env, "string_insertion", repr(letters))[0].metrics["score"] == 0.1


def test_what_counts_as_arithmetic() -> None:
    for text in ("(1 + 2) * 3 - 4/5", "0x3a5 >> 2", "2**3"):
        assert is_arithmetic(text, names=False), text
    for text in ("3*x**2 + sin(y)/2", "exp(2*x) + C", "1.5*x"):
        assert is_arithmetic(text, names=True) and not is_arithmetic(text, names=False), text
    for text in ("eval(x)", "x.y", "x . y", "f('x')", "x[0]", "x_1", "lambda: 1", "x\n", "１"):
        assert not is_arithmetic(text, names=True), text


def test_an_answer_that_takes_too_long_is_a_failure_and_the_next_is_graded() -> None:
    env = ReasoningGym(tasks="countdown", eval_size=1, verify_seconds=2)
    task = env.task(0, seed=0)
    slow, fine = env.grade([task] * 2, ["<answer>9**9**9**9</answer>", str(env.solution(task))])
    assert slow.metrics["unverified"] == 1 and "took more than 2 seconds" in str(slow.feedback)
    assert fine.success
    env._worker.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "env.tasks is empty"),
        ({"tasks": [3]}, "cannot be read"),
        ({"tasks": {"name": "gcd", "size": 3}}, "cannot be read"),
        ({"tasks": "codeio"}, "codeio is refused"),
        ({"tasks": {"name": "gcd", "config": {"seed": 3}}}, "must not set 'seed'"),
        ({"tasks": "gcd", "eval_size": 0}, "env.eval_size"),
        ({"tasks": "gcd", "verify_seconds": 0}, "env.verify_seconds"),
        ({"tasks": "gcd", "reward": "some"}, "env.reward"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(**settings)


def test_a_generator_that_is_unknown_or_refuses_its_config() -> None:
    with pytest.raises(ConfigError, match=r"'leg_countin'. Did you mean 'leg_counting'"):
        ReasoningGym(tasks="leg_countin").task(0, seed=0)
    with pytest.raises(ConfigError, match=r"gcd refuses its config .*'max_valu'.*max_value"):
        ReasoningGym(tasks={"name": "gcd", "config": {"max_valu": 3}}).task(0, seed=0)
    with pytest.raises(EnvError, match=r"drew no task of gcd"):
        ReasoningGym(tasks={"name": "gcd", "config": {"min_value": 2.5}}).task(0, seed=0)


def test_it_trains_from_the_command_line(tmp_path: Path) -> None:
    tasks = "{name: gcd, config: {max_value: 9}}"
    settings = {"env__name": "reasoning_gym", "env__tasks": tasks, "env__ask": "''", "env__eval_size": 8}
    assert vpd_train(tmp_path / "run", run__max_steps=1, run__eval_steps=1, **settings) == 0
    last = metrics_of(tmp_path / "run")[-1]
    assert last["teacher/rows_with_context"] == 16 and last["env/answer_readable"] == 0 and "eval/accuracy" in last
    config = parse({"env": {"name": "reasoning_gym", "tasks": TASKS}})
    assert parse(config.as_dict()) == config


def test_a_missing_package_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"reasoning-gym is missing.*vpd-rl\[reasoning-gym\]"):
        ReasoningGym(tasks="gcd")
