"""The source of rollouts: a pure function of (seed, step), and the same groups for any number of ranks."""

import dataclasses
import queue
from collections.abc import Sequence
from typing import Any

import pytest

from vpd.engines import ScriptedEngine
from vpd.engines.mixed_engine import MixedEngine
from vpd.envs import per_row
from vpd.errors import EnvError, VPDError
from vpd.evaluation import EvalSettings, evaluate
from vpd.feedback import GraderFeedback
from vpd.feedback.critique import SelfCritique
from vpd.lab import tiny
from vpd.prompts import Prompter
from vpd.ranks import OneProcess, Ranks, ThreadRanks, divide, share_of
from vpd.rollout import RolloutSettings, RolloutSource
from vpd.types import Grade, Task

SETTINGS = RolloutSettings(prompts_per_step=5, num_generations=3, max_completion_length=6)


class Counting:
    """Task n asks for n; an answer with an even seed is right.  Grading ``fails_on`` raises."""

    def __init__(self, fails_on: int | None = None):
        self.fails_on = fails_on
        self.graded = 0

    def task(self, index: int, *, seed: int) -> Task:
        return Task(id=f"{seed}/{index}", messages=({"role": "user", "content": f"apply rule A to {index % 10}"},))

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return [self.task(1000 + place, seed=0) for place in range(7)][:limit]

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        self.graded += 1
        if self.fails_on is not None and task.id.endswith(f"/{self.fails_on}"):
            raise KeyError("broken")
        right = int(text) % 2 == 0
        return Grade(reward=float(right), feedback=None if right else f"not {text}")


def source(ranks: Ranks | None = None, env: Any = None, settings: RolloutSettings = SETTINGS) -> RolloutSource:
    tokenizer = tiny.make_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda prompt, key: str(key.seed(7) % 10))
    return RolloutSource(
        env=env or Counting(),
        engine=engine,
        prompter=Prompter(tokenizer, tiny.TEMPLATE, window=96, max_completion_length=6),
        feedback=[GraderFeedback()],
        settings=settings,
        seed=7,
        ranks=ranks or OneProcess(),
    )


def test_the_groups_of_a_step_follow_from_seed_and_step_alone() -> None:
    one = source()
    first, second = one.take(0)[0], one.take(1)[0]
    assert [g.rollouts[0].task.id for g in first + second] == [f"7/{n}" for n in range(10)]
    assert source().take(1)[0] == second  # whoever resumes at step 1 gets what the uninterrupted run got
    keys = [r.key for group in first + second for r in group.rollouts]
    assert len(set(keys)) == len({key.seed(7) for key in keys}) == 30
    assert {(key.phase, key.turn) for key in keys} == {("train", 0)}
    assert [(key.step, key.task, key.sample) for key in keys[14:17]] == [(0, 4, 2), (1, 5, 0), (1, 5, 1)]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_makes_the_same_groups_and_shares_the_work(world: int) -> None:
    alone = source().take(2)[0]
    envs = [Counting() for _ in range(world)]
    made = ThreadRanks.run(world, lambda ranks: source(ranks, envs[ranks.rank]).take(2)[0])
    assert all(groups == alone for groups in made)
    assert sum(env.graded for env in envs) == 15 and max(env.graded for env in envs) <= 3 * -(-5 // world)


def test_any_number_of_ranks_evaluates_to_the_same_numbers() -> None:
    def measured(ranks: Ranks) -> Any:
        one = source(ranks)
        settings = EvalSettings(sampling=SETTINGS.sampling, num_samples=3)
        return evaluate(one, one.env.eval_tasks(None), settings)

    alone = measured(OneProcess())
    assert alone.teacher["tasks"] > 0
    for result in ThreadRanks.run(2, measured):
        assert (result.student, result.teacher) == (alone.student, alone.teacher)
        assert [r.key for r in result.retries] == [r.key for r in alone.retries]


def test_a_failure_on_one_rank_ends_all_ranks() -> None:
    results = ThreadRanks.run(2, lambda ranks: source(ranks, Counting(fails_on=4)).take(0))
    assert isinstance(results[1], EnvError) and "KeyError" in str(results[1])  # task 4 is rank 1's
    assert isinstance(results[0], VPDError) and "rank 1 failed" in str(results[0]) and "KeyError" in str(results[0])


@pytest.mark.parametrize(("world", "count"), [(1, 5), (2, 5), (3, 2), (4, 0), (3, 9)])
def test_shares_are_contiguous_and_whole(world: int, count: int) -> None:
    shares = [list(share_of(rank, world, count)) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_divide_keeps_the_order_and_calls_no_one_without_work() -> None:
    called: list[int] = []

    def program(ranks: Ranks) -> list[int]:
        def work(share: Sequence[int]) -> list[int]:
            called.append(ranks.rank)
            return [item * 10 for item in share]

        return divide(ranks, [1, 2], work)

    assert ThreadRanks.run(3, program) == [[10, 20]] * 3 and len(called) == 2
    assert divide(OneProcess(), [], lambda share: list(share)) == []


def test_what_the_feedback_says_reaches_the_teachers_prompt() -> None:
    groups, seconds = source().take(0)
    assert set(seconds) == {"rows/drawn", "time/rollout", "time/feedback"}
    for rollout in (r for group in groups for r in group.rollouts):
        assert (rollout.teacher_prompt is None) == rollout.success
        assert rollout.success == (int(rollout.completion.text) % 2 == 0)


def test_a_rank_that_does_not_come_is_not_waited_for_without_end() -> None:
    missing, left_alone = ThreadRanks.run(
        2, lambda ranks: ranks.all_gather("here") if ranks.rank else "away", timeout=0.05
    )
    assert missing == "away" and isinstance(left_alone, queue.Empty)


def test_a_rank_without_tasks_spends_no_time_on_rollouts() -> None:
    seconds = ThreadRanks.run(8, lambda ranks: source(ranks).take(0)[1])
    busy = [bool(share_of(rank, 8, 5)) for rank in range(8)]
    assert [found["time/rollout"] > 0 for found in seconds] == busy
    assert [found["time/feedback"] > 0 for found in seconds] == busy


class Chat(Counting):
    """The same, and every attempt has two turns."""

    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Any]]) -> list[str | None]:
        return ["5" if len(conversation) == 2 else None for conversation in conversations]


def test_a_mixture_with_a_teacher_answers_training_tasks_and_nothing_else() -> None:
    tokenizer = tiny.make_tokenizer()
    student, teacher = (ScriptedEngine(tokenizer, lambda prompt, key, text=text: text) for text in ("1", "2"))
    mixed = dataclasses.replace(
        source(env=Chat()),
        engine=student,
        training_engine=MixedEngine(student, teacher, first_fraction=0.5),
        feedback=[SelfCritique(template="{task} {attempt}", max_critique_length=4)],
    )
    groups, _ = mixed.take(0)
    said = [{rollout.completion.text for rollout in group.rollouts} for group in groups]
    assert {"1"} in said and {"2"} in said and len(said) == 5
    assert {rollout.completion.turns for group in groups for rollout in group.rollouts} == {2}
    by_attempt: dict[tuple[int, int], set[str]] = {}
    for name, engine in (("student", student), ("teacher", teacher)):
        for _, key in engine.asked:
            if key.phase == "train":
                by_attempt.setdefault((key.task, key.sample), set()).add(name)
    assert len(by_attempt) == 15 and all(len(names) == 1 for names in by_attempt.values())
    assert {key.phase for _, key in teacher.asked} == {"train"}
    assert "train/feedback-0" in {key.phase for _, key in student.asked}  # the student is its own critic
    before = len(teacher.asked)
    result = evaluate(mixed, mixed.env.eval_tasks(None), EvalSettings(sampling=SETTINGS.sampling, num_samples=2))
    assert result.student["avg@2"] == 0.0 and result.teacher["tasks"] > 0 and len(teacher.asked) == before
    assert {"eval", "eval_retry", "eval_control", "eval/feedback-0"} <= {key.phase for _, key in student.asked}
