"""Evaluation by hand: which answers count, which are tried again, and what the teacher's retries are compared with."""

import math
import random

import pytest
from fakes import Comment, RecordingEngine, ScriptedChat, ScriptedEnv, asking, evaluate_with, in_turn

from vpd.evaluation import Evaluation
from vpd.monitor import Monitor
from vpd.recipes.evaluation import show, show_answers, verdict
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
CONTROL = {"eval1": ["poor"], "eval2": ["right", "right", "wrong"]}
WITH_CONTROL = {question: texts + CONTROL.get(question, []) for question, texts in STUDENT.items()}


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
    assert result.teacher == {} and result.control == {} and result.retries == [] and result.control_retries == []


def test_exactly_the_failures_with_a_context_are_tried_again_each_with_its_own_teacher_prompt() -> None:
    engine = RecordingEngine(in_turn(WITH_CONTROL | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    assert [len(call) for call in engine.calls] == [12, 4, 4]
    asked = [sample.prompt for sample in engine.calls[1]]
    assert asked == [
        f"[user]{q}[assistant]" for q in ("eval1<not poor>", "eval2<not wrong>", "eval2<not poor>", "eval2<not wrong>")
    ]
    assert [(r.task.id, r.completion.text) for r in result.retries] == [
        ("eval1", "right"), ("eval2", "right"), ("eval2", "half"), ("eval2", "wrong"),
    ]  # fmt: skip
    assert [r.success for r in result.retries] == [True, True, False, False]


def test_the_control_answers_the_same_failed_attempts_from_the_students_own_prompt() -> None:
    engine = RecordingEngine(in_turn(WITH_CONTROL | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    assert [s.prompt for s in engine.calls[2]] == [f"[user]eval{i}[assistant]" for i in (1, 2, 2, 2)]
    places = [[(r.key.task, r.key.sample) for r in retries] for retries in (result.retries, result.control_retries)]
    assert places[0] == places[1] == [(1, 1), (2, 0), (2, 1), (2, 2)]
    assert {r.key.phase for r in result.control_retries} == {"eval_control"}
    assert [r.success for r in result.control_retries] == [False, True, True, False]


def test_teacher_control_and_gain_by_hand() -> None:
    engine = RecordingEngine(in_turn(WITH_CONTROL | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    # the teacher on eval1: 1 of 1, on eval2: 1 of 3; the control: 0 of 1, 2 of 3; the gains are 1 and -1/3
    assert result.teacher == pytest.approx(
        {
            "avg@3": 2 / 3, "avg@3_se": (2 / 3) / math.sqrt(2) / math.sqrt(2), "pass@3": 1.0, "pass@3_se": 0.0,
            "reward": (1 + 1.5 / 3) / 2, "tasks": 2.0, "answers": 4.0,
            "student_accuracy": 1 / 3, "gain": 1 / 3, "gain_se": (4 / 3) / math.sqrt(2) / math.sqrt(2),
        }
    )  # fmt: skip
    assert result.control == pytest.approx(
        {
            "avg@3": 1 / 3, "avg@3_se": (2 / 3) / math.sqrt(2) / math.sqrt(2), "pass@3": 0.5, "pass@3_se": 0.5,
            "reward": (0.25 + 2 / 3) / 2, "tasks": 2.0, "answers": 4.0,
        }
    )  # fmt: skip
    assert result.student["avg@3"] == pytest.approx(1 / 3)
    told = {r.completion.text for g in result.groups for r in g.rollouts if r.teacher_prompt is not None}
    assert told == {"right", "poor", "wrong"}  # the groups that are given back are those with the feedback


def test_without_the_control_there_is_nothing_to_compare_with_and_no_cost() -> None:
    engine = RecordingEngine(in_turn(STUDENT | TEACHER))
    comments = [Comment(objection)]
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=comments, control=False)
    assert [len(call) for call in engine.calls] == [12, 4] and result.teacher["avg@3"] == pytest.approx(2 / 3)
    assert not {"student_accuracy", "gain", "gain_se"} & set(result.teacher)
    assert result.control == {} and result.control_retries == []


def test_the_threshold_holds_for_the_retries_too() -> None:
    engine = RecordingEngine(in_turn(WITH_CONTROL | TEACHER))
    result = evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.5, feedback=[Comment(objection)])
    assert [r.success for r in result.retries] == [True, True, True, False]


def test_without_a_failure_that_has_a_context_nobody_is_asked_again() -> None:
    for say in (lambda rollout: None, lambda rollout: "fine" if rollout.success else None):
        engine = RecordingEngine(in_turn(STUDENT))
        result = evaluate_with(ScriptedEnv(judge), engine, samples=3, feedback=[Comment(say)])
        assert len(engine.calls) == 1
        assert result.teacher == result.control == {"tasks": 0.0, "answers": 0.0} and result.retries == []


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
    student, writer, teacher, control = ([sample.seed for sample in call] for call in engine.calls)
    assert len(teacher) == len(control) > 0
    return {"student": student, "writer": writer, "teacher": teacher, "control": control}


def test_answers_feedback_and_retries_have_seeds_of_their_own() -> None:
    every = [seed for run in (0, 1) for seeds in seeds_of(run).values() for seed in seeds]
    assert len(every) > 80 and len(set(every)) == len(every)
    assert seeds_of(1) == seeds_of(1)


def retry_seeds(right_answers: int) -> list[int]:
    """Seeds of teacher's and control's retries of eval1, after so many of eval0's three answers were right."""
    texts = STUDENT | {"eval0": ["right"] * right_answers + ["poor"] * 6, "eval1": ["poor"] * 6}
    texts |= {"eval2": ["right"] * 3, "eval0<not poor>": ["right"] * 3, "eval1<not poor>": ["right"] * 3}
    engine = RecordingEngine(in_turn(texts))
    evaluate_with(ScriptedEnv(judge), engine, samples=3, feedback=[Comment(objection)])
    return [sample.seed for call in engine.calls[1:] for sample in call if "eval1" in sample.prompt]


def test_the_seed_of_a_retry_does_not_depend_on_which_other_answers_failed() -> None:
    assert retry_seeds(3) == retry_seeds(2) == retry_seeds(0) and len(set(retry_seeds(3))) == 6


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
    engine = RecordingEngine(in_turn(WITH_CONTROL | TEACHER | {"eval1<not half>": ["right"]}))
    sampling = {"max_completion_length": 9, "temperature": 0.2, "top_p": 0.7, "top_k": 4}
    evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)], **sampling)
    assert len(engine.calls) == 3
    assert {(s.max_tokens, s.temperature, s.top_p, s.top_k) for s in engine.samples} == {(9, 0.2, 0.7, 4)}


def test_only_held_out_tasks_are_asked() -> None:
    env, engine = ScriptedEnv(judge, held_out=5), RecordingEngine(random_answer)
    evaluate_with(env, engine, limit=3)
    assert {sample.prompt for sample in engine.samples} == {f"[user]eval{i}[assistant]" for i in range(3)}
    assert env.seeds == set()  # no training task was drawn
    assert asking("eval0") in env.eval_tasks(1)


def test_answers_are_keyed_as_eval_and_retries_as_eval_retry_of_the_same_sample() -> None:
    engine = RecordingEngine(in_turn(WITH_CONTROL | TEACHER))
    evaluate_with(ScriptedEnv(judge), engine, samples=3, threshold=0.6, feedback=[Comment(objection)])
    answers, retries, controls = ([sample.key for sample in call] for call in engine.calls)
    assert answers == [
        SampleKey(phase="eval", step=0, task=task, sample=sample) for task in range(4) for sample in range(3)
    ]
    for phase, keys in (("eval_retry", retries), ("eval_control", controls)):
        assert keys == [
            SampleKey(phase=phase, step=0, task=task, sample=sample)
            for task, sample in ((1, 1), (2, 0), (2, 1), (2, 2))
        ]


def chances(kind: str, count: int) -> list[float]:
    """How often the student is right, by task."""
    draw = random.Random(kind)
    return [draw.random() if kind == "any" else float(kind) for _ in range(count)]


def simulated(student: list[float], *, better: float, samples: int, seed: int = 0) -> Evaluation:
    """A student with such chances, and a teacher that mends a share ``better`` of its failures; 0: ignores feedback."""

    def answer(prompt: str, drawn: int) -> str:
        chance = student[int(prompt.removeprefix("[user]eval").split("<")[0].split("[")[0])]
        chance += (1 - chance) * better if "<" in prompt else 0.0
        return "right" if drawn % 2**32 < chance * 2**32 else "wrong"  # a seed is a hash

    env, comments = ScriptedEnv(judge, held_out=len(student)), [Comment(lambda rollout: "not that")]
    return evaluate_with(env, RecordingEngine(answer), samples=samples, seed=seed, feedback=comments)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("kind", ["0.5", "any", "0.9"])
def test_a_teacher_that_ignores_the_feedback_does_not_look_better(kind: str, samples: int) -> None:
    """The student's accuracy on these tasks, that counts the failures they were chosen by, would be .71 beside .91."""
    teacher = simulated(chances(kind, 1500), better=0.0, samples=samples).teacher
    assert abs(teacher["gain"]) < 3 * teacher["gain_se"] and teacher["gain_se"] < 0.06
    assert teacher["gain"] == pytest.approx(teacher[f"avg@{samples}"] - teacher["student_accuracy"])


@pytest.mark.parametrize("kind", ["0.5", "any"])
def test_a_better_teacher_gains_what_it_is_better_by(kind: str) -> None:
    teacher = simulated(chances(kind, 1500), better=0.4, samples=4).teacher
    truth = 0.4 * (1 - teacher["student_accuracy"])
    assert teacher["gain"] == pytest.approx(truth, abs=4 * teacher["gain_se"]) and teacher["gain"] > 0.1


def share_of_alarms(better: float, *, tasks: int = 64, evaluations: int = 40) -> float:
    """How often ``teacher_no_better`` is raised, over evaluations of new tasks with new randomness."""
    raised = 0
    for seed in range(evaluations):
        student = chances("any", evaluations * tasks)[seed * tasks : (seed + 1) * tasks]
        metrics = simulated(student, better=better, samples=4, seed=seed).teacher
        metrics |= {"accuracy": metrics["avg@4"]}
        monitor = Monitor(lambda alarm: None)
        monitor.on_step(1, {"m_step/rows": 8.0} | {f"eval_teacher/{k}": v for k, v in metrics.items()}, [])
        raised += bool(monitor.alarms)
    return raised / evaluations


def test_how_often_the_alarm_is_raised_and_falsely() -> None:
    useless, slightly, better = (share_of_alarms(share) for share in (0.0, 0.1, 0.3))
    assert useless >= 0.4, useless
    assert slightly <= 0.2, slightly  # a gain of .05 with a standard error of .03
    assert better == 0.0, better
    assert share_of_alarms(0.0, tasks=12) == 0.0  # too few tasks to say anything


def shown(capsys: pytest.CaptureFixture[str], result: Evaluation) -> str:
    show(result, 3)
    return " ".join(capsys.readouterr().out.split())


def test_answers_are_shown_failures_first_with_their_retries(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"samples": 1, "threshold": 0.6, "feedback": [Comment(objection)]}
    result = evaluate_with(ScriptedEnv(judge), RecordingEngine(in_turn(WITH_CONTROL | TEACHER)), **options)
    show_answers(result, 2)
    text = capsys.readouterr().out
    failed, control = result.groups, {retry.key.task: retry for retry in result.control_retries}
    first = next(group.rollouts[0] for group in failed if not group.rollouts[0].success)
    assert text.count("\nanswer ") + text.startswith("answer ") == 2 and "[wrong, reward " in text
    assert f"answer     [wrong, reward {first.grade.reward:g}] {first.completion.text}" in text
    retried = control[first.key.task]
    assert f"control    [{'right' if retried.success else 'wrong'}, reward {retried.grade.reward:g}]" in text
    assert "teacher    [" in text
    show_answers(result, 0)
    assert capsys.readouterr().out == ""


def test_a_gain_gets_a_verdict() -> None:
    assert "there is something to distil" in verdict(0.3, 0.1, 32)
    assert "nothing to distil yet, or too few tasks" in verdict(0.0, 0.05, 32) and "+0.100" in verdict(0.0, 0.05, 32)
    assert "makes answers worse" in verdict(-0.3, 0.1, 32) and "One task" in verdict(0.3, math.nan, 1)
    assert verdict(1.0, 0.0, 2).startswith("2 tasks with a failed attempt say little")  # they agree by chance


def test_the_table_names_teacher_control_and_gain(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"samples": 3, "threshold": 0.6, "feedback": [Comment(objection)]}
    text = shown(capsys, evaluate_with(ScriptedEnv(judge), RecordingEngine(in_turn(WITH_CONTROL | TEACHER)), **options))
    assert "student 4 12 0.333 ± 0.236 0.500 ± 0.289 0.375" in text
    assert "teacher, with feedback 2 4 0.667 ± 0.333 1.000 ± 0.000 0.750" in text
    assert "control, without 2 4 0.333 ± 0.333 0.500 ± 0.500 0.458" in text
    assert "(teacher less control, by task): +0.333 ± 0.667" in text and "any right: share of the tasks" in text
    engine = RecordingEngine(in_turn(STUDENT | TEACHER))
    text = shown(capsys, evaluate_with(ScriptedEnv(judge), engine, control=False, **options))
    assert "teacher, with feedback 2 4" in text and "control" not in text and "gain from" not in text
    result = evaluate_with(ScriptedEnv(judge), RecordingEngine(in_turn(STUDENT)), samples=3, feedback=[])
    assert "the teacher has nothing to retry" in shown(capsys, result)
    result = evaluate_with(ScriptedEnv(judge), RecordingEngine(in_turn(STUDENT)), samples=3)
    assert "teacher" not in shown(capsys, result)
