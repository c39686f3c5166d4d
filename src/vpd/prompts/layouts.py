"""Where the teacher reads its context, for each ``prompts.layout``.

block      behind the task, between a header and a closing line
request    one line of feedback behind the task, as if the user had written it there: "Write about dogs. Mention the
           ocean."  What is longer, and a demonstration, is a block: a program's traceback is nothing that a user wants
system     in the system message
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from vpd.prompts.settings import PromptSettings
from vpd.types import Message

Kind: TypeAlias = Literal["demonstration", "feedback"]
KINDS: tuple[Kind, ...] = ("demonstration", "feedback")  # in the order of the prompt


def with_context(
    messages: Sequence[Message], last: int, texts: Mapping[Kind, str], settings: PromptSettings
) -> list[Message]:
    """The task's messages with the texts of its context; ``last`` is the place of the last user message."""
    changed = list(messages)
    if settings.layout == "system":
        return _in_system_message(changed, _in_one_text(texts, settings))
    changed[last] = {**changed[last], "content": changed[last]["content"] + _behind_the_task(texts, settings)}
    return changed


def frame(texts: Mapping[Kind, str], settings: PromptSettings) -> str:
    """What stands around the texts; where a text is empty, the most that may."""
    around: Mapping[Kind, str] = dict.fromkeys(texts, "")
    if settings.layout == "system":
        return _in_one_text(around, settings)
    return " " if _is_remark(texts, settings) else _block(around, settings)


def _behind_the_task(texts: Mapping[Kind, str], settings: PromptSettings) -> str:
    return f" {texts['feedback']}" if _is_remark(texts, settings) else _block(texts, settings)


def _is_remark(texts: Mapping[Kind, str], settings: PromptSettings) -> bool:
    """Whether the context goes into the request: one line of feedback, and nothing else."""
    alone = settings.layout == "request" and set(texts) == {"feedback"}
    return alone and len(texts["feedback"].splitlines()) == 1


def _block(texts: Mapping[Kind, str], settings: PromptSettings) -> str:
    """The texts under their headers, before the closing line."""
    headers: dict[Kind, str] = {"demonstration": settings.demonstration_header, "feedback": settings.feedback_header}
    return "".join(headers[kind] + texts[kind] for kind in KINDS if kind in texts) + settings.closing


def _in_one_text(texts: Mapping[Kind, str], settings: PromptSettings) -> str:
    """The demonstration under its header, and the feedback as it is."""
    headers: dict[Kind, str] = {"demonstration": settings.demonstration_header, "feedback": ""}
    return "\n\n".join((headers[kind] + texts[kind]).strip() for kind in KINDS if kind in texts)


def _in_system_message(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
