"""What an update does with objectives: several terms, measured losses, per-token signals, one rule for adding up."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, flat, random_groups, tiny_learner, tiny_model
from torch import Tensor
from torch.nn.functional import logsigmoid

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.e_step import BCO, EStep, ShiftedBCO
from vpd.algorithms.examples import student_logprobs, teacher_logprobs, to_examples, with_loss_weights
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.algorithms.vpd import VPDSettings
from vpd.learners import Learner, Loss, TokenLoss, Update, combine
from vpd.learners.teachers import TeacherSettings
from vpd.model.batch import Batch
from vpd.model.scorer import Scorer
from vpd.types import Example, Group, Rollout


def likelihood(scorer: Scorer, batch: Batch) -> Tensor:
    """-log pi of each token [B,T]."""
    return -scorer.logprobs("student")


def likelihood_of_rows(scorer: Scorer, batch: Batch) -> Tensor:
    """-log pi of each row [B]."""
    return -scorer.logprobs("student").sum(-1)


def weights(count: int) -> list[float]:
    return [0.1 * (row % 4) for row in range(count)]


def trained(objective: Any, examples: Sequence[Example], **changes: Any) -> Tensor:
    learner = tiny_learner(tiny_model(), **changes)
    learner.update("x", examples, {"a": objective})
    return flat(learner.model)


def same(left: Tensor, right: Tensor) -> bool:
    moved = (right - flat(tiny_model())).norm()
    return bool(moved > 1e-3 and (left - right).norm() < 1e-10 * moved)


def test_a_loss_of_rows_is_the_sum_of_its_tokens() -> None:
    made = to_examples(random_groups(0))
    rows = with_loss_weights(made, a=weights(len(made)))
    assert same(trained(likelihood_of_rows, rows), trained(likelihood, rows))


def test_terms_add_up_with_their_own_weights_for_any_micro_batch_size() -> None:
    made = to_examples(random_groups(0))
    a, b = weights(len(made)), [0.3 * (row % 3 == 0) for row in range(len(made))]
    both = with_loss_weights(made, a=a, b=b)
    together = with_loss_weights(made, a=[x + 2 * y for x, y in zip(a, b, strict=True)])
    expected = trained(likelihood, together)
    for size in (1, 3, 100):
        learner = tiny_learner(tiny_model(), micro_batch_size=size)
        update = learner.update("x", both, {"a": likelihood, "b": lambda s, batch: 2 * likelihood(s, batch)})
        assert same(flat(learner.model), expected)
        assert update.metrics["x/loss"] == pytest.approx(update.metrics["x/a_loss"] + update.metrics["x/b_loss"])
        assert update.metrics["x/rows"] == sum(bool(x or y) for x, y in zip(a, b, strict=True))


def test_an_objective_meets_only_rows_that_have_weight_in_its_term() -> None:
    made = to_examples(random_groups(0))
    a, b = weights(len(made)), [0.3 * (row % 3 == 0) for row in range(len(made))]
    seen: dict[str, list[tuple[int, ...]]] = {"a": [], "b": []}

    def recording(term: str) -> Loss:
        def loss(scorer: Scorer, batch: Batch) -> Tensor:
            seen[term] += [example.completion for example in batch.examples]
            return likelihood(scorer, batch)

        return loss

    tiny_learner(tiny_model()).update("x", with_loss_weights(made, a=a, b=b), {t: recording(t) for t in seen})
    for term, values in (("a", a), ("b", b)):
        assert sorted(seen[term]) == sorted(e.completion for e, w in zip(made, values, strict=True) if w)


class Pairs:
    """A pairwise preference loss: each success against each failure of its group, -log sigma(margin)."""

    def measure(self, scorer: Scorer, batch: Batch) -> Tensor:
        return scorer.logprobs("student").sum(-1)

    def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
        slope = {id(example): 0.0 for example in examples}
        rows = list(zip(values, examples, strict=True))
        for up, winner in rows:
            for down, loser in rows:
                if winner.success and not loser.success and winner.group == loser.group:
                    share = 1.0 / (1.0 + math.exp(up - down))
                    slope[id(winner)] -= share
                    slope[id(loser)] += share
        by_row = {(e.group, e.completion): slope[id(e)] for e in examples}

        def loss(scorer: Scorer, batch: Batch) -> Tensor:
            coefficients = [by_row[e.group, e.completion] for e in batch.examples]
            return torch.tensor(coefficients, dtype=torch.float64) * scorer.logprobs("student").sum(-1)

        return loss


def test_a_pairwise_loss_is_exact_for_any_micro_batch_size() -> None:
    """A method in one test file: the pair's margin becomes each row's coefficient, known before any loss is formed."""
    made = to_examples(random_groups(0))
    model = tiny_model()
    total = torch.zeros((), dtype=torch.float64)
    scores = [
        torch.log_softmax(model(torch.tensor([e.prompt + e.completion])).logits[0], -1)[len(e.prompt) - 1 : -1]
        .gather(1, torch.tensor(e.completion)[:, None])
        .sum()
        for e in made
    ]
    for winner, up in zip(made, scores, strict=True):
        for loser, down in zip(made, scores, strict=True):
            if winner.success and not loser.success and winner.group == loser.group:
                total = total - logsigmoid(up - down)
    total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.3 * parameter.grad
    rows = with_loss_weights(made, a=[1.0] * len(made))
    for size in (1, 3, 100):
        assert same(trained(Pairs(), rows, micro_batch_size=size), flat(model))


@pytest.mark.parametrize("size", [1, 100])
def test_a_measured_loss_is_given_the_values_of_its_rows_in_order(size: int) -> None:
    made = to_examples(random_groups(0))
    given: list[tuple[list[float], list[Example]]] = []

    class Recording(Pairs):
        def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
            given.append((list(values), list(examples)))
            return likelihood

    rows = with_loss_weights(made, a=weights(len(made)))
    learner = tiny_learner(tiny_model(), micro_batch_size=size)
    expected = [sum(score) for score in learner.score(made, student_logprobs)]
    update = learner.update("x", rows, {"a": Recording()})
    [(values, examples)] = given
    chosen = [row for row, example in enumerate(rows) if example.loss_weights["a"]]
    assert examples == [rows[row] for row in chosen]
    assert values == pytest.approx([expected[row] for row in chosen], abs=1e-12)
    assert [value is not None for value in update.values["a"]] == [row in chosen for row in range(len(made))]
    assert [value for value in update.values["a"] if value is not None] == values


def test_signals_are_means_over_tokens_and_come_back_token_by_token() -> None:
    made = to_examples(random_groups(0))
    masked = [dataclasses.replace(e, mask=(*e.mask[:-1], len(e.mask) == 1)) for e in made]
    rows = with_loss_weights(masked, a=weights(len(made)))
    learner = tiny_learner(tiny_model(), micro_batch_size=2)
    expected = learner.score(masked, student_logprobs)

    def loss(scorer: Scorer, batch: Batch) -> TokenLoss:
        return TokenLoss(likelihood(scorer, batch), signals={"logp": scorer.logprobs("student").detach()})

    update = learner.update("x", rows, {"a": loss})
    entering = [row for row, example in enumerate(rows) if example.loss_weights["a"]]
    tokens = sum(sum(masked[row].mask) for row in entering)
    assert update.metrics["x/logp"] == pytest.approx(sum(sum(expected[row]) for row in entering) / tokens)
    kept = update.tokens["x/logp"]
    assert [row for row, signal in enumerate(kept) if signal is not None] == entering
    for row in entering:
        signal = kept[row]
        assert signal is not None and signal.tolist() == pytest.approx(expected[row], abs=1e-12)


def test_updates_of_one_name_add_up_by_one_rule() -> None:
    one = Update({"x/rows": 2.0, "x/tokens": 10.0, "x/updates": 1.0, "x/loss": 1.0, "y/only": 5.0})
    two = Update({"x/rows": 4.0, "x/tokens": 30.0, "x/updates": 1.0, "x/loss": 3.0, "x/more": 7.0})
    nothing = Update({"x/rows": 0.0, "x/tokens": 0.0, "x/updates": 0.0})
    assert combine([one, nothing, two]).metrics == {
        "x/rows": 6.0, "x/tokens": 40.0, "x/updates": 2.0, "x/loss": 2.5, "x/more": 7.0, "y/only": 5.0,
    }  # fmt: skip
    uncounted = Update({"x/loss": 1.0}), Update({"x/tokens": 3.0, "x/loss": 5.0})
    assert combine(uncounted).metrics == {"x/tokens": 3.0, "x/loss": 4.0}  # without tokens it counts as one
    assert combine([Update({"x/tokens": 0.0, "x/loss": 7.0})]).metrics == {"x/tokens": 0.0, "x/loss": 7.0}
    first, second = torch.ones(1), torch.zeros(2)
    joined = combine([Update({}, tokens={"x/a": [first, None]}), Update({}, tokens={"x/a": [second]})])
    assert list(joined.tokens["x/a"]) == [first, None, second]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_several_updates_an_iteration_report_all_rows(parts: int) -> None:
    groups = random_groups(0)
    with_context = sum(r.teacher_prompt is not None for group in groups for r in group.rollouts)
    learner = tiny_learner(tiny_model())
    update = Distill(SDPOSettings(updates_per_batch=parts)).step(groups, learner)
    assert update.metrics["m_step/rows"] == with_context and update.metrics["m_step/updates"] == parts
    assert len(update.tokens["m_step/divergence"]) == sum(len(group.rollouts) for group in groups)


def with_behaviour(groups: list[Group], learner: Learner, offset: float) -> list[Group]:
    """The groups as if sampled by other weights: the sampler's log-probs are the learner's plus ``offset``."""
    scores = iter(learner.score(to_examples(groups), student_logprobs))
    return [
        Group(
            rollouts=tuple(
                dataclasses.replace(
                    r, completion=dataclasses.replace(r.completion, logprobs=tuple(s + offset for s in next(scores)))
                )
                for r in group.rollouts
            )
        )
        for group in groups
    ]


@pytest.mark.parametrize(("reference", "ratio"), [("own", 1.0), ("sampler", 1.25)])
def test_the_ratio_is_taken_against_the_named_reference(reference: Any, ratio: float) -> None:
    """A stale or imprecise sampler: ignored with "own", corrected with "sampler"."""
    learner = tiny_learner(tiny_model())
    offset = -torch.tensor(1.25, dtype=torch.float64).log().item()
    groups = with_behaviour(random_groups(0), learner, offset)
    update = Distill(SDPOSettings(importance_reference=reference)).step(groups, learner)
    assert update.metrics["m_step/importance_ratio"] == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize(
    "method",
    [GRPO(GRPOSettings(importance_reference="sampler")), Hybrid(HybridSettings(importance_reference="sampler"))],
)
def test_a_policy_gradient_reports_the_ratio_to_the_sampler(method: Any) -> None:
    learner = tiny_learner(tiny_model())
    groups = with_behaviour(random_groups(0), learner, -torch.tensor(1.25, dtype=torch.float64).log().item())
    assert method.step(groups, learner).metrics["policy/importance_ratio"] == pytest.approx(1.25, abs=1e-9)


def test_the_correction_is_truncated() -> None:
    learner = tiny_learner(tiny_model())
    groups = with_behaviour(random_groups(0), learner, -3.0)
    update = Distill(SDPOSettings(importance_reference="sampler")).step(groups, learner)
    assert update.metrics["m_step/importance_ratio"] == 2.0


def test_a_learner_hands_out_a_policy_and_not_its_modules() -> None:
    model = tiny_model()
    learner = tiny_learner(model)
    policy = learner.policy()
    assert policy.version == 0 and policy.call(lambda found, extra: (found is model, extra), 3) == (True, 3)
    for name, tensor in policy.tensors():
        assert torch.equal(tensor, model.state_dict()[name])
    learner.end_iteration()
    assert policy.version == learner.policy().version == 1
    teacher = learner.policy("teacher")
    assert teacher.call(lambda found: found) is learner.teacher.mixture("teacher")[0][0]


def test_a_teacher_that_is_no_model_of_its_own_has_no_policy() -> None:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind="trust_region"))
    with pytest.raises(ValueError, match="no model of their own"):
        learner.policy("teacher")


def test_copies_of_the_weights_belong_to_the_learners_root() -> None:
    """So that they are moved and sharded with it."""
    learner = tiny_learner(tiny_model(), keep_initial=True)
    copies = learner._root.copies
    assert set(copies) == {"average", "initial"}
    made = to_examples(random_groups(0))
    assert learner.score(made[:1], student_logprobs, model="initial") == learner.score(made[:1], student_logprobs)
    assert learner.score(made[:1], teacher_logprobs, model="teacher") == learner.score(made[:1], teacher_logprobs)


def test_an_update_without_a_row_that_has_weight_reports_zeros_and_changes_nothing() -> None:
    learner = tiny_learner(tiny_model())
    rows = with_loss_weights(to_examples(random_groups(0)), a=[0.0] * 12)
    update = learner.update("x", rows, {"a": likelihood})
    assert update.metrics == {"x/rows": 0.0, "x/tokens": 0.0, "x/updates": 0.0}
    assert torch.equal(flat(learner.model), flat(tiny_model()))


class RecordingUpdates:
    """A learner that keeps the objectives and options of every update."""

    def __init__(self) -> None:
        self.learner: Any = tiny_learner(tiny_model())
        self.objectives: list[Any] = []
        self.options: list[dict[str, Any]] = []

    @property
    def logprob_tolerance(self) -> float:
        return float(self.learner.logprob_tolerance)

    @property
    def version(self) -> int:
        return int(self.learner.version)

    def score(self, *arguments: Any, **options: Any) -> Any:
        return self.learner.score(*arguments, **options)

    def update(self, name: str, examples: Sequence[Example], objectives: Any, **options: Any) -> Update:
        self.objectives += objectives.values()
        self.options.append(options)
        return self.learner.update(name, examples, objectives, **options)


def e_step(**settings: Any) -> EStep:
    prompter: Any = TokenPrompter()
    return EStep(VPDSettings(**settings), prompter)


def test_every_epoch_of_an_e_step_has_the_shift_of_its_first_which_moves_by_its_momentum() -> None:
    step, shifts = e_step(e_epochs=3, e_lr_scale=0.5, shift_momentum=0.75), [0.0]
    for seed in (0, 1):
        learner: Any = RecordingUpdates()
        groups = random_groups(seed)
        _, update = step.run(groups, to_examples(groups), learner)
        met = update.metrics
        midpoint = (met["e_step/implicit_reward_success"] + met["e_step/implicit_reward_failure"]) / 2
        shifts.append(midpoint if seed == 0 else 0.75 * shifts[1] + 0.25 * midpoint)
        assert step.state() == {"iteration": seed + 1, "shift": pytest.approx(shifts[-1], rel=1e-12)}
        assert met["e_step/shift"] == step.state()["shift"] and met["e_step/updates"] == 3
        first, *more = learner.objectives
        assert first == BCO(step.settings, shifts[1] if seed else None)
        assert more == [ShiftedBCO(step.settings, step.state()["shift"])] * 2
        assert learner.options == [{"train": "teacher", "lr_scale": 0.5}] * 3


def test_the_shift_of_the_first_epochs_loss_is_the_one_that_is_kept() -> None:
    rows = to_examples(random_groups(0))
    values = [0.1 * row for row in range(len(rows))]
    right = [v for v, e in zip(values, rows, strict=True) if e.success]
    wrong = [v for v, e in zip(values, rows, strict=True) if not e.success]
    midpoint = (sum(right) / len(right) + sum(wrong) / len(wrong)) / 2
    settings = VPDSettings(shift_momentum=0.75)
    for previous, shift in ((None, midpoint), (2.0, 1.5 + 0.25 * midpoint)):
        prepared: Any = BCO(settings, previous).prepare(values, rows)
        assert prepared.shift == pytest.approx(shift, rel=1e-12) and prepared.settings is settings


def test_e_steps_are_due_every_so_many_iterations_whether_they_ran_or_were_skipped() -> None:
    step, due = e_step(e_every=3), []
    learner, groups = tiny_learner(tiny_model()), random_groups(0)
    for iteration in range(8):
        if step.is_due():
            due.append(iteration)
            step.run(groups, to_examples(groups), learner)
        else:
            assert step.skip().metrics == {"e_step/rows": 0.0}
    assert due == [0, 3, 6] and step.state()["iteration"] == 8
    resumed = e_step(e_every=3)
    resumed.restore(step.state())
    assert resumed.state() == step.state() and not resumed.is_due()


def test_an_e_step_without_a_row_to_train_on_says_so_and_keeps_the_shift() -> None:
    step = e_step(e_every=1)
    groups = [
        Group(rollouts=tuple(dataclasses.replace(r, context=(), teacher_prompt=None) for r in group.rollouts))
        for group in random_groups(0)
    ]
    learner: Any = RecordingUpdates()
    _, update = step.run(groups, to_examples(groups), learner)
    assert (update.metrics["e_step/rows"], update.metrics["e_step/skipped"]) == (0.0, 1.0)
    assert learner.objectives == [] and step.state() == {"iteration": 1, "shift": None}


def test_a_row_without_a_token_has_no_part_in_an_e_step() -> None:
    """Beside it the same step is taken, with the same shift, as without it."""

    def emptied(rollout: Rollout) -> Rollout:
        nothing = dataclasses.replace(rollout.completion, tokens=(), sampled=(), logprobs=())
        return dataclasses.replace(rollout, completion=nothing)

    def ran(groups: list[Group]) -> tuple[Update, torch.Tensor]:
        learner = tiny_learner(tiny_model())
        return e_step().run(groups, to_examples(groups), learner)[1], flat(learner.model)

    groups = random_groups(0)
    failed = next(r for r in groups[0].rollouts if not r.success and r.teacher_prompt)
    with_empty, moved = ran([Group(rollouts=(*groups[0].rollouts, emptied(failed))), *groups[1:]])
    alone, expected = ran(groups)
    for name in ("rows", "rows_failure", "shift", "loss", "accuracy"):
        assert with_empty.metrics[f"e_step/{name}"] == pytest.approx(alone.metrics[f"e_step/{name}"], rel=1e-9)
    assert (moved - expected).norm() < 1e-9 * (expected - flat(tiny_model())).norm()


def test_the_implicit_reward_is_a_sum_over_tokens_or_their_mean_as_set() -> None:
    made = [dataclasses.replace(e, reference=e.behaviour) for e in to_examples(random_groups(0))]
    rows = with_loss_weights(made, bco=[float(e.teacher is not None) for e in made])

    def rewards(log_ratio: Any) -> Sequence[float | None]:
        objective = BCO(VPDSettings(log_ratio=log_ratio), None)
        update = tiny_learner(tiny_model()).update("e_step", rows, {"bco": objective}, train="teacher")
        return update.values["bco"]

    for row, total, mean in zip(rows, rewards("sum"), rewards("mean"), strict=True):
        assert (total is None) == (mean is None) == (row.teacher is None)
        if total is not None and mean is not None:
            assert total == pytest.approx(mean * sum(row.mask), rel=1e-9) and total != 0


def test_rows_that_are_distilled_but_not_in_the_e_step_have_their_reference_from_before_it() -> None:
    groups = random_groups(0)
    rows = to_examples(groups)
    only_distilled = [row for row, e in enumerate(rows) if e.success and e.teacher is not None]
    learner: Any = tiny_learner(tiny_model())
    before = learner.score(rows, student_logprobs)
    made, _ = e_step(success_context="drop").run(groups, rows, learner)
    assert only_distilled
    for row in only_distilled:
        assert made[row].reference == pytest.approx(before[row], abs=1e-12)
