"""Whose logits play the student and the teacher, and the model passes that this takes.

Dimension legend: B rows, T longest completion, V vocabulary that all modules have, H hidden size, N completion tokens
of the batch where the mask is True, n some of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vpd.errors import ModelError
from vpd.model import head
from vpd.model.batch import Batch
from vpd.model.passes import LearnerPath, last_hidden
from vpd.types import Tokens

Role: TypeAlias = Literal["student", "teacher"]
#: Pairs (module, share): the logits of a role are the sum of its modules' logits, each multiplied by its share.
#: One module with share 1 is the usual case; a trust-region teacher has two, whose shares sum to 1.
LogitMixture: TypeAlias = tuple[tuple[Any, float], ...]


class ModelPasses:
    """The hidden states of one batch under each role: one pass for each module of a role, made once and kept.

    Gradient flows through the role in ``train`` alone.  Where the same weights play both, autocast's cache is
    cleared between a pass without gradient and one with: of older torch (2.6; pytorch PR 165068) the second would be
    given the rounded weights of the first, which have no gradient.
    """

    def __init__(
        self,
        batch: Batch,
        mixtures: Mapping[Role, LogitMixture],
        *,
        train: Role | None,
        temperature: float,
        path: LearnerPath,
    ):
        self._batch = batch
        self._mixtures = mixtures
        self._train = train
        self._temperature = temperature
        self._path = path
        self._vocabulary = _common_vocabulary(batch, [model for mix in mixtures.values() for model, _ in mix])
        self._hidden: dict[Role, list[Tensor]] = {}
        self.tokens = 0  # that models have computed, padding included
        self.padding = 0

    def has_plain_head(self, role: Role) -> bool:
        """Whether a single module plays the role and its head is one matrix, which :meth:`head_of` needs."""
        return len(self._mixtures[role]) == 1 and head.is_plain(self._mixtures[role][0][0].get_output_embeddings())

    def hidden(self, role: Role) -> list[Tensor]:
        """The hidden states that predict the batch's tokens, [N,H] for each module of the role."""
        if role not in self._hidden:
            prompts = self._prompts(role)
            self._hidden[role] = [self._pass(role, model, prompts) for model, _ in self._mixtures[role]]
        return self._hidden[role]

    def logits(self, role: Role, hidden: Sequence[Tensor]) -> Tensor:
        """Logits [n,V] in at least fp32, divided by the temperature, of hidden states [n,H] for each module.

        V is the smallest vocabulary of all modules: heads that are padded to different sizes are compared on the tokens
        that all of them have, and each distribution is over these.
        """
        if self._has_grad(role):  # see the class
            torch.clear_autocast_cache()
        with torch.set_grad_enabled(self._has_grad(role)):
            total: Tensor | None = None
            for (model, share), hidden_nH in zip(self._mixtures[role], hidden, strict=True):
                logits_nV = model.get_output_embeddings()(hidden_nH)[:, : self._vocabulary]
                wide = torch.promote_types(logits_nV.dtype, torch.float32)
                logits_nV = head.logit_function(model)(logits_nV.to(wide)) * (share / self._temperature)
                total = logits_nV if total is None else total + logits_nV
        assert total is not None, "a role without a module"
        return total

    def head_of(self, role: Role) -> head.HeadInputs:
        """What the logits of a role with a plain head are made of; the head has the rows of V tokens."""
        ((model, share),) = self._mixtures[role]
        (hidden_NH,) = self.hidden(role)
        weight_VH = model.get_output_embeddings().weight[: self._vocabulary]
        if not self._has_grad(role):
            hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        return head.HeadInputs(hidden_NH, weight_VH, head.logit_function(model), share / self._temperature)

    def _has_grad(self, role: Role) -> bool:
        return torch.is_grad_enabled() and role == self._train

    def _prompts(self, role: Role) -> list[Tokens]:
        if role == "student":
            return [example.prompt for example in self._batch.examples]
        if self._batch.teacher_top_k is not None:
            raise ValueError("a remote teacher gives top-k log-probs only; a pass of the teacher needs its prompt")
        prompts = [example.teacher_prompt for example in self._batch.examples]
        known = [prompt for prompt in prompts if prompt is not None]
        if len(known) < len(prompts):
            raise ValueError(
                "a batch for a teacher pass has a row without a teacher's prompt; a learner keeps them apart"
            )
        return known

    def _pass(self, role: Role, model: Any, prompts: Sequence[Tokens]) -> Tensor:
        completions = [example.completion for example in self._batch.examples]
        masks = [example.mask for example in self._batch.examples]
        with torch.set_grad_enabled(self._has_grad(role)):
            done = last_hidden(model, prompts, completions, masks, path=self._path)
        if self._train is not None and not self._has_grad(role):  # see the class
            torch.clear_autocast_cache()
        self.tokens += done.tokens
        self.padding += done.padding
        return done.hidden_NH


def _common_vocabulary(batch: Batch, models: Sequence[Any]) -> int:
    """The smallest vocabulary of these models.  Raises ModelError if the batch holds a token outside of it."""
    smallest = min(len(model.get_output_embeddings().weight) for model in models)
    last = int(batch.tokens_BT.max()) if batch.tokens_BT.numel() else -1
    if last >= smallest:
        raise ModelError(
            "a completion holds a token that not all models have",
            got=f"token {last}",
            expected=f"less than {smallest}, the smallest vocabulary of student and teacher",
            do="Ids beyond the tokenizer's are padding of the head: train the model that samples them a little first.",
        )
    return smallest
