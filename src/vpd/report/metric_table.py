"""Every metric that a run writes, described in one place: the console's legend and docs/metrics.md are made of it.

A part of a name in braces stands for many: ``{update}/loss`` for ``m_step/loss``, ``e_step/loss`` and so on.
``tests/test_metric_table.py`` holds the table against what runs write.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

UPDATES = ("m_step", "e_step", "policy", "preference", "sft", "ldd")
#: What a placeholder of a name may be, as a regular expression.
PLACEHOLDERS: Mapping[str, str] = {
    "update": "|".join(UPDATES),
    "evaluation": "eval|eval_teacher",
    "k": r"\d+",
    "term": "[a-z]+",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its name or pattern, its meaning, its unit, who writes it, and what a healthy value looks like."""

    name: str
    meaning: str
    unit: str = ""
    written_by: str = ""
    healthy: str = ""

    def matches(self, name: str) -> bool:
        """Whether this describes the metric ``name``."""
        return re.fullmatch(_expression(self.name), name) is not None


@dataclass(frozen=True, slots=True)
class Part:
    """Metrics that belong together, with a sentence about them."""

    title: str
    about: str
    metrics: tuple[Metric, ...]


PARTS = (
    Part(
        "Outcomes in training",
        "Of the step's answers that were graded, before they are learned from.",
        (
            Metric("step", "iterations trained so far; at 0 the evaluation before training", "", "every run"),
            Metric("reward", "mean reward", "reward", "every run with a grade", "rises"),
            Metric("reward_std", "standard deviation within a group, mean over groups", "reward", "as `reward`",
                   "above 0, else a policy gradient learns nothing"),
            Metric("success", "share of answers that count as solved", "share", "as `reward`", "rises"),
            Metric("frac_reward_zero_std", "share of groups whose rewards are all equal", "share", "as `reward`",
                   "well below 1"),
            Metric("env/grader_failed", "share of answers that the grader could not grade", "share",
                   "reward functions with `env.max_failed`", "0"),
            Metric("env/{name}", "what the environment measures of an answer (`Grade.metrics`), mean", "its own",
                   "environments that measure something"),
        ),
    ),
    Part(
        "Answers",
        "What the student wrote.",
        (
            Metric("completions/mean_length", "tokens of an answer", "tokens", "every run", "steady"),
            Metric("completions/max_length", "tokens of the longest answer", "tokens", "every run"),
            Metric("completions/repetition", "share of the runs of four tokens in an answer that stand in it before",
                   "share", "answers of eight tokens or more", "as at the beginning"),
            Metric("completions/clipped_ratio", "share of answers that `rollout.max_completion_length` cut", "share",
                   "environments whose answers have no fixed length", "near 0"),
            Metric("completions/mean_turns", "turns of an answer", "turns", "environments with replies"),
            Metric("completions/env_token_share", "share of an answer's tokens that the environment wrote", "share",
                   "environments with replies"),
            Metric("completions/reply_tokens_cut", "tokens cut from the environment's replies, which had no room",
                   "tokens", "where there are any", "none"),
            Metric("completions/reply_control_tokens_removed", "control tokens taken out of the environment's replies",
                   "tokens", "where there are any"),
            Metric("completions/quoted_run", "words in a row that failed attempts share with the feedback, unread",
                   "words", "`rollout.retries`", "as at the beginning"),
        ),
    ),
    Part(
        "Contexts",
        "What the teacher reads.",
        (
            Metric("teacher/rows_with_context", "answers with feedback for the teacher", "rows", "every run",
                   "as many as failed, with the source `environment`"),
            Metric("teacher/tokens_cut", "tokens cut from the teacher's prompts", "tokens", "every run", "0, or few"),
            Metric("teacher/from_{sources}", "share of answers whose context is of these sources, joined by +", "share",
                   "every run with contexts"),
            Metric("teacher/rows_without_room", "answers whose context found no room in the window", "rows",
                   "where there are any", "none"),
            Metric("teacher/control_tokens_removed", "control tokens taken out of texts that the teacher reads",
                   "tokens", "where there are any"),
            Metric("teacher/unknown_tokens", "words of the teacher's prompts that the tokenizer does not know",
                   "tokens", "where there are any", "none"),
            Metric("feedback/{source}_tokens", "tokens that a model wrote for this source", "tokens",
                   "`self_critique`, `critic`, `judge`"),
            Metric("feedback/{source}_empty", "share of critiques that say nothing", "share",
                   "`self_critique`, `critic`", "near 0"),
            Metric("feedback/{source}_clipped", "share of critiques that `max_critique_length` cut off", "share",
                   "`self_critique`, `critic`", "near 0"),
            Metric("feedback/tokens_cut", "tokens cut from what a model read or wrote for feedback", "tokens",
                   "where there are any", "none, or few"),
            Metric("feedback/control_tokens_removed", "control tokens taken out of what a model wrote", "tokens",
                   "where there are any"),
        ),
    ),
    Part(
        "Retries",
        "The teacher's own attempts ([retries](retries.md)).",
        (
            Metric("retries/rows", "retries", "rows", "`rollout.retries`"),
            Metric("retries/success", "share of the teacher's retries that are solved", "share", "`rollout.retries`",
                   "above `success`"),
            Metric("retries/reward", "mean reward of the retries", "reward", "`rollout.retries`", "above `reward`"),
            Metric("retries/quoted_run", "words in a row that retries share with their feedback", "words",
                   "`rollout.retries`"),
            Metric("retries/left_out", "retries that succeeded and are not learned from, as they quote", "rows",
                   "`rollout.retries` with sdpo, vpd, gated", "few"),
        ),
    ),
    Part(
        "Rows",
        "What became of every answer; `rows/trained` and the reasons add up to `rows/drawn`.",
        (
            Metric("rows/drawn", "answers that the step was to have", "rows", "every run"),
            Metric("rows/trained", "answers that were learned from", "rows", "every run", "most of `rows/drawn`"),
            Metric("rows/no_context", "left out: nothing for the teacher to read", "rows", "sdpo, vpd, gkd"),
            Metric("rows/zero_advantage", "left out: as good as the others of its group", "rows",
                   "grpo, gated, hybrid"),
            Metric("rows/no_group", "left out: the only attempt at its task", "rows", "as `rows/zero_advantage`"),
            Metric("rows/no_outcome", "left out: nobody graded it", "rows", "recorded answers"),
            Metric("rows/failed_grade", "left out: its grader failed", "rows", "`env.max_failed`", "none"),
            Metric("rows/failure", "left out: it failed", "rows", "sft"),
            Metric("rows/no_preference", "left out: no judge preferred it or another to it", "rows", "plare"),
            Metric("rows/no_feedback", "left out: the environment said nothing", "rows", "ldd"),
            Metric("rows/no_room", "left out: the environment's text has no room in the window", "rows", "ldd"),
            Metric("rows/no_tokens", "left out: the student wrote nothing", "rows", "every method", "none"),
            Metric("rows/no_weight", "left out: the method gave it no weight", "rows", "every method"),
            Metric("rows/unused", "left out: the method passed it to no update", "rows", "every method"),
            Metric("rollout/staleness", "age of the weights that sampled the answers", "iterations", "every run",
                   "0; with `rollout.overlap` 1"),
        ),
    ),
    Part(
        "Updates",
        "Of each kind of update: `m_step` (sdpo, vpd, gated, gkd), `e_step` (vpd, gated), `policy` (grpo, hybrid), "
        "`preference` (plare), `sft`, `ldd`. Means over tokens, before the update.",
        (
            Metric("e_step/rows", "answers the E-step learned from", "rows", "vpd, gated",
                   "0 between E-steps, and in gated while trust is low"),
            Metric("m_step/rows", "answers the M-step learned from", "rows", "sdpo, vpd, gated, gkd"),
            Metric("{update}/rows", "answers the update learned from", "rows", "the update's methods"),
            Metric("{update}/tokens", "their tokens", "tokens", "the update's methods"),
            Metric("{update}/updates", "optimiser steps", "steps", "the update's methods"),
            Metric("policy/loss", "the policy gradient's loss", "", "grpo, hybrid", "near 0; it need not fall"),
            Metric("sft/loss", "of the answers that are learned, nats a token", "nats a token", "sft", "falls"),
            Metric("ldd/loss", "of the environment's text, nats a token", "nats a token", "ldd", "falls"),
            Metric("{update}/loss", "the sum of the weighted losses", "", "the update's methods"),
            Metric("{update}/{term}_loss", "one term of a loss of several: distill, policy, retry, dynamics", "",
                   "gated; `rollout.retries`; `dynamics`"),
            Metric("{update}/grad_norm", "norm of the gradient before clipping", "", "the update's methods",
                   "no jumps"),
            Metric("{update}/padding", "share of the computed tokens that are padding", "share", "the update's methods",
                   "below .3, else see `optim.max_tokens_per_microbatch`"),
            Metric("{update}/entropy", "how undecided the student is about the next token", "nats a token",
                   "all but the E-step", "falls slowly; near 0 it explores no more"),
            Metric("m_step/divergence", "of student and teacher, nats a token", "nats a token", "sdpo, vpd, gated, gkd",
                   "falls"),
            Metric("m_step/teacher_entropy", "how undecided the teacher is about the next token", "nats a token",
                   "as `m_step/divergence`", "steady"),
            Metric("{update}/teacher_minus_student", "mean log-ratio of the tokens that the student wrote",
                   "nats a token", "sdpo, vpd, gated, gkd, hybrid", "towards 0"),
            Metric("m_step/student_drift_kl", "KL of the student since the reference of the importance ratio",
                   "nats a token", "as `m_step/divergence`", "near 0"),
            Metric("{update}/importance_ratio", "mean importance ratio", "", "m_step and policy", "near 1"),
            Metric("policy/clip_ratio", "share of tokens whose ratio is outside the clipping range", "share", "grpo",
                   "near 0"),
            Metric("{update}/sampling_logp_difference", "distance of the sampler's log-probs from the reference",
                   "nats a token", "m_step and policy", "below .01; more with an engine of another precision"),
            Metric("{update}/sampler_mismatch", "distance of the sampler's log-probs from the learner's",
                   "nats a token", "`importance_reference: sampler`", "below .01; more with another precision"),
            Metric("policy/groups_without_signal", "share of groups whose rewards are all equal", "share", "grpo",
                   "well below 1"),
            Metric("learning_rate", "the schedule's", "", "every run"),
        ),
    ),
    Part(
        "E-step",
        "Of iterations with an E-step, before its first update ([method](method.md)).",
        (
            Metric("e_step/accuracy", "how well the teacher tells successes from failures (.5: by chance)", "share",
                   "vpd, gated", "above .5"),
            Metric("e_step/shift", "delta, what an implicit reward is compared with", "implicit reward", "vpd, gated",
                   "between both classes"),
            Metric("e_step/implicit_reward_success", "mean implicit reward of the successes", "implicit reward",
                   "vpd, gated, if there are any", "above the failures'"),
            Metric("e_step/implicit_reward_failure", "mean implicit reward of the failures", "implicit reward",
                   "vpd, gated, if there are any", "below the successes'"),
            Metric("e_step/rows_success", "successes", "rows", "vpd, gated", "some of both"),
            Metric("e_step/rows_failure", "failures", "rows", "vpd, gated", "some of both"),
            Metric("e_step/saturation", "share of rows more than 5 from the shift, which are past learning", "share",
                   "vpd, gated", "below .5"),
            Metric("e_step/kind_predicts_success", "how well the kind of context alone tells successes from failures",
                   "share", "vpd, gated", "below .6"),
            Metric("e_step/skipped", "1 where an E-step was due and no row had a context", "", "vpd, gated", "none"),
            Metric("e_step/student_drift_kl", "KL of the student after the E-step from the student before",
                   "nats a token",
                   "vpd, gated; not with a sampler's log-probs as reference, or several updates a batch", "below .1"),
            Metric("{update}/sampler_logp_difference", "largest distance of sampler and learner, of the rows compared",
                   "nats", "vpd, gated", "below .001; .5 in 16 bits"),
            Metric("{update}/rows_scored", "rows scored by the learner", "rows", "vpd, gated",
                   "few: all rows are scored where sampler and learner differ"),
        ),
    ),
    Part(
        "Gate",
        "Of evidence-gated VPD ([gated](gated.md)).",
        (
            Metric("gate/trust", "weight of what the teacher says beside the reward", "0 to 1", "gated",
                   "above 0 while the student still learns from feedback"),
            Metric("gate/auc", "share of this step's pairs (success, failure) that the teacher orders rightly", "share",
                   "gated", "above .5"),
            Metric("gate/auc_mean", "the running estimate of it, with the prior", "share", "gated", "above .5"),
            Metric("gate/auc_se", "its standard error; 0 while all groups agree", "share", "gated", "falls"),
            Metric("gate/gap", "mean log-ratio of the successes less that of the failures", "nats", "gated", "above 0"),
            Metric("gate/groups", "groups with a success and a failure, which the evidence is of", "groups", "gated",
                   "several"),
            Metric("gate/retry_auc", "share of the pairs of a retry and another attempt in which the retry is right",
                   "share", "gated with `rollout.retries`", "above .5"),
            Metric("gate/retry_groups", "groups with such pairs", "groups", "gated with `rollout.retries`"),
            Metric("gate/lr_scale", "factor on the learning rate", "", "gated"),
            Metric("gate/sampler_logp_difference", "as `e_step/sampler_logp_difference`", "nats", "gated",
                   "below .001; .5 in 16 bits"),
            Metric("gate/rows_scored", "as `e_step/rows_scored`", "rows", "gated", "few"),
        ),
    ),
    Part(
        "Judges and preferences",
        "Of the source `judge`, and of plare.",
        (
            Metric("judge/pairs", "pairs of attempts that were compared", "pairs", "the source `judge`"),
            Metric("judge/unsure", "share of the pairs of attempts that the judge does not decide", "share",
                   "the source `judge`", "well below 1"),
            Metric("judge/disagree", "share of the pairs whose verdict changes with their order", "share",
                   "the source `judge`", "near 0"),
            Metric("judge/unreadable", "verdicts that could not be read", "verdicts", "the source `judge`", "0"),
            Metric("judge/tokens", "tokens that the judge wrote", "tokens", "the source `judge`"),
            Metric("judge/agrees_with_reward", "share of the decided pairs in which the better reward is preferred",
                   "share", "the source `judge`, where rewards differ", "above .5"),
            Metric("preference/pairs", "pairs that are learned from", "pairs", "plare", "several"),
            Metric("preference/accuracy", "share of the decided pairs whose better attempt is the likelier one",
                   "share", "plare", "rises"),
            Metric("preference/margin", "mean advantage of the better attempt over the worse", "nats", "plare",
                   "rises"),
        ),
    ),
    Part(
        "Recorded answers",
        "Of steps with answers of a log ([recorded](recorded.md)).",
        (
            Metric("recorded/rows", "recorded answers among the rows", "rows", "`env.name: recorded`"),
            Metric("recorded/rows_ungraded", "those that nobody graded", "rows", "`env.name: recorded`"),
            Metric("recorded/staleness", "distance of the student from those who gave the answers", "nats a token",
                   "recorded answers, but for sft and ldd", "below 1"),
            Metric("recorded/effective_tokens", "share of the tokens that count by their importance ratio", "share",
                   "as `recorded/staleness`", "above .5"),
            Metric("recorded/effective_answers", "the same of whole answers", "share", "as `recorded/staleness`"),
        ),
    ),
    Part(
        "Evaluation",
        "Of steps with an evaluation (`run.eval_steps`). `eval_teacher` is of the failed attempts, answered again.",
        (
            Metric("eval/accuracy", "held-out tasks: right without feedback", "share", "`run.eval_steps`", "rises"),
            Metric("eval_teacher/accuracy", "failed held-out attempts again, with feedback", "share",
                   "`run.eval_steps` with feedback", "above the control's"),
            Metric("eval_teacher/student_accuracy", "the same again without", "share", "`run.eval_control`"),
            Metric("eval_teacher/gain", "teacher less control, mean over tasks", "share", "`run.eval_control`",
                   "two standard errors above 0, while there is something to distil"),
            Metric("eval_teacher/gain_se", "its standard error", "share", "`run.eval_control`", "below .1"),
            Metric("{evaluation}/avg@{k}", "mean share of k answers that are right; `accuracy` is the same", "share",
                   "`run.eval_steps`", "rises"),
            Metric("{evaluation}/pass@{k}", "share of tasks of which one of k answers is right", "share",
                   "`run.eval_steps`", "rises"),
            Metric("{evaluation}/avg@{k}_se", "its standard error over tasks", "share", "`run.eval_steps`"),
            Metric("{evaluation}/pass@{k}_se", "its standard error over tasks", "share", "`run.eval_steps`"),
            Metric("{evaluation}/reward", "mean reward", "reward", "`run.eval_steps`", "rises"),
            Metric("{evaluation}/tasks", "tasks", "tasks", "`run.eval_steps`", "64 or more, for a gain that shows"),
            Metric("{evaluation}/answers", "answers", "answers", "`run.eval_steps`"),
        ),
    ),
    Part(
        "Time, memory, engine",
        "Of several processes the largest.",
        (
            Metric("time/rollout", "sampling and grading", "seconds", "every run"),
            Metric("time/rollout_wait", "waiting for rollouts that are made beside the update", "seconds",
                   "`rollout.overlap`", "near 0"),
            Metric("time/feedback", "feedback", "seconds", "every run"),
            Metric("time/retries", "retries", "seconds", "`rollout.retries`"),
            Metric("time/teacher", "asking a teacher behind a server", "seconds", "`algorithm.teacher_url`"),
            Metric("time/update", "the update, an E-step included", "seconds", "every run"),
            Metric("time/e_step", "the E-step, a part of `time/update`", "seconds", "vpd, gated"),
            Metric("time/record", "token records", "seconds", "`run.record_rows`", "5 % of a step"),
            Metric("time/eval", "evaluation", "seconds", "`run.eval_steps`"),
            Metric("time/sync", "giving the server the weights", "seconds", "`engine.name: vllm`"),
            Metric("time/sync_write", "of it, writing them", "seconds", "`engine.name: vllm`"),
            Metric("time/sync_send", "of it, the server's loading", "seconds", "`engine.name: vllm`"),
            Metric("memory/peak_rss_gib", "most memory of the process so far", "GiB", "every run", "levels off"),
            Metric("memory/peak_cuda_gib", "most memory of the GPU so far", "GiB", "runs on a GPU", "levels off"),
            Metric("engine/canary_difference", "largest distance of the server's log-probs from the learner's",
                   "nats", "`engine.name: vllm`", "as in [vllm](vllm.md)"),
            Metric("engine/canary_difference_mean", "the same, mean over the canary's tokens", "nats",
                   "`engine.name: vllm`", "as in [vllm](vllm.md)"),
        ),
    ),
)  # fmt: skip


def metrics() -> Iterator[Metric]:
    """Every entry of the table, in its order."""
    for part in PARTS:
        yield from part.metrics


def names_of_evaluation(answers: int) -> list[str]:
    """The names of all that an evaluation with so many answers a task may measure."""
    part = next(part for part in PARTS if part.title == "Evaluation")
    names = [metric.name.replace("{k}", str(answers)) for metric in part.metrics]
    whose = PLACEHOLDERS["evaluation"].split("|")
    return list(dict.fromkeys(name.replace("{evaluation}", one) for name in names for one in whose))


@cache
def find_metric(name: str) -> Metric | None:
    """The entry that describes a metric, an exact name before a pattern; None for a metric of somebody's own."""
    found = [metric for metric in metrics() if metric.matches(name)]
    return min(found, key=lambda metric: "{" in metric.name, default=None)


def meaning_of(name: str) -> str:
    """The meaning of a shipped metric.  Raises KeyError for another."""
    metric = find_metric(name)
    if metric is None:
        raise KeyError(name)
    return metric.meaning


@cache
def _expression(name: str) -> str:
    """A regular expression for the names that a pattern stands for."""
    parts = re.split(r"\{(\w+)\}", name)
    return "".join(f"(?:{PLACEHOLDERS.get(p, '.+')})" if number % 2 else re.escape(p) for number, p in enumerate(parts))
