"""Tokenizers in the style of well-known families, trained on a few sentences: byte-level, with their control tokens."""

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vpd.lab import tiny

CORPUS = [
    "the quick brown fox jumps over the lazy dog " * 20,
    "def f(x): return x + 1\n" * 20,
    "feedback on an earlier attempt solve the original task now",
]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ (system if loop.first else '') + m.content.strip() }} [/INST]"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
#: What marks roles in these templates.
ROLE_MARKERS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "USER:", "ASSISTANT:"]


def byte_level(
    template: str, *, special: str, plain: str = "", normalizer: Any = None, more: list[str] | None = None, **named: Any
) -> Any:
    """``special`` and ``plain``: added tokens by whitespace; ``more``: added tokens that are ordinary text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special.split()])
    tokenizer.add_tokens(
        [
            AddedToken(x, special=False, normalized=normalizer is not None, single_word=False)
            for x in [*plain.split(), *(more or [])]
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    fast.chat_template = template
    return fast


@functools.cache
def llama3() -> Any:
    """As on the Hub only the first and the last token have names; the headers are special without one."""
    return byte_level(
        LLAMA3,
        special="<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
        " <|python_tag|> <|reserved_special_token_0|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


@functools.cache
def qwen(template: str = QWEN) -> Any:
    """``<think>`` and the tool tags are added tokens that are not special."""
    return byte_level(
        template,
        special="<|endoftext|> <|im_start|> <|im_end|> <|image_pad|>",
        plain="<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@functools.cache
def gemma() -> Any:
    """With HTML tags and runs of whitespace among the added tokens."""
    return byte_level(
        GEMMA,
        special="<pad> <eos> <bos> <start_of_turn> <end_of_turn>",
        plain="[@BOS@] <h1> </h1> <table>",
        more=["\n\n", "\n\n\n", "    "],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


@functools.cache
def mistral() -> Any:
    return byte_level(
        MISTRAL,
        special="<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@functools.cache
def llama2() -> Any:
    """``[INST]`` and ``<<SYS>>`` are plain text."""
    return byte_level(LLAMA2, special="<unk> <s> </s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def vicuna() -> Any:
    """Roles are words with a colon; a normalizer makes full-width letters narrow."""
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return byte_level(VICUNA, special="<s> </s>", normalizer=normalizers.NFKC(), **named)


@functools.cache
def full_width() -> Any:
    """A normalizer makes full-width letters narrow before tags are looked for."""
    return byte_level(QWEN, special="<|im_start|> <|im_end|>", plain="<think> </think>", normalizer=normalizers.NFKC())


@functools.cache
def bundled() -> Any:
    return tiny.make_tokenizer()


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama3": llama3,
    "qwen": qwen,
    "gemma": gemma,
    "mistral": mistral,
    "llama2": llama2,
    "vicuna": vicuna,
    "full-width": full_width,
    "tiny": bundled,
}
