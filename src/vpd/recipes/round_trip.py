"""Whether a chat template writes a conversation as it was sampled, from the header of an answer to the next turn."""

import logging
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from vpd.prompts import Prompter
from vpd.types import Message, Task

LOG = logging.getLogger("vpd")
ANSWER = "<think>\nso\n</think>\n\nan answer"


def check_round_trip(prompter: Prompter, tasks: Sequence[Task]) -> None:
    """Log a warning where the template writes earlier turns otherwise than the model sampled them.

    In an attempt of several turns the model goes on from the tokens that it sampled, and these are what losses score.
    A template that drops earlier thinking, say, would show it other turns outside of training.
    """
    if not tasks or keeps_answers(prompter, tasks[0].messages):
        return
    LOG.warning(
        "the chat template writes earlier answers otherwise than they were sampled (thinking left out, say): attempts"
        " of several turns go on from the sampled tokens, and a chat server would show the model others"
    )


def keeps_answers(prompter: Prompter, messages: Sequence[Message]) -> bool:
    """Whether a conversation that goes on after an answer begins with prompt and answer, but for whitespace."""
    answer = ANSWER if "think>" in str(prompter.tokenizer.chat_template) else "an answer"
    more: list[Message] = [{"role": "assistant", "content": answer}, {"role": "user", "content": "?"}]
    return _text(prompter, [*messages, *more]).startswith(_text(prompter, messages) + "".join(answer.split()))


def warn_of_missing_header(prompter: Prompter, tasks: Sequence[Task]) -> None:
    """Log a warning where prompts end without what the template writes before every answer."""
    header = missing_header(prompter, tasks[0]) if tasks else ""
    if header:
        LOG.warning(
            "the chat template has %r before an answer and leaves it out of the prompt (it ignores"
            " add_generation_prompt): the model must answer without it. Take a template that writes it there.",
            header,
        )


def missing_header(prompter: Prompter, task: Task) -> str:
    """What stands before an answer in a conversation and not in the task's prompt, without whitespace.

    Empty for a template that heeds ``add_generation_prompt``, needs no header, or takes or shows no answer.
    """
    messages, tools = prompter.shown(task)
    answer: Message = {"role": "assistant", "content": "an answer"}
    try:
        prompt = _text(prompter, messages, tools)
        bare = _text(prompter, messages, tools, add_generation_prompt=False)
        answered = _text(prompter, [*messages, answer], tools, add_generation_prompt=False)
    except (TemplateError, TypeError, ValueError):
        return ""
    header, shown, _ = answered.removeprefix(prompt).partition("ananswer")
    return header if prompt == bare and answered.startswith(prompt) and shown else ""


def _text(
    prompter: Prompter, messages: Sequence[Message], tools: Sequence[Any] = (), *, add_generation_prompt: bool = True
) -> str:
    text = prompter.tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=prompter.settings.enable_thinking,
    )
    return "".join(str(text).split())
