"""What a model can do is found by trying: fast paths are refused where they would change its numbers."""

from typing import Any

import pytest
import torch
from helpers import VOCABULARY, tiny_model
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vpd.errors import ModelError
from vpd.model import attention
from vpd.model.decoding import EnginePath
from vpd.model.passes import LearnerPath
from vpd.model.probe import check_head, engine_path, learner_path

CPU = torch.device("cpu")


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


class Scaled(LlamaForCausalLM):
    """A model that multiplies its logits after the head, as some families do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 0.5 * output.logits
        return output


def paths(model: Any) -> tuple[LearnerPath, EnginePath]:
    return learner_path(model), engine_path(model)


def test_a_plain_model_takes_both_fast_paths() -> None:
    model = tiny_model()
    assert paths(model) == ("packed", "shared") and attention.is_installed(model)
    assert learner_path(tiny_model(), share_prefixes=False) == "padded"


def test_sliding_layers_take_none_of_them() -> None:
    config = Qwen3Config(**SMALL, head_dim=8, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    model = Qwen3ForCausalLM(config).eval()
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert paths(model) == ("padded", "cached") and not attention.is_installed(model)


def test_a_sliding_window_of_all_layers_takes_none_of_them() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=32)).eval()
    assert paths(model) == ("padded", "cached") and not attention.is_installed(model)


def test_another_attention_takes_none_of_them_and_stays() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert paths(model) == ("padded", "cached")
    assert model.config._attn_implementation == "eager"


def test_logits_that_change_after_the_head_are_refused() -> None:
    model = tiny_model()
    check_head(model, "teacher", CPU)
    scaled = Scaled(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    with pytest.raises(ModelError, match=r"the teacher \(Scaled\) changes its logits after the head in a way"):
        check_head(scaled, "teacher", CPU)
