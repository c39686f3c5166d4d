"""Every loss: a number worked by hand, zero where it must be zero, the sign of its gradient, fast form = plain form."""

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd import losses

LOG2 = math.log(2)
seeds = st.integers(0, 10_000)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def of(*p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


PI, Q = of(0.5, 0.25, 0.25), of(0.25, 0.25, 0.5)


def test_token_logprobs_and_entropy_by_hand() -> None:
    assert losses.token_logprobs(PI[None] + 3.0, torch.tensor([1])).item() == pytest.approx(math.log(0.25))
    assert losses.entropy(PI + 3.0).item() == pytest.approx(0.5 * LOG2 + 0.5 * math.log(4))


@pytest.mark.parametrize(
    ("alpha", "value"),
    [
        (0.0, 0.25 * math.log(0.5) + 0.5 * LOG2),  # KL(q || pi) = .25 log(.25/.5) + .5 log(.5/.25)
        (1.0, 0.5 * LOG2 + 0.25 * math.log(0.5)),
        (0.5, 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)),  # both halves are equal by symmetry
    ],
)
def test_divergence_by_hand(alpha: float, value: float) -> None:
    assert losses.divergence(PI, Q, alpha=alpha).item() == pytest.approx(value, abs=1e-12)


def test_top_k_by_hand() -> None:
    # the student's likeliest token alone: pi = (.5, rest .5), q = (.25, rest .75)
    value = losses.divergence(PI, Q, alpha=1.0, top_k=1).item()
    assert value == pytest.approx(0.5 * LOG2 + 0.5 * math.log(0.5 / 0.75), abs=1e-6)
    assert losses.divergence(PI, Q, alpha=1.0, top_k=1, tail=False).item() == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_divergence_is_not_negative_and_zero_at_equality_with_zero_gradient(seed: int, alpha: float) -> None:
    student, teacher = logits(seed, 3, 7), logits(seed + 1, 3, 7)
    for top_k in (None, 3, 7):
        assert (losses.divergence(student, teacher, alpha=alpha, top_k=top_k) > -1e-9).all()
    same = teacher.clone().requires_grad_()
    value = losses.divergence(same, teacher, alpha=alpha)
    assert value.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(value.sum(), same)
    assert gradient.abs().max() < 1e-12


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_jensen_shannon_is_symmetric_and_bounded(seed: int) -> None:
    a, b = logits(seed, 5, 9) * 5, logits(seed + 1, 5, 9) * 5
    forward, backward = losses.divergence(a, b, alpha=0.5), losses.divergence(b, a, alpha=0.5)
    assert torch.allclose(forward, backward, atol=1e-12) and (forward <= LOG2 + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_top_k_with_tail_grows_to_the_whole(seed: int) -> None:
    student, teacher = logits(seed, 4, 8), logits(seed + 1, 4, 8)
    values = [losses.divergence(student, teacher, alpha=1.0, top_k=k) for k in range(1, 9)]
    for small, large in itertools.pairwise(values):
        assert (small <= large + 1e-9).all()
    whole = losses.divergence(student, teacher, alpha=1.0)
    assert torch.equal(values[-1], whole) and torch.equal(
        losses.divergence(student, teacher, alpha=1.0, top_k=99), whole
    )


def test_top_k_of_a_remote_teacher_by_hand() -> None:
    # the teacher's likeliest token is the third: pi = (.25, rest .75), q = (.5, rest .5)
    ids, logprobs = torch.tensor([2]), of(0.5)
    value = losses.divergence_from_top_k(PI, ids, logprobs, alpha=1.0).item()
    assert value == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-12)
    assert losses.divergence_from_top_k(PI, ids, logprobs, alpha=1.0, tail=False).item() == pytest.approx(0.0)


def test_a_remote_teacher_of_the_whole_vocabulary_has_no_bucket() -> None:
    """Its log-probs may be rounded, so that they do not sum to 1: the rest is nobody's."""
    ids, logprobs = torch.tensor([[2, 0, 1]]), of(0.50, 0.24, 0.24)[None]
    exact = losses.divergence(PI, of(0.24, 0.24, 0.50), alpha=0.5).item()
    for tail in (True, False):
        value = losses.divergence_from_top_k(PI[None], ids, logprobs, alpha=0.5, tail=tail)
        found = losses.divergence_from_top_k_and_grad(PI[None], ids, logprobs, torch.tensor([0]), alpha=0.5, tail=tail)
        assert value.item() == pytest.approx(exact) and found.value_N.item() == pytest.approx(exact)


def test_statistics_of_a_remote_teacher_by_hand() -> None:
    # of five tokens two are known, .5 and .2: the other three share .3, so .1 each
    ids, logprobs = torch.tensor([[3, 1]] * 3), of(0.5, 0.2).expand(3, 2)
    found, entropy = losses.top_k_statistics(ids, logprobs, torch.tensor([3, 1, 0]), 5)
    assert found.exp().tolist() == pytest.approx([0.5, 0.2, 0.1])
    assert torch.allclose(entropy, losses.entropy(of(0.5, 0.2, 0.1, 0.1, 0.1)))
    # all of them are known: nothing is left to spread
    whole = of(0.7, 0.3)[None]
    found, entropy = losses.top_k_statistics(torch.tensor([[1, 0]]), whole, torch.tensor([0]), 2)
    assert found.item() == pytest.approx(math.log(0.3)) and torch.allclose(entropy, losses.entropy(whole))


ROWS, ROWS_2, FLAGS, FLAGS_21 = torch.zeros(3), torch.zeros(2, 1), torch.ones(3).bool(), torch.ones(2, 1).bool()
TABLE, TOKENS = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
IDS = torch.zeros(2, 3, dtype=torch.long)
MISMATCHES: dict[str, list[Callable[[], object]]] = {
    "contrastive_preference": [lambda: losses.contrastive_preference(torch.zeros(2), torch.zeros(3), bias=0.5)],
    "token_logprobs": [lambda: losses.token_logprobs(TABLE, TOKENS[:1])],
    "logprobs_and_grad": [lambda: losses.logprobs_and_grad(TABLE, TOKENS[:1])],
    "divergence": [lambda: losses.divergence(TABLE, TABLE[:1], alpha=0.5)],
    "divergence_and_grad": [
        lambda: losses.divergence_and_grad(TABLE, TABLE[:1], TOKENS, alpha=0.5),
        lambda: losses.divergence_and_grad(TABLE, TABLE, TOKENS[:1], alpha=0.5),
    ],
    "divergence_from_top_k": [
        lambda: losses.divergence_from_top_k(TABLE, IDS[:1], torch.zeros(1, 3), alpha=0.5),
        lambda: losses.divergence_from_top_k(TABLE, IDS, torch.zeros(2, 1), alpha=0.5),
    ],
    "divergence_from_top_k_and_grad": [
        lambda: losses.divergence_from_top_k_and_grad(TABLE, IDS, torch.zeros(2, 3), TOKENS[:1], alpha=0.5),
        lambda: losses.divergence_from_top_k_and_grad(TABLE, IDS, torch.zeros(2, 1), TOKENS, alpha=0.5),
    ],
    "top_k_statistics": [
        lambda: losses.top_k_statistics(IDS, torch.zeros(2, 1), TOKENS, 9),
        lambda: losses.top_k_statistics(IDS, torch.zeros(2, 3), TOKENS[:1], 9),
    ],
    "sampled_divergence": [lambda: losses.sampled_divergence(TABLE, TABLE[:1])],
    "importance_ratio": [lambda: losses.importance_ratio(TABLE, TABLE[:, :1], clip=None)],
    "implicit_reward": [
        lambda: losses.implicit_reward(TABLE, TABLE[:1], TABLE.bool(), beta=0.1),
        lambda: losses.implicit_reward(TABLE, TABLE, TABLE[:1].bool(), beta=0.1),
    ],
    "bco": [lambda: losses.bco(ROWS, FLAGS_21, 0.0), lambda: losses.bco(ROWS, FLAGS, torch.zeros(3))],
    "midpoint_shift": [lambda: losses.midpoint_shift(ROWS[:, None], FLAGS)],
    "clipped_policy_gradient": [
        lambda: losses.clipped_policy_gradient(TABLE, TABLE[:1], ROWS[:2], clip_low=0.2, clip_high=0.2),
        lambda: losses.clipped_policy_gradient(TABLE, TABLE, ROWS, clip_low=0.2, clip_high=0.2),
        lambda: losses.clipped_policy_gradient(TABLE, TABLE, ROWS_2, clip_low=0.2, clip_high=0.2),
    ],
    "mixed_advantage": [
        lambda: losses.mixed_advantage(ROWS, TABLE, form="reshape", outcome_share=0.5, clip=0.2),
        lambda: losses.mixed_advantage(ROWS_2, TABLE, form="reshape", outcome_share=0.5, clip=0.2),
    ],
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_nothing_broadcasts(name: str) -> None:
    for call in MISMATCHES[name]:
        with pytest.raises(ValueError, match=rf"^{name}: .*got .*\["):
            call()


def test_every_public_loss_has_its_shapes_checked() -> None:
    functions = {
        name
        for name, value in vars(losses).items()
        if inspect.isfunction(value) and value.__module__ == losses.__name__ and name[0] != "_"
    }
    assert functions - {"entropy", "effective_share"} == set(MISMATCHES)  # these take one tensor


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"alpha": -0.1}, {"alpha": 1.1}, {"alpha": 0.5, "top_k": 0}):
        with pytest.raises(ValueError, match="got"):
            losses.divergence(PI, Q, **wrong)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_sampled_estimator_has_the_value_and_the_gradient_of_the_divergence_in_expectation(seed: int) -> None:
    student, teacher = logits(seed, 6).requires_grad_(), logits(seed + 1, 6)
    logp, logq = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    estimates = losses.sampled_divergence(logp, logq)  # one entry for each token that could be drawn
    expected = (logp.detach().exp() * estimates).sum()
    exact = losses.divergence(student, teacher, alpha=1.0)
    assert expected.item() == pytest.approx(exact.item(), abs=1e-12)
    ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (expected, exact))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_several_contexts_on_one_prefix_meet_at_the_geometric_mean() -> None:
    teachers = [logits(1, 5), logits(2, 5), logits(3, 5)]
    meeting = torch.log_softmax(torch.stack([torch.log_softmax(t, -1) for t in teachers]).mean(0), -1).requires_grad_()
    total = sum(losses.divergence(meeting, t, alpha=1.0) for t in teachers)
    (gradient,) = torch.autograd.grad(total, meeting)
    assert gradient.abs().max() < 1e-12


def test_importance_ratio_is_one_at_home_and_clipped_abroad() -> None:
    here = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    assert torch.equal(losses.importance_ratio(here, here.detach(), clip=2.0), torch.ones(1, 2))
    far = losses.importance_ratio(here, torch.tensor([[-3.0, -1.0]]), clip=2.0)
    assert far.tolist() == [[2.0, pytest.approx(math.exp(-1))]] and not far.requires_grad


def test_implicit_reward_by_hand() -> None:
    teacher, reference = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-2.0, -4.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert losses.implicit_reward(teacher, reference, mask, beta=0.1).item() == pytest.approx(0.4)
    assert losses.implicit_reward(teacher, reference, mask, beta=0.1, log_ratio="mean").item() == pytest.approx(0.2)
    assert losses.implicit_reward(teacher, teacher, mask, beta=0.1).item() == 0.0
    with pytest.raises(ValueError, match="median"):
        losses.implicit_reward(teacher, reference, mask, beta=0.1, log_ratio="median")


def test_e_step_loss_at_zero_is_two_log_two() -> None:
    success = torch.tensor([True, False, False])
    value = losses.bco(torch.zeros(3, dtype=torch.float64), success, 0.0)
    weights = torch.tensor([1.0, 0.5, 0.5])
    assert (weights * value).sum().item() == pytest.approx(2 * LOG2)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-2, 2))
def test_e_step_gradients_are_exact(seed: int, shift: float) -> None:
    beta = 0.1
    teacher = logits(seed, 4, 3).requires_grad_()
    reference = logits(seed + 1, 4, 3)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True, True, True]])
    success = torch.tensor([True, False, False, True])
    reward = losses.implicit_reward(teacher, reference, mask, beta=beta)
    weights = torch.tensor([0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    (weights * losses.bco(reward, success, shift)).sum().backward()
    margin = reward.detach() - shift
    push = torch.where(success, -beta * torch.sigmoid(-margin) / 2, beta * torch.sigmoid(margin) / 2)
    assert torch.allclose(teacher.grad, torch.where(mask, push[:, None], 0.0), atol=1e-15)
    assert (teacher.grad[success][mask[success]] < 0).all() and (teacher.grad[~success][mask[~success]] > 0).all()
    assert teacher.grad.abs().max() <= beta / 2


def test_no_gradient_reaches_the_shift() -> None:
    reward = torch.tensor([0.3, -0.2], requires_grad=True)
    success = torch.tensor([True, False])
    shift = losses.midpoint_shift(reward, success)
    assert not shift.requires_grad and shift.item() == pytest.approx(0.05)
    given_shift = torch.tensor(0.1, requires_grad=True)
    losses.bco(reward, success, given_shift).sum().backward()
    assert given_shift.grad is None


def test_a_missing_class_counts_as_zero_and_its_push_decays() -> None:
    reward, none = torch.tensor([-1.0, -3.0], dtype=torch.float64), torch.tensor([False, False])
    assert losses.midpoint_shift(reward, none).item() == pytest.approx(-1.0)
    pushes = []
    for level in (0.0, -5.0, -50.0):
        rt = torch.full((2,), level, dtype=torch.float64, requires_grad=True)
        losses.bco(rt, none, losses.midpoint_shift(rt, none)).sum().backward()
        pushes.append(rt.grad[0].item())
    assert pushes[0] > pushes[1] > pushes[2] > 0 and pushes[2] < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.floats(-4, 4), st.floats(-4, 4), st.floats(-6, 6))
def test_the_midpoint_minimises_and_bounds_the_paired_loss(win: float, loss: float, shift: float) -> None:
    rt = torch.tensor([win, loss], dtype=torch.float64)
    success = torch.tensor([True, False])
    at = losses.bco(rt, success, shift).sum()
    best = losses.bco(rt, success, losses.midpoint_shift(rt, success)).sum()
    assert best <= at + 1e-12
    assert -torch.nn.functional.logsigmoid(rt[0] - rt[1]) < at


def test_clipped_policy_gradient_by_hand() -> None:
    reference = torch.zeros(2, 2, dtype=torch.float64)
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5)]] * 2, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    value = losses.clipped_policy_gradient(logprobs, reference, advantage, clip_low=0.2, clip_high=0.28)
    assert value.tolist() == [pytest.approx([-1.28, -0.5]), pytest.approx([1.5, 0.8])]
    value.sum().backward()
    # a gain beyond the clip gives no gradient, a loss always does
    assert logprobs.grad.tolist() == [pytest.approx([0.0, -0.5]), pytest.approx([1.5, 0.0])]
