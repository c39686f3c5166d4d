"""Whether a chat template shows the model what a task with tools says.

A template need not know tools: it then leaves out their descriptions, the calls, or a tool's answer, without a word,
and the model reads an answer to a call that is not there.  Each of these is taken away once, and the text that the
template writes must change.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from vpd.errors import ModelError
from vpd.types import Message

Render: TypeAlias = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], Any]
PLAIN = ("system", "user", "assistant")  # recipes.prompt_checks tests whether these are shown
DO = "Take a model whose chat template knows tools, or write them into the question."


def check_shown(render: Render, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], what: str) -> None:
    """Raise ModelError if ``render`` (messages and tools to text or tokens) leaves out tools, a call, or a tool's
    answer of ``what``."""
    if not tools and all(message["role"] in PLAIN and "tool_calls" not in message for message in messages):
        return
    whole = render(messages, tools)
    if tools and render(messages, ()) == whole:
        raise ModelError(f"the model's chat template leaves out the tools of {what}", do=DO)
    for place, message in enumerate(messages):
        for part, changed in _changed(message):
            if render([*messages[:place], changed, *messages[place + 1 :]], tools) == whole:
                raise ModelError(f"the model's chat template leaves out {part} of {what} (message {place})", do=DO)


def _changed(message: Message) -> list[tuple[str, Mapping[str, Any]]]:
    """The parts that must be shown, each with the message in which that part is another."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    if message["role"] not in PLAIN:
        found.append(
            (f"the message of the role {message['role']!r}", {**message, "content": message["content"] + " 0"})
        )
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        other = [*calls[:number], _renamed(call), *calls[number + 1 :]]
        found.append(("a call in 'tool_calls'", {**message, "tool_calls": other}))
    return found


def _renamed(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    renamed = {**function, "name": f"{function['name']}_"}
    return {**call, "function": renamed} if "function" in call else renamed
