"""Activation checkpointing changes what is kept in memory, and nothing else."""

import inspect
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, flat, random_groups, tiny_learner, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from vpd.algorithms.examples import to_examples, with_loss_weights
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.errors import ConfigError
from vpd.model import activation_checkpointing
from vpd.model.decoding import EnginePath, decoder_for
from vpd.model.probe import engine_path


def trained(kind: str, **changes: Any) -> tuple[Any, torch.Tensor]:
    settings = VPDSettings(e_every=2, teacher_ema_rate=0.5)
    learner = tiny_learner(tiny_model(), teacher=settings.teacher_settings(), gradient_checkpointing=kind, **changes)
    algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
    for seed in range(3):
        algorithm.step(random_groups(seed), learner)
        learner.end_iteration()
    return learner, flat(learner.model)


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_the_same(kind: str, share_prefixes: bool) -> None:
    _, plain = trained("none", share_prefixes=share_prefixes)
    learner, other = trained(kind, share_prefixes=share_prefixes)
    assert torch.equal(plain, other) and not torch.equal(plain, flat(tiny_model()))
    assert not any(module.training for module in learner.model.modules())  # dropout stays off


def test_selective_repeats_no_matrix_product() -> None:
    operations, activations = {}, {}
    made = to_examples(random_groups(0))
    for kind in ("none", "selective", "full"):
        learner = tiny_learner(tiny_model(), gradient_checkpointing=kind)
        calls: list[str] = []
        for layer in learner.model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda *_, to=calls: to.append("act"))
        with FlopCounterMode(display=False) as counter:
            learner.update(
                "m",
                with_loss_weights(made, policy=[1.0] * len(made)),
                {"policy": lambda scorer, batch: scorer.logprobs("student")},
            )
        operations[kind], activations[kind] = counter.get_total_flops(), len(calls)
    assert operations["none"] == operations["selective"] < operations["full"]
    assert activations["none"] < activations["selective"] == activations["full"]


class WithoutCheckpointing(LlamaForCausalLM):
    supports_gradient_checkpointing = False


def test_a_model_without_it_is_refused() -> None:
    model = WithoutCheckpointing(tiny_model().config)
    with pytest.raises(ConfigError, match="WithoutCheckpointing has no gradient checkpointing"):
        activation_checkpointing.enable(model, "full")
    activation_checkpointing.enable(model, "none")


@pytest.mark.skipif(
    "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer),
    reason="this transformers ignores the cache of a checkpointing layer even without gradients",
)
@pytest.mark.parametrize("path", ["cached", "shared"])
@torch.no_grad()
def test_sampling_keeps_its_cache_within_an_active_block(path: EnginePath) -> None:
    model = tiny_model()
    activation_checkpointing.enable(model, "full")
    assert engine_path(model) == "shared"
    with activation_checkpointing.active(model):
        decoder = decoder_for(model, [(1, 2, 3, 4)], path)
        decoder.step(torch.tensor([5]))
        ours = decoder.step(torch.tensor([6]))
    assert torch.allclose(ours, model(torch.tensor([[1, 2, 3, 4, 5, 6]])).logits[:, -1], atol=1e-5)
