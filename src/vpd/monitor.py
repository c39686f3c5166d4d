"""Alarms: what goes wrong in such runs without an error, noticed while it happens, with what to change.

A rule looks at the metrics of all steps so far and returns what it saw, or None.  A rule that fires raises one alarm;
it may fire again once it has looked ``REARM`` times and seen nothing.  A rule about something that is not measured at
every step (an evaluation, an E-step) looks at the steps that have it.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vpd.feedback.critique import CRITICS
from vpd.run_folder.files import FileSystem, rewind_lines
from vpd.types import Group, Metrics

History: TypeAlias = Sequence[Metrics]

FILE = "alarms.jsonl"
REARM = 10
START = 5  # steps whose mean is "the beginning"

# An evaluation that may say that a teacher is no better: a gain of .2 is then two standard errors at least.
ENOUGH_TASKS = 16
LARGEST_SE = 0.1
LEAST_TRUST = 0.1  # below it next to nothing of the loss of `gated` comes from the teacher
NEGLIGIBLE = 0.02  # a gain that is not worth having
#: Metrics that say how far the sampler is from the learner.
GAPS = [f"{step}/{name}" for step in ("m_step", "policy") for name in ("sampler_mismatch", "sampling_logp_difference")]
NOTICEABLE = 0.005  # nats a token that a sampler may move away from the learner
LEAST_EFFECTIVE, LARGEST_MOVE = 0.5, 1.0  # of recorded answers: effective share of tokens, nats a token
ENTROPIES = ("m_step/entropy", "policy/entropy")
ENOUGH_SUCCESS, BETTER = 0.5, 0.1  # certain or repetitive answers are fine where they succeed, or do more often
REPEATED = 0.3  # a larger share of repeated runs of four tokens than at the beginning
QUOTED_WORDS = 2.0  # more words in a row of the feedback than at the beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One warning: the step, the rule, what it saw in the metrics, and what to do."""

    step: int
    rule: str
    saw: str
    do: str


@dataclass(frozen=True, slots=True)
class Rule:
    """An alarm's name, its condition (None: fine; else what was seen), and its advice, or a function for it.

    ``needs`` names the metric without which there is nothing to look at in a step; empty: it looks at every step.
    """

    name: str
    look: Callable[[History], str | None]
    do: str | Callable[[History], str]
    needs: str = ""

    def looks_at(self, metrics: Metrics) -> bool:
        """Whether a step has what the rule is about."""
        return not self.needs or self.needs in metrics

    def advice(self, history: History) -> str:
        """What to do about what was seen."""
        return self.do if isinstance(self.do, str) else self.do(history)


class Monitor:
    """An observer.  ``on_alarm`` is called with every alarm; with ``folder`` they are also kept in ``alarms.jsonl``."""

    def __init__(
        self,
        on_alarm: Callable[[Alarm], None],
        *,
        folder: Path | None = None,
        rules: Sequence[Rule] = (),
        files: FileSystem | None = None,
    ):
        self.alarms: list[Alarm] = []
        self._on_alarm = on_alarm
        self._folder = folder
        self._files = files or FileSystem()
        self._rules = tuple(rules) or RULES
        self._steps: list[int] = []
        self._history: list[Metrics] = []  # of those steps
        self._fired: dict[str, list[int]] = {}  # rule -> after how many entries of the history it fired

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        self._steps.append(step)
        self._history.append(metrics)
        for rule in self._rules:
            saw = rule.look(self._history) if rule.looks_at(metrics) else None
            if saw is None:
                continue
            fired = self._fired.setdefault(rule.name, [])
            since = self._history[fired[-1] : -1] if fired else []
            first = not fired or sum(map(rule.looks_at, since)) >= REARM
            fired.append(len(self._history))
            if first:
                self._raise(Alarm(step=step, rule=rule.name, saw=saw, do=rule.advice(self._history)))

    def rewind(self, step: int) -> None:
        """Forget the metrics and alarms after ``step``, in ``alarms.jsonl`` too."""
        length = sum(seen <= step for seen in self._steps)
        self._steps, self._history = self._steps[:length], self._history[:length]
        self._fired = {name: [at for at in fired if at <= length] for name, fired in self._fired.items()}
        self.alarms = [alarm for alarm in self.alarms if alarm.step <= step]
        if self._folder is not None:
            rewind_lines(self._folder / FILE, step, self._files)

    def state(self) -> dict[str, Any]:
        """All metrics so far, when each rule fired, and the alarms."""
        alarms = [asdict(alarm) for alarm in self.alarms]
        return {"steps": self._steps, "history": self._history, "fired": self._fired, "alarms": alarms}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; no alarm is repeated."""
        self._steps, self._history = list(state["steps"]), list(state["history"])
        self._fired = {name: list(fired) for name, fired in state["fired"].items()}
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]

    def _raise(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        self._on_alarm(alarm)
        if self._folder is not None:
            self._files.append_line(self._folder / FILE, json.dumps(asdict(alarm)))


def _series(history: History, name: str) -> list[float]:
    """The finite values of one metric, oldest first."""
    return [metrics[name] for metrics in history if name in metrics and math.isfinite(metrics[name])]


def _beginning_and_now(history: History, name: str, last: int = 3) -> tuple[float, float]:
    """The means of a metric's first ``START`` values and of its newest; 0 and 0 until there are more."""
    values = _series(history, name)
    return (statistics.fmean(values[:START]), statistics.fmean(values[-last:])) if len(values) > START else (0.0, 0.0)


def _above(name: str, bound: float, what: str) -> Callable[[History], str | None]:
    """Fires when the newest value is above a bound."""

    def look(history: History) -> str | None:
        value = history[-1].get(name)
        return None if value is None or not value > bound else f"{what}: {name} is {value:.3g}, above {bound:g}"

    return look


def _teacher_no_better(history: History) -> str | None:
    """Compares the teacher's retries of failed attempts with the control's, which read no feedback.

    Fires where the gain is at most 0 although the evaluation is large enough to show one (``ENOUGH_TASKS`` tasks, a
    standard error of at most ``LARGEST_SE``), and where the gain is within two standard errors of 0 and these bound it
    below ``NEGLIGIBLE``.  A useless teacher is noticed at about every second evaluation of 64 tasks; one whose gain is
    two standard errors, and not negligible, is suspected wrongly at one evaluation in 44.

    Silent in ``gated`` where the teacher was better once and its trust is gone: the student has overtaken it, as it
    should, and no longer learns from it.
    """
    names = [f"eval_teacher/{name}" for name in ("gain", "gain_se", "tasks", "accuracy", "student_accuracy")]
    values = [history[-1][name] for name in names if name in history[-1]]
    if "m_step/rows" not in history[-1] or len(values) < len(names):
        return None
    gain, error, tasks, teacher, control = values
    none_seen = gain <= 0 and error <= LARGEST_SE and tasks >= ENOUGH_TASKS
    none_left = gain <= 2 * error and gain + 2 * error < NEGLIGIBLE and tasks >= ENOUGH_TASKS
    overtaken = history[-1].get("gate/trust", 1.0) < LEAST_TRUST and _was_better(history[:-1])
    if overtaken or not (none_seen or none_left):
        return None
    return (
        f"the teacher is right in {teacher:.1%} of its retries of failed attempts, the same model without the feedback "
        f"in {control:.1%}: a gain of {gain:+.3f} ± {error:.3f} over {tasks:.0f} tasks"
    )


def _was_better(history: History) -> bool:
    """Whether an evaluation found the teacher better than the control by more than two standard errors."""
    return any(
        metrics["eval_teacher/gain"] > 2 * metrics["eval_teacher/gain_se"]
        for metrics in history
        if "eval_teacher/gain" in metrics and "eval_teacher/gain_se" in metrics
    )


def _about_the_teacher(history: History) -> str:
    """What to do about a teacher that is no better: one that never was, or that the student has overtaken."""
    gated = "gate/trust" in history[-1]
    if _was_better(history[:-1]):
        wait = "gate/trust should fall by itself; if it does not, stop."
        leave = "stop, or use algorithm.name gated, which then learns from the reward."
        return f"It was better before, so the student may have overtaken its teacher: {wait if gated else leave}"
    other = "" if gated else ", or use algorithm.name gated or grpo"
    return (
        "Look at the teacher's prompts in rollouts/: is the feedback readable and specific? Make it say more, or add a"
        f" source to feedback{other}."
    )


def _teacher_entropy(history: History) -> str | None:
    first, now = _beginning_and_now(history, "m_step/teacher_entropy", last=1)
    if now <= 1.5 * first + 0.1:
        return None
    return f"the teacher's entropy rose from {first:.2f} to {now:.2f} nats a token: it is forgetting how to answer"


def _length_collapse(history: History) -> str | None:
    first, now = _beginning_and_now(history, "completions/mean_length")
    return f"answers shrank from {first:.1f} to {now:.1f} tokens" if now < first / 3 else None


def _entropy_collapse(history: History) -> str | None:
    """Fires where answers become certain (a third of the entropy at the beginning) and no more often right."""
    first, now = _beginning_and_now(history, next((name for name in ENTROPIES if name in history[-1]), ""))
    success = _series(history, "success")
    if not success:
        return None
    before, after = statistics.fmean(success[:START]), statistics.fmean(success[-3:])
    if now >= first / 3 or after >= ENOUGH_SUCCESS or after >= before + BETTER:
        return None
    return f"the student's entropy fell from {first:.2f} to {now:.2f} nats a token, and {after:.0%} of answers succeed"


def _repetition(history: History) -> str | None:
    first, now = _beginning_and_now(history, "completions/repetition")
    success = statistics.fmean(_series(history, "success")[-3:] or [0.0])
    if now < first + REPEATED or success >= ENOUGH_SUCCESS:
        return None
    return f"{now:.0%} of the runs of four tokens in an answer stand in it before, {first:.0%} at the beginning"


def _flat_reward(history: History) -> str | None:
    equal_rewards = _series(history, "frac_reward_zero_std")[-20:]
    if len(equal_rewards) < 20 or min(equal_rewards) < 1.0:
        return None
    rewards = _series(history, "reward")[-20:]
    return f"for 20 steps all answers to a task had one reward (mean {statistics.fmean(rewards):.3g})"


def _no_context(history: History) -> str | None:
    reads = "m_step/rows" in history[-1] and "m_step/divergence" not in history[-1]  # an external teacher needs none
    rows = _series(history, "teacher/rows_with_context")[-5:]
    failing = [1 - value for value in _series(history, "success")[-5:]]
    if not reads or len(rows) < 5 or max(rows) > 0 or max(failing, default=1) == 0:
        return None
    return "for 5 steps no failed answer had a context: the teacher has nothing to read and nothing is trained"


def _silent_critic(history: History) -> str | None:
    silent = [source for source in CRITICS if history[-1].get(f"feedback/{source}_empty") == 1.0]
    return f"every critique of {' and '.join(silent)} is empty" if silent else None


def _nothing_learned(history: History) -> str | None:
    rows = _series(history, "rows/trained")[-5:]
    learns = [name for name in ("preference", "sft", "ldd") if f"{name}/rows" in history[-1]]
    if not learns or len(rows) < 5 or max(rows) > 0:
        return None
    drawn = statistics.fmean(_series(history, "rows/drawn")[-5:])
    reasons = {
        name.removeprefix("rows/"): value
        for name, value in history[-1].items()
        if name.startswith("rows/") and name not in ("rows/drawn", "rows/trained") and value
    }
    why = ", ".join(f"{name} {value:.0f}" for name, value in reasons.items())
    return f"for 5 steps none of {drawn:.0f} attempts a step was learned from; left out in the last: {why or 'none'}"


def _dead_gradient(history: History) -> str | None:
    for step in ("m_step", "e_step", "policy"):
        norm, loss = history[-1].get(f"{step}/grad_norm"), history[-1].get(f"{step}/loss")
        if norm is not None and loss is not None and norm < 1e-6 and abs(loss) > 1e-3:
            return f"{step}: the gradient norm is {norm:.1e} at a loss of {loss:.3g}"
    return None


def _sampler_gaps(history: History, name: str) -> list[float]:
    """A gap of sampler and learner, of steps in which both had the same weights.

    So those are left out with rollouts of older weights, and ``sampler_mismatch`` where an E-step moved the student.
    """
    history = [metrics for metrics in history if not metrics.get("rollout/staleness")]
    if name.endswith("sampler_mismatch"):
        history = [metrics for metrics in history if not metrics.get("e_step/rows")]
    return _series(history, name)


def _sampler_differs(history: History) -> str | None:
    for name in GAPS:
        for gap in _sampler_gaps(history[-1:], name):
            if gap > 0.1:
                return f"the sampler's log-probs and the learner's differ by {gap:.3g} nats a token"
    return None


def _sampler_drifts(history: History) -> str | None:
    """A sampler that takes the weights only in part moves away from the learner, little by little."""
    for name in GAPS:
        values = _sampler_gaps(history, name)
        if not _sampler_gaps(history[-1:], name) or len(values) < START + 3:
            continue
        first, now = statistics.fmean(values[:START]), min(values[-3:])
        if now > 2 * first + NOTICEABLE:
            return f"the sampler moved away from the learner, from {first:.3g} to {now:.3g} nats a token"
    return None


def _stale_rollouts(history: History) -> str | None:
    lag = history[-1].get("rollout/staleness", 0.0)
    gaps = [history[-1].get(f"{step}/sampling_logp_difference", 0.0) for step in ("m_step", "policy")]
    if lag <= 0 or max(gaps) == 0.0:
        return None
    return f"answers were sampled by weights {lag:.3g} iterations old, and the importance ratio does not correct for it"


def _recorded_too_old(history: History) -> str | None:
    share, moved = history[-1].get("recorded/effective_tokens", 1.0), history[-1]["recorded/staleness"]
    if share >= LEAST_EFFECTIVE and moved <= LARGEST_MOVE:
        return None
    return f"recorded answers: {share:.0%} of their tokens count by the importance ratio, {moved:.2g} nats a token away"


def _quotes_feedback(history: History) -> str | None:
    first, now = _beginning_and_now(history, "completions/quoted_run")
    if now < first + QUOTED_WORDS:
        return None
    return (
        f"answers repeat {now:.1f} words in a row of the feedback that they have not read, {first:.1f} at the beginning"
    )


RULES = (
    Rule(
        "teacher_no_better",
        _teacher_no_better,
        _about_the_teacher,
        needs="eval_teacher/gain",
    ),
    Rule(
        "teacher_entropy",
        _teacher_entropy,
        "Lower optim.learning_rate or algorithm.e_lr_scale, raise algorithm.e_every, or take a slower EMA teacher.",
        needs="m_step/teacher_entropy",
    ),
    Rule(
        "student_drift",
        _above("e_step/student_drift_kl", 0.1, "the E-step moves the student too, by much"),
        "Raise algorithm.e_every or lower algorithm.e_lr_scale.",
        needs="e_step/student_drift_kl",
    ),
    Rule(
        "length_collapse", _length_collapse, "Look at rollouts/: is a short answer rewarded? Lower the learning rate."
    ),
    Rule(
        "entropy_collapse",
        _entropy_collapse,
        "Look at rollouts/: are all answers alike? Lower the learning rate, or let the student learn from what"
        " succeeds: rollout.retries.",
    ),
    Rule(
        "repetition",
        _repetition,
        "Look at rollouts/: the student has learned to repeat itself. Lower the learning rate, and let the grader"
        " refuse repetition.",
        needs="completions/repetition",
    ),
    Rule(
        "flat_reward",
        _flat_reward,
        "Make tasks easier or harder, or let the grader give a part of the reward for a part of the answer.",
    ),
    Rule(
        "no_context",
        _no_context,
        "Let the grader say why (informative feedback), or add 'sibling' or 'self_critique' to feedback.",
    ),
    Rule(
        "silent_critic",
        _silent_critic,
        "Raise max_critique_length, which a model that thinks may use up before it answers, or change the critic's"
        " template or model.",
    ),
    Rule(
        "nothing_learned",
        _nothing_learned,
        "Look at rollouts/: plare needs a judge that decides (judge/unreadable, judge/disagree), sft successes, ldd"
        " text that says more than right or wrong.",
        needs="rows/trained",
    ),
    Rule(
        "e_step_saturated",
        _above("e_step/saturation", 0.5, "most rows are past learning in the E-step"),
        "Lower algorithm.teacher_beta, or set algorithm.log_ratio to mean.",
        needs="e_step/saturation",
    ),
    Rule(
        "kind_predicts_success",
        _above("e_step/kind_predicts_success", 0.6, "the kind of context alone tells successes from failures"),
        "Use algorithm.success_context: matched, or a source that writes about both.",
        needs="e_step/kind_predicts_success",
    ),
    Rule(
        "grader_failed",
        _above("env/grader_failed", 0.0, "some answers could not be graded and count as failures"),
        "The warnings name the rows. Mend the grader, or set env.max_failed to 0 to stop at the first.",
    ),
    Rule(
        "quotes_feedback",
        _quotes_feedback,
        "Look at rollouts/: the model has learned to write feedback in place of answers. Lower"
        " algorithm.retry_max_quote, and let the grader refuse answers that quote it.",
        needs="completions/quoted_run",
    ),
    Rule(
        "recorded_too_old",
        _recorded_too_old,
        "The student has left those who gave the recorded answers: stop here, mix in fresh attempts (env.fresh_share),"
        " or record anew.",
        needs="recorded/staleness",
    ),
    Rule("dead_gradient", _dead_gradient, "Something cuts the graph or underflows: check dtype and frozen parameters."),
    Rule("stale_rollouts", _stale_rollouts, "Set algorithm.importance_reference to sampler."),
    Rule(
        "sampler_drifts",
        _sampler_drifts,
        "The engine may serve old weights in part: restart its server, and look at engine/canary_difference.",
    ),
    Rule("sampler_differs", _sampler_differs, "Check that both use one precision and the same weights."),
)
