"""The E-step of VPD (arXiv 2605.15113): train the teacher q(y|x,C) on outcomes.

In theory it is min_q KL(q || pi*) with pi*(y|x) ~ pi_0(y|x) exp(r / beta).  In practice it is Binary Classifier
Optimization (BCO, arXiv 2404.04656), unpaired because each attempt has its own context C:

    rt_i = beta * sum_t (log q(y_t|x,C,y_<t) - sg log pi_0(y_t|x,y_<t))
    L_E  = - mean_success log sigma(rt - delta) - mean_failure log sigma(-(rt - delta))
    delta <- m delta + (1 - m) (mean_success rt + mean_failure rt) / 2       at the first E-step the midpoint itself

======== ================ ======================================================================================
symbol   in the paper     here
======== ================ ======================================================================================
q        teacher          the live weights reading the task and C: ``scorer.logprobs("teacher")``
pi_0     prior            student before the E-step (``prior: dynamic``) or initial one (``fixed``): the references
C        context          the teacher's prompt, chosen by :func:`~vpd.algorithms.contexts.e_step_contexts`
rt       implicit reward  ``implicit_reward_B``, :func:`implicit_reward`
beta                      ``teacher_beta``
delta    reward shift     ``shift``, :func:`next_shift`; m is ``shift_momentum``
L_E      E-step loss      :class:`ShiftedBCO`, with weights 1 / n of each class (``weighting.class_mean``)
F        schedule         ``e_every``: an E-step in iterations 0, F, 2F, ...
y        samples          the student's attempts, the teacher's own (retries), or both: ``e_step_rows``
======== ================ ======================================================================================
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from vpd.algorithms import weighting
from vpd.algorithms.contexts import SuccessContext, e_step_contexts, kind_predicts_success
from vpd.algorithms.examples import choose_rows, own_logprobs, student_logprobs, to_examples, with_loss_weights
from vpd.algorithms.retries import to_retry_examples
from vpd.learners import Learner, Loss, ModelName, TokenLoss, Update, combine
from vpd.prompts import Prompter
from vpd.types import Example, Floats, Group, Metrics

if TYPE_CHECKING:
    from torch import Tensor

    from vpd.model.batch import Batch
    from vpd.model.scorer import Scorer

EStepRows: TypeAlias = Literal["student", "teacher", "both"]
SATURATED = 5.0  # |rt - delta| beyond which the sigmoid is within 1 % of 0 or 1, on either side


class EStepSettings(Protocol):
    """The settings that the E-step uses; :class:`~vpd.algorithms.vpd.VPDSettings` has their meanings and defaults."""

    @property
    def e_every(self) -> int | None: ...
    @property
    def e_epochs(self) -> int: ...
    @property
    def e_lr_scale(self) -> float: ...
    @property
    def teacher_beta(self) -> float: ...
    @property
    def log_ratio(self) -> Literal["sum", "mean"]: ...
    @property
    def prior(self) -> Literal["dynamic", "fixed"]: ...
    @property
    def shift_momentum(self) -> float: ...
    @property
    def success_context(self) -> SuccessContext: ...
    @property
    def e_step_rows(self) -> EStepRows: ...


class EStep:
    """The E-step as a part of an algorithm; call :meth:`run` or :meth:`skip` once in each iteration.

    Its state is the number of iterations so far and the reward shift delta.
    """

    def __init__(self, settings: EStepSettings, prompter: Prompter):
        self.settings = settings
        self._prompter = prompter
        self._iteration = 0
        self._shift: float | None = None

    def is_due(self) -> bool:
        """Whether this iteration is one of 0, F, 2F, ..."""
        return self.settings.e_every is not None and self._iteration % self.settings.e_every == 0

    def skip(self) -> Update:
        """Count an iteration without an E-step."""
        self._iteration += 1
        return Update({"e_step/rows": 0.0})

    def run(
        self, groups: Sequence[Group], examples: Sequence[Example], learner: Learner, *, score_all: bool = False
    ) -> tuple[list[Example], Update]:
        """Train the teacher on this batch; returns the M-step's examples with log pi as reference, and the report.

        log pi are the student's log-probs before this E-step.  The rows that need them are those with a context in
        either step, or all with ``score_all``.
        """
        self._iteration += 1
        started = time.perf_counter()
        e_groups = self._prompter.attach(e_step_contexts(groups, self.settings.success_context))
        e_examples = to_examples(e_groups)
        rows = [
            row
            for row, pair in enumerate(zip(examples, e_examples, strict=True))
            if score_all or any(e.teacher is not None for e in pair)
        ]
        chosen = [examples[row] for row in rows]
        own, measured = own_logprobs(chosen, learner)
        fixed = self.settings.prior == "fixed"
        prior = list(map(tuple, learner.score(chosen, student_logprobs, model="initial"))) if fixed else own
        log_pi, log_pi_0 = (dict(zip(rows, logprobs, strict=True)) for logprobs in (own, prior))
        update = self._train(self._samples(groups, _with_references(e_examples, log_pi_0), learner), learner)
        metrics = {f"e_step/{name}": value for name, value in measured.items()}
        metrics["e_step/kind_predicts_success"] = kind_predicts_success(e_groups)
        metrics["time/e_step"] = time.perf_counter() - started
        return _with_references(examples, log_pi), combine([update, Update(metrics)])

    def _samples(self, groups: Sequence[Group], examples: Sequence[Example], learner: Learner) -> list[Example]:
        """The rows that the teacher learns from: the student's attempts, its own (the groups' retries), or both."""
        retries = to_retry_examples(groups) if self.settings.e_step_rows != "student" else []
        if not retries:
            return list(examples)
        model: ModelName = "initial" if self.settings.prior == "fixed" else "live"
        log_pi_0 = learner.score(retries, student_logprobs, model=model)
        scored = [dataclasses.replace(e, reference=tuple(row)) for e, row in zip(retries, log_pi_0, strict=True)]
        return scored if self.settings.e_step_rows == "teacher" else [*examples, *scored]

    def state(self) -> dict[str, Any]:
        return {"iteration": self._iteration, "shift": self._shift}

    def restore(self, state: dict[str, Any]) -> None:
        self._iteration, self._shift = state["iteration"], state["shift"]

    def _train(self, examples: Sequence[Example], learner: Learner) -> Update:
        """``e_epochs`` updates of the live weights on the teacher's prompt, all with the same delta."""
        import torch

        settings = self.settings
        examples = choose_rows(examples, context=True)
        chosen = [e for e in examples if not e.left_out]
        if not chosen:
            return Update({"e_step/rows": 0.0, "e_step/skipped": 1.0})
        weights = iter(weighting.class_mean([e.success for e in chosen]))
        weighted = with_loss_weights(examples, bco=[0.0 if e.left_out else next(weights) for e in examples])

        def update(objective: BCO | ShiftedBCO) -> Update:
            return learner.update("e_step", weighted, {"bco": objective}, train="teacher", lr_scale=settings.e_lr_scale)

        first = update(BCO(settings, self._shift))
        rewards = [value for value in first.values["bco"] if value is not None]
        implicit_reward_B = torch.tensor(rewards, dtype=torch.float64)
        success_B = torch.tensor([e.success for e in chosen])
        self._shift = next_shift(self._shift, implicit_reward_B, success_B, momentum=settings.shift_momentum)
        more = [update(ShiftedBCO(settings, self._shift)) for _ in range(settings.e_epochs - 1)]
        return combine([first, *more, Update(e_step_metrics(implicit_reward_B, success_B, self._shift))])


@dataclasses.dataclass(frozen=True)
class BCO:
    """L_E with the delta that this batch gives; ``previous`` is the delta of the E-step before, None at the first."""

    settings: EStepSettings
    previous: float | None

    def measure(self, scorer: Scorer, batch: Batch) -> Tensor:
        """The implicit reward rt of each row [B]."""
        return implicit_reward(self.settings, scorer, batch)

    def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
        """L_E, now that rt of all rows is known."""
        import torch

        implicit_reward_B = torch.tensor(values, dtype=torch.float64)
        success_B = torch.tensor([e.success for e in examples])
        shift = next_shift(self.previous, implicit_reward_B, success_B, momentum=self.settings.shift_momentum)
        return ShiftedBCO(self.settings, shift)


@dataclasses.dataclass(frozen=True)
class ShiftedBCO:
    """L_E of each row [B] at a given delta, before the class means: -log sigma(+-(rt - delta))."""

    settings: EStepSettings
    shift: float

    def __call__(self, scorer: Scorer, batch: Batch) -> TokenLoss:
        from vpd import losses

        implicit_reward_B = implicit_reward(self.settings, scorer, batch)
        return TokenLoss(losses.bco(implicit_reward_B, batch.success_B, self.shift))


def implicit_reward(settings: EStepSettings, scorer: Scorer, batch: Batch) -> Tensor:
    """rt = beta * sum_t (log q - sg log pi_0) of each row [B]; the batch's references are log pi_0."""
    from vpd import losses

    return losses.implicit_reward(
        scorer.logprobs("teacher"),
        batch.reference_BT,
        batch.mask_BT,
        beta=settings.teacher_beta,
        log_ratio=settings.log_ratio,
    )


def next_shift(previous: float | None, implicit_reward_B: Tensor, success_B: Tensor, *, momentum: float) -> float:
    """delta of this E-step: at the first the midpoint of the class means of rt, then a moving average of midpoints."""
    from vpd import losses

    midpoint = float(losses.midpoint_shift(implicit_reward_B, success_B))
    return midpoint if previous is None else momentum * previous + (1 - momentum) * midpoint


def e_step_metrics(implicit_reward_B: Tensor, success_B: Tensor, shift: float) -> Metrics:
    """delta, and how rt compares with it and with the outcomes before the first update.

    ``accuracy`` is the mean over the classes that occur of the share of rows with rt on the right side of delta;
    ``saturation`` the share of rows with abs(rt - delta) above 5.
    """
    correct_B = (implicit_reward_B > shift) == success_B
    classes = [of_class_B for of_class_B in (success_B, ~success_B) if of_class_B.any()]
    metrics: Metrics = {
        "e_step/shift": shift,
        "e_step/saturation": float(((implicit_reward_B - shift).abs() > SATURATED).double().mean()),
        "e_step/accuracy": sum(float(correct_B[of_class_B].double().mean()) for of_class_B in classes) / len(classes),
    }
    for name, of_class_B in (("success", success_B), ("failure", ~success_B)):
        if of_class_B.any():
            metrics[f"e_step/implicit_reward_{name}"] = float(implicit_reward_B[of_class_B].mean())
        metrics[f"e_step/rows_{name}"] = float(of_class_B.sum())
    return metrics


def _with_references(examples: Sequence[Example], references: Mapping[int, Floats]) -> list[Example]:
    """The examples with these reference log-probs, by row; one that carries a reference already keeps it."""
    return [
        dataclasses.replace(e, reference=references[row]) if row in references and e.reference is None else e
        for row, e in enumerate(examples)
    ]
