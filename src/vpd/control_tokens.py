"""Text from outside must not become control tokens: a forged turn, an end of text, the start of a tool call."""

import functools
import re
from typing import Any, Literal

from vpd.errors import ModelError


class ControlTokens:
    """The added tokens of a tokenizer that a text from outside must not become.

    These are all that the tokenizer marks special, and of the others those that look like a tag (``<think>``,
    ``</tool_call>``).  Whitespace and plain words that were added to the vocabulary are ordinary text.
    """

    _TAG = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
    _ROUNDS = 16  # a text that spells one token inside another needs one round for each

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._unknown = tokenizer.unk_token_id  # what unknown words become: a control token only where it is spelled
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = {number: token.content for number, token in added.items() if token.special}
        tags = {number: token.content for number, token in added.items() if self._TAG.fullmatch(token.content)}
        self._of = {"special": special, "any": {**tags, **special}}
        self._neutralised = functools.lru_cache(maxsize=512)(self._neutralise)
        self._inert = functools.lru_cache(maxsize=512)(self._with_gap)

    def neutralise(self, text: str, which: Literal["any", "special"] = "any") -> tuple[str, int]:
        """``text`` such that it encodes to no control token, and how many it did encode to.

        Text that spells none is returned as it is; lone surrogates, which have no encoding, become question marks.
        """
        return self._neutralised(text.encode(errors="replace").decode(), which)

    def _neutralise(self, text: str, which: Literal["any", "special"]) -> tuple[str, int]:
        count = 0
        for _ in range(self._ROUNDS):
            found = self._spelled(text, which)
            if not found:
                return text, count
            count += len(found)
            spellings = sorted({self._of[which][number] for number in found}, key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, spellings)))
            gapped = pattern.sub(lambda match: self._inert(match[0]), text)
            text = self._without(text, which) if gapped == text else gapped
        raise ModelError(
            "a text cannot be kept from becoming control tokens of the tokenizer",
            got=repr(text)[:160],
            do="Report this tokenizer.",
        )

    def _spelled(self, text: str, which: str) -> list[int]:
        """The control tokens that a text encodes to, in order."""
        tokens = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        known = self._of[which]
        found = [token for token in tokens if token in known and token != self._unknown]
        return found + [self._unknown] * (text.count(known[self._unknown]) if self._unknown in known else 0)

    def _with_gap(self, spelling: str) -> str:
        """``<|im_end|>`` as ``< |im_end|>``; only a gap where the tokenizer has no tokens for that."""
        gapped = f"{spelling[0]} {spelling[1:]}"
        tokens = self._tokenizer.encode(gapped, add_special_tokens=False)
        plain = len(spelling) > 1 and not any(t in self._of["any"] or t == self._unknown for t in tokens)
        return gapped if plain else " "

    def _without(self, text: str, which: str) -> str:
        """The text without its control tokens, where the tokenizer reads another spelling as one (full-width, say)."""
        pieces: list[list[int]] = [[]]
        for token in self._tokenizer.encode(text, add_special_tokens=False, verbose=False):
            if token in self._of[which] and token != self._unknown:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return " ".join(map(self._tokenizer.decode, pieces))
