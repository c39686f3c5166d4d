"""What a model can do is found by trying: fast paths are refused where they would change its numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, tiny_learner, tiny_model
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vpd.errors import ModelError
from vpd.learners import accelerate_learner
from vpd.model import attention, widened
from vpd.model.decoding import EnginePath
from vpd.model.passes import LearnerPath, last_hidden
from vpd.model.probe import check_causal, check_head, engine_path, learner_path

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


@pytest.mark.parametrize(("device", "form"), [("cpu", "PackedSegments"), ("cuda", "GroupedSegments")])
def test_packed_rows_are_tried_as_the_device_that_will_train_computes_them(
    device: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is to be sharded is still on the CPU when it is probed."""
    tried: set[str] = set()
    for kind in (attention.PackedSegments, attention.GroupedSegments):

        def seen(segments: Any, *states: Any, own: Any = kind.attend, **options: Any) -> torch.Tensor:
            tried.add(type(segments).__name__)
            return own(segments, *states, **options)

        monkeypatch.setattr(kind, "attend", seen)
    assert learner_path(tiny_model(), device=torch.device(device)) == "packed"
    assert tried == {form}


def test_the_learner_says_where_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def path(model: Any, name: str, **options: Any) -> LearnerPath:
        asked.append(options.get("device"))
        return "padded"

    monkeypatch.setattr(accelerate_learner, "learner_path", path)
    learner = tiny_learner(tiny_model())
    assert asked and set(asked) == {learner.accelerator.device}


def test_sliding_layers_take_none_of_them() -> None:
    config = Qwen3Config(**SMALL, head_dim=8, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    model = Qwen3ForCausalLM(config).eval()
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert paths(model) == ("padded", "cached") and not attention.is_installed(model)


def test_a_sliding_window_of_all_layers_takes_none_of_them() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=32)).eval()
    assert paths(model) == ("padded", "cached") and not attention.is_installed(model)


def test_another_attention_takes_none_of_them_and_stays() -> None:
    model = tiny_model(dtype=torch.float32)
    model.set_attn_implementation("eager")
    assert paths(model) == ("padded", "cached")
    assert model.config._attn_implementation == "eager"


def test_a_prompt_that_becomes_nan_beside_a_longer_one_is_seen() -> None:
    """The eager attention of transformers takes the softmax of a mask of float64's least number in float32."""
    model = tiny_model(dtype=torch.float64)
    model.set_attn_implementation("eager")
    assert engine_path(model) == "cached_by_length"


class Crowded(LlamaForCausalLM):
    """A model whose numbers move by a thousandth where rows stand side by side, as padding moves Zamba 2 in 5.10."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, inputs, states: states * (1 + 1e-3 * (len(states) > 1)))


def test_a_difference_that_shows_in_log_probs_is_not_rounding() -> None:
    model = Crowded(tiny_model().config).eval()
    assert learner_path(model, share_prefixes=False) == "by_length"
    assert learner_path(tiny_model(dtype=torch.float32), share_prefixes=False) == "padded"


def test_a_difference_that_16_bits_hide_is_seen() -> None:
    model = Crowded(tiny_model().config).to(torch.bfloat16).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert learner_path(model, share_prefixes=False) == "by_length"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


class Rounded(Crowded):
    """A model whose rounding in 16 bits, as that of 30 layers, moves the logits by a tenth of their size."""

    def __init__(self, config: Any):
        LlamaForCausalLM.__init__(self, config)

        def move(module: Any, inputs: Any, states: torch.Tensor) -> torch.Tensor:
            return states * 1.1 if states.dtype is torch.bfloat16 and len(states) > 1 else states

        self.model.norm.register_forward_hook(move)


def test_the_rounding_of_16_bits_refuses_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Rounded(tiny_model().config).to(torch.bfloat16).eval()
    assert learner_path(model, share_prefixes=False) == "padded"
    monkeypatch.setattr(widened, "SHARE", 0.0)  # no memory for float32
    assert widened.wider_type(model) is None and learner_path(model, share_prefixes=False) == "padded"


class Amplifying(Crowded):
    """A model in which rounding of float32 grows to a thousandth, as in one with large weights."""

    def __init__(self, config: Any):
        LlamaForCausalLM.__init__(self, config)

        def move(module: Any, inputs: Any, states: torch.Tensor) -> torch.Tensor:
            return states * (1 + 1e-3 * states.shape[1] / 8) if states.dtype is torch.float32 else states

        self.model.norm.register_forward_hook(move)


def test_the_rounding_of_float32_refuses_no_path_and_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Amplifying(tiny_model().config).float().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_causal(model, "model")
    assert learner_path(model, share_prefixes=False) == "padded"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    monkeypatch.setattr(widened, "SHARE", 0.0)  # no memory for float64: refused, as before
    with pytest.raises(ModelError, match="not causal"):
        check_causal(model, "model")


class Changed(LlamaForCausalLM):
    """A model whose states are changed by a function of them."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(tiny_model().config)
        self.model.norm.register_forward_hook(lambda module, inputs, states: change(states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda states: states * torch.nan, lambda states: states / 0])
def test_what_is_no_number_is_refused(change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    model = Changed(lambda states: change(states) if len(states) > 1 else states).to(dtype).eval()
    assert learner_path(model, share_prefixes=False) == "by_length"
    broken = Changed(change).to(dtype).eval()
    check_causal(broken, "model")
    assert learner_path(broken) == "by_length"
    with pytest.raises(ModelError, match=r"logits of the model .* are not finite"):
        engine_path(broken)


def test_a_model_that_becomes_nan_once_a_token_follows_is_not_causal() -> None:
    def change(states: torch.Tensor) -> torch.Tensor:
        return states * (torch.nan if states.shape[1] > 5 else 1.0)

    with pytest.raises(ModelError, match=r"not causal.*no numbers"):
        check_causal(Changed(change).float().eval(), "model")


def test_tokens_that_are_never_said_hide_no_difference() -> None:
    def silent(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits[..., :-2], torch.full_like(logits[..., -2:], torch.finfo(logits.dtype).min)], dim=-1)

    good, bad = tiny_model(dtype=torch.float32), Crowded(tiny_model().config).float().eval()
    for model in (good, bad):
        model.get_output_embeddings().register_forward_hook(silent)
    assert learner_path(good, share_prefixes=False) == "padded"
    assert learner_path(bad, share_prefixes=False) == "by_length"


def test_a_large_difference_in_float32_is_not_taken_for_rounding() -> None:
    model = Changed(lambda states: states * 2 if states.dtype is torch.float32 and len(states) > 1 else states)
    assert learner_path(model.float().eval(), share_prefixes=False) == "by_length"


def test_a_model_that_cannot_be_run_in_float64_is_judged_by_float32() -> None:
    model = Changed(lambda states: (states + 1e-3 * states.mean(1, keepdim=True)).float()).float().eval()
    with pytest.raises(ModelError, match="not causal"):
        check_causal(model, "model")


class Wider(LlamaForCausalLM):
    """A model whose attention asks for something that only its own code knows."""

    option: Any = 1.0

    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(self._ask, with_kwargs=True)

    def _ask(self, module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"s_aux": self.option}


def test_an_option_that_the_fast_paths_do_not_know_refuses_them(caplog: pytest.LogCaptureFixture) -> None:
    model = Wider(tiny_model().config).eval()
    assert paths(model) == ("padded", "cached") and not attention.is_installed(model)
    assert caplog.text.count("asks for more than causal attention; got s_aux") == 2
    model.option = None  # named, but nothing is asked for
    assert paths(model) == ("packed", "shared")
    model.option = 1.0  # after the probe: no silent change of the numbers
    with pytest.raises(attention.FastPathError, match="got s_aux"):
        last_hidden(model, [(1, 2, 3)], [(4, 5)], [[True, True]], path="packed")


class Rolled(LlamaForCausalLM):
    """A model that mixes tokens outside of its attention, the first with the last of its row."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.layers[0].register_forward_pre_hook(self._mix, with_kwargs=True)

    def _mix(self, module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + torch.roll(args[0], 1, 1), *args[1:]), kwargs


def test_a_mixer_that_is_no_attention_takes_the_paths_that_are_right_for_it() -> None:
    model = Rolled(tiny_model().config).eval()
    assert learner_path(model) == "by_length"
    with pytest.raises(ModelError, match=r"the engine.s passes of the model \(Rolled\) do not give the model.s own"):
        engine_path(model)


class Switched(LlamaForCausalLM):
    """A model whose own code asks for the attention's name, as DeepSeek V3.2 does before it applies its mask."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.layers[0].register_forward_pre_hook(self._change, with_kwargs=True)

    def _change(self, module: Any, args: Any, kwargs: Any) -> Any:
        own = self.config._attn_implementation in ("eager", "sdpa")
        return (args[0] * (2.0 if own else 1.0), *args[1:]), kwargs


def test_the_attentions_name_switches_nothing_off() -> None:
    model = Switched(tiny_model().config).eval()
    assert paths(model) == ("padded", "cached") and not attention.is_installed(model)
    attention.install(model)  # compared is still the model as it came
    with pytest.raises(ModelError, match=r"do not give the model.s own log-probs"):
        learner_path(model)


class Distant(LlamaForCausalLM):
    """A model that reads the token 40 places before in its plain pass alone, as a forgotten window would show."""

    places = 40

    def __init__(self, config: Any):
        super().__init__(config)
        self.model.layers[0].register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, module: Any, args: Any, kwargs: Any) -> Any:
        before = torch.nn.functional.pad(args[0], (0, 0, self.places, 0))[:, : args[0].shape[1]]
        return (args[0] if kwargs.get("segments") is not None else args[0] + before, *args[1:]), kwargs


def test_the_rows_of_the_probe_are_longer_than_what_the_configuration_names() -> None:
    model = Distant(tiny_model().config).eval()
    model.config.sliding_window = 40
    assert learner_path(model) == "padded"


class Near(Distant):
    places = 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_difference_of_the_logits_size_is_seen_in_every_precision(dtype: torch.dtype) -> None:
    assert learner_path(Near(tiny_model().config).to(dtype).eval()) == "padded"
    assert learner_path(tiny_model(dtype=dtype).eval()) == "packed"


class Shifted(torch.nn.Module):
    """A mixer of tokens that is no attention, and hardly shows in a young model."""

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        return 1e-6 * torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1], None


def test_a_layer_without_attention_is_counted_even_where_its_numbers_do_not_show() -> None:
    model = tiny_model(dtype=torch.float32)
    model.model.layers[0].self_attn = Shifted()
    assert learner_path(model) == "padded"


def test_a_window_that_is_too_long_to_try_refuses_the_fast_paths(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.config.attention_window_size = 50  # of 64 positions
    assert learner_path(model) == "padded"
    assert "it has a window of 50 tokens, too many to try" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"index_topk_blocks": 10, "index_block_size": 5},  # MiniMax M3: the best 10 blocks of 5 tokens
        {"index_topk": 2, "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 25}},
        {"log_scaling_n_floor": 50},
        {"layer_windows": [8, 50]},
    ],
)
def test_blocks_are_crossed_in_tokens_and_settings_inside_others_count(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert paths(model) == ("padded", "cached")
    assert caplog.text.count("it has a window of 50 tokens, too many to try") == 2


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "attention_mask"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 2, 6, 6)}, "position_bias"),
        ({"softcap": 50.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"scaling": None}, "no scaling"),
    ],
)
def test_whatever_a_call_asks_for_beyond_causal_attention_refuses_both_fast_paths(
    asked: dict[str, Any], named: str
) -> None:
    states = torch.randn(1, 2, 6, 4)
    segments = attention.PackedSegments.of((2, 4), (None, 0), device=CPU, dtype=states.dtype)
    prefix = attention.SharedPrefixKV.of([(states, states)], torch.ones(1, 6)).with_rows(torch.tensor([0]))
    layer = tiny_model().model.layers[0].self_attn
    allowed = {"attention_mask": torch.zeros(1, 1, 1, 1), "scaling": 0.5, "dropout": 0.0, "sliding_window": None}
    for fast, queries in (({"segments": segments}, states), ({"prefix_kv": prefix}, states[:, :, :1])):
        assert attention.attend(layer, queries, queries, queries, **(allowed | fast))[0].isfinite().all()
        with pytest.raises(attention.FastPathError, match=f"got {named}$"):
            attention.attend(layer, queries, queries, queries, **(allowed | fast | asked))


def test_the_cost_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="vpd")
    paths(tiny_model())
    assert caplog.text.count("checked against the model itself (") == 2


def test_a_soft_cap_is_seen_on_the_small_logits_of_a_young_model() -> None:
    model = tiny_model()
    capped = Capped(model.config).eval()
    with pytest.raises(ModelError, match="changes its logits after the head in a way"):
        check_head(capped, "model", CPU)
    capped.config.final_logit_softcapping = 30.0
    check_head(capped, "model", CPU)


class Capped(LlamaForCausalLM):
    """A model with the soft cap of Gemma 2."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


def test_logits_that_change_after_the_head_are_refused() -> None:
    model = tiny_model()
    check_head(model, "teacher", CPU)
    scaled = Scaled(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    with pytest.raises(ModelError, match=r"the teacher \(Scaled\) changes its logits after the head in a way"):
        check_head(scaled, "teacher", CPU)
