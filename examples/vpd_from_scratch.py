"""Variational Policy Distillation (arXiv 2605.15113) from scratch: plain, slow, obvious, and nothing but torch.

No padding and no batching: every row is one unpadded forward, every mean is spelled out. It exists to be read, and as
the oracle the library is tested against. One set of weights plays two roles, told apart by the prompt alone: the
student pi(y|x) reads the task, the teacher q(y|x,C) also reads feedback C. Both score the same completion tokens.

    E-step   rt_i = beta * sum_t (log q(y_t|x, C, y_<t) - log pi(y_t|x, y_<t))        the implicit reward; pi is frozen
             L_E  = - mean_{success} log sigmoid(rt - delta) - mean_{failure} log sigmoid(-(rt - delta))
    M-step   L_M  = E_{y ~ pi} sum_t KL( pi(.|x, y_<t) || stopgrad q(.|x, C, y_<t) )   or another divergence, see there

Everything is computed in the dtype of the model's logits, on the CPU. A completion has at least one token.
"""

import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]  # ids [1, L] -> logits [1, L, V]; an nn.Module, or a function around one


@dataclass
class Row:
    """One rollout: what the student read and wrote, its grade, and what the teacher reads (None = no context C)."""

    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None  # the M-step's: the task and this row's own feedback
    reward: float
    success: bool
    group: int  # rows of one group answer the same prompt
    e_teacher_prompt: list[int] | None  # the E-step's: may differ (a success in the context of a failed sibling)


def log_probs(model: Model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """[T, V]: the full log-softmax at each completion position; the logits at position i predict token i + 1."""
    logits = model(torch.tensor([prompt + completion]))[0]
    return F.log_softmax(logits[len(prompt) - 1 : len(prompt) + len(completion) - 1] / temperature, dim=-1)


def token_logps(model: Model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """[T]: the log-probability of each completion token."""
    table = log_probs(model, prompt, completion, temperature)
    return torch.stack([table[t, token] for t, token in enumerate(completion)])


@torch.no_grad()
def student_logps(model: Model, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
    """logp_S0, one [T] tensor a row: the tokens under the plain prompt, without gradient."""
    return [token_logps(model, row.prompt, row.completion, temperature) for row in rows]


def divergence(log_pi: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """[T], exact over V. alpha 0: KL(q||pi); 1: KL(pi||q); between, with m = (1-alpha) pi + alpha q:
    (1-alpha) KL(pi||m) + alpha KL(q||m): Jensen-Shannon at 0.5, tending to 0 (not to the KLs) at both ends."""
    pi, q = log_pi.exp(), log_q.exp()
    if alpha == 0:
        return (q * (log_q - log_pi)).sum(-1)
    if alpha == 1:
        return (pi * (log_pi - log_q)).sum(-1)
    log_m = torch.logaddexp(log_pi + math.log(1 - alpha), log_q + math.log(alpha))
    return (1 - alpha) * (pi * (log_pi - log_m)).sum(-1) + alpha * (q * (log_q - log_m)).sum(-1)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float | None = None) -> float:
    """One optimiser step on the loss; max_norm None = no gradient clipping. Returns the loss before the step."""
    optimizer.zero_grad()
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def ema_update(teacher: nn.Module, model: nn.Module, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate model, parameter by parameter; rate 1 copies, rate 0 freezes."""
    for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
        old.copy_((1 - rate) * old + rate * new)


# ---------------------------------------------------------------------------------------------------------- VPD


def implicit_reward(
    model: Model,
    row: Row,
    reference_logp: Tensor,
    teacher_beta: float = 0.1,
    log_ratio: str = "sum",
    temperature: float = 1.0,
) -> Tensor:
    """rt = beta * sum_t (log q(y_t|x,C) - log pi_ref(y_t|x)), q = the live weights on the row's E-step prompt.
    The gradient goes to log q only. log_ratio "mean" divides by T (exp(rt / beta) is then no density ratio)."""
    assert row.e_teacher_prompt is not None and log_ratio in ("sum", "mean")
    ratio = token_logps(model, row.e_teacher_prompt, row.completion, temperature) - reference_logp.detach()
    return teacher_beta * (ratio.sum() if log_ratio == "sum" else ratio.mean())


def reward_shift(rts: list[float], successes: list[bool], delta: float | None, momentum: float = 0.9) -> float:
    """The new delta: halfway between the class means of rt (a missing class counts as mean 0), averaged with the past
    one; the first E-step (delta None) takes the midpoint itself."""
    good = [rt for rt, s in zip(rts, successes, strict=True) if s]
    bad = [rt for rt, s in zip(rts, successes, strict=True) if not s]
    midpoint = 0.5 * ((sum(good) / len(good) if good else 0.0) + (sum(bad) / len(bad) if bad else 0.0))
    return midpoint if delta is None else momentum * delta + (1 - momentum) * midpoint


def e_loss(rts: list[Tensor], successes: list[bool], delta: float) -> Tensor:
    """L_E, a classifier of outcomes by rt (BCO, arXiv 2404.04656). The term of a missing class drops out."""
    good = [-F.logsigmoid(rt - delta) for rt, s in zip(rts, successes, strict=True) if s]
    bad = [-F.logsigmoid(-(rt - delta)) for rt, s in zip(rts, successes, strict=True) if not s]
    return torch.stack([torch.stack(terms).mean() for terms in (good, bad) if terms]).sum()


def e_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    reference_logps: list[Tensor] | None,
    delta: float | None,
    *,
    teacher_beta: float = 0.1,
    log_ratio: str = "sum",
    delta_momentum: float = 0.9,
    e_epochs: int = 1,
    lr_scale: float = 1.0,
    temperature: float = 1.0,
    max_norm: float | None = None,
) -> float | None:
    """Train the teacher (the live weights on the E-step prompts) on outcomes: e_epochs updates on L_E over all rows.

    reference_logps: one [T] a row of `rows`; None = the student as it is now (dynamic prior); those of the initial
    policy = fixed prior. delta is set once, before the first epoch, and carries no gradient. Rows without an E-step
    context take no part; if none has one, nothing happens. Returns the new delta."""
    if reference_logps is None:
        reference_logps = student_logps(model, rows, temperature)
    used = [(row, ref) for row, ref in zip(rows, reference_logps, strict=True) if row.e_teacher_prompt is not None]
    if not used:
        return delta
    successes = [row.success for row, _ in used]
    with torch.no_grad():
        rts = [implicit_reward(model, row, ref, teacher_beta, log_ratio, temperature).item() for row, ref in used]
    delta = reward_shift(rts, successes, delta, delta_momentum)
    rates = [g["lr"] for g in optimizer.param_groups]
    for g in optimizer.param_groups:
        g["lr"] = g["lr"] * lr_scale
    for _ in range(e_epochs):
        live = [implicit_reward(model, row, ref, teacher_beta, log_ratio, temperature) for row, ref in used]
        update(optimizer, e_loss(live, successes, delta), max_norm)
    for g, rate in zip(optimizer.param_groups, rates, strict=True):
        g["lr"] = rate
    return delta


def average_tokens(per_token: list[Tensor], average: str, n_rows: int, n_tokens: int) -> Tensor:
    """seq_mean: the token mean of each row, summed, over n_rows. token_mean: the sum of all tokens over n_tokens."""
    if average == "seq_mean":
        return torch.stack([x.mean() for x in per_token]).sum() / n_rows
    assert average == "token_mean"
    return torch.cat(per_token).sum() / n_tokens


def m_step(
    model: Model,
    teacher: Model,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    reference_logps: list[Tensor] | None,
    alpha: float = 0.5,
    is_clip: float | None = 2.0,
    average: str = "seq_mean",
    *,
    denominator: str = "active",
    temperature: float = 1.0,
    max_norm: float | None = None,
) -> float:
    """One update on L_M: distil the teacher (on each row's own context, no gradient) into the student.

    Each token's divergence is weighted by exp(logp_S - logp_S0), detached, at most is_clip (None = weight 1), where
    logp_S0 = reference_logps was recorded before the E-step (None = weight 1 too: nothing has moved). Rows without a
    context add exactly 0; the mean is over those that have one ("active") or over all rows, all tokens ("all").
    Returns L_M; with no context in the batch it is 0 and no step is taken."""
    per_token = []
    for i, row in enumerate(rows):
        if row.teacher_prompt is None:
            continue
        log_pi = log_probs(model, row.prompt, row.completion, temperature)
        with torch.no_grad():
            log_q = log_probs(teacher, row.teacher_prompt, row.completion, temperature)
        weight = torch.ones(len(row.completion), dtype=log_pi.dtype)
        if reference_logps is not None and is_clip is not None:
            logp = torch.stack([log_pi[t, token] for t, token in enumerate(row.completion)])
            weight = (logp - reference_logps[i]).exp().detach().clamp(max=is_clip)
        per_token.append(weight * divergence(log_pi, log_q, alpha))
    if not per_token:
        return 0.0
    assert denominator in ("active", "all")
    counted = [row for row in rows if denominator == "all" or row.teacher_prompt is not None]
    loss = average_tokens(per_token, average, len(counted), sum(len(row.completion) for row in counted))
    return update(optimizer, loss, max_norm)


def vpd_iteration(
    model: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    k: int,
    delta: float | None,
    *,
    e_every: int | None = 5,
    fixed_prior: Model | None = None,
    teacher_beta: float = 0.1,
    log_ratio: str = "sum",
    delta_momentum: float = 0.9,
    e_epochs: int = 1,
    lr_scale: float = 1.0,
    alpha: float = 0.5,
    is_clip: float | None = 2.0,
    average: str = "seq_mean",
    denominator: str = "active",
    ema_rate: float | None = 0.05,
    temperature: float = 1.0,
    max_norm: float | None = None,
) -> float | None:
    """Iteration k of VPD on rows rolled out from `model`: record logp_S0, an E-step if k % e_every == 0, an M-step, and
    last the teacher's one move. e_every None is SDPO. Returns the new delta.

    teacher: `model` itself (live) or a copy that follows it by ema_update (ema_rate None = the caller moves it).
    fixed_prior: a frozen copy of the initial policy as the E-step's reference; None = the student itself (dynamic)."""
    if e_every is not None and teacher is not model and ema_rate == 0:
        raise ValueError("the M-step's teacher never moves: the E-step would not reach the student")
    logp_s0 = student_logps(model, rows, temperature)
    if e_every is not None and k % e_every == 0:
        prior = logp_s0 if fixed_prior is None else student_logps(fixed_prior, rows, temperature)
        delta = e_step(
            model,
            optimizer,
            rows,
            prior,
            delta,
            teacher_beta=teacher_beta,
            log_ratio=log_ratio,
            delta_momentum=delta_momentum,
            e_epochs=e_epochs,
            lr_scale=lr_scale,
            temperature=temperature,
            max_norm=max_norm,
        )
    m_step(
        model,
        teacher,
        optimizer,
        rows,
        logp_s0,
        alpha,
        is_clip,
        average,
        denominator=denominator,
        temperature=temperature,
        max_norm=max_norm,
    )
    if teacher is not model and ema_rate is not None:
        ema_update(teacher, model, ema_rate)
    return delta


# ------------------------------------------------------------------------------------------------------ baselines


def advantages(rows: list[Row]) -> list[float]:
    """(r - mean) / (std + 1e-4) within each group, std with Bessel's correction (n - 1) as is torch.std's default,
    in float64. A group of one has advantage 0."""
    out = []
    for row in rows:
        r = torch.tensor([other.reward for other in rows if other.group == row.group], dtype=torch.float64)
        out.append(((row.reward - r.mean()) / (r.std() + 1e-4)).item() if len(r) > 1 else 0.0)
    return out


def grpo_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    reference_logps: list[Tensor] | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    temperature: float = 1.0,
    max_norm: float | None = None,
) -> float:
    """One GRPO update on every row: PPO's clipped objective, mean over all tokens of the batch, no KL term. The ratio
    is to reference_logps, the behaviour policy's; None = on-policy, ratio 1 (with its gradient). Returns the loss.
    Advantages: (r - mean) / (std + 1e-4) within the group, std with Bessel's correction."""
    per_token = []
    for i, (row, advantage) in enumerate(zip(rows, advantages(rows), strict=True)):
        logp = token_logps(model, row.prompt, row.completion, temperature)
        ratio = (logp - (logp.detach() if reference_logps is None else reference_logps[i])).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        per_token.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return update(optimizer, torch.cat(per_token).mean(), max_norm)


def hybrid_step(
    model: Model,
    teacher: Model,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    form: str,
    *,
    outcome_share: float = 0.5,
    reweight_clip: float = 0.2,
    temperature: float = 1.0,
) -> float:
    """One on-policy update of a hybrid: GRPO's advantage A of each row meets the teacher's opinion of each token,
    o = log q - log pi (0 for a row without C). "reshape": A_t = share A + (1 - share) o. "reweight":
    A_t = A clip(exp(sign(A) o), 1 - eps, 1 + eps). Mean over all tokens of the batch. Returns the loss."""
    per_token = []
    for row, outcome in zip(rows, advantages(rows), strict=True):
        logp = token_logps(model, row.prompt, row.completion, temperature)
        opinion = torch.zeros_like(logp)
        if row.teacher_prompt is not None:
            opinion = (token_logps(teacher, row.teacher_prompt, row.completion, temperature) - logp).detach()
        if form == "reshape":
            advantage = outcome_share * outcome + (1 - outcome_share) * opinion
        else:
            sign = (outcome > 0) - (outcome < 0)
            advantage = outcome * (sign * opinion).exp().clamp(1 - reweight_clip, 1 + reweight_clip)
        per_token.append(-advantage * (logp - logp.detach()).exp())
    return update(optimizer, torch.cat(per_token).mean())


def gkd_step(
    model: Model,
    teacher: Model,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    alpha: float = 0.5,
    average: str = "seq_mean",
    *,
    temperature: float = 1.0,
    max_norm: float | None = None,
) -> float:
    """One GKD update (arXiv 2306.13649, student's own samples): the divergence to an external frozen teacher that reads
    the student's own prompt, on every row whatever its context or outcome. Returns the loss."""
    per_token = []
    for row in rows:
        with torch.no_grad():
            log_q = log_probs(teacher, row.prompt, row.completion, temperature)
        per_token.append(divergence(log_probs(model, row.prompt, row.completion, temperature), log_q, alpha))
    loss = average_tokens(per_token, average, len(rows), sum(len(row.completion) for row in rows))
    return update(optimizer, loss, max_norm)


# -------------------------------------------------------------------------------------------------- demonstration
# Hidden operations: each letter A-D stands for one digit look-up, applied to every digit of the problem; the reward is
# 1 if all are right. The student reads the letter and the digits, the teacher also the feedback: the operation's name.

OPERATIONS = ["1032547698", "9876543210", "5678901234", "2301674598", "0123456789"]  # those of A-D, and a decoy
N_DIGITS, LETTER, NAME, EQUALS, VOCABULARY = 5, 10, 14, 19, 20  # tokens: digits 0-9, letters 10-13, names 14-18, "="


class Tiny(nn.Module):
    """One transformer layer with a learned bias for each distance back: ids [N, L] -> logits [N, L, V]."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed, self.bias = heads, nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(heads, 32))
        self.qkv, self.out, self.up = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(4 * width, width), nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed(ids), ids.shape[1]
        q, k, v = self.qkv(x).view(len(ids), length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        back = torch.arange(length)[:, None] - torch.arange(length)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + self.bias[:, back.clamp(min=0)]
        mixed = scores.masked_fill(back < 0, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:])))))
        return logits


def problem(rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """The student's prompt, the teacher's (the operation's name in front), and the right answer."""
    letter, digits = rng.randrange(4), [rng.randrange(10) for _ in range(N_DIGITS)]
    prompt = [LETTER + letter, *digits, EQUALS]
    return prompt, [NAME + letter, *prompt], [int(OPERATIONS[letter][d]) for d in digits]


@torch.no_grad()
def sample(model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Answers at temperature 1 (here the prompts have one length, so they share a forward)."""
    ids = torch.tensor(prompts)
    for _ in range(N_DIGITS):
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)], dim=1)
    return ids[:, -N_DIGITS:].tolist()


def accuracy(model: nn.Module, hinted: bool, n: int = 1000) -> float:
    rng = random.Random(12345)
    problems = [problem(rng) for _ in range(n)]
    answers = sample(model, [teacher if hinted else student for student, teacher, _ in problems])
    return sum(answer == right for answer, (_, _, right) in zip(answers, problems, strict=True)) / n


def warm_up(seed: int, learn: int = 200, blur: int = 150) -> nn.Module:
    """The base model, supervised. First: follow the named operation, always. Then: follow it on .75 of the digits, and
    without a name use the letter's own on .25 only, one of the other four else: next to a blind guess."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(learn + blur):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - max(0, step - learn) / blur)
        losses = []
        for hinted in (True, False) if step >= learn else (True,):
            share = 1.0 if step < learn else 0.75 if hinted else 0.25
            texts = []
            for _ in range(64):
                digits, op = [rng.randrange(10) for _ in range(N_DIGITS)], rng.randrange(5 if hinted else 4)
                prompt = [NAME + op, LETTER + rng.randrange(4)] if hinted else [LETTER + op]
                others = [o for o in range(5) if o != op]
                answer = [int(OPERATIONS[op if rng.random() < share else rng.choice(others)][d]) for d in digits]
                texts.append([*prompt, *digits, EQUALS, *answer])
            ids = torch.tensor(texts)
            logits = model(ids)[:, -N_DIGITS - 1 : -1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, -N_DIGITS:].flatten()))
        update(optimizer, torch.stack(losses).sum(), max_norm=1.0)
    return model


def roll_out(model: nn.Module, rng: random.Random, n_prompts: int = 8, n_rollouts: int = 8) -> list[Row]:
    """Each failure gets feedback. A success has none, so the M-step leaves it out; the E-step reads it in the context
    of a failed sibling, so that having a context does not give the outcome away."""
    rows = []
    for group in range(n_prompts):
        prompt, with_feedback, right = problem(rng)
        answers = sample(model, [prompt] * n_rollouts)
        e_context = None if all(answer == right for answer in answers) else with_feedback
        for answer in answers:
            ok = answer == right
            rows.append(Row(prompt, answer, None if ok else with_feedback, float(ok), ok, group, e_context))
    return rows


def train(method: str, lr: float, base: nn.Module, seed: int, iterations: int, every: int) -> tuple[list[float], float]:
    """Student accuracy after each `every` iterations, and the best of the teacher's with feedback at those points."""
    torch.manual_seed(seed)
    rng, model, teacher, delta = random.Random(seed), copy.deepcopy(base), copy.deepcopy(base), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    curve, best_teacher = [], 0.0
    for k in range(iterations):
        rows = roll_out(model, rng)
        if method == "GRPO":
            grpo_step(model, optimizer, rows, max_norm=1.0)
        else:
            e_every = 5 if method == "VPD" else None
            delta = vpd_iteration(model, teacher, optimizer, rows, k, delta, e_every=e_every, max_norm=1.0)
        if (k + 1) % every == 0:
            curve.append(accuracy(model, hinted=False))
            best_teacher = max(best_teacher, accuracy(teacher, hinted=True))
    return curve, best_teacher


NOTE = """
{seconds:.0f} s in all. What was seen on seeds 2-5 when this was written: GRPO solves one letter of the four, never the
others, and stays near .25. SDPO rises later and mostly falls back. VPD, its teacher trained on outcomes, peaked highest
on each seed and its teacher went further, but it drifts too, and once it ended below GRPO. A few seeds of a toy rank
nothing. Learning rates: a coarse search on seeds 0 and 1 between 2e-4 and 4e-3; larger ones end SDPO at 0, and VPD's
two seeds disagreed above 1e-3."""


def main(seeds: tuple[int, ...] = (2, 3), iterations: int = 120, every: int = 20) -> None:
    torch.set_num_threads(1)
    start = time.time()
    print("Student accuracy after so many iterations of 8 prompts x 8 rollouts; the teacher's best, with feedback.\n")
    print("seed  method  lr    " + "".join(f"{k:>7}" for k in range(0, iterations + 1, every)) + "   teacher  seconds")
    for seed in seeds:
        base = warm_up(seed)
        first, teacher_first = accuracy(base, hinted=False), accuracy(base, hinted=True)
        print(f"{seed:>4}  base          {first:>7.3f}{'':>{7 * (iterations // every)}}{teacher_first:>10.3f}")
        for method, lr in (("GRPO", 1e-3), ("SDPO", 5e-4), ("VPD", 1e-3)):
            begun = time.time()
            curve, best = train(method, lr, base, seed, iterations, every)
            cells = "".join(f"{x:>7.3f}" for x in [first, *curve])
            teacher = "-" if method == "GRPO" else f"{best:.3f}"
            print(f"{seed:>4}  {method:<6}  {lr:.0e} {cells}{teacher:>10}{time.time() - begun:>9.1f}", flush=True)
    print(NOTE.format(seconds=time.time() - start))


if __name__ == "__main__":
    main()
