"""Variational Policy Distillation (arXiv 2605.15113): SDPO whose teacher is trained on outcomes.

E-step, every ``e_every`` iterations, before the M-step (:mod:`vpd.algorithms.e_step`): the teacher learns to tell
successes from failures, with the current student as reference.

M-step, always (:mod:`vpd.algorithms.distill`): the student is distilled towards the teacher on its own rollouts.  With
``e_every: null`` nothing but that is left, which is SDPO.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vpd.algorithms.contexts import SuccessContext
from vpd.algorithms.distill import Distill, DistillSettings, SelfTeacher
from vpd.algorithms.e_step import EStep
from vpd.algorithms.examples import to_examples
from vpd.errors import ConfigError
from vpd.learners import Learner, Update, combine
from vpd.prompts import Prompter
from vpd.types import Group


@dataclass(frozen=True, kw_only=True)
class VPDSettings(SelfTeacher, DistillSettings):
    """VPD.  ``preset: paper`` (alpha 1 and a live teacher) changes the defaults of those two settings."""

    name: Literal["vpd"] = "vpd"
    preset: Annotated[Literal["default", "paper"], "paper: distillation_alpha 1, teacher live (unless set)"] = "default"
    e_every: Annotated[int | None, "F: one E-step in this many iterations, the first included; null: never (SDPO)"] = 5
    e_epochs: Annotated[int, "updates per E-step"] = 1
    e_lr_scale: Annotated[float, "the E-step's learning rate, as a multiple of the M-step's"] = 1.0
    teacher_beta: Annotated[float, "beta: scale of the implicit reward"] = 0.1
    log_ratio: Annotated[Literal["sum", "mean"], "implicit reward from the sum or the mean over tokens"] = "sum"
    prior: Annotated[Literal["dynamic", "fixed"], "reference of the E-step: the current or the initial student"] = (
        "dynamic"
    )
    shift_momentum: Annotated[float, "memory of the reward shift delta"] = 0.9
    success_context: Annotated[SuccessContext, "C of a success in the E-step"] = "matched"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_own_teacher()
        check = [
            ("e_every", self.e_every is None or self.e_every >= 1, "at least 1, or null for no E-step"),
            ("e_epochs", self.e_epochs >= 1, "at least 1"),
            ("e_lr_scale", self.e_lr_scale > 0, "a positive number"),
            ("teacher_beta", self.teacher_beta > 0, "a positive number"),
            ("shift_momentum", 0.0 <= self.shift_momentum < 1.0, "a number from 0 to below 1"),
        ]
        for name, holds, expected in check:
            if not holds:
                raise ConfigError(f"algorithm.{name} is out of range", got=getattr(self, name), expected=expected)
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
        self.e_step = EStep(settings, prompter)
        self.m_step = Distill(settings)
        self._reference = settings.importance_reference

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        examples = to_examples(groups, self._reference)
        if not self.e_step.is_due():
            return combine([self.e_step.skip(), self.m_step.distil(examples, learner)])
        examples, e_step = self.e_step.run(groups, examples, learner)
        m_step = self.m_step.distil(examples, learner)
        return combine([e_step, m_step, drift_of(e_step, m_step)])

    def state(self) -> dict[str, Any]:
        return self.e_step.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.e_step.restore(state)


def drift_of(e_step: Update, m_step: Update) -> Update:
    """How far the E-step moved the student, KL(student now || student before it) a token, seen on the M-step's rows."""
    if not e_step.metrics["e_step/rows"] or "m_step/student_drift_kl" not in m_step.metrics:
        return Update({})
    return Update({"e_step/student_drift_kl": m_step.metrics["m_step/student_drift_kl"]})
