"""The mathematics: tensors in, per-row or per-token tensors out.  Nothing here averages or shifts.

Dimension legend: B rows, T completion tokens, V vocabulary, K top-k support, N tokens in any order.
``logits_BTV[b, t]`` are the logits that predict ``tokens_BT[b, t]`` (the shift is done by :mod:`vpd.model.packing`).
Leading dimensions may be anything: ``[N, V]`` works where ``[B, T, V]`` is written.  All logarithms are natural (nats).
Nothing broadcasts silently: a function raises ValueError if its tensors differ in shape.

A logit of -inf is probability 0, as in a masked vocabulary.  It adds 0 to entropies, and to divergences and gradients
where both distributions have it.  Where one rules out what the other can say, KL is +inf, as it is defined: KL(pi || q)
for such a teacher, KL(q || pi) for such a student.  Between the two (Jensen-Shannon) the divergence is finite.

pi is the student pi(y|x), q the teacher q(y|x,C).  Source: arXiv 2605.15113 (VPD) unless said.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_REST = 1e-7  # least probability of all tokens outside the K that are compared


class ValueAndGrad(NamedTuple):
    """A value for each of N next-token distributions [N], its gradient in the logits [N,V], and aux tensors [N].

    Each token's gradient is that of its own value alone: ``gradient_NV[n] = d value_N[n] / d logits_NV[n]``.
    """

    value_N: Tensor
    gradient_NV: Tensor
    aux: tuple[Tensor, ...]


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """log p of each token [B,T], in at least fp32."""
    _same_shape("token_logprobs", logits=logits_BTV[..., 0], tokens=tokens_BT)
    chosen_BT = logits_BTV.gather(-1, tokens_BT[..., None])[..., 0]
    return (chosen_BT - logits_BTV.logsumexp(-1)).to(torch.promote_types(logits_BTV.dtype, torch.float32))


def logprobs_and_grad(logits_NV: Tensor, tokens_N: Tensor) -> ValueAndGrad:
    """:func:`token_logprobs` and its gradient, onehot - p; aux: the entropy."""
    _same_shape("logprobs_and_grad", logits=logits_NV[..., 0], tokens=tokens_N)
    logp_NV = torch.log_softmax(logits_NV, -1)
    p_NV = logp_NV.exp()
    chosen_N, entropy_N = _token_aux(logp_NV, p_NV, tokens_N)
    grad_NV = p_NV.neg_()
    grad_NV.scatter_add_(1, tokens_N[:, None], grad_NV.new_ones(len(tokens_N), 1))
    return ValueAndGrad(chosen_N, grad_NV, (entropy_N,))


def entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy of each next-token distribution [B,T], in nats."""
    logp_BTV = torch.log_softmax(logits_BTV, -1)
    return -(logp_BTV.exp() * logp_BTV.clamp(min=_floor(logp_BTV))).sum(-1)


def divergence(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    *,
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each next-token distribution [B,T], >= 0.

    ``alpha`` 0 is KL(q || pi), 1 is KL(pi || q), and between, with m = (1 - alpha) pi + alpha q,
    (1 - alpha) KL(pi || m) + alpha KL(q || m)  (GKD, arXiv 2306.13649, eq. 1; SDPO, arXiv 2601.20802).
    It tends to 0 at both ends, so the ends are not its limits.

    ``top_k`` compares on the student's K most likely tokens: with ``tail`` the rest is one bucket,
    log(1 - sum), without it both are renormalised.  K >= V is exact and has no tail.
    """
    _check_divergence(alpha, top_k)
    _same_shape("divergence", student_logits=student_logits_BTV, teacher_logits=teacher_logits_BTV)
    student_logp = torch.log_softmax(student_logits_BTV, -1)
    teacher_logp = torch.log_softmax(teacher_logits_BTV, -1)
    if top_k is not None and top_k < student_logp.shape[-1]:
        support_BTK = student_logp.detach().topk(top_k, dim=-1).indices
        student_logp = _restrict(student_logp.gather(-1, support_BTK), tail)
        teacher_logp = _restrict(teacher_logp.gather(-1, support_BTK), tail)
    return _jensen_shannon(student_logp, teacher_logp, alpha)


def divergence_and_grad(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    tokens_N: Tensor,
    *,
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
) -> ValueAndGrad:
    """:func:`divergence` and its gradient in the student's logits.

    Aux: log-probs of the tokens under student and teacher, entropies of student and teacher.  With s = log p,
    t = log q and m the log of the mixture, the gradient is p (s - t - KL) at alpha 1, p - q at alpha 0, and between
    (1 - alpha) p (s - m - KL(p || m)): what the mixture itself moves cancels out.
    """
    _check_divergence(alpha, top_k)
    _same_shape("divergence_and_grad", student_logits=student_logits_NV, teacher_logits=teacher_logits_NV)
    _same_shape("divergence_and_grad", student_logits=student_logits_NV[..., 0], tokens=tokens_N)
    s_NV, t_NV = torch.log_softmax(student_logits_NV, -1), torch.log_softmax(teacher_logits_NV, -1)
    p_NV, q_NV = s_NV.exp(), t_NV.exp()

    def aux() -> tuple[Tensor, ...]:  # overwrites s and t
        student, teacher = _token_aux(s_NV, p_NV, tokens_N), _token_aux(t_NV, q_NV, tokens_N)
        return student[0], teacher[0], student[1], teacher[1]

    if top_k is not None and top_k < s_NV.shape[1]:
        support_NK = s_NV.topk(top_k, dim=-1).indices
        s_NK, t_NK, found = s_NV.gather(1, support_NK), t_NV.gather(1, support_NK), aux()
        return ValueAndGrad(*_grad_on(support_NK, s_NK, t_NK, p_NV, alpha, tail), found)
    if alpha == 0.0:
        value_N = torch.linalg.vecdot(q_NV, _gap(q_NV, t_NV, s_NV))
        found = aux()
        return ValueAndGrad(value_N, p_NV.sub_(q_NV), found)
    if alpha == 1.0:
        gap_NV, found = _gap(p_NV, s_NV, t_NV), aux()
        value_N = torch.linalg.vecdot(p_NV, gap_NV)
        return ValueAndGrad(value_N, p_NV.mul_(gap_NV.sub_(value_N[:, None])), found)
    found = aux()
    m_NV = p_NV.lerp(q_NV, alpha).clamp_(min=torch.finfo(p_NV.dtype).tiny).log_()
    above_NV = s_NV.sub_(m_NV)
    above_N = torch.linalg.vecdot(p_NV, above_NV)
    value_N = (1 - alpha) * above_N + alpha * torch.linalg.vecdot(q_NV, t_NV.sub_(m_NV))
    return ValueAndGrad(value_N, p_NV.mul_(above_NV.sub_(above_N[:, None])).mul_(1 - alpha), found)


def divergence_from_top_k(
    student_logits_BTV: Tensor,
    teacher_ids_BTK: Tensor,
    teacher_logprobs_BTK: Tensor,
    *,
    alpha: float,
    tail: bool = True,
) -> Tensor:
    """:func:`divergence` [B,T] from a teacher of whom only the K likeliest tokens are known, on those K tokens.

    With ``tail`` the rest of the vocabulary is one bucket, log(1 - sum), without it both are renormalised.  K = V is
    the exact divergence and has no bucket.
    """
    _check_top_k("divergence_from_top_k", student_logits_BTV, teacher_ids_BTK, teacher_logprobs_BTK, alpha)
    tail = tail and teacher_ids_BTK.shape[-1] < student_logits_BTV.shape[-1]
    student_logp = torch.log_softmax(student_logits_BTV, -1).gather(-1, teacher_ids_BTK)
    return _jensen_shannon(_restrict(student_logp, tail), _restrict(teacher_logprobs_BTK, tail), alpha)


def divergence_from_top_k_and_grad(
    student_logits_NV: Tensor,
    teacher_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    tokens_N: Tensor,
    *,
    alpha: float,
    tail: bool = True,
) -> ValueAndGrad:
    """:func:`divergence_from_top_k` and its gradient in the student's logits; aux as :func:`divergence_and_grad`."""
    name = "divergence_from_top_k_and_grad"
    _check_top_k(name, student_logits_NV, teacher_ids_NK, teacher_logprobs_NK, alpha)
    _same_shape(name, student_logits=student_logits_NV[..., 0], tokens=tokens_N)
    vocabulary = student_logits_NV.shape[1]
    s_NV = torch.log_softmax(student_logits_NV, -1)
    p_NV = s_NV.exp()
    teacher_N, teacher_entropy_N = top_k_statistics(teacher_ids_NK, teacher_logprobs_NK, tokens_N, vocabulary)
    s_NK = s_NV.gather(1, teacher_ids_NK)
    student_N, student_entropy_N = _token_aux(s_NV, p_NV, tokens_N)
    aux = (student_N, teacher_N, student_entropy_N, teacher_entropy_N)
    tail = tail and teacher_ids_NK.shape[1] < vocabulary
    return ValueAndGrad(*_grad_on(teacher_ids_NK, s_NK, teacher_logprobs_NK, p_NV, alpha, tail), aux)


def top_k_statistics(
    ids_BTK: Tensor, logprobs_BTK: Tensor, tokens_BT: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy, both [B,T], of distributions of which the K likeliest tokens are known.

    What is left, 1 - sum, is spread evenly over the V - K other tokens.  So the log-prob is exact where the token is
    among the K and an average elsewhere, and the entropy is the largest that the K values allow.
    """
    _same_shape("top_k_statistics", ids=ids_BTK, logprobs=logprobs_BTK)
    _same_shape("top_k_statistics", ids=ids_BTK[..., 0], tokens=tokens_BT)
    p_BTK = logprobs_BTK.exp()
    entropy_BT = -(p_BTK * logprobs_BTK.clamp(min=_floor(logprobs_BTK))).sum(-1)
    found_BTK = ids_BTK == tokens_BT[..., None]
    logprobs_BT = torch.where(found_BTK, logprobs_BTK, 0.0).sum(-1)
    others = vocabulary - ids_BTK.shape[-1]
    if others > 0:
        rest_BT = _rest(p_BTK.sum(-1))
        other_BT = rest_BT - math.log(others)
        logprobs_BT = torch.where(found_BTK.any(-1), logprobs_BT, other_BT)
        entropy_BT = entropy_BT - rest_BT.exp() * other_BT
    return logprobs_BT, entropy_BT


def sampled_divergence(student_logprobs_BT: Tensor, teacher_logprobs_BT: Tensor) -> Tensor:
    """One-sample estimate [B,T] of KL(pi || q) from the log-probs of tokens that pi sampled.

    The value is log pi - log q, unbiased (and, unlike the divergence, sometimes negative); the gradient is
    (log pi - log q) grad log pi, which is the divergence's own gradient in expectation.
    """
    _same_shape("sampled_divergence", student_logprobs=student_logprobs_BT, teacher_logprobs=teacher_logprobs_BT)
    log_ratio_BT = (student_logprobs_BT - teacher_logprobs_BT).detach()
    return log_ratio_BT + log_ratio_BT * (student_logprobs_BT - student_logprobs_BT.detach())


def effective_share(log_weight_N: Tensor) -> Tensor:
    """(sum w)^2 / (N sum w^2): the effective sample size of importance weights w, as a share of their number N [].

    From 1 / N, where one weight has it all, to 1, where all are equal.
    """
    log_share = 2 * log_weight_N.logsumexp(0) - (2 * log_weight_N).logsumexp(0)
    return log_share.exp() / len(log_weight_N)


def importance_ratio(logprobs_BT: Tensor, reference_BT: Tensor, *, clip: float | None) -> Tensor:
    """Ratio pi / pi_0 of each token [B,T], at most ``clip`` (None: no bound), without gradient."""
    _same_shape("importance_ratio", logprobs=logprobs_BT, reference=reference_BT)
    ratio_BT = (logprobs_BT.detach() - reference_BT).exp()
    return ratio_BT if clip is None else ratio_BT.clamp(max=clip)


def implicit_reward(
    teacher_logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, *, beta: float, log_ratio: str = "sum"
) -> Tensor:
    """rt = beta * sum_t (log q - log pi_0) over each row's tokens where the mask is True [B].

    ``log_ratio="mean"``: their mean.
    """
    _same_shape("implicit_reward", teacher_logprobs=teacher_logprobs_BT, reference=reference_BT, mask=mask_BT)
    ratio_BT = torch.where(mask_BT, teacher_logprobs_BT - reference_BT, 0.0)
    total_B = ratio_BT.sum(-1)
    if log_ratio == "mean":
        total_B = total_B / mask_BT.sum(-1).clamp(min=1)
    elif log_ratio != "sum":
        raise ValueError(f"log_ratio must be 'sum' or 'mean'; got {log_ratio!r}")
    return beta * total_B


def bco(implicit_reward_B: Tensor, success_B: Tensor, shift: Tensor | float) -> Tensor:
    """The E-step's loss of each row [B]: -log sigma(rt - shift) for a success, -log sigma(shift - rt) for a failure.

    Binary Classifier Optimization, arXiv 2404.04656; ``shift`` is a scalar, and no gradient reaches it.
    """
    shift = torch.as_tensor(shift, dtype=implicit_reward_B.dtype, device=implicit_reward_B.device).detach()
    _same_shape("bco", implicit_reward=implicit_reward_B, success=success_B)
    if shift.ndim:
        raise ValueError(f"bco: shift must be a scalar; got {list(shift.shape)}")
    margin_B = implicit_reward_B - shift
    return -F.logsigmoid(torch.where(success_B, margin_B, -margin_B))


def midpoint_shift(implicit_reward_B: Tensor, success_B: Tensor) -> Tensor:
    """Half-way between the mean implicit rewards of successes and failures, a scalar without gradient.

    A class that is missing counts as mean 0: if the shift followed the failures alone, the push that makes
    them less likely would never die out.
    """
    _same_shape("midpoint_shift", implicit_reward=implicit_reward_B, success=success_B)
    reward_B = implicit_reward_B.detach()
    means = [reward_B[rows].mean() if bool(rows.any()) else reward_B.new_zeros(()) for rows in (success_B, ~success_B)]
    return (means[0] + means[1]) / 2


def contrastive_preference(better_P: Tensor, worse_P: Tensor, *, bias: float) -> Tensor:
    """Loss of each of P pairs, -log sigma(A+ - b A-), from their advantages A = alpha sum log pi; b is ``bias``.

    Contrastive preference learning (arXiv 2310.13639, eq. 5 and 7): with b < 1 it is not enough to make both attempts
    unlikely.  PLARE (arXiv 2507.23391) takes it for a judge's preferences.
    """
    _same_shape("contrastive_preference", better=better_P, worse=worse_P)
    return -F.logsigmoid(better_P - bias * worse_P)


def clipped_policy_gradient(
    logprobs_BT: Tensor, reference_BT: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clipped surrogate of each token [B,T]: -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = pi / pi_0.

    ``advantage`` is one number for each row [B] or for each token [B,T]  (arXiv 1707.06347, eq. 7).
    """
    advantage_BT = advantage[:, None].expand(-1, logprobs_BT.shape[1]) if advantage.ndim == 1 else advantage
    _same_shape("clipped_policy_gradient", logprobs=logprobs_BT, reference=reference_BT, advantage=advantage_BT)
    ratio_BT = (logprobs_BT - reference_BT).exp()
    return -torch.minimum(ratio_BT * advantage_BT, ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantage_BT)


def mixed_advantage(
    advantage_B: Tensor, log_ratio_BT: Tensor, *, form: str, outcome_share: float, clip: float
) -> Tensor:
    """An advantage for each token [B,T] from the outcome's A and the teacher's log-ratio o = log q - log pi.

    ``reshape``: share A + (1 - share) o.  ``reweight``: A clip(exp(sign(A) o), 1 - clip, 1 + clip).
    """
    _same_shape("mixed_advantage", advantage=advantage_B, log_ratio=log_ratio_BT[:, 0])
    advantage_B1 = advantage_B[:, None]
    if form == "reshape":
        return outcome_share * advantage_B1 + (1 - outcome_share) * log_ratio_BT
    if form == "reweight":
        return advantage_B1 * (advantage_B1.sign() * log_ratio_BT).exp().clamp(1 - clip, 1 + clip)
    raise ValueError(f"form must be 'reshape' or 'reweight'; got {form!r}")


def _same_shape(function: str, **tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{function}: tensors of different shapes; got {shapes}")


def _check_divergence(alpha: float, top_k: int | None) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None; got {top_k}")


def _check_top_k(function: str, logits: Tensor, ids: Tensor, logprobs: Tensor, alpha: float) -> None:
    _check_divergence(alpha, None)
    _same_shape(function, teacher_ids=ids, teacher_logprobs=logprobs)
    _same_shape(function, student_logits=logits[..., 0], teacher_ids=ids[..., 0])


def _jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, alpha: float) -> Tensor:
    if alpha == 0.0:
        return _kl(teacher_logp, student_logp)
    if alpha == 1.0:
        return _kl(student_logp, teacher_logp)
    neither = (student_logp == -math.inf) & (teacher_logp == -math.inf)
    mixture_logp = torch.logaddexp(
        student_logp.masked_fill(neither, 0.0) + math.log1p(-alpha),
        teacher_logp.masked_fill(neither, 0.0) + math.log(alpha),
    )
    return (1 - alpha) * _kl(student_logp, mixture_logp) + alpha * _kl(teacher_logp, mixture_logp)


def _kl(left_logp: Tensor, right_logp: Tensor) -> Tensor:
    """KL(left || right) over the last dimension; entries of probability 0 on the left add nothing."""
    left_p = left_logp.exp()
    return (left_p * _gap(left_p, left_logp, right_logp)).sum(-1)


def _gap(left_p: Tensor, left_logp: Tensor, right_logp: Tensor) -> Tensor:
    """log left - log right, 0 where left is 0."""
    return (left_logp - right_logp).masked_fill_(left_p == 0, 0.0)


def _token_aux(logp_NV: Tensor, p_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy, both [N]; bounds ``logp_NV`` below in place, so that 0 log 0 is 0."""
    chosen_N = logp_NV.gather(1, tokens_N[:, None])[:, 0]
    return chosen_N, -torch.linalg.vecdot(p_NV, logp_NV.clamp_(min=_floor(logp_NV)))


def _floor(logp: Tensor) -> float:
    """A log-prob whose exponential is 0 and of which a few may be added up."""
    return torch.finfo(logp.dtype).min / 4


def _restrict(logp_BTK: Tensor, tail: bool) -> Tensor:
    """Make K of V log-probs a distribution: append the rest as a bucket, or renormalise."""
    if not tail:
        return torch.log_softmax(logp_BTK, -1)
    head_logp = logp_BTK.to(torch.promote_types(logp_BTK.dtype, torch.float32))
    return torch.cat([head_logp, _rest(head_logp.exp().sum(-1, keepdim=True))], -1)


def _rest(known: Tensor) -> Tensor:
    """Log of the probability outside the known tokens, from their sum."""
    return torch.log1p(-known.clamp(max=1 - SMALLEST_REST))


def _grad_on(
    support_NK: Tensor, student_logp_NK: Tensor, teacher_logp_NK: Tensor, p_NV: Tensor, alpha: float, tail: bool
) -> tuple[Tensor, Tensor]:
    """The divergence on K tokens [N] and its gradient in the student's logits [N,V]; overwrites p = exp(s)."""
    with torch.enable_grad():  # on K tokens autograd is cheap, and the mathematics is written once
        s_NK = student_logp_NK.requires_grad_()
        value_N = _jensen_shannon(_restrict(s_NK, tail), _restrict(teacher_logp_NK, tail), alpha)
        (grad_NK,) = torch.autograd.grad(value_N.sum(), s_NK)
    return value_N.detach(), p_NV.mul_(-grad_NK.sum(-1, keepdim=True)).scatter_add_(1, support_NK, grad_NK)
