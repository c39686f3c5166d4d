"""Which curves a report shows, and what each metric means in a sentence."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of a chart; ``dash`` tells it from the others, ``error`` names the metric of its standard error."""

    metric: str
    label: str
    dash: str = "solid"
    error: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of one part of the report; ``share``: from 0 to 1; ``zero``: a line at 0 tells better from worse."""

    part: str
    title: str
    about: str
    lines: tuple[Line, ...]
    unit: str = ""
    share: bool = False
    zero: bool = False


CHARTS = (
    Chart(
        "learning",
        "Student on held-out tasks",
        "Share of its answers that are right, without any feedback. This is what the run is for.",
        (Line("eval/accuracy", "student"),),
        "share right",
        share=True,
    ),
    Chart(
        "learning",
        "Failed attempts again",
        "The same failed held-out attempts, answered once more with the feedback (the teacher) and without it (the "
        "control). The distance between the two is what there is to distil.",
        (
            Line("eval_teacher/accuracy", "teacher, with feedback"),
            Line("eval_teacher/student_accuracy", "control, without", "dot"),
        ),
        "share right",
        share=True,
    ),
    Chart(
        "learning",
        "Gain from feedback",
        "Teacher less control, task by task; the bars are one standard error. At 0 there is nothing left to distil "
        "that these tasks can show.",
        (Line("eval_teacher/gain", "gain", error="eval_teacher/gain_se"),),
        "share right",
        zero=True,
    ),
    Chart("learning", "Reward in training", "Mean over the step's answers.", (Line("reward", "reward"),), "reward"),
    Chart(
        "learning",
        "Success in training",
        "Share of the step's answers that count as solved, and of the teacher's retries where there are any.",
        (Line("success", "student"), Line("retries/success", "retries", "dash")),
        "share right",
        share=True,
    ),
    Chart(
        "learning",
        "Length of answers",
        "Mean number of tokens. A collapse means that short answers are rewarded, or that the teacher stops early.",
        (Line("completions/mean_length", "length"),),
        "tokens",
    ),
    Chart(
        "teacher",
        "Teacher against student",
        "Divergence of their distributions over the next token on the student's own answers. It falls as the student "
        "takes over what the teacher knows.",
        (Line("m_step/divergence", "divergence"),),
        "nats a token",
    ),
    Chart(
        "teacher",
        "Teacher less student",
        "Mean log-ratio of the tokens that the student wrote. Below 0 the teacher likes them less than the student.",
        (Line("m_step/teacher_minus_student", "log-ratio"),),
        "nats a token",
        zero=True,
    ),
    Chart(
        "teacher",
        "Entropy",
        "How undecided each is about the next token. A teacher whose entropy rises is forgetting how to answer.",
        (Line("m_step/entropy", "student"), Line("m_step/teacher_entropy", "teacher", "dash")),
        "nats a token",
    ),
    Chart(
        "teacher",
        "Rows",
        "Answers that had a context for the teacher to read, and those that were learned from.",
        (Line("rows/trained", "trained"), Line("teacher/rows_with_context", "with context", "dash")),
        "rows a step",
    ),
    Chart(
        "e_step",
        "Implicit rewards of both classes",
        "How much the teacher prefers the answers that succeeded, and those that failed, beside the shift between "
        "them. The E-step pulls the two apart.",
        (
            Line("e_step/implicit_reward_success", "successes"),
            Line("e_step/implicit_reward_failure", "failures", "dash"),
            Line("e_step/shift", "shift", "dot"),
        ),
        "implicit reward",
        zero=True,
    ),
    Chart(
        "e_step",
        "Does the teacher tell them apart?",
        "Share of rows whose implicit reward is on the right side of the shift, the mean of both classes (one half: no "
        "better than chance), and the share of rows that are past learning.",
        (Line("e_step/accuracy", "accuracy"), Line("e_step/saturation", "saturated", "dot")),
        "share of rows",
        share=True,
    ),
    Chart(
        "e_step",
        "What the E-step does to the student",
        "KL of the student after it from the student before it. Student and teacher are one network, so some drift is "
        "normal; above .1 it is an alarm.",
        (Line("e_step/student_drift_kl", "drift"),),
        "nats a token",
    ),
    Chart(
        "gate",
        "Evidence",
        "How often the teacher prefers the success of a success and a failure at the same task: of this batch (dotted),"
        " and over time with one standard error. One half: no better than chance.",
        (Line("gate/auc_mean", "over time", error="gate/auc_se"), Line("gate/auc", "this batch", "dot")),
        "share of pairs",
        share=True,
    ),
    Chart(
        "gate",
        "Trust",
        "The weight of the distillation beside the policy gradient: twice the evidence less one, at least 0.",
        (Line("gate/trust", "trust"),),
        "weight",
        share=True,
    ),
    Chart(
        "gate",
        "Mixed groups",
        "Tasks with a success and a failure, which the evidence is made of. Without any, trust stays what it is.",
        (Line("gate/groups", "groups"),),
        "groups a step",
    ),
    Chart(
        "optimiser",
        "Gradient norms",
        "Before clipping, of each kind of update.",
        (
            Line("m_step/grad_norm", "M-step"),
            Line("e_step/grad_norm", "E-step", "dash"),
            Line("policy/grad_norm", "policy", "dot"),
        ),
        "norm",
    ),
    Chart("optimiser", "Learning rate", "Of the schedule.", (Line("learning_rate", "learning rate"),), "rate"),
)
#: part -> its name in the menu and its title
PARTS = {
    "learning": ("Learning", "Does it learn?"),
    "teacher": ("Teacher", "Teacher and student"),
    "e_step": ("E-step", "The E-step"),
    "gate": ("Gate", "The gate"),
    "optimiser": ("Optimiser", "The optimiser"),
}
#: seconds of a step by what they went to; time/e_step is a part of time/update
TIMES = {
    "time/rollout": "sampling and grading",
    "time/rollout_wait": "waiting for rollouts that are made beside the update",
    "time/feedback": "feedback",
    "time/retries": "retries",
    "time/e_step": "E-step",
    "time/update": "M-step and the rest of the update",
    "time/eval": "evaluation",
    "time/record": "token records",
}
#: tokens of a step by what they were for
TOKENS = {
    "sampled": "sampled answers",
    "critiques": "critiques written by a model",
    "e_step/tokens": "learned from in the E-step",
    "m_step/tokens": "learned from in the M-step",
    "policy/tokens": "learned from in the policy gradient",
}


def charts_with(names: set[str]) -> list[dict[str, Any]]:
    """The charts that show something of these metrics, with the lines that they have."""
    found = []
    for chart in CHARTS:
        lines = [asdict(line) for line in chart.lines if line.metric in names]
        if lines:
            found.append({**asdict(chart), "lines": lines})
    return found
