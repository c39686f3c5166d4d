"""Where the teacher reads its context, for each ``prompts.layout``.

block      behind the task, between a header and a closing line
request    behind the task, as if the user had written it there: "Write about dogs. Mention the ocean."
system     in the system message
"""

from collections.abc import Mapping, Sequence, Set
from typing import Literal, TypeAlias

from vpd.prompts.settings import PromptSettings
from vpd.types import Message

Kind: TypeAlias = Literal["demonstration", "feedback"]
KINDS: tuple[Kind, ...] = ("demonstration", "feedback")  # in the order of the prompt


def with_context(
    messages: Sequence[Message], last: int, texts: Mapping[Kind, str], settings: PromptSettings
) -> list[Message]:
    """The task's messages with the texts of its context; ``last`` is the place of the last user message."""
    added = [_framed(kind, texts[kind], settings) for kind in KINDS if kind in texts]
    changed = list(messages)
    if settings.layout == "system":
        return _in_system_message(changed, "".join(added).strip())
    closing = settings.closing if settings.layout == "block" else ""
    changed[last] = {**changed[last], "content": changed[last]["content"] + "".join(added) + closing}
    return changed


def frame(kinds: Set[Kind], settings: PromptSettings) -> str:
    """What stands around the texts of these kinds."""
    closing = settings.closing if settings.layout == "block" else ""
    return "".join(_framed(kind, "", settings) for kind in KINDS if kind in kinds) + closing


def _framed(kind: Kind, text: str, settings: PromptSettings) -> str:
    if kind == "demonstration":
        return settings.demonstration_header + text
    if settings.layout == "block":
        return settings.feedback_header + text
    return f" {text}" if text and len(text.splitlines()) == 1 else f"\n\n{text}"


def _in_system_message(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
