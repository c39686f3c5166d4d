"""An auxiliary term that ties the policy to a frozen dynamics model (LDD, arXiv 2210.00066), beside any method.

    L + weight * mean_t KL( p_0(. | x, y, o_<t) || pi(. | x, y, o_<t) )     o: the environment's text on the attempt y

p_0 are the initial weights of the run, so a run that starts from a model trained by ``ldd`` keeps what that has learned
about the environment while it learns to answer.  The rows of the term join every update of the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from vpd.algorithms import Algorithm, weighting
from vpd.algorithms.examples import forward_kl, token_counts, with_loss_weights
from vpd.algorithms.ldd import environment_examples
from vpd.learners import Learner, Objective, Update
from vpd.learners.around import LearnerAround
from vpd.prompts import Prompter
from vpd.settings import Settings
from vpd.types import Example, Group, TopKLogprobs

if TYPE_CHECKING:
    from torch import Tensor

    from vpd.model.batch import Batch
    from vpd.model.scorer import Role, Scorer

NOTHING = -30.0  # log-prob of a token that p_0 rules out, and at a place that does not count


@dataclass(frozen=True, kw_only=True)
class DynamicsSettings(Settings, section="dynamics"):
    """An auxiliary term that keeps the model's predictions of the environment's text near those of its initial weights.

    It is for a run that starts from a model trained by ``ldd``, with any method.
    """

    weight: Annotated[float, Ge(0), "weight of the term beside the method's own loss; 0: none"] = 0.0
    top_k: Annotated[
        int, Ge(1), "compare on the initial model's K likeliest tokens, the rest as one; at most the vocabulary"
    ] = 64


class Tied:
    """A method with the auxiliary term in each of its student's updates."""

    def __init__(self, method: Algorithm, settings: DynamicsSettings, prompter: Prompter):
        self._method = method
        self._settings = settings
        self._prompter = prompter

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration of the method; what p_0 says of the environment's text is scored once before."""
        rows = [row for row in environment_examples(groups, self._prompter) if not row.left_out]
        if not rows or not self._settings.weight:
            return self._method.step(groups, learner)
        rows = [dataclasses.replace(row, key=None) for row in rows]  # the method accounts for the attempts
        rows = likeliest(rows, self._settings.top_k, learner)
        weights = weighting.token_average(token_counts(rows), [True] * len(rows), average="token_mean")
        rows = with_loss_weights(rows, dynamics=[self._settings.weight * weight for weight in weights])
        return self._method.step(groups, WithTerm(learner, rows, {"dynamics": forward_kl}))

    def state(self) -> dict[str, Any]:
        return self._method.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._method.restore(state)


def likeliest(rows: Sequence[Example], top_k: int, learner: Learner) -> list[Example]:
    """The rows with the initial weights' K likeliest tokens at each place as their teacher."""
    scores: Any = learner.score(rows, _Likeliest(top_k), model="initial")
    pairs = zip(rows, scores, strict=True)
    return [dataclasses.replace(row, teacher=_teacher(values_TC, row.mask)) for row, values_TC in pairs]


def _teacher(values_TC: Sequence[Sequence[float]], mask: Sequence[bool]) -> TopKLogprobs:
    width = len(values_TC[0]) // 2
    empty = (*range(width), *[NOTHING] * width)
    places = [values if counts else empty for values, counts in zip(values_TC, mask, strict=True)]
    return TopKLogprobs(
        ids=tuple(tuple(map(int, place[:width])) for place in places),
        logprobs=tuple(tuple(max(value, NOTHING) for value in place[width:]) for place in places),
    )


@dataclass(frozen=True)
class _Likeliest:
    """Measure [B,T,2K]: the K likeliest next tokens (all, of a smaller vocabulary), and their log-probs."""

    top_k: int

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        import torch

        def columns(logp_nV: Tensor, tokens_n: Tensor) -> Tensor:
            top = logp_nV.topk(min(self.top_k, logp_nV.shape[1]), dim=-1)
            return torch.cat([top.indices.to(logp_nV), top.values], 1)

        return scorer.of_tokens("student", columns)


class WithTerm(LearnerAround):
    """A learner whose updates of the student also have these rows, with their own term of the loss.

    The report is that of the other rows, and holds the term's loss.
    """

    def __init__(self, learner: Learner, rows: Sequence[Example], objectives: Mapping[str, Objective]):
        super().__init__(learner)
        self._rows = rows
        self._objectives = objectives

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        if train != "student":
            return super().update(name, examples, objectives, train=train, lr_scale=lr_scale)
        together = {**objectives, **self._objectives}
        update = super().update(name, [*examples, *self._rows], together, train=train, lr_scale=lr_scale)
        count = len(examples)
        own = {f"{name}/rows": float(len(self._rows)), f"{name}/tokens": float(sum(token_counts(self._rows)))}
        return Update(
            {key: value - own.get(key, 0.0) for key, value in update.metrics.items()},
            values={term: values[:count] for term, values in update.values.items()},
            tokens={signal: kept[:count] for signal, kept in update.tokens.items()},
        )
