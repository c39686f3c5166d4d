"""What a model that writes feedback reads: task and attempts as text, within budgets of tokens and its window."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from vpd.errors import ConfigError, nearest
from vpd.feedback import Writer
from vpd.prompts import FittedText
from vpd.types import Message, Rollout, Task

#: What looks like a field of a template: a word in braces that is no part of LaTeX (``\\boxed{x}``, ``x^{n}``).
FIELD = re.compile(r"\\[A-Za-z]+(?:\[[^\]]*\])?(?:\{[^{}]*\})+|[\^_]\{[^{}]*\}|\{([^\W\d]\w*)\}")


def check_template(what: str, template: str, known: Collection[str]) -> None:
    """Raise ConfigError where a word in braces is none of the ``known`` fields: it would be sent as it stands.

    >>> check_template("the template", 'Attempt: {attempt}. Answer as {"score": 1} or {}.', ["attempt"])
    """
    unknown = next((name for name in FIELD.findall(template) if name and name not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"feedback: {what} has no field {{{unknown}}}",
            got=repr(template[:60]),
            do=f"{nearest(unknown, known)} Text that is to stay in braces is written {{ {unknown} }}.",
        )


@dataclass(frozen=True)
class Template:
    """A prompt of one user message with ``{fields}``, all filled in one pass: what fills one may hold braces.

    >>> Template("{first} or {second}?", ("first", "second")).messages({"first": "{second}", "second": "2"})
    [{'role': 'user', 'content': '{second} or 2?'}]
    """

    text: str
    fields: tuple[str, ...]

    @property
    def shown(self) -> set[str]:
        """The fields that stand in the text."""
        return {name for name in self.fields if f"{{{name}}}" in self.text}

    def messages(self, values: Mapping[str, str]) -> list[Message]:
        """The prompt with the fields' values; a field without one is left empty."""
        pattern = "|".join(map(re.escape, self.fields))
        text = re.sub(rf"\{{({pattern})\}}", lambda found: values.get(found[1], ""), self.text)
        return [{"role": "user", "content": text}]

    def fitted(
        self, texts: Mapping[str, str], budgets: Mapping[str, int], writer: Writer, max_tokens: int, **fixed: str
    ) -> dict[str, FittedText]:
        """Those of the texts that are shown, within their budgets of tokens and, beside the values that are fixed and
        an answer of ``max_tokens``, within the writer's window."""

        def excess(found: Mapping[str, FittedText]) -> int:
            return writer.excess(self.messages({**fixed, **plain_texts(found)}), max_tokens)

        return fit_all({name: text for name, text in texts.items() if name in self.shown}, budgets, writer, excess)


def plain_texts(fields: Mapping[str, FittedText]) -> dict[str, str]:
    """The texts alone."""
    return {name: field.text for name, field in fields.items()}


def task_text(task: Task) -> str:
    """All messages of a task."""
    return "\n\n".join(message["content"] for message in task.messages)


def attempt_text(rollout: Rollout) -> str:
    """An attempt's answer; an empty one is named."""
    return rollout.completion.text.strip() or "(an empty answer)"


def fit_all(
    texts: Mapping[str, str],
    budgets: Mapping[str, int],
    writer: Writer,
    excess: Callable[[Mapping[str, FittedText]], int],
) -> dict[str, FittedText]:
    """The texts by name, each within its budget; where the writer's window is short, the longest loses more of it.

    ``excess`` of fitted texts is how many tokens the prompt that shows them is too long.
    """
    budgets = dict(budgets)

    def fitted() -> dict[str, FittedText]:
        return {name: writer.shorten(text, budgets[name]) for name, text in texts.items()}

    found = fitted()
    while found and (beyond := excess(found)):
        longest = max(found, key=lambda name: found[name].length)
        length = found[longest].length
        if length <= 1:
            break
        budgets[longest] = max(length - beyond, length // 2)
        found = fitted()
    return found
