"""Every row ever drawn is accounted for, and a row holds the tokens that were sampled, and finite numbers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEnv, scripted_run
from helpers import ALGORITHMS, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.examples import choose_rows, to_examples, with_loss_weights
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.errors import EnvError, NonFiniteError, TrainingError
from vpd.learners import Update
from vpd.learners.journal import Journal
from vpd.types import Example, Grade, Group, Rollout


def changed(groups: Sequence[Group], row: int, change: Callable[[Rollout], Rollout]) -> list[Group]:
    """The groups with one rollout changed."""
    rows = iter(range(100))
    return [Group(rollouts=tuple(change(r) if next(rows) == row else r for r in g.rollouts)) for g in groups]


def without_context(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, context=(), teacher_prompt=None)


def not_graded(rollout: Rollout) -> Rollout:
    grade = Grade(reward=0.0, success=False, informative=False, metrics={"grader_failed": 1.0})
    return dataclasses.replace(without_context(rollout), grade=grade)


def step(algorithm: Any, groups: Sequence[Group], learner: Any = None) -> dict[str, float]:
    journal = Journal(learner or tiny_learner(tiny_model()), groups)
    algorithm.step(groups, journal)
    return journal.account(sum(len(group.rollouts) for group in groups))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_rows_of_every_method_add_up_and_none_is_unexplained(name: str) -> None:
    make, teacher = ALGORITHMS[name]
    external = {"external": tiny_model(1)} if teacher.kind == "external" else {}
    learner, algorithm = tiny_learner(tiny_model(), teacher=teacher, **external), make()
    for seed in range(3):  # with and without an E-step
        counts = step(algorithm, random_groups(seed), learner)
        drawn = counts.pop("rows/drawn")
        assert drawn == 12 == sum(counts.values()) and counts["rows/trained"] > 0
        assert not {"rows/unused", "rows/no_weight"} & set(counts)


def test_a_method_that_reads_feedback_says_which_rows_have_none() -> None:
    groups = changed(random_groups(0), 5, not_graded)
    bare = [r for group in groups for r in group.rollouts if r.teacher_prompt is None]
    counts = step(Distill(SDPOSettings()), groups)
    assert counts == {
        "rows/drawn": 12.0,
        "rows/trained": 12.0 - len(bare),
        "rows/failed_grade": 1.0,
        "rows/no_context": len(bare) - 1.0,
    }


def test_a_method_that_reads_rewards_says_which_rows_have_no_advantage() -> None:
    def equal(rollout: Rollout) -> Rollout:
        return dataclasses.replace(rollout, grade=Grade(reward=1.0, success=True))

    groups = random_groups(0)
    groups[1] = Group(rollouts=tuple(map(equal, groups[1].rollouts)))
    groups[2] = Group(rollouts=groups[2].rollouts[:1])
    assert step(GRPO(GRPOSettings()), groups) == {
        "rows/drawn": 9.0, "rows/trained": 4.0, "rows/no_group": 1.0, "rows/zero_advantage": 4.0,
    }  # fmt: skip
    with_context = [r.teacher_prompt is not None for group in groups[1:] for r in group.rollouts]
    for either in (GatedVPD(GatedSettings(e_every=None), None), Hybrid(HybridSettings(form="reshape"))):  # type: ignore[arg-type]
        assert step(either, groups)["rows/trained"] == 4.0 + sum(with_context)


def test_a_row_without_a_sampled_token_is_named() -> None:
    def silent(rollout: Rollout) -> Rollout:
        said = dataclasses.replace(rollout.completion, tokens=(), sampled=(), logprobs=())
        return dataclasses.replace(rollout, completion=said)

    assert step(Distill(SDPOSettings()), changed(random_groups(0), 1, silent))["rows/no_tokens"] == 1.0


class Own:
    """A user's method: gives some rows no weight, and leaves others out, without a word."""

    def step(self, groups: Sequence[Group], learner: Any) -> Update:
        examples = with_loss_weights(to_examples(groups)[2:], nll=[0.0, *[1.0] * 9])
        return learner.update("own", examples, {"nll": lambda scorer, batch: -scorer.logprobs("student")})


def test_a_method_of_the_users_that_says_nothing_is_counted_too() -> None:
    counts = step(Own(), random_groups(0))
    assert counts == {"rows/drawn": 12.0, "rows/trained": 9.0, "rows/no_weight": 1.0, "rows/unused": 2.0}


def test_a_feedback_source_that_loses_a_row_is_an_error() -> None:
    def forgetful(groups: list[Group], writer: Any) -> list[Group]:
        return [Group(rollouts=group.rollouts[1:]) for group in groups]

    env = ScriptedEnv(lambda task, text: Grade(reward=0.0))
    with pytest.raises(TrainingError, match=r"rows were lost.*got 3 rows.*expected 6"):
        scripted_run(env, lambda prompt, seed: "a", feedback=[forgetful]).run()


def test_rows_of_other_rollouts_than_the_drawn_ones_count_for_none() -> None:
    groups, others = random_groups(0), random_groups(1)
    journal = Journal(tiny_learner(tiny_model()), groups)
    rows = with_loss_weights(to_examples([*groups[1:], *others]), a=[1.0] * 20)
    journal.update("a", rows, {"a": objective})
    assert journal.account(12) == {"rows/drawn": 12.0, "rows/trained": 8.0, "rows/unused": 4.0}


@pytest.mark.parametrize("algorithm", ["vpd", "gated", "sdpo", "grpo", "hybrid"])
def test_a_run_reports_them_at_every_step(algorithm: str, tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "out", algorithm__name=algorithm, run__max_steps=2) == 0
    for line in metrics_of(tmp_path / "out"):
        rows = {name: value for name, value in line.items() if name.startswith("rows/")}
        assert rows.pop("rows/drawn") == 16 == sum(rows.values())


def example(**changes: Any) -> list[Example]:
    [first, *others] = choose_rows(to_examples(random_groups(0)), context=True)
    return with_loss_weights([dataclasses.replace(first, **changes), *others], a=[1.0] * 12)


def objective(scorer: Any, batch: Any) -> Any:
    return -scorer.logprobs("student")


def test_the_scored_tokens_are_the_sampled_ones() -> None:
    groups = random_groups(0)
    sampled = groups[0].rollouts[0].completion
    tokens = (*sampled.tokens[:-1], (sampled.tokens[-1] + 1) % 7)
    for call in ("score", "update"):
        journal = Journal(tiny_learner(tiny_model()), groups)
        with pytest.raises(TrainingError, match="the row of task 0, sample 0 holds other tokens"):
            if call == "score":
                journal.score(example(completion=tokens), objective)
            else:
                journal.update("a", example(completion=tokens), {"a": objective})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sampler's log-prob", {"behaviour": (math.nan, -1.0, -1.0, -1.0, -1.0)}),
        ("reference log-prob", {"reference": (-math.inf, -1.0, -1.0, -1.0, -1.0)}),
        ("advantage", {"advantage": math.inf}),
    ],
)
def test_a_number_of_a_row_that_is_not_finite_stops_before_the_step(name: str, changes: dict[str, Any]) -> None:
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match=rf"the {name} of the row of task 0, .* finite.*No step was taken"):
        Journal(tiny_learner(model), random_groups(0)).update("a", example(**changes), {"a": objective})
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_score_that_is_not_a_number_stops() -> None:
    with pytest.raises(NonFiniteError, match="a log-prob of the row of task 0, sample 0 under the live weights"):
        Journal(tiny_learner(tiny_model()), random_groups(0)).score(
            example(), lambda scorer, batch: scorer.logprobs("student") * math.nan
        )


@pytest.mark.parametrize("reward", [1e308, -1e308, 1e31])
def test_a_reward_that_no_advantage_can_be_made_of_is_an_error_of_the_grader(reward: float) -> None:
    with pytest.raises(EnvError, match="too large to compute with"):
        Grade(reward=reward)
    rewards = [1e30, -1e30, 0.0, 1e30]
    graded = iter(rewards * 3)
    groups = [
        Group(
            rollouts=tuple(dataclasses.replace(r, grade=Grade(reward=next(graded), success=False)) for r in g.rollouts)
        )
        for g in random_groups(0)
    ]
    for scale in ("group", "batch", "none"):
        assert step(GRPO(GRPOSettings(scale_rewards=scale)), groups)["rows/trained"] == 12.0  # type: ignore[arg-type]
