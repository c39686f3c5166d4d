"""A tokenizer for counting, where a model's own is not there: pieces of text about as long as real ones are.

It splits as byte-pair vocabularies of 50 to 150 thousand entries do on English, code and numbers: words of up to seven
letters are one piece, every digit is one.  Prompts are laid out in ChatML.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

PIECE = re.compile(r"<\|im_(?:start|end)\|>| ?[^\W\d_]{1,7}|\d| ?[^\w\s]{1,2}|\s+|.", re.DOTALL)


class StandInTokenizer:
    """As much of a tokenizer of transformers as prompts are built with."""

    unk_token_id = None
    is_fast = False
    chat_template = "chatml"
    added_tokens_decoder: Mapping[int, Any] = {}

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._pieces: list[str] = []

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, **_: Any) -> list[int]:
        """Numbers of the pieces; a new piece gets the next number."""
        return [self._number(piece) for piece in PIECE.findall(text)]

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(self._pieces[token] for token in tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, tokenize: bool = True, **options: Any
    ) -> Any:
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        if tools:
            turns.insert(0, f"<|im_start|>system\n{tools}<|im_end|>\n")
        if options.get("add_generation_prompt"):
            turns.append("<|im_start|>assistant\n")
        text = "".join(turns)
        return self.encode(text) if tokenize else text

    def _number(self, piece: str) -> int:
        if piece not in self._numbers:
            self._numbers[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._numbers[piece]


def find_tokenizer(source: str, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """The tokenizer of a folder or of the Hub's cache, else a stand-in; and which it is, for the reader.

    Nothing is downloaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return StandInTokenizer(), "a stand-in (the model's own is not here), so lengths are about right"
    if tokenizer.chat_template is None:
        return StandInTokenizer(), "a stand-in (the model's own has no chat template), so lengths are about right"
    where = "its folder" if Path(source).is_dir() else "the Hub's cache"
    return tokenizer, f"the model's own, from {where}"
