"""The M-step: distil a teacher that reads more than the student, token by token, on the student's own rollouts.

    L_M = E_{y~pi} sum_t KL( pi(.|x,y_<t) || sg[ q(.|x,C,y_<t) ] )              arXiv 2605.15113, M-step

pi is the student, q the teacher, C the context.  ``distillation_alpha`` 1 is this KL; other values are other
divergences D of the two.  The divergence of each token is multiplied by the importance ratio pi / pi_0, where pi_0 is
the student before the E-step.

With a teacher made of the student's own weights this alone is SDPO (arXiv 2601.20802).  With an external teacher
that reads the student's own prompt it is GKD (arXiv 2306.13649).  VPD is this with an E-step before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from vpd.algorithms import Algorithm, Needs, RemoteTeacher, weighting
from vpd.algorithms.examples import (
    ReferenceSetting,
    UpdatesSetting,
    choose_rows,
    mismatch,
    split_by_group,
    to_examples,
    token_counts,
    with_loss_weights,
    with_reference,
)
from vpd.algorithms.retries import Imitation, RetrySettings
from vpd.errors import ConfigError
from vpd.learners import Learner, TokenLoss, Update, combine
from vpd.learners.settings import CopyType, TeacherSettings
from vpd.prompts import Prompter
from vpd.settings import IsPath, Settings, Share
from vpd.types import Example, Group

if TYPE_CHECKING:
    from vpd.model.batch import Batch
    from vpd.model.scorer import Divergence, Scorer


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings, section="algorithm"):
    """The M-step: which divergence between student and teacher, and how it is averaged."""

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
        float | None, Gt(0), "upper bound of the importance ratio pi / pi_0 of a token; null: no ratio"
    ] = 2.0
    importance_reference: ReferenceSetting = "own"
    distillation_weight: Annotated[
        float, Ge(0), "weight of the distillation; 0: none, which leaves what is learned from retries"
    ] = 1.0
    average: Annotated[weighting.Average, "mean of sequence means, or mean over tokens"] = "seq_mean"
    denominator: Annotated[
        weighting.Denominator, "rows that divide the loss: those with a context, or all (SDPO's released code)"
    ] = "active"
    updates_per_batch: UpdatesSetting = 1

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
    """Settings of a teacher made of the student's own weights: a base class of SDPO's, VPD's and the hybrid's."""

    teacher: Annotated[
        Literal["live", "ema", "frozen", "trust_region"],
        "whose weights play the teacher: the student's own now, their moving average, the initial ones, or a mixture"
        " of live and initial logits",
    ] = "ema"
    teacher_ema_rate: Annotated[
        float, Share, "share of the student that enters an EMA teacher each iteration; 0: as frozen"
    ] = 0.05
    teacher_trust_region_mix: Annotated[
        float, Share, "share of the live logits in a trust_region teacher; 0: as frozen"
    ] = 0.05
    teacher_dtype: Annotated[
        CopyType | None,
        "number type of the copy of the weights that the teacher or a fixed prior keeps; null: the model's, and an EMA"
        " of a bfloat16 model is averaged in float32 (6 bytes a weight, with its rounded copy; float32: 4, slower)",
    ] = None

    def teacher_settings(self) -> TeacherSettings:
        """The learner's settings of the teacher."""
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
class ServedTeacher(DistillSettings, section="algorithm"):
    """Settings of a teacher that may be behind a server: a base class of SDPO's and GKD's.  It never moves."""

    teacher_url: Annotated[
        str | None,
        "a vLLM server that has teacher_model under that name and gives its distillation_topk likeliest tokens, so that"
        " no copy of it is here; null: it is here",
    ] = None
    teacher_api_key_env: Annotated[
        str | None,
        "name of the environment variable that holds the token of teacher_url; null: that of vpd serve where this is"
        " engine.url, else none",
    ] = None

    def check(self) -> None:
        super().check()
        if self.teacher_url is None:
            return
        if self.distillation_topk is None or self.distillation_estimator != "exact":
            raise ConfigError(
                "algorithm.teacher_url: a server gives its likeliest tokens, not the whole vocabulary",
                got=f"distillation_topk {self.distillation_topk}, distillation_estimator {self.distillation_estimator}",
                do="Set algorithm.distillation_topk, for example to 20, and distillation_estimator to exact.",
            )

    def server(self, model: str, *, reads_context: bool) -> RemoteTeacher | None:
        """The teacher at ``teacher_url``, if one is there."""
        if self.teacher_url is None:
            return None
        return RemoteTeacher(
            url=self.teacher_url, model=model, api_key_env=self.teacher_api_key_env, reads_context=reads_context
        )


@dataclass(frozen=True, kw_only=True)
class SDPOSettings(SelfTeacher, RetrySettings, ServedTeacher):
    """SDPO: a teacher made of the student's weights reads the feedback; it is never trained on outcomes."""

    name: Literal["sdpo"] = "sdpo"
    teacher_model: Annotated[
        str, "with teacher frozen: the name that teacher_url has for the initial weights, or for an adapter on them"
    ] = ""

    @property
    def needs(self) -> Needs:
        server = self.server(self.teacher_model, reads_context=True)
        return Needs(
            feedback=True,
            teacher=None if server else self.teacher_settings(),
            remote_teacher=server,
            top_k=self.distillation_topk,
            learns_from_retries=True,
        )

    def build(self, prompter: Prompter) -> Algorithm:
        return Distill(self, imitation=Imitation(self, self.importance_clip))

    def check(self) -> None:
        super().check()
        if bool(self.teacher_model) != (self.teacher_url is not None):
            raise ConfigError(
                "algorithm.teacher_model is the name of the teacher at algorithm.teacher_url: one needs the other",
                got=f"teacher_model {self.teacher_model!r}, teacher_url {self.teacher_url}",
                do="Set both, or neither: the teacher is then made of the student's weights here.",
            )
        if self.teacher_url is not None and self.teacher != "frozen":
            raise ConfigError(
                "algorithm.teacher_url: a teacher behind a server never moves",
                got=f"algorithm.teacher {self.teacher}",
                do="Set it to frozen, or algorithm.teacher_url to null (with model.lora no teacher takes a copy here).",
            )
        if self.teacher_url is not None and self.retry_loss == "forward_kl":
            raise ConfigError(
                "algorithm.teacher_url: a teacher's server scores attempts, and no retries",
                got="algorithm.retry_loss forward_kl",
                do="Set algorithm.retry_loss to cross_entropy, policy_gradient or none.",
            )

    def _keeps_a_copy(self) -> bool:
        return super()._keeps_a_copy() and self.teacher_url is None


@dataclass(frozen=True, kw_only=True)
class GKDSettings(ServedTeacher):
    """GKD: a frozen external teacher reads the task alone.  No context, no importance ratio."""

    name: Literal["gkd"] = "gkd"
    teacher_model: Annotated[str, IsPath(), "Hub id or folder of the teacher; same tokenizer as the student"] = ""
    importance_reference: Annotated[Literal["own"], "GKD has no importance ratio: a row is its own reference"] = "own"
    student_fraction: Annotated[
        float, Share, "lambda: share of prompts answered by the student, the rest as other_answers says"
    ] = 1.0
    other_answers: Annotated[
        Literal["teacher", "data"],
        "who answers the rest of the prompts: the teacher, or the data (supervised: the environment's right answer,"
        " with env dataset the column env.solution_column)",
    ] = "teacher"
    teacher_chat_template: Annotated[
        Literal["own", "student"],
        "how the teacher reads the task: as its own chat template writes it, or as the student's does",
    ] = "own"

    @property
    def needs(self) -> Needs:
        server = self.server(self.teacher_model, reads_context=False)
        return Needs(
            teacher=None if server else self.teacher_settings(),
            external_model=None if server else self.teacher_model,
            remote_teacher=server,
            student_fraction=self.student_fraction,
            other_answers=self.other_answers,
            own_chat_template=self.teacher_chat_template == "own",
            top_k=self.distillation_topk,
        )

    def build(self, prompter: Prompter) -> Algorithm:
        return Distill(self, own_prompt=True)

    def check(self) -> None:
        super().check()
        if not self.teacher_model:
            raise ConfigError("algorithm.teacher_model is missing", expected="a Hub id or a folder")
        if self.distillation_estimator == "sampled" and self.student_fraction < 1 and self.other_answers == "data":
            raise ConfigError(
                "algorithm.distillation_estimator 'sampled' is an estimate on the student's own answers",
                got=f"student_fraction {self.student_fraction} with other_answers data",
                do="Set distillation_estimator to exact.",
            )
        if self.teacher_url is not None and self.student_fraction < 1 and self.other_answers == "teacher":
            raise ConfigError(
                "algorithm.teacher_url: a teacher's server scores answers, and writes none",
                got=f"student_fraction {self.student_fraction}",
                do="Set algorithm.student_fraction to 1 or other_answers to data, or load the teacher here"
                " (teacher_url: null).",
            )

    def teacher_settings(self) -> TeacherSettings:
        """The learner's settings of the teacher."""
        return TeacherSettings(kind="external")


class Distill:
    """The M-step, ``update("m_step")``: SDPO where rollouts have a context C, GKD with ``own_prompt``.

    ``own_prompt``: the teacher reads the task alone, in every row.  ``imitation``: what is learned from retries, in the
    same update.
    """

    def __init__(self, settings: DistillSettings, *, own_prompt: bool = False, imitation: Imitation | None = None):
        self.settings = settings
        self.own_prompt = own_prompt
        self._imitation = imitation

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: the M-step alone."""
        return self.distil(groups, to_examples(groups, self.settings.importance_reference), learner)

    def distil(self, groups: Sequence[Group], examples: Sequence[Example], learner: Learner) -> Update:
        """``updates_per_batch`` updates on L_M and on the groups' retries.

        ``examples`` are the groups' rollouts; an example's reference, where it has one, is log pi_0.
        """
        settings = self.settings
        if self.own_prompt:
            rollouts = (rollout for group in groups for rollout in group.rollouts)
            examples = [
                dataclasses.replace(e, teacher=rollout.teacher_logprobs or rollout.external_prompt)
                for e, rollout in zip(examples, rollouts, strict=True)
            ]
        elif settings.updates_per_batch > 1:
            every_row = self._imitation is not None and self._imitation.needs_references(groups)
            examples = with_reference(examples, learner, lambda e: every_row or e.teacher is not None)
        retries = self._imitation.examples(groups, examples) if self._imitation else []
        updates = [Update(self._imitation.metrics(groups))] if self._imitation else []
        for part in split_by_group(choose_rows(examples, context=True), settings.updates_per_batch):
            own_groups = {example.group for example in part}
            updates.append(self._update(part, [row for row in retries if row.group in own_groups], learner))
        return combine(updates)

    def _update(self, examples: Sequence[Example], retries: Sequence[Example], learner: Learner) -> Update:
        """One update."""
        settings = self.settings
        weights = weighting.token_average(
            token_counts(examples),
            [not e.left_out for e in examples],
            average=settings.average,
            denominator=settings.denominator,
        )
        rows = with_loss_weights(examples, distill=[settings.distillation_weight * weight for weight in weights])
        if self._imitation is None:
            return learner.update("m_step", rows, {"distill": self.loss})
        return self._imitation.update(learner, rows, {"distill": self.loss}, retries)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def loss(self, scorer: Scorer, batch: Batch) -> TokenLoss:
        """L_M of each token [B,T]: the importance ratio, truncated, times the divergence D(pi, sg q).

        The signal ``student_drift_kl`` is r log r - r + 1 with r = pi / pi_0: never negative, and for y ~ pi_0 an
        unbiased estimate of KL(pi || pi_0) per token.  ``sampling_logp_difference`` compares the sampler's log-probs
        with those of the model that it sampled from: pi_0, or the external teacher (0 for the data's answers).
        """
        from vpd import losses

        settings = self.settings
        compared = self._compare(scorer)
        reference_BT = batch.reference_or(compared.student_logprobs)
        ratio_BT = losses.importance_ratio(compared.student_logprobs, reference_BT, clip=settings.importance_clip)
        sampled_BT = compared.teacher_logprobs.where(batch.by_teacher_B[:, None], reference_BT)
        difference_BT = (sampled_BT - batch.behaviour_BT).abs().masked_fill(batch.by_data_B[:, None], 0.0)
        drift_BT = compared.student_logprobs - reference_BT
        return TokenLoss(
            ratio_BT * compared.value,
            signals={
                "divergence": compared.value.detach(),
                "importance_ratio": ratio_BT,
                "teacher_minus_student": compared.teacher_logprobs - compared.student_logprobs,
                "student_drift_kl": drift_BT.exp() * drift_BT - drift_BT.exp() + 1,
                "sampling_logp_difference": difference_BT,
                "entropy": compared.student_entropy,
                "teacher_entropy": compared.teacher_entropy,
                **mismatch(settings.importance_reference, compared.student_logprobs, batch),
            },
        )

    def _compare(self, scorer: Scorer) -> Divergence:
        """The divergence between student and teacher of each token, exact or estimated from the sampled token."""
        from vpd import losses
        from vpd.model.scorer import Divergence

        settings = self.settings
        if settings.distillation_estimator == "exact":
            return scorer.divergence(
                alpha=settings.distillation_alpha,
                top_k=settings.distillation_topk,
                tail=settings.distillation_tail,
                importance_clip=settings.importance_clip,
            )
        student_BT, teacher_BT = scorer.logprobs("student"), scorer.logprobs("teacher")
        return Divergence(
            losses.sampled_divergence(student_BT, teacher_BT),
            student_BT.detach(),
            teacher_BT,
            scorer.entropy("student"),
            scorer.entropy("teacher"),
        )
