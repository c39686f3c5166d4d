"""The M-step: distil a teacher that reads more than the student, token by token, on the student's own rollouts.

    L_M = E_{y~pi} sum_t D( pi(.|x,y_<t) , sg[ q(.|x,C,y_<t) ] )              arXiv 2605.15113, M-step

With a teacher made of the student's own weights this alone is SDPO (arXiv 2601.20802).  With an external teacher
that reads the student's own prompt it is GKD (arXiv 2306.13649).  VPD is this with an E-step before it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt

from vpd import losses
from vpd.algorithms import Algorithm, Needs, weighting
from vpd.algorithms.examples import split_by_group, to_examples, token_counts, with_loss_weights, with_reference
from vpd.errors import ConfigError
from vpd.learners import Learner, Terms
from vpd.learners.teachers import CopyType, TeacherSettings
from vpd.model.scorer import Batch, Scorer
from vpd.prompts import Prompter
from vpd.settings import Settings, Share
from vpd.types import Example, Group, Metrics


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings, section="algorithm"):
    """What every method that distils can choose (defaults: docs/method.md)."""

    distillation_alpha: Annotated[
        float, Share, "0 = KL(teacher||student), 1 = KL(student||teacher), between: Jensen-Shannon"
    ] = 0.5
    distillation_topk: Annotated[
        int | None, Ge(1), "compare on the student's K likeliest tokens; null: the whole vocabulary"
    ] = None
    distillation_tail: Annotated[bool, "with top-k, put the rest of the vocabulary in one bucket"] = True
    distillation_estimator: Annotated[
        Literal["exact", "sampled"], "exact: compare whole distributions; sampled: the sampled token only (alpha 1)"
    ] = "exact"
    importance_clip: Annotated[
        float | None, Gt(0), "cap of the ratio pi / pi_0 that weighs each token; null: no ratio"
    ] = 2.0
    average: Annotated[weighting.Average, "mean of sequence means, or mean over tokens"] = "seq_mean"
    denominator: Annotated[
        weighting.Denominator, "rows that divide the loss: those with a context, or all (SDPO's released code)"
    ] = "active"
    updates_per_batch: Annotated[int, Ge(1), "optimiser steps per iteration; the batch is split by whole groups"] = 1

    def check(self) -> None:
        super().check()
        if self.distillation_estimator == "sampled" and (self.distillation_alpha != 1.0 or self.distillation_topk):
            raise ConfigError(
                "algorithm.distillation_estimator 'sampled' estimates KL(student||teacher) over all of V only",
                got=f"distillation_alpha {self.distillation_alpha}, distillation_topk {self.distillation_topk}",
                do="Set distillation_alpha to 1 and distillation_topk to null.",
            )


@dataclass(frozen=True, kw_only=True)
class SelfTeacher(Settings, section="algorithm"):
    """Settings of a teacher made of the student's own weights; mixed into SDPO's, VPD's and the hybrid's."""

    teacher: Annotated[
        Literal["live", "ema", "frozen", "trust_region"],
        "whose weights play the teacher: the student's own now, their moving average, the initial ones, or a mixture"
        " of live and initial logits",
    ] = "ema"
    teacher_ema_rate: Annotated[float, Share, "share of the student that enters an EMA teacher each iteration"] = 0.05
    teacher_trust_region_mix: Annotated[float, Share, "share of the live logits in a trust_region teacher"] = 0.05
    teacher_dtype: Annotated[
        CopyType | None,
        "number type of the copy of the weights that the teacher or a fixed prior keeps; null: the model's"
        " (an EMA teacher cannot be bfloat16)",
    ] = None

    def teacher_settings(self) -> TeacherSettings:
        """What the learner is told about the teacher."""
        return TeacherSettings(
            kind=self.teacher,
            ema_rate=self.teacher_ema_rate,
            trust_region_mix=self.teacher_trust_region_mix,
            dtype=self.teacher_dtype,
        )

    def check(self) -> None:
        super().check()
        self.teacher_settings()
        if self.teacher_dtype is not None and not self._keeps_a_copy():
            raise ConfigError(
                "algorithm.teacher_dtype is of a copy of the weights, and a live teacher keeps none",
                got=self.teacher_dtype,
                do="Set it to null.",
            )

    def _keeps_a_copy(self) -> bool:
        return self.teacher != "live"


@dataclass(frozen=True, kw_only=True)
class SDPOSettings(SelfTeacher, DistillSettings):
    """SDPO: a teacher made of the student's weights reads the feedback; it is never trained on outcomes."""

    name: Literal["sdpo"] = "sdpo"

    @property
    def needs(self) -> Needs:
        return Needs(feedback=True, teacher=self.teacher_settings(), top_k=self.distillation_topk)

    def build(self, prompter: Prompter) -> Algorithm:
        return Distill(self)


@dataclass(frozen=True, kw_only=True)
class GKDSettings(DistillSettings):
    """GKD: a frozen external teacher reads the student's own prompt.  No context, no importance ratio."""

    name: Literal["gkd"] = "gkd"
    teacher_model: Annotated[str, "Hub id or folder of the teacher; same tokenizer as the student"] = ""
    student_fraction: Annotated[
        float, Share, "lambda: share of prompts answered by the student, the rest by the teacher"
    ] = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(
            teacher=self.teacher_settings(),
            external_model=self.teacher_model,
            student_fraction=self.student_fraction,
            top_k=self.distillation_topk,
        )

    def build(self, prompter: Prompter) -> Algorithm:
        return Distill(self, own_prompt=True)

    def check(self) -> None:
        super().check()
        if not self.teacher_model:
            raise ConfigError("algorithm.teacher_model is missing", expected="a Hub id or a folder")

    def teacher_settings(self) -> TeacherSettings:
        """What the learner is told about the teacher."""
        return TeacherSettings(kind="external")


class Distill:
    """``update("m_step")``: SDPO when the rollouts carry contexts, GKD with ``own_prompt``.

    ``own_prompt`` lets the teacher read the student's prompt, for every row.
    """

    def __init__(self, settings: DistillSettings, *, own_prompt: bool = False):
        self.settings = settings
        self.own_prompt = own_prompt

    def step(self, groups: Sequence[Group], learner: Learner) -> Metrics:
        examples = to_examples(groups)
        if self.settings.updates_per_batch > 1 and not self.own_prompt:
            examples = self.score_taking_part(examples, learner)
        return self.distil(groups, examples, learner)

    def distil(self, groups: Sequence[Group], examples: Sequence[Example], learner: Learner) -> Metrics:
        """The M-step on examples that may carry a reference, part by part."""
        if self.own_prompt:
            examples = [dataclasses.replace(e, teacher_prompt=e.prompt) for e in examples]
        metrics: Metrics = {}
        start = 0
        for part in split_by_group(groups, self.settings.updates_per_batch):
            size = sum(len(group.rollouts) for group in part)
            own = examples[start : start + size]
            start += size
            weights = weighting.token_average(
                token_counts(own),
                [e.teacher_prompt is not None for e in own],
                average=self.settings.average,
                denominator=self.settings.denominator,
            )
            update = learner.update("m_step", with_loss_weights(own, distill=weights), self.objective)
            metrics = update | metrics if metrics else update  # of several parts, the first is reported
        return metrics

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def score_taking_part(self, examples: Sequence[Example], learner: Learner) -> list[Example]:
        """Reference log-probs for the rows that have a context; the others cost nothing."""
        chosen = [i for i, e in enumerate(examples) if e.teacher_prompt is not None]
        scored = iter(with_reference([examples[i] for i in chosen], learner) if chosen else ())
        return [next(scored) if e.teacher_prompt is not None else e for e in examples]

    def objective(self, scorer: Scorer, batch: Batch) -> Terms:
        """L_M: the divergence of each token times the truncated ratio pi / pi_0."""
        settings = self.settings
        if settings.distillation_estimator == "sampled":
            student_BT, teacher_BT = scorer.logprobs("student"), scorer.logprobs("teacher")
            value_BT = losses.sampled_divergence(student_BT, teacher_BT)
            entropies = {"entropy": scorer.entropy("student"), "teacher_entropy": scorer.entropy("teacher")}
            student_BT = student_BT.detach()
        else:
            compared = scorer.divergence(
                alpha=settings.distillation_alpha,
                top_k=settings.distillation_topk,
                tail=settings.distillation_tail,
                term="distill",
                clip=settings.importance_clip,
            )
            value_BT, student_BT, teacher_BT = compared.value, compared.student_logprobs, compared.teacher_logprobs
            entropies = {"entropy": compared.student_entropy, "teacher_entropy": compared.teacher_entropy}
        reference_BT = batch.reference_or(student_BT)
        ratio_BT = losses.importance_ratio(student_BT, reference_BT, clip=settings.importance_clip)
        moved_BT = student_BT - reference_BT
        per_token = {
            "divergence": value_BT.detach(),
            "importance_ratio": ratio_BT,
            "teacher_minus_student": teacher_BT - student_BT,
            "student_drift_kl": moved_BT.exp() * moved_BT - moved_BT.exp() + 1,
            "sampling_logp_difference": (reference_BT - batch.behaviour_BT).abs(),
            **entropies,
        }
        return Terms(
            losses={"distill": (ratio_BT * value_BT * batch.mask_BT).sum(-1)},
            stats={name: torch.where(batch.mask_BT, value, 0.0).sum(-1) for name, value in per_token.items()},
        )
