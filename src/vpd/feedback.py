"""Feedback sources: where the diagnostic text C about an attempt comes from.

A source is a function ``(groups, engine) -> groups`` that adds sections to rollouts; sources compose in order.

* ``environment``: what the grader wrote about this attempt, where it is more than a bare verdict;
* ``sibling``: a successful attempt of the same group, never the row itself.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from vpd.engines import Engine
from vpd.types import Group, Rollout, Section

Feedback: TypeAlias = Callable[[Sequence[Group], Engine], list[Group]]

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The grader's own text about this attempt."""

    name: Literal["environment"] = "environment"

    def __call__(self, groups: Sequence[Group], engine: Engine) -> list[Group]:
        def section(rollout: Rollout) -> list[Section]:
            grade = rollout.grade
            if not grade.feedback or not grade.informative:
                return []
            return [Section(kind="feedback", source=self.name, text=grade.feedback)]

        return [_extend(group, [section(rollout) for rollout in group.rollouts]) for group in groups]


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """The first other success of the group, as a demonstration; groups without one yield nothing."""

    name: Literal["sibling"] = "sibling"
    remove_thinking: Annotated[bool, "leave out the demonstration's <think> block"] = True

    def __call__(self, groups: Sequence[Group], engine: Engine) -> list[Group]:
        return [self._extend(group) for group in groups]

    def _extend(self, group: Group) -> Group:
        winners = [index for index, rollout in enumerate(group.rollouts) if rollout.success]
        sections: list[list[Section]] = []
        for index in range(len(group.rollouts)):
            other = next((winner for winner in winners if winner != index), None)
            text = "" if other is None else self._solution(group.rollouts[other])
            demonstration = Section(kind="demonstration", source=self.name, text=text, quotes=other)
            sections.append([demonstration] if text else [])
        return _extend(group, sections)

    def _solution(self, rollout: Rollout) -> str:
        text = rollout.completion.text
        return (_THINKING.sub("", text) if self.remove_thinking else text).strip()


def _extend(group: Group, sections: Sequence[Sequence[Section]]) -> Group:
    """The group with more sections on each rollout."""
    return Group(
        rollouts=tuple(
            dataclasses.replace(rollout, context=(*rollout.context, *more))
            for rollout, more in zip(group.rollouts, sections, strict=True)
        )
    )
