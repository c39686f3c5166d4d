"""Algorithms: short programs over ``learner.score`` and ``learner.update``.

======== ============================================================================================
grpo     ``update("policy")``: the outcome alone
distill  ``update("m_step")`` towards a teacher: SDPO, and GKD with an external one
hybrid   ``update("policy")`` with the teacher's log-ratio in the advantage
vpd      when due ``update("e_step")`` of the teacher on outcomes; always what ``distill`` does
gated    like vpd, with a policy gradient; the distillation counts as far as the teacher has been right
======== ============================================================================================

An algorithm imports no environment, no engine and no optimiser.  What must outlive a step is in ``state()``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from vpd.learners import Learner, Update
from vpd.types import Group


class Algorithm(Protocol):
    """Turns the groups of one iteration into updates of a learner."""

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: any number of ``score`` and ``update`` calls, and what the updates reported, combined."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...
