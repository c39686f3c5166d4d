"""What an external teacher reads: the task alone, as its own chat template writes it."""

import dataclasses
from collections.abc import Callable, Sequence

from vpd.types import Group, Task, TeacherPrompt, Tokens


def with_own_prompts(groups: Sequence[Group], own_prompt: Callable[[Task], Tokens]) -> list[Group]:
    """The rollouts with the task as the teacher's own chat template writes it, where that is not the student's prompt.

    A teacher's prompt with feedback gives way: an external teacher reads none.
    """

    def of_group(group: Group) -> Group:
        tokens = own_prompt(group.rollouts[0].task)
        made = TeacherPrompt(tokens=tokens, sources=())
        return Group(
            rollouts=tuple(
                r if tokens == r.prompt else dataclasses.replace(r, teacher_prompt=made) for r in group.rollouts
            )
        )

    return [of_group(group) for group in groups]
