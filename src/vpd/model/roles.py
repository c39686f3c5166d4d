"""Whose logits play the student and the teacher, and the model passes that this takes.

Dimension legend: B rows, T longest completion, V vocabulary, H hidden size, N completion tokens of the batch where the
mask is True, n some of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vpd.model import attention
from vpd.model.batch import Batch
from vpd.model.packing import Layout, lay_out
from vpd.types import Tokens

Role: TypeAlias = Literal["student", "teacher"]
#: Pairs (module, share): the logits of a role are the sum of its modules' logits, each multiplied by its share.
#: One module with share 1 is the usual case; a trust-region teacher has two, whose shares sum to 1.
LogitMixture: TypeAlias = tuple[tuple[Any, float], ...]


class ModelPasses:
    """The hidden states of one batch under each role: one pass for each module of a role, made once and kept.

    Gradient flows through the role in ``train`` alone.
    """

    def __init__(
        self,
        batch: Batch,
        mixtures: Mapping[Role, LogitMixture],
        *,
        train: Role | None,
        temperature: float,
        share_prefixes: bool,
    ):
        self._batch = batch
        self._mixtures = mixtures
        self._train = train
        self._temperature = temperature
        self._share_prefixes = share_prefixes
        self._hidden: dict[Role, list[Tensor]] = {}
        self.tokens = 0  # that models have computed, padding included
        self.padding = 0

    def is_one_module(self, role: Role) -> bool:
        """Whether a single module plays the role."""
        return len(self._mixtures[role]) == 1

    def hidden(self, role: Role) -> list[Tensor]:
        """The hidden states that predict the batch's tokens, [N,H] for each module of the role."""
        if role not in self._hidden:
            prompts = self._prompts(role)
            self._hidden[role] = [self._pass(role, model, prompts) for model, _ in self._mixtures[role]]
        return self._hidden[role]

    def logits(self, role: Role, hidden: Sequence[Tensor]) -> Tensor:
        """Logits [n,V] in at least fp32, divided by the temperature, of hidden states [n,H] for each module."""
        with torch.set_grad_enabled(self._has_grad(role)):
            total: Tensor | None = None
            for (model, share), hidden_nH in zip(self._mixtures[role], hidden, strict=True):
                logits_nV = model.get_output_embeddings()(hidden_nH)
                wide = torch.promote_types(logits_nV.dtype, torch.float32)
                logits_nV = logits_nV.to(wide) * (share / self._temperature)
                total = logits_nV if total is None else total + logits_nV
        assert total is not None, "a role without a module"
        return total

    def head_of(self, role: Role) -> tuple[Tensor, Tensor, float]:
        """Of a role that one module plays: its hidden states [N,H], its head [V,H], and what multiplies its logits."""
        ((model, share),) = self._mixtures[role]
        (hidden_NH,) = self.hidden(role)
        weight_VH = model.get_output_embeddings().weight
        if not self._has_grad(role):
            hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        return hidden_NH, weight_VH, share / self._temperature

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
        layout = self._layout(model, prompts)
        self.tokens += layout.inputs["input_ids"].numel()
        self.padding += layout.padding
        with torch.set_grad_enabled(self._has_grad(role)):
            hidden_KLH = model.base_model(**layout.inputs, use_cache=False).last_hidden_state
            return hidden_KLH[layout.row_N, layout.place_N]

    def _layout(self, model: Any, prompts: Sequence[Tokens]) -> Layout:
        weight = next(model.parameters())
        packed = self._share_prefixes and attention.is_installed(model)
        return lay_out(
            prompts,
            [example.completion for example in self._batch.examples],
            [example.mask for example in self._batch.examples],
            hidden_size=model.config.get_text_config().hidden_size if packed else None,
            device=weight.device,
            dtype=weight.dtype,
        )
