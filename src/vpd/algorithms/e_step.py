"""The E-step (arXiv 2605.15113): the teacher is trained on outcomes.

The loss is Binary Classifier Optimization's (arXiv 2404.04656):

    rt_i = beta * sum_t (log q(y_t|x,C) - sg log pi_0(y_t|x))                    implicit reward of row i
    L_E  = - mean_success log sigma(rt - delta) - mean_failure log sigma(-(rt - delta))

pi_0 is the student before the E-step (``prior: dynamic``, a sliding trust region) or the initial one (``fixed``).
delta, the reward shift, is the midpoint of the two classes' mean rewards, smoothed over E-steps.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vpd import losses
from vpd.algorithms import weighting
from vpd.algorithms.contexts import SuccessContext, e_step_contexts, kind_predicts_success
from vpd.algorithms.examples import own_logprobs, student_logprobs, to_examples, with_loss_weights
from vpd.learners import Learner, Loss, TokenLoss, Update, combine
from vpd.model.batch import Batch
from vpd.model.scorer import Scorer
from vpd.prompts import Prompter
from vpd.types import Example, Floats, Group, Metrics

SATURATED = 5.0  # |rt - delta| beyond which the sigmoid's gradient is below 1 %


class EStepSettings(Protocol):
    """What the E-step reads of an algorithm's settings."""

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


class EStep:
    """Remembers which iteration it is and the reward shift; call :meth:`run` or :meth:`skip` once an iteration."""

    def __init__(self, settings: EStepSettings, prompter: Prompter):
        self.settings = settings
        self._prompter = prompter
        self._iteration = 0
        self._shift: float | None = None

    def is_due(self) -> bool:
        """Whether this iteration is one of 0, F, 2F, ..."""
        return self.settings.e_every is not None and self._iteration % self.settings.e_every == 0

    def skip(self) -> Update:
        """This iteration has no E-step."""
        self._iteration += 1
        return Update({"e_step/rows": 0.0})

    def run(
        self, groups: Sequence[Group], examples: Sequence[Example], learner: Learner, *, score_all: bool = False
    ) -> tuple[list[Example], Update]:
        """Train the teacher on this batch; returns the M-step's examples with log pi_0, and what was reported.

        ``score_all``: rows without a context get a log pi_0 too.
        """
        self._iteration += 1
        started = time.perf_counter()
        matched_groups = self._prompter.attach(e_step_contexts(groups, self.settings.success_context))
        matched = to_examples(matched_groups)
        enter = [
            row
            for row, pair in enumerate(zip(examples, matched, strict=True))
            if score_all or any(e.teacher is not None for e in pair)
        ]
        current, metrics = self._current_logprobs(examples, enter, learner)
        prior = self._initial_logprobs(examples, enter, learner) if self.settings.prior == "fixed" else current
        update = self._train(_with_references(matched, prior), learner)
        metrics["e_step/kind_predicts_success"] = kind_predicts_success(matched_groups)
        metrics["time/e_step"] = time.perf_counter() - started
        return _with_references(examples, current), combine([update, Update(metrics)])

    def state(self) -> dict[str, Any]:
        return {"iteration": self._iteration, "shift": self._shift}

    def restore(self, state: dict[str, Any]) -> None:
        self._iteration, self._shift = state["iteration"], state["shift"]

    def _current_logprobs(
        self, examples: Sequence[Example], rows: Sequence[int], learner: Learner
    ) -> tuple[dict[int, Floats], Metrics]:
        if not rows:
            return {}, {}
        found, how = own_logprobs([examples[row] for row in rows], learner)
        return dict(zip(rows, found, strict=True)), {f"e_step/{name}": value for name, value in how.items()}

    def _initial_logprobs(
        self, examples: Sequence[Example], rows: Sequence[int], learner: Learner
    ) -> dict[int, Floats]:
        if not rows:
            return {}
        scores = learner.score([examples[row] for row in rows], student_logprobs, model="initial")
        return dict(zip(rows, map(tuple, scores), strict=True))

    def _train(self, matched: Sequence[Example], learner: Learner) -> Update:
        """``e_epochs`` updates of the live weights on the teacher's prompt; the shift stays for all of them."""
        settings = self.settings
        entering = [e for e in matched if e.teacher is not None]
        if not entering:
            return Update({"e_step/rows": 0.0, "e_step/skipped": 1.0})
        weights = iter(weighting.class_mean([e.success for e in entering]))
        rows = with_loss_weights(matched, bco=[next(weights) if e.teacher is not None else 0.0 for e in matched])

        def update(objective: "BCO | ShiftedBCO") -> Update:
            return learner.update("e_step", rows, {"bco": objective}, train="teacher", lr_scale=settings.e_lr_scale)

        first = update(BCO(settings, self._shift))
        reward_B = torch.tensor([value for value in first.values["bco"] if value is not None], dtype=torch.float64)
        success_B = torch.tensor([e.success for e in entering])
        self._shift = next_shift(self._shift, reward_B, success_B, momentum=settings.shift_momentum)
        more = [update(ShiftedBCO(settings, self._shift)) for _ in range(settings.e_epochs - 1)]
        return combine([first, *more, Update(e_step_metrics(reward_B, success_B, self._shift))])


@dataclasses.dataclass(frozen=True)
class BCO:
    """L_E with the shift that follows from this batch; ``previous`` is the last E-step's, None before the first."""

    settings: EStepSettings
    previous: float | None

    def measure(self, scorer: Scorer, batch: Batch) -> Tensor:
        """Implicit reward rt of each row [B]."""
        return implicit_reward(self.settings, scorer, batch)

    def prepare(self, values: Sequence[float], examples: Sequence[Example]) -> Loss:
        reward_B = torch.tensor(values, dtype=torch.float64)
        success_B = torch.tensor([e.success for e in examples])
        shift = next_shift(self.previous, reward_B, success_B, momentum=self.settings.shift_momentum)
        return ShiftedBCO(self.settings, shift)


@dataclasses.dataclass(frozen=True)
class ShiftedBCO:
    """L_E of each row [B] at a given shift."""

    settings: EStepSettings
    shift: float

    def __call__(self, scorer: Scorer, batch: Batch) -> TokenLoss:
        reward_B = implicit_reward(self.settings, scorer, batch)
        return TokenLoss(losses.bco(reward_B, batch.success_B, self.shift))


def implicit_reward(settings: EStepSettings, scorer: Scorer, batch: Batch) -> Tensor:
    """rt of each row [B], with the batch's reference as log pi_0."""
    return losses.implicit_reward(
        scorer.logprobs("teacher"),
        batch.reference_BT,
        batch.mask_BT,
        beta=settings.teacher_beta,
        log_ratio=settings.log_ratio,
    )


def next_shift(previous: float | None, reward_B: Tensor, success_B: Tensor, *, momentum: float) -> float:
    """The reward shift of this E-step: the midpoint at first, then a moving average of midpoints."""
    target = float(losses.midpoint_shift(reward_B, success_B))
    return target if previous is None else momentum * previous + (1 - momentum) * target


def e_step_metrics(reward_B: Tensor, success_B: Tensor, shift: float) -> Metrics:
    """What the E-step saw before its first update; accuracy is balanced over the classes that are there."""
    right_B = (reward_B > shift) == success_B
    present = [rows for rows in (success_B, ~success_B) if rows.any()]
    metrics: Metrics = {
        "e_step/shift": shift,
        "e_step/saturation": float(((reward_B - shift).abs() > SATURATED).double().mean()),
        "e_step/accuracy": sum(float(right_B[rows].double().mean()) for rows in present) / len(present),
    }
    for name, rows in (("success", success_B), ("failure", ~success_B)):
        if rows.any():
            metrics[f"e_step/implicit_reward_{name}"] = float(reward_B[rows].mean())
        metrics[f"e_step/rows_{name}"] = float(rows.sum())
    return metrics


def _with_references(examples: Sequence[Example], found: Mapping[int, Floats]) -> list[Example]:
    """The examples with the references that were found; one that carries a reference already keeps it."""
    return [
        dataclasses.replace(e, reference=found[row]) if row in found and e.reference is None else e
        for row, e in enumerate(examples)
    ]
