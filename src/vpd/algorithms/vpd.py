"""Variational Policy Distillation (arXiv 2605.15113): SDPO whose teacher is trained on outcomes.

E-step, every ``e_every`` iterations, before the M-step: the teacher learns to tell successes from failures with the
current student as reference (a sliding trust region),

    rt_i = beta * sum_t (log q(y_t|x,C) - sg log pi(y_t|x))
    L_E  = - mean_success log sigma(rt - delta) - mean_failure log sigma(-(rt - delta))

M-step: :class:`vpd.algorithms.distill.Distill`.  With ``e_every: null`` nothing but that is left, which is SDPO.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval

from vpd import losses
from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.contexts import SuccessContext, e_step_contexts, kind_predicts_success
from vpd.algorithms.distill import Distill, DistillSettings, SelfTeacher
from vpd.algorithms.examples import (
    reference_logprobs,
    student_logprobs,
    teacher_logprobs,
    to_examples,
    with_loss_weights,
)
from vpd.errors import ConfigError
from vpd.learners import Learner, Objective, Terms
from vpd.model.scorer import Batch, Scorer
from vpd.prompts import Prompter
from vpd.settings import Share
from vpd.types import Example, Group, Metrics

SATURATED = 5.0  # |rt - delta| beyond which the sigmoid's gradient is below 1 %


_PRESET: Any = None  # stands for the value that ``preset`` gives
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {"distillation_alpha": 0.5, "teacher": "ema"},
    "paper": {"distillation_alpha": 1.0, "teacher": "live"},
}


@dataclass(frozen=True, kw_only=True)
class VPDSettings(SelfTeacher, DistillSettings):
    """VPD: an E-step trains the teacher on outcomes, then the student is distilled towards it.

    ``preset`` chooses the defaults of ``distillation_alpha`` and ``teacher``; a value that is given wins.
    """

    name: Literal["vpd"] = "vpd"
    preset: Annotated[
        Literal["default", "paper"], "paper: distillation_alpha 1 and teacher live, where these are not set"
    ] = "default"
    distillation_alpha: Annotated[
        float,
        Share,
        "0 = KL(teacher||student), 1 = KL(student||teacher), between: Jensen-Shannon; preset paper: 1 unless set",
    ] = _PRESET
    teacher: Annotated[
        Literal["live", "ema", "frozen", "trust_region"],
        "whose weights play the teacher: the student's own now, their moving average, the initial ones, or a mixture"
        " of live and initial logits; preset paper: live unless set",
    ] = _PRESET
    e_every: Annotated[
        int | None, Ge(1), "F: one E-step in this many iterations, the first included; null: never (SDPO)"
    ] = 5
    e_epochs: Annotated[int, Ge(1), "updates per E-step"] = 1
    e_lr_scale: Annotated[float, Gt(0), "the E-step's learning rate, as a multiple of the M-step's"] = 1.0
    teacher_beta: Annotated[float, Gt(0), "beta: scale of the implicit reward"] = 0.1
    log_ratio: Annotated[Literal["sum", "mean"], "implicit reward from the sum or the mean over tokens"] = "sum"
    prior: Annotated[Literal["dynamic", "fixed"], "reference of the E-step: the current or the initial student"] = (
        "dynamic"
    )
    shift_momentum: Annotated[float, Interval(ge=0.0, lt=1.0), "memory of the reward shift delta"] = 0.9
    success_context: Annotated[SuccessContext, "which context a success is scored with in the E-step"] = "matched"

    def __post_init__(self) -> None:
        for name, value in PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is _PRESET:
                object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def needs(self) -> Needs:
        return Needs(
            feedback=True,
            teacher=self.teacher_settings(),
            initial_copy=self.prior == "fixed",
            top_k=self.distillation_topk,
        )

    def build(self, prompter: Prompter) -> Algorithm:
        return VPD(self, prompter)

    def check(self) -> None:
        super().check()
        still = self.teacher == "frozen" or (self.teacher == "ema" and self.teacher_ema_rate == 0.0)
        if self.e_every is not None and still:
            raise ConfigError(
                "VPD with a teacher that never moves: the E-step would not reach the student",
                got=f"algorithm.teacher {self.teacher}",
                do="Use ema (rate above 0), live or trust_region, or set e_every to null (SDPO).",
            )

    def _keeps_a_copy(self) -> bool:
        return super()._keeps_a_copy() or self.prior == "fixed"


class VPD:
    """E-step when due, then the M-step.  ``prompter`` builds the E-step's own teacher prompts."""

    def __init__(self, settings: VPDSettings, prompter: Prompter):
        self.settings = settings
        self.m_step = Distill(settings)
        self._prompter = prompter
        self._iteration = 0
        self._shift: float | None = None

    def step(self, groups: Sequence[Group], learner: Learner) -> Metrics:
        examples, metrics = self._when_due(groups, learner)
        if examples is None:
            return metrics | self.m_step.step(groups, learner)
        metrics |= self.m_step.distil(groups, examples, learner)
        if metrics["e_step/rows"] and metrics["m_step/rows"]:
            metrics["e_step/student_drift_kl"] = metrics["m_step/student_drift_kl"]
        return metrics

    def state(self) -> dict[str, Any]:
        return {"iteration": self._iteration, "shift": self._shift}

    def restore(self, state: dict[str, Any]) -> None:
        self._iteration, self._shift = state["iteration"], state["shift"]

    def _when_due(
        self, groups: Sequence[Group], learner: Learner, *, everyone: bool = False, skip: bool = False
    ) -> tuple[list[Example] | None, Metrics]:
        """The E-step if it is due: the M-step's examples with their references (None: it was not), and metrics.

        ``everyone``: rows without a context get a reference too; ``skip``: due or not, it does not take place.
        """
        due = self.settings.e_every is not None and self._iteration % self.settings.e_every == 0
        self._iteration += 1
        if not due or skip:
            return None, {"e_step/rows": 0.0}
        started = time.perf_counter()
        matched = self._prompter.attach(e_step_contexts(groups, self.settings.success_context))
        examples, e_examples, found = self._references(
            to_examples(groups), to_examples(matched), learner, everyone=everyone
        )
        metrics = found | self._e_step([e for e in e_examples if e.teacher_prompt is not None], learner)
        metrics["e_step/kind_predicts_success"] = kind_predicts_success(matched)
        metrics["time/e_step"] = time.perf_counter() - started
        return examples, metrics

    def _references(
        self, own: Sequence[Example], matched: Sequence[Example], learner: Learner, *, everyone: bool
    ) -> tuple[list[Example], list[Example], Metrics]:
        """logp_S0 for every row that enters either step, found once; the fixed prior for the E-step's, if asked."""
        pairs = list(zip(own, matched, strict=True))
        enter = [i for i, pair in enumerate(pairs) if everyone or any(e.teacher_prompt is not None for e in pair)]
        found, how = reference_logprobs([own[i] for i in enter], learner) if enter else ([], {})
        current = dict(zip(enter, found, strict=True))
        prior = current
        if self.settings.prior == "fixed" and enter:
            initial = learner.score([own[i] for i in enter], student_logprobs, model="initial")
            prior = dict(zip(enter, map(tuple, initial), strict=True))

        def attach(examples: Sequence[Example], reference: Mapping[int, Sequence[float]]) -> list[Example]:
            return [
                dataclasses.replace(e, reference=tuple(reference[i])) if i in reference else e
                for i, e in enumerate(examples)
            ]

        metrics = {f"e_step/{name}": value for name, value in how.items()}
        return attach(own, current), attach(matched, prior), metrics

    def _e_step(self, examples: Sequence[Example], learner: Learner) -> Metrics:
        """Measure the shift, then ``e_epochs`` updates of the live weights on the teacher's prompt."""
        if not examples:
            return {"e_step/rows": 0.0, "e_step/skipped": 1.0}
        settings = self.settings
        measured: Metrics = {}

        def measure(reward_B: torch.Tensor, success_B: torch.Tensor) -> float:
            """Of the first pass over all rows: the shift moves, and stays for the whole E-step."""
            if not measured:
                self._move_shift(reward_B, success_B)
                measured.update(e_step_metrics(reward_B, success_B, self._shift or 0.0))
            return self._shift or 0.0

        if not learner.in_one_pass(examples):
            scores = learner.score(examples, teacher_logprobs)
            rewards = [self._implicit_reward(e, s) for e, s in zip(examples, scores, strict=True)]
            measure(torch.stack(rewards), torch.tensor([e.success for e in examples]))
        weighted = with_loss_weights(examples, bco=weighting.class_mean([e.success for e in examples]))
        metrics: Metrics = {}
        for _ in range(settings.e_epochs):
            update = learner.update(
                "e_step", weighted, e_step_objective(settings, measure), train="teacher", lr_scale=settings.e_lr_scale
            )
            metrics = update | metrics  # of several epochs, the first is reported
        return metrics | measured

    def _move_shift(self, reward_B: torch.Tensor, success_B: torch.Tensor) -> None:
        target = float(losses.midpoint_shift(reward_B, success_B))
        memory = 0.0 if self._shift is None else self.settings.shift_momentum
        self._shift = memory * (self._shift or 0.0) + (1 - memory) * target

    def _implicit_reward(self, example: Example, teacher_logprobs: Sequence[float]) -> torch.Tensor:
        return losses.implicit_reward(
            torch.tensor(teacher_logprobs, dtype=torch.float64),
            torch.tensor(example.reference, dtype=torch.float64),
            torch.tensor(example.mask),
            beta=self.settings.teacher_beta,
            log_ratio=self.settings.log_ratio,
        )


def e_step_objective(settings: VPDSettings, shift: Callable[[torch.Tensor, torch.Tensor], float]) -> Objective:
    """L_E of each row, with the batch's reference as the prior; ``shift`` is asked with rewards and successes [B]."""

    def objective(scorer: Scorer, batch: Batch) -> Terms:
        reward_B = losses.implicit_reward(
            scorer.logprobs("teacher"),
            batch.reference_BT,
            batch.mask_BT,
            beta=settings.teacher_beta,
            log_ratio=settings.log_ratio,
        )
        return Terms(losses={"bco": losses.bco(reward_B, batch.success_B, shift(reward_B.detach(), batch.success_B))})

    return objective


def e_step_metrics(rewards: torch.Tensor, success: torch.Tensor, shift: float) -> Metrics:
    """What the E-step saw before its update; accuracy is balanced over the classes that are there."""
    right = (rewards > shift) == success
    metrics: Metrics = {
        "e_step/shift": shift,
        "e_step/saturation": float(((rewards - shift).abs() > SATURATED).double().mean()),
        "e_step/accuracy": sum(float(right[c].double().mean()) for c in (success, ~success) if c.any())
        / sum(bool(c.any()) for c in (success, ~success)),
    }
    for name, rows_of_class in (("success", success), ("failure", ~success)):
        if rows_of_class.any():
            metrics[f"e_step/implicit_reward_{name}"] = float(rewards[rows_of_class].mean())
        metrics[f"e_step/rows_{name}"] = float(rows_of_class.sum())
    return metrics
