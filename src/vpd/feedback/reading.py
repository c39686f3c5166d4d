"""What a model that writes feedback reads: task and attempts as text, within budgets of tokens and its window."""

from collections.abc import Callable, Mapping

from vpd.feedback import Writer
from vpd.prompts import FittedText
from vpd.types import Rollout, Task


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
