"""Shapes of published models, as their ``config.json`` has them; enough to count memory and operations without them."""

from collections.abc import Mapping
from typing import Any


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> Mapping[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


def _llama(
    vocabulary: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, window: int, *, tied: bool = False
) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": window,
        "tie_word_embeddings": tied,
    }


def _olmo3() -> Mapping[str, Any]:
    return {
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 65536,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    }


#: By the last part of a Hub id, in lower case.
KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-4b-base": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, tied=False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, tied=False),
    "olmo-3-7b-instruct": _olmo3(),
    "olmo-3-7b-think": _olmo3(),
    "llama-3.1-8b-instruct": _llama(128256, 4096, 14336, 32, 32, 8, 131072),
    "llama-3.3-70b-instruct": _llama(128256, 8192, 28672, 80, 64, 8, 131072),
    "smollm2-135m-instruct": _llama(49152, 576, 1536, 30, 9, 3, 8192, tied=True),
}
