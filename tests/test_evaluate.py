"""Evaluation by hand: which answers count, which are tried again, on which tasks student and teacher are compared."""

import math

import pytest
from fakes import Comment, RecordingEngine, ScriptedChat, ScriptedEnv, asking, evaluate_with, in_turn

from vpd.types import Grade, Rollout, SampleKey, Task

REWARDS = {"right": 1.0, "half": 0.5, "wrong": 0.0, "bad": 0.0, "poor": 0.25}


def judge(task: Task, text: str) -> Grade:
    return Grade(reward=REWARDS[text])


def objection(rollout: Rollout) -> str | None:
    """Said of every attempt, also of the right ones, but not of ``bad``, and not at all about eval3."""
    silent = rollout.task.id == "eval3" or rollout.completion.text == "bad"
    return None if silent else f"not {rollout.completion.text}"


STUDENT = {
    "eval0": ["right", "right", "right"],
    "eval1": ["right", "poor", "bad"],
    "eval2": ["wrong", "poor", "wrong"],
    "eval3": ["wrong", "wrong", "wrong"],
}
TEACHER = {
    "eval1<not poor>": ["right"],
    "eval2<not wrong>": ["right", "wrong"],
    "eval2<not poor>": ["half"],
}


def test_student_by_hand() -> None:
    result = evaluate_with(ScriptedEnv(judge), RecordingEngine(in_turn(STUDENT)), samples=3, threshold=0.6)
    # shares 1, 1/3, 0, 0; passes 1, 1, 0, 0; mean rewards 1, 1.25 / 3, .25 / 3, 0
    mean = (1 + 1 / 3) / 4
    spread = math.sqrt(((1 - mean) ** 2 + (1 / 3 - mean) ** 2 + 2 * mean**2) / 3)
    assert result.student == pytest.approx(
        {
            "avg@3": mean, "avg@3_se": spread / 2, "pass@3": 0.5, "pass@3_se": math.sqrt(1 / 3) / 2,
            "reward": (1 + 1.5 / 3) / 4, "tasks": 4.0, "answers": 12.0,
        }
    )  # fmt: skip
    assert result.teacher == {} and result.retries == []


def test_exactly_the_failures_with_a_context_are_tried_again_each_with_its_own_teacher_prompt() -> None:
    engine = RecordingEngine(in_turn(STUDENT | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    assert [len(call) for call in engine.calls] == [12, 4]
    asked = [sample.prompt for sample in engine.calls[1]]
    assert asked == [
        f"[user]{q}[assistant]" for q in ("eval1<not poor>", "eval2<not wrong>", "eval2<not poor>", "eval2<not wrong>")
    ]
    assert [(r.task.id, r.completion.text) for r in result.retries] == [
        ("eval1", "right"), ("eval2", "right"), ("eval2", "half"), ("eval2", "wrong"),
    ]  # fmt: skip
    assert [r.success for r in result.retries] == [True, True, False, False]


def test_teacher_by_hand_and_the_student_on_just_the_teachers_tasks() -> None:
    engine = RecordingEngine(in_turn(STUDENT | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    # eval1: 1 of 1, eval2: 1 of 3; the student on these two: 1/3 and 0 (on all four 1/3, on the first two 2/3)
    assert result.teacher == pytest.approx(
        {
            "avg@3": 2 / 3, "avg@3_se": (2 / 3) / math.sqrt(2) / math.sqrt(2), "pass@3": 1.0, "pass@3_se": 0.0,
            "reward": (1 + 1.5 / 3) / 2, "tasks": 2.0, "answers": 4.0, "student_accuracy": 1 / 6,
        }
    )  # fmt: skip
    assert result.student["avg@3"] == pytest.approx(1 / 3)
    told = {r.completion.text for g in result.groups for r in g.rollouts if r.teacher_prompt is not None}
    assert told == {"right", "poor", "wrong"}  # the groups that are given back are those with the feedback


def test_the_threshold_holds_for_the_retries_too() -> None:
    engine = RecordingEngine(in_turn(STUDENT | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.5, feedback=[Comment(objection)])
    assert [r.success for r in result.retries] == [True, True, True, False]


def test_without_a_failure_that_has_a_context_nobody_is_asked_again() -> None:
    for say in (lambda rollout: None, lambda rollout: "fine" if rollout.success else None):
        engine = RecordingEngine(in_turn(STUDENT))
        result = evaluate_with(ScriptedEnv(judge), engine, samples=3, feedback=[Comment(say)])
        assert len(engine.calls) == 1
        assert result.teacher == {"tasks": 0.0, "answers": 0.0} and result.retries == []


def test_one_task_has_no_standard_error() -> None:
    result = evaluate_with(ScriptedEnv(judge), RecordingEngine(in_turn(STUDENT)), samples=3, limit=1)
    assert result.student["avg@3"] == 1.0 and math.isnan(result.student["avg@3_se"])


def random_answer(prompt: str, seed: int) -> str:
    return ("right", "poor", "wrong")[seed % 3]


def seeds_of(seed: int = 0) -> dict[str, list[int]]:
    """All seeds of an evaluation with a model that writes the feedback, by what they are for."""
    engine = RecordingEngine(lambda prompt, drawn: "why" if "not " in prompt else random_answer(prompt, drawn))
    env = ScriptedEnv(judge, held_out=6)
    evaluate_with(env, engine, samples=4, seed=seed, feedback=[Comment(objection, ask=True)])
    student, writer, teacher = ([sample.seed for sample in call] for call in engine.calls)
    return {"student": student, "writer": writer, "teacher": teacher}


def test_answers_feedback_and_retries_have_seeds_of_their_own() -> None:
    every = [seed for run in (0, 1) for seeds in seeds_of(run).values() for seed in seeds]
    assert len(every) > 80 and len(set(every)) == len(every)
    assert seeds_of(1) == seeds_of(1)


def retry_seeds(right_answers: int) -> list[int]:
    """Seeds of the retries of eval1, after so many of eval0's three answers were right."""
    texts = STUDENT | {"eval0": ["right"] * right_answers + ["poor"] * (3 - right_answers), "eval1": ["poor"] * 3}
    texts |= {"eval2": ["right"] * 3, "eval0<not poor>": ["right"] * 3, "eval1<not poor>": ["right"] * 3}
    engine = RecordingEngine(in_turn(texts))
    evaluate_with(ScriptedEnv(judge), engine, samples=3, feedback=[Comment(objection)])
    return [sample.seed for sample in engine.calls[1] if "eval1" in sample.prompt]


def test_the_seed_of_a_retry_does_not_depend_on_which_other_answers_failed() -> None:
    assert retry_seeds(3) == retry_seeds(2) == retry_seeds(0)


def test_attempts_of_several_turns_are_evaluated_whole() -> None:
    def reply(task: Task, said: list[str]) -> str | None:
        return "again" if len(said) == 1 else None

    engine = RecordingEngine(lambda prompt, seed: "right" if "again" in prompt else "poor")
    result = evaluate_with(ScriptedChat(judge, reply), engine, samples=1)
    assert result.student["avg@1"] == 1.0
    assert {r.completion.turns for g in result.groups for r in g.rollouts} == {2}
    # the teacher's retry may go on for as long
    engine = RecordingEngine(lambda prompt, seed: "right" if "<" in prompt and "again" in prompt else "poor")
    result = evaluate_with(ScriptedChat(judge, reply), engine, samples=1, feedback=[Comment(lambda r: "no")])
    assert result.student["avg@1"] == 0.0 and result.teacher["avg@1"] == 1.0
    assert {r.completion.turns for r in result.retries} == {2}


def test_the_sampling_settings_reach_answers_and_retries() -> None:
    engine = RecordingEngine(in_turn(STUDENT | TEACHER | {"eval1<not half>": ["right"]}))
    sampling = {"max_completion_length": 9, "temperature": 0.2, "top_p": 0.7, "top_k": 4}
    evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)], **sampling)
    assert len(engine.calls) == 2
    assert {(s.max_tokens, s.temperature, s.top_p, s.top_k) for s in engine.samples} == {(9, 0.2, 0.7, 4)}


def test_only_held_out_tasks_are_asked() -> None:
    env, engine = ScriptedEnv(judge, held_out=5), RecordingEngine(random_answer)
    evaluate_with(env, engine, limit=3)
    assert {sample.prompt for sample in engine.samples} == {f"[user]eval{i}[assistant]" for i in range(3)}
    assert env.seeds == set()  # no training task was drawn
    assert asking("eval0") in env.eval_tasks(1)


def test_answers_are_keyed_as_eval_and_retries_as_eval_retry_of_the_same_sample() -> None:
    engine = RecordingEngine(in_turn(STUDENT | TEACHER))
    evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    answers, retries = ([sample.key for sample in call] for call in engine.calls)
    assert answers == [
        SampleKey(phase="eval", step=0, task=task, sample=sample) for task in range(4) for sample in range(3)
    ]
    assert retries == [
        SampleKey(phase="eval_retry", step=0, task=task, sample=sample)
        for task, sample in ((1, 1), (2, 0), (2, 1), (2, 2))
    ]
