"""Whether a chat template writes a conversation as it was sampled, turn after turn."""

import logging
from collections.abc import Sequence

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


def _text(prompter: Prompter, messages: Sequence[Message]) -> str:
    options = {"add_generation_prompt": True, "enable_thinking": prompter.settings.enable_thinking}
    text = prompter.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return "".join(str(text).split())
