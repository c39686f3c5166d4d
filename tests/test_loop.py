"""The loop, put together as ``vpd train`` does it, of fakes that keep what they were asked."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from fakes import (
    Comment,
    LetterTokenizer,
    OneStepAhead,
    RecordingEngine,
    ScriptedChat,
    ScriptedEnv,
    ScriptedRun,
    evaluate_with,
    scripted_run,
)

from vpd.feedback import SiblingDemonstration
from vpd.feedback.critique import SelfCritique
from vpd.types import Grade, Group, Rollout, Task


def answer(prompt: str, seed: int) -> str:
    """Right one time in three; a critic's answer quotes what it was asked."""
    if prompt.startswith("[user]say why"):
        return f"critique of {prompt[len('[user]say why ') : -len('[assistant]')]}"
    return f"{'right' if seed % 3 == 0 else 'wrong'} {seed}"


def judge(task: Task, text: str) -> Grade:
    return Grade(reward=float(text.startswith("right")))


def critique(rollout: Rollout) -> str | None:
    return None if rollout.success else f"say why {rollout.task.id} {rollout.completion.text}"


def run(**options: Any) -> ScriptedRun:
    return scripted_run(ScriptedEnv(judge), answer, **options).run()


def rows(groups: list[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def asked(made: ScriptedRun) -> list[tuple[str, int, str]]:
    return [(sample.prompt, sample.seed, sample.text) for sample in made.engine.samples]


def tasks_of(made: ScriptedRun) -> list[list[str]]:
    return [[group.rollouts[0].task.id for group in groups] for groups in made.algorithm.seen]


def test_everything_happens_in_its_order() -> None:
    made = run(max_steps=5, eval_steps=2, save_steps=2)
    step = ["generate", "step", "end_iteration"]
    assert made.log == [
        "load 0 0", "generate", "observe 0",
        *step, "load 1 1", "observe 1",
        *step, "load 2 2", "generate", "observe 2", "save 2",
        *step, "load 3 3", "observe 3",
        *step, "load 4 4", "generate", "observe 4", "save 4",
        *step, "load 5 5", "generate", "observe 5", "save 5",
    ]  # fmt: skip


def test_without_evaluation_and_checkpoints_there_are_none() -> None:
    made = run(max_steps=2, save_steps=0)
    assert [entry for entry in made.log if entry != "generate"] == [
        "load 0 0", "step", "end_iteration", "load 1 1", "observe 1", "step", "end_iteration", "load 2 2", "observe 2",
    ]  # fmt: skip
    assert not [name for _, metrics, _ in made.observer.seen for name in metrics if name.startswith("eval")]


def test_tasks_advance_step_by_step_and_none_is_skipped() -> None:
    made = run(tasks=3, max_steps=3, seed=7)
    assert tasks_of(made) == [[f"train{i}" for i in range(low, low + 3)] for low in (0, 3, 6)]
    assert made.env.seeds == {7}


def test_every_sample_of_a_run_has_a_seed_of_its_own() -> None:
    made = run(tasks=3, group=4, max_steps=4, feedback=[Comment(critique, ask=True), Comment(critique, ask=True)])
    seeds = [seed for _, seed, _ in asked(made)]
    assert len(seeds) > 4 * 12 + 20 and len(set(seeds)) == len(seeds)
    other = run(tasks=3, group=4, max_steps=4, feedback=[Comment(critique, ask=True)], seed=1)
    assert not set(seeds) & {seed for _, seed, _ in asked(other)}


def test_evaluation_has_seeds_of_its_own_and_the_same_at_every_step() -> None:
    made = run(max_steps=4, eval_steps=2, group=2, samples=2, feedback=[Comment(critique, ask=True)])
    held_out = [[(s.prompt, s.seed) for s in call] for call in made.engine.calls if "eval" in call[0].prompt]
    student, critic, teacher, control = held_out[:4]
    assert (
        held_out == [student, critic, teacher, control] * 3
    )  # at steps 0, 2 and 4: scripted weights do not change answers
    assert len(student) == 8 and len(teacher) == len(critic) == len(control)
    of_evaluation = {seed for call in held_out[:4] for _, seed in call}
    assert len(of_evaluation) == sum(map(len, held_out[:4]))
    training = [s.seed for call in made.engine.calls if "train" in call[0].prompt for s in call]
    assert len(training) > 24 and not of_evaluation & set(training)


def test_the_evaluation_in_a_run_is_the_one_that_the_same_seed_gives_alone() -> None:
    made = run(max_steps=1, eval_steps=1, seed=7, samples=3, feedback=[Comment(critique)])
    alone = RecordingEngine(answer)
    result = evaluate_with(ScriptedEnv(judge), alone, samples=3, seed=7, feedback=[Comment(critique)])
    assert asked(made)[: len(alone.samples)] == [(s.prompt, s.seed, s.text) for s in alone.samples]
    assert made.observer.seen[0][1]["eval_teacher/reward"] == result.teacher["reward"]


def test_evaluating_does_not_change_the_training() -> None:
    options: dict[str, Any] = {"max_steps": 3, "feedback": [Comment(critique, ask=True)]}
    plain, watched = run(**options), run(eval_steps=1, **options)
    assert asked(plain) == [sample for sample in asked(watched) if "train" in sample[0]]
    assert plain.algorithm.seen == watched.algorithm.seen


def test_each_step_samples_with_the_newest_weights_and_evaluation_with_the_updated_ones() -> None:
    made = run(max_steps=3, eval_steps=1)
    loaded = [(call[0].prompt[6:10], call[0].loaded) for call in made.engine.calls]
    assert loaded == [("eval", 0), ("trai", 0), ("eval", 1), ("trai", 1), ("eval", 2), ("trai", 2), ("eval", 3)]
    versions = [{r.completion.version for r in rows(groups)} for groups in made.algorithm.seen]
    assert versions == [{0}, {1}, {2}]


def test_observers_get_each_steps_own_groups_and_metrics_once() -> None:
    made = run(max_steps=3, eval_steps=2, group=3, samples=2, limit=3, feedback=[Comment(critique)])
    assert [step for step, _, _ in made.observer.seen] == [0, 1, 2, 3]
    assert made.observer.seen[0][2] == []
    for step, metrics, groups in made.observer.seen[1:]:
        assert groups == made.algorithm.seen[step - 1]  # with the feedback and the teacher's prompts
        assert any(r.teacher_prompt is not None for r in rows(groups))
        assert metrics["reward"] == pytest.approx(sum(r.grade.reward for r in rows(groups)) / 9)
        assert metrics["policy/loss"] == step
        assert metrics["learning_rate"] == pytest.approx(0.1 * (step - 1))  # the rate that this step was taken at
        assert all(metrics[f"time/{name}"] >= 0 for name in ("rollout", "feedback", "update"))
    evaluated = [step for step, metrics, _ in made.observer.seen if "eval/avg@2" in metrics]
    assert evaluated == [0, 2, 3]


def test_evaluation_is_reported_for_student_and_teacher() -> None:
    made = run(max_steps=1, eval_steps=1, samples=4, limit=3, feedback=[Comment(critique)])
    student, teacher, control = made.engine.calls[:3]
    right = [s.text.startswith("right") for s in student]
    assert {s.prompt for s in student} == {f"[user]eval{i}[assistant]" for i in range(3)} and len(student) == 12
    assert 0 < sum(right) < 12
    first = made.observer.seen[0][1]
    assert first["eval/accuracy"] == first["eval/avg@4"] == pytest.approx(sum(right) / 12)
    assert first["eval/answers"] == 12 and first["eval_teacher/answers"] == 12 - sum(right) == len(teacher)
    assert first["eval_teacher/accuracy"] == first["eval_teacher/avg@4"]
    by_task = [
        [s.text.startswith("right") for s in control if s.prompt == f"[user]eval{i}[assistant]"] for i in (0, 1, 2)
    ]
    again = [sum(task) / len(task) for task in by_task if task]
    assert first["eval_teacher/student_accuracy"] == pytest.approx(sum(again) / len(again))
    gain = first["eval_teacher/accuracy"] - first["eval_teacher/student_accuracy"]
    assert first["eval_teacher/gain"] == pytest.approx(gain) and first["eval_teacher/gain_se"] > 0


def test_the_control_may_be_left_out_of_a_run() -> None:
    made = run(max_steps=1, eval_steps=1, samples=4, limit=3, feedback=[Comment(critique)], eval_control=False)
    first = made.observer.seen[0][1]
    assert first["eval_teacher/answers"] > 0
    assert not {"eval_teacher/student_accuracy", "eval_teacher/gain", "eval_teacher/gain_se"} & set(first)


def test_the_threshold_holds_in_training_and_in_evaluation() -> None:
    half = ScriptedEnv(lambda task, text: Grade(reward=0.5))
    for threshold, expected in ((0.5, 1.0), (0.6, 0.0)):
        made = scripted_run(half, answer, threshold=threshold, eval_steps=1, max_steps=1).run()
        assert made.observer.seen[1][1]["success"] == made.observer.seen[1][1]["eval/accuracy"] == expected


def test_feedback_stays_with_the_attempt_that_it_is_about() -> None:
    made = run(max_steps=2, tasks=3, group=4, feedback=[Comment(critique), Comment(critique, ask=True)])
    seen = [rollout for groups in made.algorithm.seen for rollout in rows(groups)]
    assert {rollout.success for rollout in seen} == {True, False}
    for rollout in seen:
        about = f"{rollout.task.id} {rollout.completion.text}"
        expected = [] if rollout.success else [f"say why {about}", f"critique of {about}"]
        assert [section.text for section in rollout.context] == expected
        assert (rollout.teacher_prompt is None) == rollout.success
        if rollout.teacher_prompt is not None:
            read = LetterTokenizer().decode(rollout.teacher_prompt.tokens)
            assert read == f"[user]{rollout.task.id}<{expected[0]}\n\n{expected[1]}>[assistant]"


def test_a_critique_stays_with_the_attempt_that_it_is_about() -> None:
    made = run(max_steps=2, tasks=3, group=4, feedback=[SelfCritique(template="say why {task} {attempt}")])
    seen = [rollout for groups in made.algorithm.seen for rollout in rows(groups)]
    assert {rollout.success for rollout in seen} == {True, False}
    for rollout in seen:
        expected = [] if rollout.success else [f"critique of {rollout.task.id} {rollout.completion.text}"]
        assert [section.text for section in rollout.context] == expected
    for (_, metrics, _), groups in zip(made.observer.seen, made.algorithm.seen, strict=True):
        assert metrics["teacher/rows_with_context"] == sum(not rollout.success for rollout in rows(groups))
        written = sum(len(section.text) for rollout in rows(groups) for section in rollout.context)
        assert metrics["feedback/self_critique_tokens"] == written


def test_a_demonstration_is_a_success_of_the_same_group() -> None:
    made = run(max_steps=3, tasks=4, group=4, feedback=[SiblingDemonstration()])
    assert tasks_of(made) == tasks_of(run(max_steps=3, tasks=4, group=4))
    quoted = 0
    for groups in made.algorithm.seen:
        for group in groups:
            for index, rollout in enumerate(group.rollouts):
                for section in rollout.context:
                    assert section.quotes is not None and section.quotes != index
                    other = group.rollouts[section.quotes]
                    assert other.success and section.text == other.completion.text
                    quoted += 1
    assert quoted > 10


def test_the_rollout_settings_reach_the_engine() -> None:
    made = run(max_steps=1, eval_steps=1, feedback=[Comment(critique, ask=True)])
    critics = [s for s in made.engine.samples if "say why" in s.prompt and "<" not in s.prompt]
    answers = [s for s in made.engine.samples if s not in critics]
    assert {(s.max_tokens, s.temperature) for s in answers} == {(100, 0.9)}
    assert {(s.max_tokens, s.temperature) for s in critics} == {(50, 0.7)}


def told(made: ScriptedRun) -> list[tuple[int, dict[str, float], list[Group]]]:
    """What observers saw, without what the clock and the machine say."""
    return [
        (step, {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}, groups)
        for step, metrics, groups in made.observer.seen
    ]


def test_a_resumed_run_goes_on_as_if_nothing_had_happened() -> None:
    def make(steps: int) -> ScriptedRun:
        feedback = [Comment(critique, ask=True)]
        return scripted_run(
            ScriptedEnv(judge), answer, max_steps=steps, eval_steps=2, save_steps=2, tasks=3, feedback=feedback
        )

    whole = make(6).run()
    assert sorted(whole.saved) == [2, 4, 6]
    for step in (2, 4):
        rest = make(6).resume_from(whole, step).run()
        assert rest.log[0] == f"load {step} {step}"
        assert tasks_of(rest) == tasks_of(whole)[step:] and tasks_of(rest)[0][0] == f"train{3 * step}"
        assert told(rest) == [seen for seen in told(whole) if seen[0] > step]
        assert asked(rest) == asked(whole)[-len(asked(rest)) :]
        assert rest.algorithm.state() == whole.algorithm.state() == {"steps": 6}
        assert rest.saved == {at: text for at, text in whole.saved.items() if at > step}


def critic_seeds(judgement: Callable[[Task, str], Grade]) -> dict[str, int]:
    made = scripted_run(
        ScriptedEnv(judgement), answer, max_steps=1, feedback=[Comment(critique, ask=True)], group=2
    ).run()
    return {s.prompt: s.seed for s in made.engine.samples if "say why" in s.prompt}


def test_the_seed_of_a_critique_does_not_depend_on_which_other_attempts_failed() -> None:
    all_failed = critic_seeds(lambda task, text: Grade(reward=0.0))
    one_right = critic_seeds(lambda task, text: Grade(reward=float(task.id == "train0")))
    assert len(all_failed) == 6 and len(one_right) == 4
    assert one_right.items() <= all_failed.items()


def test_attempts_of_several_turns_reach_the_algorithm_whole() -> None:
    env = ScriptedChat(judge, lambda task, said: f"{task.id}?" if len(said) < 9 else None)
    made = scripted_run(env, answer, max_steps=2, eval_steps=2, group=3, turns=2).run()
    seen = [rollout for groups in made.algorithm.seen for rollout in rows(groups)]
    assert len(seen) == 18
    for rollout in seen:
        pairs = zip(rollout.completion.tokens, rollout.completion.sampled, strict=True)
        assert rollout.completion.turns == 2
        assert LetterTokenizer().decode([t for t, mine in pairs if not mine]) == f"[user]{rollout.task.id}?[assistant]"
    seeds = [seed for prompt, seed, _ in asked(made) if "train" in prompt]
    assert len(seeds) == 36 and len(set(seeds)) == 36
    assert made.observer.seen[1][1]["completions/mean_turns"] == 2.0
    assert len(asked(made)) == 36 + 2 * 2 * 8  # the evaluations, at steps 0 and 2, end after as many turns


def ahead(**options: Any) -> ScriptedRun:
    """A run whose source begins with a step's rollouts as soon as it is told of it."""
    made = scripted_run(ScriptedEnv(judge), answer, **options)
    made.loop.source = OneStepAhead(made.loop.source, made.log)
    return made


def calls_of_source(made: ScriptedRun) -> list[str]:
    return [entry for entry in made.log if entry.startswith(("start", "take")) or entry == "step"]


def test_a_source_is_told_of_each_step_once_before_it_is_trained_on_and_of_none_after_the_last() -> None:
    expected = ["start 0", "take 0", "start 1", "step", "take 1", "start 2", "step", "take 2", "step"]
    assert calls_of_source(ahead(max_steps=3).run()) == expected
    rest = ahead(max_steps=3)
    rest.loop.step = 2
    assert calls_of_source(rest.run()) == ["start 2", "take 2", "step"]
    done = ahead(max_steps=3)
    done.loop.step = 3
    assert calls_of_source(done.run()) == []


def test_staleness_is_how_many_updates_the_rollouts_are_behind() -> None:
    assert [metrics["rollout/staleness"] for _, metrics, _ in run(max_steps=3).observer.seen] == [0, 0, 0]
    late = ahead(max_steps=3).run()
    assert [metrics["rollout/staleness"] for _, metrics, _ in late.observer.seen] == [0, 1, 1]


def test_the_algorithm_trains_the_learner_of_the_run() -> None:
    made = run(max_steps=2)
    assert [learner.version for learner in made.algorithm.learners] == [2, 2]  # by way of the journal of its calls
    made.learner.iterations = 7
    assert [learner.version for learner in made.algorithm.learners] == [7, 7]


def test_times_are_seconds_of_this_step() -> None:
    started = time.perf_counter()
    made = run(max_steps=2, feedback=[Comment(critique, ask=True)])
    elapsed = time.perf_counter() - started
    spent = [
        metrics[f"time/{name}"] for _, metrics, _ in made.observer.seen for name in ("rollout", "feedback", "update")
    ]
    assert len(spent) == 6 and min(spent) > 0 and sum(spent) <= elapsed
