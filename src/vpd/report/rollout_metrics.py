"""Metrics of the rollouts themselves, under TRL's names where the thing is the same."""

import resource
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from vpd.feedback.critique import CRITICS
from vpd.quoting import feedback_quoted
from vpd.types import Group, Metrics, Rollout

REPEATED_RUN = 4  # tokens


def rollout_metrics(groups: Sequence[Group], *, fixed_length: bool = False) -> Metrics:
    """Reward, length and context metrics of one iteration.

    ``completions/clipped_ratio`` (answers cut by ``max_completion_length``) is left out where answers have a
    ``fixed_length`` and a full one is normal.  Rewards are those of the answers that were graded.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.completion.tokens) for rollout in rollouts]
    prompts = [r.teacher_prompt for r in rollouts if r.teacher_prompt and r.teacher_prompt.sources]
    metrics: Metrics = {
        **_outcomes(groups),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/max_length": float(max(lengths)),
        **_repetition(rollouts),
        "teacher/rows_with_context": float(len(prompts)),
        "teacher/tokens_cut": float(sum(prompt.cut for prompt in prompts)),
    }
    if any(rollout.completion.turns > 1 for rollout in rollouts):
        spoken = sum(sum(rollout.completion.sampled) for rollout in rollouts)
        metrics["completions/mean_turns"] = statistics.fmean(rollout.completion.turns for rollout in rollouts)
        metrics["completions/env_token_share"] = 1 - spoken / sum(lengths)
    counts = {
        "teacher/rows_without_room": sum(bool(r.context) and r.teacher_prompt is None for r in rollouts),
        "teacher/control_tokens_removed": sum(prompt.control_tokens for prompt in prompts),
        "teacher/unknown_tokens": sum(prompt.unknown_tokens for prompt in prompts),
        "completions/reply_tokens_cut": sum(rollout.completion.reply_cut for rollout in rollouts),
        "completions/reply_control_tokens_removed": sum(r.completion.reply_control_tokens for r in rollouts),
        "feedback/tokens_cut": sum(section.cut for rollout in rollouts for section in rollout.context),
        "feedback/control_tokens_removed": sum(s.control_tokens for rollout in rollouts for s in rollout.context),
    }
    metrics |= {name: float(count) for name, count in counts.items() if count}
    if not fixed_length:
        metrics["completions/clipped_ratio"] = statistics.fmean(r.completion.finish == "length" for r in rollouts)
    sources = Counter("+".join(prompt.sources) for prompt in prompts)
    metrics |= {f"teacher/from_{source}": count / len(rollouts) for source, count in sorted(sources.items())}
    metrics |= _written_metrics(rollouts)
    metrics |= _retry_metrics(rollouts)
    metrics |= _judge_metrics(groups)
    counts = {
        "recorded/rows": sum(r.completion.recorded for r in rollouts),
        "recorded/rows_ungraded": sum(not r.grade.graded for r in rollouts),
    }
    metrics |= {name: float(count) for name, count in counts.items() if count}
    names = sorted({name for rollout in rollouts for name in rollout.grade.metrics})
    for name in names:
        values = [r.grade.metrics[name] for r in rollouts if name in r.grade.metrics]
        metrics[f"env/{name}"] = statistics.fmean(values)
    return metrics


def _outcomes(groups: Sequence[Group]) -> Metrics:
    graded = [[r for r in group.rollouts if r.grade.graded] for group in groups]
    rewards = [[r.grade.reward for r in group] for group in graded if group]
    if not rewards:
        return {}
    spreads = [statistics.pstdev(group) for group in rewards]
    return {
        "reward": statistics.fmean(reward for group in rewards for reward in group),
        "reward_std": statistics.fmean(spreads),
        "success": statistics.fmean(r.success for group in graded for r in group),
        "frac_reward_zero_std": statistics.fmean(spread == 0 for spread in spreads),
    }


def _repetition(rollouts: Sequence[Rollout]) -> Metrics:
    """Share of the runs of four tokens in an answer that stand in it before (seq-rep-4, arXiv 1908.04319), mean.

    What the environment replied does not count.  Answers of fewer than eight tokens are left out; empty where all are.
    """
    shares = []
    for rollout in rollouts:
        tokens = [t for t, s in zip(rollout.completion.tokens, rollout.completion.sampled, strict=True) if s]
        if len(tokens) >= 2 * REPEATED_RUN:
            runs = [tuple(tokens[i : i + REPEATED_RUN]) for i in range(len(tokens) - REPEATED_RUN + 1)]
            shares.append(1 - len(set(runs)) / len(runs))
    return {"completions/repetition": statistics.fmean(shares)} if shares else {}


def _written_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """The tokens that models wrote for each source, and the shares of critiques that say nothing or are cut off."""
    sections = [section for rollout in rollouts for section in rollout.context]
    tokens: Counter[str] = Counter()
    for section in sections:
        tokens[section.source] += section.tokens
    metrics = {f"feedback/{source}_tokens": float(n) for source, n in sorted(tokens.items()) if n}
    for source in CRITICS:
        clipped = [section.clipped for section in sections if section.source == source]
        silent = sum(rollout.silent.count(source) for rollout in rollouts)
        if clipped or silent:
            metrics[f"feedback/{source}_empty"] = silent / (silent + len(clipped))
        if clipped:
            metrics[f"feedback/{source}_clipped"] = statistics.fmean(clipped)
    return metrics


def _retry_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """The teacher's accuracy in training, and how much of the feedback is quoted (words in a row, means over rows).

    ``retries/quoted_run`` is of the retries, ``completions/quoted_run`` of the student's attempts that they follow,
    which were made before that feedback was written.
    """
    pairs = [(attempt, retry) for attempt in rollouts for retry in attempt.retries]
    if not pairs:
        return {}
    retried = [attempt for attempt in rollouts if attempt.retries]
    return {
        "retries/rows": float(len(pairs)),
        "retries/success": statistics.fmean(retry.success for _, retry in pairs),
        "retries/reward": statistics.fmean(retry.grade.reward for _, retry in pairs),
        "retries/quoted_run": statistics.fmean(feedback_quoted(attempt, retry) for attempt, retry in pairs),
        "completions/quoted_run": statistics.fmean(feedback_quoted(attempt, attempt) for attempt in retried),
    }


def _judge_metrics(groups: Sequence[Group]) -> Metrics:
    """How often a judge was sure, and how often it agreed with the rewards where these differ; empty without one."""
    compared = [
        (r, group.rollouts[one.other], one) for group in groups for r in group.rollouts for one in r.comparisons
    ]
    if not compared:
        return {}
    decided = [(r, other, one) for r, other, one in compared if one.preferred is not None]
    agrees = [
        (r.grade.reward > other.grade.reward) == one.preferred
        for r, other, one in decided
        if r.grade.reward != other.grade.reward
    ]
    metrics: Metrics = {
        "judge/pairs": float(len(compared)),
        "judge/unsure": 1 - len(decided) / len(compared),
        "judge/disagree": statistics.fmean(one.disagree for _, _, one in compared),
        "judge/unreadable": float(sum(one.unreadable for _, _, one in compared)),
        "judge/tokens": float(sum(one.tokens for _, _, one in compared)),
    }
    return metrics | ({"judge/agrees_with_reward": statistics.fmean(agrees)} if agrees else {})


def rollout_metrics_for(*, fixed_length: bool) -> Callable[[Sequence[Group]], Metrics]:
    """:func:`rollout_metrics` for one environment, and the memory that the run has needed so far."""
    return lambda groups: rollout_metrics(groups, fixed_length=fixed_length) | peak_memory()


def peak_memory() -> Metrics:
    """Highest memory so far in GiB: the process's resident set, and the accelerator's allocation if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    metrics: Metrics = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_available():
        metrics["memory/peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics
