"""Text from outside must not become control tokens: a forged turn, an end of text, the start of a tool call.

Some chat templates mark roles by plain text (``[INST]`` of Llama 2, ``USER:`` of Vicuna): to a model that was trained
with them they are as good as tokens, so text may not spell these either.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from vpd.errors import ModelError

#: Conversations that are rendered to see what a template writes around the messages; it may refuse some of them.
_ROLES = (("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant", "tool"))
_SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}"
_TAG = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
_THINKING = re.compile(r"</?think(ing)?>")


class ControlTokens:
    """The added tokens of a tokenizer that a text from outside must not become.

    These are all that the tokenizer marks special, and of the others those that look like a tag (``<think>``,
    ``</tool_call>``).  Whitespace and plain words that were added to the vocabulary are ordinary text.  The
    :func:`role_markers` of the chat template count as special ones.
    """

    _ROUNDS = 16  # a text that spells one token inside another needs one round for each

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.unknown = unknown_token(tokenizer)  # what unknown words become: a control token only where it is spelled
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = {number: token.content for number, token in added.items() if token.special}
        tags = {number: token.content for number, token in added.items() if _TAG.fullmatch(token.content)}
        self._of = {"special": special, "any": {**tags, **special}}
        markers = role_markers(tokenizer, [token.content for token in added.values()])
        self._markers = {"special": [m for m in markers if not _THINKING.fullmatch(m)], "any": markers}
        self._neutralised = functools.lru_cache(maxsize=512)(self._neutralise)
        self._inert = functools.lru_cache(maxsize=512)(self._with_gap)

    def neutralise(self, text: str, which: Literal["any", "special"] = "any") -> tuple[str, int]:
        """``text`` such that it encodes to no control token and spells no role marker, and how many it did.

        Text that spells none is returned as it is; lone surrogates, which have no encoding, become question marks.
        """
        return self._neutralised(text.encode(errors="replace").decode(), which)

    def _neutralise(self, text: str, which: Literal["any", "special"]) -> tuple[str, int]:
        count = 0
        for _ in range(self._ROUNDS):
            tokens = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
            found = self._spelled(text, tokens, which)
            if not found:
                return text, count
            count += len(found)
            pattern = re.compile("|".join(map(re.escape, sorted(set(found), key=len, reverse=True))))
            gapped = pattern.sub(lambda match: self._inert(match[0]), text)
            text = self._without(tokens, which) if gapped == text else gapped
        raise ModelError(
            "a text cannot be kept from becoming control tokens of the tokenizer",
            got=repr(text)[:160],
            do="Report this tokenizer.",
        )

    def _spelled(self, text: str, tokens: Sequence[int], which: str) -> list[str]:
        """The control tokens and role markers that a text encodes to, as they are spelled."""
        known = self._of[which]
        found = [known[token] for token in tokens if token in known and token != self.unknown]
        as_read = self._tokenizer.decode(tokens) if self._markers[which] else ""
        for marker in self._markers[which]:
            found += [marker] * max(text.count(marker), as_read.count(marker))
        if self.unknown in known:
            found += [known[self.unknown]] * text.count(known[self.unknown])
        return found

    def _with_gap(self, spelling: str) -> str:
        """``<|im_end|>`` as ``< |im_end|>``, ``USER:`` as ``USER :``; only a gap where there are no tokens for that."""
        mark = re.search(r"[^\w\s]", spelling)
        place = max(mark.start(), 1) if mark else 1
        gapped = f"{spelling[:place]} {spelling[place:]}"
        tokens = self._tokenizer.encode(gapped, add_special_tokens=False)
        plain = len(spelling) > 1 and not any(t in self._of["any"] or t == self.unknown for t in tokens)
        return gapped if plain else " "

    def _without(self, tokens: Sequence[int], which: str) -> str:
        """The text without its control tokens, where the tokenizer reads another spelling as one (full-width, say)."""
        pieces: list[list[int]] = [[]]
        for token in tokens:
            if token in self._of[which] and token != self.unknown:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return " ".join(map(self._tokenizer.decode, pieces))


def unknown_token(tokenizer: Any) -> int | None:
    """The token that unknown text becomes, None without one.

    A tokenizer's file may name it where its configuration does not.
    """
    if tokenizer.unk_token_id is not None or not tokenizer.is_fast:
        return tokenizer.unk_token_id
    named = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("unk_token")
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return added.get(named)


def role_markers(tokenizer: Any, control: Sequence[str]) -> list[str]:
    """What the chat template writes around messages as plain text: lines (``### Response:``) and tags (``<<SYS>>``).

    ``control`` are the spellings of added tokens, which are left out.  A line that is only words (``user``, between
    two control tokens) marks nothing by itself.
    """
    found: dict[str, None] = {}
    for roles in _ROLES:
        messages = [{"role": role, "content": _SENTINEL} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):  # this template has not all of these roles
            continue
        for spelling in sorted(control, key=len, reverse=True):
            text = text.replace(spelling, "\n")
        lines = [line.strip() for part in text.split(_SENTINEL) for line in part.splitlines()]
        tags = [word for line in lines for word in line.split() if _TAG.fullmatch(word)]
        found |= dict.fromkeys([*tags, *(x for x in lines if re.search(r"\w", x) and re.search(r"[^\w\s]", x))])
    return list(found)
