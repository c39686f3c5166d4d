"""What an external teacher reads: the task alone."""

import dataclasses
from collections.abc import Callable, Sequence

from vpd.types import Group, Task, TeacherPrompt, Tokens


def with_own_prompts(groups: Sequence[Group], own_prompt: Callable[[Task], Tokens]) -> list[Group]:
    """The rollouts with what an external teacher reads as their teacher's prompt: the task, and no feedback."""

    def of_group(group: Group) -> Group:
        made = TeacherPrompt(tokens=own_prompt(group.rollouts[0].task), sources=())
        return Group(rollouts=tuple(dataclasses.replace(r, teacher_prompt=made) for r in group.rollouts))

    return [of_group(group) for group in groups]
