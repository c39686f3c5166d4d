"""Feedback sources: where the diagnostic text C about an attempt comes from.

A source is a function ``(groups, writer) -> groups`` that adds sections to rollouts; sources compose in order.

* ``environment``: what the grader wrote about this attempt, where it is more than a bare verdict;
* ``sibling``: a successful attempt of the same group, never the row itself;
* ``self_critique``: a critique that the current model writes of its own attempt (:mod:`vpd.feedback.critique`);
* ``critic``: the same, said by another model behind an OpenAI-compatible endpoint.

``when: missing`` makes a source a fallback: it is used only where the sources before it gave no text.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeAlias, runtime_checkable

from vpd.errors import FeedbackError
from vpd.printable import shown
from vpd.prompts import FittedText
from vpd.settings import Settings
from vpd.types import Group, Message, Rollout, SampleKey, Section

When: TypeAlias = Literal["always", "missing"]

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Written:
    """A text that a model wrote and what it cost: ``tokens`` generated (0: unknown).

    ``thinking_open``: its prompt ended in ``<think>``, so that the text begins inside the thinking.  ``clipped``: the
    limit of tokens ended it.
    """

    text: str
    tokens: int = 0
    thinking_open: bool = False
    clipped: bool = False


class Writer(Protocol):
    """A model that writes text for a feedback source, which so needs no tokens."""

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        keys: Sequence[SampleKey],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        """The next assistant message of each conversation, in order.

        ``keys[i]`` is the key of the attempt that text i is about.
        """
        ...

    def excess(self, conversation: Sequence[Message], max_tokens: int) -> int:
        """Tokens that a prompt and its answer take beyond the writer's window; 0 where they fit or it is unknown."""
        ...

    def shorten(self, text: str, max_tokens: int) -> FittedText:
        """The text without the writer's control tokens, and without its middle where that exceeds ``max_tokens``."""
        ...


class Feedback(Protocol):
    """A source of diagnostic text."""

    def __call__(self, groups: Sequence[Group], writer: Writer) -> list[Group]:
        """The same groups, in order, with this source's sections added to ``Rollout.context``."""
        ...


@runtime_checkable
class Remote(Protocol):
    """A source that asks a service, which is tried before a run begins."""

    def contact(self) -> None:
        """Ask the service once.  Raises FeedbackError."""
        ...


class ScriptedWriter:
    """A fake for tests and dry runs: ``answer(conversation, key)`` is the text; keeps what it was asked."""

    def __init__(self, answer: Callable[[Sequence[Message], SampleKey], str]):
        self.answer = answer
        self.asked: list[tuple[Sequence[Message], SampleKey]] = []

    def write(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        keys: Sequence[SampleKey],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        asked = list(zip(conversations, keys, strict=True))
        self.asked += asked
        texts = [self.answer(conversation, key) for conversation, key in asked]
        return [Written(text, tokens=len(text.split())) for text in texts]

    def excess(self, conversation: Sequence[Message], max_tokens: int) -> int:
        return 0

    def shorten(self, text: str, max_tokens: int) -> FittedText:
        words = text.split()
        if len(words) <= max_tokens:
            return FittedText(text=text, length=len(words))
        return FittedText(text=" ".join(words[:max_tokens]), length=max_tokens, cut=len(words) - max_tokens)


@dataclass(frozen=True, kw_only=True)
class GraderFeedback(Settings, section="feedback"):
    """The grader's own text about this attempt."""

    name: Literal["environment"] = "environment"
    when: Annotated[When, "always, or missing: only where the sources before it said nothing"] = "always"

    def __call__(self, groups: Sequence[Group], writer: Writer) -> list[Group]:
        return [extend(group, [self._sections(r) for r in group.rollouts], self.when) for group in groups]

    def _sections(self, rollout: Rollout) -> list[Section]:
        grade = rollout.grade
        if not grade.feedback or not grade.informative:
            return []
        return [Section(kind="feedback", source=self.name, text=grade.feedback)]


@dataclass(frozen=True, kw_only=True)
class SiblingDemonstration(Settings, section="feedback"):
    """The first other success of the group, as a demonstration; groups without one yield nothing."""

    name: Literal["sibling"] = "sibling"
    when: Annotated[When, "always, or missing: only where the sources before it said nothing"] = "always"
    remove_thinking: Annotated[bool, "leave out the demonstration's <think> block"] = True

    def __call__(self, groups: Sequence[Group], writer: Writer) -> list[Group]:
        return [self._extend(group) for group in groups]

    def _extend(self, group: Group) -> Group:
        winners = [index for index, rollout in enumerate(group.rollouts) if rollout.success]
        sections: list[list[Section]] = []
        for index in range(len(group.rollouts)):
            other = next((winner for winner in winners if winner != index), None)
            text = "" if other is None else self._solution(group.rollouts[other])
            demonstration = Section(kind="demonstration", source=self.name, text=text, quotes=other)
            sections.append([demonstration] if text else [])
        return extend(group, sections, self.when)

    def _solution(self, rollout: Rollout) -> str:
        text, thinking_open = rollout.completion.text, rollout.completion.thinking_open
        return without_thinking(text, thinking_open=thinking_open) if self.remove_thinking else text.strip()


def demonstrate_retries(groups: Sequence[Group]) -> list[Group]:
    """The groups with a retry that succeeded as the demonstration of each failed attempt that has none.

    Its own retries come first, then those of the group's other attempts.
    """
    return [extend(group, [_retry_to_show(group, attempt) for attempt in group.rollouts]) for group in groups]


def _retry_to_show(group: Group, attempt: Rollout) -> list[Section]:
    if attempt.success or any(section.kind == "demonstration" for section in attempt.context):
        return []
    for retry in (*attempt.retries, *(retry for other in group.rollouts for retry in other.retries)):
        if retry.success:
            text = without_thinking(retry.completion.text, thinking_open=retry.completion.thinking_open)
            return [Section(kind="demonstration", source="retry", text=text)] if text else []
    return []


def without_thinking(text: str, *, thinking_open: bool = False) -> str:
    """The text without its ``<think>`` block.

    Where the prompt opened the block (``thinking_open``, or ``</think>`` comes first), it reaches to the first
    ``</think>``.  A block that is never closed reaches to the end.

    >>> without_thinking("3? No.</think> 4")
    '4'
    """
    before, closed, after = text.partition("</think>")
    if thinking_open or (closed and "<think>" not in before):
        text = after
    return _THINKING.sub("", text).strip()


def extend(group: Group, sections: Sequence[Sequence[Section]], when: When = "always") -> Group:
    """The group with more sections on each rollout; ``missing``: only on those that have none yet.

    Raises FeedbackError for anything but a Section.
    """
    wrong = [section for more in sections for section in more if not isinstance(section, Section)]
    if wrong or len(sections) != len(group.rollouts):
        raise FeedbackError(
            "what a feedback source adds to a group is not a list of sections for each rollout",
            got=shown(wrong[0]) if wrong else f"{len(sections)} lists for {len(group.rollouts)} rollouts",
            expected="Section(kind='feedback', source='its name', text='...') each",
        )
    return Group(
        rollouts=tuple(
            dataclasses.replace(rollout, context=(*rollout.context, *more))
            if when == "always" or not rollout.context
            else rollout
            for rollout, more in zip(group.rollouts, sections, strict=True)
        )
    )
