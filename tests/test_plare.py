"""PLARE: the loss of pairs by hand and against an independent form, and what takes part in it."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from helpers import flat, random_groups, tiny_learner, tiny_model

from vpd import losses
from vpd.algorithms.plare import PLARE, ContrastivePreference, Pair, PLARESettings, decided_pairs
from vpd.learners.teachers import TeacherSettings
from vpd.types import Comparison, Group, SampleKey

RATE = 0.3


def keys_of(count: int) -> list[SampleKey]:
    return [SampleKey(phase="train", step=0, task=0, sample=index) for index in range(count)]


def test_the_loss_of_a_pair_by_hand() -> None:
    better, worse = torch.tensor([-1.0, 0.0]), torch.tensor([-4.0, 0.0])
    found = losses.contrastive_preference(better, worse, bias=0.5)  # margins -1 + 2 = 1 and 0
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1.0)), math.log(2.0)])
    equal = losses.contrastive_preference(better, worse, bias=1.0)  # margins 3 and 0
    assert equal.tolist() == pytest.approx([math.log(1 + math.exp(-3.0)), math.log(2.0)])


def test_the_gradient_raises_the_better_and_lowers_the_worse_b_times_as_much() -> None:
    better, worse = (torch.tensor([value], requires_grad=True) for value in (-1.0, -4.0))
    losses.contrastive_preference(better, worse, bias=0.5).sum().backward()
    pull = 1 / (1 + math.exp(1.0))  # sigma(-margin), margin 1
    assert better.grad is not None and worse.grad is not None
    assert (better.grad.item(), worse.grad.item()) == pytest.approx((-pull, 0.5 * pull))


def test_pairs_of_different_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="contrastive_preference: tensors of different shapes"):
        losses.contrastive_preference(torch.zeros(2), torch.zeros(1), bias=0.5)


def test_rows_losses_add_up_to_the_pairs_where_a_row_is_in_several() -> None:
    first, second, third = keys_of(3)
    pairs = [Pair(better=first, worse=second), Pair(better=first, worse=third), Pair(better=third, worse=second)]
    values = {first: -1.0, second: -4.0, third: -2.0}
    examples: list[Any] = [type("Row", (), {"key": key}) for key in values]
    loss: Any = ContrastivePreference(PLARESettings(), pairs).prepare(list(values.values()), examples)
    total = sum(math.log(1 + math.exp(-(values[p.better] - 0.5 * values[p.worse]))) for p in pairs)
    assert sum(value for value, _ in loss.known.values()) == pytest.approx(total)
    pulls = {p: 1 / (1 + math.exp(values[p.better] - 0.5 * values[p.worse])) for p in pairs}
    assert loss.known[first][1] == pytest.approx(-pulls[pairs[0]] - pulls[pairs[1]])
    assert loss.known[third][1] == pytest.approx(0.5 * pulls[pairs[1]] - pulls[pairs[2]])


def plain_step(model: Any, groups: list[Group], optimizer: Any, *, alpha: float, bias: float) -> float:
    """One step in another form: one forward pass for each attempt, and autograd through the loss of all pairs."""

    @functools.cache
    def advantage(number: int, index: int) -> torch.Tensor:
        rollout = groups[number].rollouts[index]
        tokens = torch.tensor([[*rollout.prompt, *rollout.completion.tokens]])
        logp = torch.log_softmax(model(tokens).logits[0].double(), -1)
        start = len(rollout.prompt)
        chosen = [logp[start + place - 1, token] for place, token in enumerate(rollout.completion.tokens)]
        return alpha * torch.stack(chosen).sum()

    found = []
    for number, group in enumerate(groups):
        for index, rollout in enumerate(group.rollouts):
            for one in rollout.comparisons:
                if one.preferred is not None:
                    better, worse = (index, one.other) if one.preferred else (one.other, index)
                    margin = advantage(number, better) - bias * advantage(number, worse)
                    found.append(-torch.log(torch.sigmoid(margin)))
    loss = torch.stack(found).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("micro_batch_size", [1, 5, 64])
@pytest.mark.parametrize("bias", [0.5, 1.0])
def test_steps_equal_those_of_an_independent_form(bias: float, micro_batch_size: int) -> None:
    model, other = tiny_model(), tiny_model()
    start = flat(model)
    learner = tiny_learner(model, teacher=TeacherSettings(kind="live"), micro_batch_size=micro_batch_size)
    algorithm = PLARE(PLARESettings(preference_alpha=0.5, preference_bias=bias))
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE)
    for seed in (1, 2):
        groups = random_groups(seed)
        update = algorithm.step(groups, learner)
        learner.end_iteration()
        assert update.metrics["preference/loss"] == pytest.approx(
            plain_step(other, groups, optimizer, alpha=0.5, bias=bias), rel=1e-9
        )
    torch.testing.assert_close(flat(model), flat(other), atol=1e-10, rtol=0)
    assert (flat(model) - start).abs().max() > 1e-3


def test_a_step_makes_the_better_attempts_likelier() -> None:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind="live"))
    algorithm = PLARE(PLARESettings(preference_alpha=0.5))
    found = [algorithm.step(random_groups(3), learner).metrics for _ in range(8)]
    assert found[-1]["preference/loss"] < found[0]["preference/loss"]
    assert found[-1]["preference/margin"] > found[0]["preference/margin"]
    assert found[-1]["preference/accuracy"] > found[0]["preference/accuracy"] or found[0]["preference/accuracy"] == 1


def test_pairs_that_the_judge_does_not_decide_take_no_part() -> None:
    (group,) = random_groups(5, groups=1)
    unsure = Group(
        rollouts=tuple(
            dataclasses.replace(r, comparisons=tuple(Comparison(other=c.other, preferred=None) for c in r.comparisons))
            for r in group.rollouts
        )
    )
    model = tiny_model()
    learner = tiny_learner(model, teacher=TeacherSettings(kind="live"))
    before = flat(model)
    update = PLARE(PLARESettings()).step([unsure], learner)
    assert update.metrics["preference/pairs"] == 0
    assert torch.equal(flat(model), before)
    assert len(decided_pairs([group])) == len(group.rollouts) - 1


def test_the_judges_preference_counts_and_not_the_reward() -> None:
    (group,) = random_groups(5, groups=1)
    first, second = group.rollouts[:2]
    for preferred in (True, False):
        kept = dataclasses.replace(first, comparisons=(Comparison(other=1, preferred=preferred),))
        two = [first, second] if preferred else [second, first]
        (pair,) = decided_pairs([Group(rollouts=(kept, dataclasses.replace(second, comparisons=())))])
        assert (pair.better, pair.worse) == tuple(r.key for r in two)


def test_an_attempt_without_a_token_is_compared_with_nothing() -> None:
    (group,) = random_groups(5, groups=1)
    empty = dataclasses.replace(group.rollouts[0].completion, tokens=(), sampled=(), logprobs=())
    changed = Group(rollouts=(dataclasses.replace(group.rollouts[0], completion=empty), *group.rollouts[1:]))
    assert len(decided_pairs([changed])) == len(decided_pairs([group])) - 1
