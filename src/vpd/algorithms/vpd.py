"""Variational Policy Distillation (VPD, arXiv 2605.15113): expectation maximisation with a teacher that reads feedback.

One network plays two roles: the student pi(y|x) reads the task x, the teacher q(y|x,C) also the context C.  With
pi*(y|x) ~ pi_0(y|x) exp(r / beta), the target of KL-regularised reinforcement learning, an iteration is

    E-step   min_q  KL(q || pi*)    every F = ``e_every`` iterations, before the M-step    :mod:`vpd.algorithms.e_step`
    M-step   min_pi KL(pi || q)     always                                                 :mod:`vpd.algorithms.distill`

The E-step takes a step on L_E: the teacher learns to tell successes from failures, with the current student as the
prior pi_0.  The M-step takes a step on L_M: the student is distilled towards the teacher, sg q, on its own rollouts.
Without an E-step (``e_every: null``) this is SDPO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from vpd.algorithms import Algorithm, Needs
from vpd.algorithms.contexts import SuccessContext
from vpd.algorithms.distill import Distill, DistillSettings, SelfTeacher
from vpd.algorithms.e_step import EStep, EStepRows
from vpd.algorithms.examples import ImportanceReference, to_examples
from vpd.algorithms.retries import Imitation, RetrySettings
from vpd.errors import ConfigError
from vpd.learners import Learner, Update, combine
from vpd.prompts import Prompter
from vpd.settings import Share
from vpd.types import Group

_PRESET: Any = None  # default of a setting whose value ``preset`` gives
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {"distillation_alpha": 0.5, "teacher": "ema"},
    "paper": {"distillation_alpha": 1.0, "teacher": "live"},
}


@dataclass(frozen=True, kw_only=True)
class VPDSettings(SelfTeacher, RetrySettings, DistillSettings):
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
        int | None,
        Ge(1),
        "F: one E-step in this many iterations, the first included; null: never (SDPO); 1 is best with retries",
    ] = 5
    e_epochs: Annotated[int, Ge(1), "updates per E-step"] = 1
    e_lr_scale: Annotated[float, Gt(0), "the E-step's learning rate, as a multiple of the M-step's"] = 1.0
    teacher_beta: Annotated[float, Gt(0), "beta: scale of the implicit reward rt"] = 0.1
    log_ratio: Annotated[Literal["sum", "mean"], "the log-ratio in rt: its sum or its mean over tokens"] = "sum"
    prior: Annotated[Literal["dynamic", "fixed"], "pi_0 of the E-step: the current or the initial student"] = "dynamic"
    shift_momentum: Annotated[
        float, Interval(ge=0.0, lt=1.0), "share of the old reward shift delta that each E-step keeps"
    ] = 0.9
    success_context: Annotated[SuccessContext, "which context C a success is scored with in the E-step"] = "matched"
    e_step_rows: Annotated[
        EStepRows, "the E-step's samples, where there are retries: the student's, the teacher's (retries), or both"
    ] = "both"

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
            learns_from_retries=True,
        )

    def build(self, prompter: Prompter) -> Algorithm:
        return VPD(self, prompter)

    def check(self) -> None:
        super().check()
        if self.e_every is not None and not self.teacher_settings().moves:
            raise ConfigError(
                "VPD with a teacher that never moves: the E-step would not reach the student",
                got=f"algorithm.teacher {self.teacher}" + ("" if self.teacher == "frozen" else " at share 0"),
                do="Use ema or trust_region with a share above 0, or live, or set e_every to null (SDPO).",
            )

    def _keeps_a_copy(self) -> bool:
        return super()._keeps_a_copy() or self.prior == "fixed"


class VPD:
    """The E-step when it is due, then the M-step.

    ``prompter`` builds the teacher's prompts of the E-step, whose contexts C may differ from the M-step's.
    """

    def __init__(self, settings: VPDSettings, prompter: Prompter):
        self.e_step = EStep(settings, prompter)
        self._imitation = Imitation(settings, settings.importance_clip)
        self.m_step = Distill(settings, imitation=self._imitation)
        self._reference = settings.importance_reference

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: E-step when due, M-step."""
        examples = to_examples(groups, self._reference)
        if not self.e_step.is_due():
            return combine([self.e_step.skip(), self.m_step.distil(groups, examples, learner)])
        score_all = self._imitation.needs_references(groups)
        examples, e_step = self.e_step.run(groups, examples, learner, score_all=score_all)
        m_step = self.m_step.distil(groups, examples, learner)
        return combine([e_step, m_step, drift_of(e_step, m_step, self._reference)])

    def state(self) -> dict[str, Any]:
        return self.e_step.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.e_step.restore(state)


def drift_of(e_step: Update, m_step: Update, reference: ImportanceReference) -> Update:
    """KL(student after the E-step || student before it) per token, estimated on the M-step's rows.

    Empty without an E-step or an M-step, and where the M-step's own number holds more than that: log-probs of the
    sampler as ``reference``, or several updates, of which the later ones see the earlier ones' moves.
    """
    seen = "m_step/student_drift_kl" in m_step.metrics and m_step.metrics["m_step/updates"] == 1.0
    if not e_step.metrics["e_step/rows"] or not seen or reference != "own":
        return Update({})
    return Update({"e_step/student_drift_kl": m_step.metrics["m_step/student_drift_kl"]})
