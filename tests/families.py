"""Every family of causal models that transformers builds, at random tiny sizes, against its own plain forward pass.

``python tests/families.py docs/models.md`` scans them all and writes the table; with names it prints these alone.
Configurations are small but have every part that the family has: windows, chunks and top-k that the rows cross, several
kinds of layers, experts, grouped heads.  Weights are large enough that every part shows in the log-probs.
"""

import copy
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vpd.engines.torch_engine import TorchEngine
from vpd.errors import ModelError
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
from vpd.learners.teachers import TeacherSettings
from vpd.model.batch import Batch
from vpd.model.probe import LONGEST
from vpd.model.scorer import Scorer
from vpd.types import Example, SampleKey, Tokens

VOCABULARY = 97
LARGEST = 100_000_000  # parameters; families that stay larger are not built
SMALL: dict[str, Any] = {
    "vocab_size": 97, "unpadded_vocab_size": 97, "encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "is_decoder": True,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "sliding_window": 16, "n_embd": 32,
    "n_layer": 4, "n_head": 4, "n_positions": 512, "ffn_dim": 48, "d_model": 32, "n_layers": 4, "n_heads": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "mamba_expand": 2, "state_size": 8, "expand": 2, "num_heads": 8, "n_groups": 1, "mamba_n_groups": 1,
    "chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "rotary_dim": 8, "n_inner": 48, "word_embed_proj_dim": 32, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "moe_layer_freq": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "attention_chunk_size": 16, "global_attn_every_n_layers": 2, "expert_intermediate_size": 24,
    "intermediate_size_mlp": 48, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2, "query_pre_attn_scalar": 8,
    "activation_sparsity_pattern": None, "block_size": 16, "index_topk": 8, "index_block_size": 4,
    "index_topk_blocks": 2, "log_scaling_n_floor": 16, "rel_extent": 8, "sliding_window_size": 16,
    "use_sliding_window": True,
    "max_window_layers": 2, "conv_dim": 32, "block_auto_adjust_ff_dim": False, "block_ff_dim": 48, "lru_width": 32,
    "attention_window_size": 16, "embedding_size": 32, "num_layers": 4, "mtp_num_hidden_layers": 0,
    "ffn_hidden_size": 48, "max_seq_len": 512, "alibi_bias_max": 8,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "zaya": {"num_experts_per_tok": 1},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "xlm": {"causal": True},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "roc_bert": {"shape_vocab_size": 10, "pronunciation_vocab_size": 10},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "longcat_flash": {"head_dim": 8, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "moe_topk": 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
        "num_key_value_heads": 4,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen4_exp_text": {
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "qwen4_exp": {"vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 32}},
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 64,
        "patch_size": 4,
        "patching_mode": "entropy",
        **{
            part: {
                "vocab_size": 260,
                "hidden_size": 32,
                "hidden_size_global": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "max_position_embeddings": 512,
                "sliding_window": 16,
            }
            for part in ("encoder_config", "decoder_config", "global_config", "patcher_config")
        },
    },
    "got_ocr2": {
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "mlp_dim": 32,
            "output_channels": 8,
            "image_size": 64,
        }
    },
    "moss_transcribe_diarize": {
        "audio_config": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    },
    "phi4_multimodal": {
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "crop_size": 28,
            "image_size": 28,
        },
        "audio_config": {
            "num_blocks": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
        "image_token_id": 90,
        "audio_token_id": 91,
    },
    "dots3_note": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "moe_intermediate_size": 24,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 32,
        },
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "phi3": {"pad_token_id": 0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 8,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_bigcode": {"multi_query": True},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "mamba": {"use_mambapy": False, "time_step_rank": 4},
    "mamba2": {"head_dim": 8, "num_heads": 8, "n_groups": 1},
    "llama4_text": {
        "no_rope_layers": [1, 0, 1, 0],
        "interleave_moe_layer_step": 2,
        "attn_temperature_tuning": True,
        "floor_scale": 16,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "intermediate_size": [48, 48, 48, 48],
    },
}

#: Settings of the text model inside a model of several kinds of input.
TEXT: dict[str, dict[str, Any]] = {}
#: Types that are not built, and why: listed as causal models, but none of text alone.
NOT_BUILT = {
    "musicgen": "its tokens are codebooks of audio, several at each place",
    "musicgen_melody": "its tokens are codebooks of audio, several at each place",
    "gemma3n": "its vision part needs the package timm; gemma3n_text is the same without",
    "gemma4_assistant": "a draft model: it reads the hidden states of another model",
    "gemma4_unified_assistant": "a draft model: it reads the hidden states of another model",
}


@dataclass(frozen=True)
class Result:
    """What became of one family: ``verdict`` is one of right, refused, wrong, crash, unbuilt."""

    verdict: str
    learner: str = ""
    engine: str = ""
    errors: tuple[float, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        errors = " ".join(f"{error:.1e}" for error in self.errors)
        return f"{self.verdict:8s} {self.learner:10s} {self.engine:17s} {errors} {self.note}"


def config_of(kind: str, **changes: Any) -> Any:
    """A tiny configuration of this type."""
    config_class = CONFIG_MAPPING[kind]
    usual = config_class()
    known = set(usual.to_dict()) | set(usual.attribute_map or {})
    settings = {name: value for name, value in SMALL.items() if name in known}
    part = vars(usual).get("text_config")
    if isinstance(part, PretrainedConfig) and part.model_type in CONFIG_MAPPING:
        settings["text_config"] = config_of(part.model_type, **TEXT.get(kind, {})).to_dict()
    if "kv_lora_rank" in known:
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    own = SPECIAL.get(kind, {})
    computed = any(isinstance(vars(config_class).get(name), property) for name in ("layer_types", "layers_block_type"))
    if computed:
        settings.pop("layer_types", None)
    elif "layer_types" in known and usual.layer_types and not {"layer_types", "layers_block_type"} & set(own):
        kinds = list(dict.fromkeys(usual.layer_types))
        settings["layer_types"] = (kinds * 4)[:4]
    return config_class(**settings | own | changes)


def make(kind: str, **changes: Any) -> Any:
    """A random model of this type, tiny, in fp32.  Raises ValueError if it is not tiny."""
    config = config_of(kind, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f}M parameters at the smallest settings that this file knows")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, 0, 1.3 / module.in_features**0.5)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, 0, 1.0)
    head = model.get_output_embeddings()
    if head is not None:
        torch.nn.init.normal_(head.weight, 0, 1.3 / head.weight.shape[1] ** 0.5)
    return model.float().eval()


def examples(seed: int = 0, prompt: int = 30, completion: int = 26) -> list[Example]:
    """Two groups of three rows of different length, with the prompts of a teacher."""
    draw = random.Random(seed)

    def ids(count: int) -> Tokens:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    made = []
    for group in range(2):
        asked = ids(prompt - 3 * group)
        for row in range(3):
            answer = ids(draw.randint(3, completion))
            made.append(
                Example(
                    prompt=asked,
                    completion=answer,
                    mask=tuple(draw.random() < 0.8 or t == 0 for t in range(len(answer))),
                    behaviour=(0.0,) * len(answer),
                    teacher=asked[:-4] + ids(draw.randint(3, 12)) + asked[-4:],
                    loss_weights={"a": draw.uniform(0.2, 1)},
                    success=bool(row),
                    group=group,
                )
            )
    return made


def plain(
    model: Any, prompt: Tokens, completion: Tokens, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T,V] and those of the completion's tokens [T], from ``model(input_ids)`` of one row."""
    logits = model(input_ids=torch.tensor([list(prompt + completion)]), use_cache=False).logits[0]
    logp_TV = torch.log_softmax(logits[len(prompt) - 1 : -1].float() / temperature, -1)
    return logp_TV, logp_TV.gather(1, torch.tensor(completion)[:, None])[:, 0]


TEMPERATURE = 0.7
OPTIM = OptimSettings(optimizer="sgd", learning_rate=1.0, weight_decay=0.0, max_grad_norm=None)


def learner_of(model: Any, optim: OptimSettings = OPTIM, **changes: Any) -> AccelerateLearner:
    """A learner whose own weights are the teacher, at :data:`TEMPERATURE`."""
    settings: dict[str, Any] = {"temperature": TEMPERATURE, "teacher": TeacherSettings(kind="live")} | changes
    PartialState(cpu=True)
    return AccelerateLearner(model, optim, **settings)


def logprob_error(learner: AccelerateLearner, pristine: Any) -> float:
    """Largest difference, in nats, of the learner's log-probs from the plain ones, student and teacher."""
    rows, worst = examples(), 0.0
    for role in ("student", "teacher"):
        scored = learner.score(rows, lambda scorer, batch, role=role: scorer.logprobs(role))
        for example, ours in zip(rows, scored, strict=True):
            prompt = example.prompt if role == "student" else example.teacher_prompt
            assert prompt is not None
            with torch.no_grad():
                theirs = plain(pristine, prompt, example.completion, TEMPERATURE)[1]
            difference = (torch.tensor(ours) - theirs)[torch.tensor(example.mask)].abs()
            worst = max(worst, float(difference.nan_to_num(torch.inf).max()))
    return worst


def objective(scorer: Scorer, batch: Batch) -> torch.Tensor:
    """A divergence and a log-prob, so that both ways through the head are differentiated."""
    return scorer.divergence(alpha=0.5).value - 0.3 * scorer.logprobs("student")


def gradient_error(learner: AccelerateLearner, pristine: Any) -> float:
    """Relative difference of the gradient of :func:`objective` from autograd's through the plain forward pass."""
    model, rows = learner.model, examples()
    before = [p.detach().clone() for p in model.parameters()]
    learner.update("x", rows, {"a": objective})
    ours = torch.cat([(old - p.detach()).flatten() for old, p in zip(before, model.parameters(), strict=True)])
    with torch.no_grad():
        for old, p in zip(before, model.parameters(), strict=True):
            p.copy_(old)
    pristine.zero_grad()
    total = torch.zeros(())
    for row in rows:
        assert row.teacher_prompt is not None
        student, own = plain(pristine, row.prompt, row.completion, TEMPERATURE)
        with torch.no_grad():
            teacher = plain(pristine, row.teacher_prompt, row.completion, TEMPERATURE)[0]
        middle = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
        value = 0.5 * (student.exp() * (student - middle)).sum(-1) + 0.5 * (teacher.exp() * (teacher - middle)).sum(-1)
        total = total + row.loss_weights["a"] * (value - 0.3 * own)[torch.tensor(row.mask)].sum()
    total.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in pristine.parameters()]
    theirs = torch.cat([part.flatten() for part in parts])
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def rounding_errors(kind: str) -> dict[str, tuple[float, float]]:
    """Mean distance from the same weights in fp32, in nats a token: (ours, a plain forward pass's), all in bf16."""
    model = make(kind).to(torch.bfloat16)
    pristine, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    learner, engine, rows = learner_of(model), TorchEngine(NoText(), eos_ids=[2]), examples()
    scored = learner.score(rows, lambda scorer, batch: scorer.logprobs("student"))
    engine.load(learner.policy())
    keys = [SampleKey(phase="train", step=0, task=task, sample=0) for task in range(len(rows))]
    sampled = engine.generate([r.prompt for r in rows], keys=keys, seed=0, max_tokens=40, temperature=TEMPERATURE)

    def compared(answers: Sequence[tuple[Tokens, Sequence[float], Sequence[bool]]]) -> tuple[float, float]:
        distances: tuple[list[Tensor], list[Tensor]] = ([], [])
        for row, (tokens, values, mask) in zip(rows, answers, strict=True):
            theirs = [plain(m, row.prompt, tokens, TEMPERATURE)[1][torch.tensor(mask)] for m in (exact, pristine)]
            distances[0].append((torch.tensor(values)[torch.tensor(mask)] - theirs[0]).abs())
            distances[1].append((theirs[1] - theirs[0]).abs())
        ours, plainly = (float(torch.cat(parts).mean()) for parts in distances)
        return ours, plainly

    return {
        "learner": compared([(row.completion, ours, row.mask) for row, ours in zip(rows, scored, strict=True)]),
        "engine": compared([(c.tokens, c.logprobs, c.sampled) for c in sampled]),
    }


class NoText:
    """A tokenizer for models that speak no language."""

    def decode(self, ids: Any, **options: Any) -> str:
        return ""


@torch.no_grad()
def engine_error(engine: TorchEngine, pristine: Any, tokens: int = 40) -> float:
    """Largest difference, in nats, of the engine's log-probs of what it sampled from the plain ones."""
    rows = examples()
    prompts = [row.prompt for row in rows] + [rows[0].prompt[:7], rows[1].prompt[:1]]
    keys = [SampleKey(phase="train", step=0, task=task, sample=0) for task in range(len(prompts))]
    sampled = engine.generate(prompts, keys=keys, seed=0, max_tokens=tokens, temperature=TEMPERATURE)
    worst = 0.0
    for prompt, completion in zip(prompts, sampled, strict=True):
        theirs = plain(pristine, prompt, completion.tokens, TEMPERATURE)[1]
        difference = (torch.tensor(completion.logprobs) - theirs).abs()
        worst = max(worst, float(difference.nan_to_num(torch.inf).max()))
    return worst


def scan(kind: str, **changes: Any) -> Result:
    """Build one family and compare learner and engine with an untouched copy."""
    if kind in NOT_BUILT:
        return Result("unbuilt", note=NOT_BUILT[kind])
    try:
        model = make(kind, **changes)
        pristine = copy.deepcopy(model)
        plain(pristine, (3, 4), (5,))
    except Exception as error:  # a family that this file cannot build: listed as such
        return Result("unbuilt", note=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}")
    learner = engine = None
    try:
        learner = learner_of(model)
        engine = TorchEngine(NoText(), eos_ids=[2])
        engine.load(learner.policy())
        errors = (
            logprob_error(learner, pristine),
            gradient_error(learner, pristine),
            engine_error(engine, pristine),
        )
    except ModelError as error:
        path = "" if learner is None else learner.path
        return Result("refused", path, note=str(error))
    except Exception as error:
        traceback.print_exc()
        return Result("crash", note=f"{type(error).__name__}: {str(error)[:120]}")
    return Result("right" if max(errors) < 5e-3 else "wrong", learner.path, engine.path, errors)


def kinds() -> list[str]:
    """The model types of all causal models of this transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


FAST = {"packed", "shared"}
PATHS = {
    "packed": "packed rows", "padded": "padded rows", "by_length": "rows of one length at a time",
    "shared": "shared prompts", "cached": "a cache for each row", "cached_by_length": "a cache, prompts of one length",
    "recomputed": "no cache: whole rows at every step",
}  # fmt: skip
INTRODUCTION = """# Models

Written by `make models`: every type of causal model in transformers {version}, at a random tiny size with all its kinds
of layers, against its own forward pass over each row alone.  Compared are the learner's log-probs, its gradients, and
the log-probs of what the engine samples; right means that all of them agree (5e-3 nats, 5e-3 of the gradient).

*Fast* is packed rows in the learner and shared prompts in the engine.  *Plain* gives the same numbers in more time.
Every run finds out for its own model, before anything is trained (`vpd/model/probe.py`), and says so in one line.
A model whose RoPE is scaled by the length of the row (longrope, dynamic) is always computed one length at a time and
sampled without a cache: beyond the original length the log-prob of a token depends on how long its row becomes, so
that what was sampled token by token is not what a pass over the whole row gives.  Sliding windows count as crossed up
to {longest} tokens.  A model of images or audio too is compared on text alone.

`make test-oldest` and `make test-newest` do the same at the lowest and the newest versions that pyproject.toml allows:
no type is silently wrong at either (transformers 5.10.1 and 5.24.0), but which path is taken, and what is refused,
may differ from this table at another version.

{counts}

| family | right and fast | right and plain | refused, why |
|---|---|---|---|
"""


def table(results: dict[str, Result]) -> str:
    """The results as docs/models.md."""
    rows, counts = [], dict.fromkeys(("fast", "plain", "refused", "wrong or crashed", "not built"), 0)
    for kind, result in results.items():
        paths = {"learner": result.learner, "engine": result.engine}
        fast = [f"{who}: {PATHS[path]}" for who, path in paths.items() if path in FAST]
        plainly = [f"{who}: {PATHS[path]}" for who, path in paths.items() if path and path not in FAST]
        why = result.note.replace("|", "/")
        match result.verdict:
            case "right":
                counts["plain" if plainly else "fast"] += 1
            case "refused":
                counts["refused"] += 1
                fast = plainly = []
            case "unbuilt":
                counts["not built"] += 1
                why = f"not built here: {why}"
            case verdict:
                counts["wrong or crashed"] += 1
                why = f"{verdict.upper()}: {why} {result.errors}"
        rows.append(f"| {kind} | {'; '.join(fast)} | {'; '.join(plainly)} | {why} |")
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    summary = f"{len(results)} types: {told}."
    start = INTRODUCTION.format(version=transformers.__version__, longest=LONGEST, counts=summary)
    return start + "\n".join(rows) + "\n"


def scan_quietly(kind: str) -> tuple[str, Result]:
    """:func:`scan` in a process of its own."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    begin = time.monotonic()
    result = scan(kind)
    print(f"{kind:28s} {result}  [{time.monotonic() - begin:.1f} s]", flush=True)
    return kind, result


def main(words: list[str]) -> None:
    output = Path(words[0]) if words and words[0].endswith(".md") else None
    if output is None:
        for kind in words:
            scan_quietly(kind)
        return
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        output.write_text(table(dict(pool.imap(scan_quietly, kinds()))))


if __name__ == "__main__":
    main(sys.argv[1:])
