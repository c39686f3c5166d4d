"""Algorithms: short programs over ``learner.score`` and ``learner.update``.

======== ==================================================================================
grpo     ``update("policy")``
distill  ``update("m_step")`` towards a teacher: SDPO, and GKD with an external one
hybrid   ``update("policy")`` with a teacher's opinion in the advantage
vpd      when due: ``score`` -> shift, ``update("e_step")``; always: what ``distill`` does
======== ==================================================================================

An algorithm imports no environment, no engine and no optimiser.  What must outlive a step is in ``state()``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from vpd.learners import Learner
from vpd.types import Group, Metrics


class Algorithm(Protocol):
    """Turns the groups of one iteration into updates of a learner."""

    def step(self, groups: Sequence[Group], learner: Learner) -> Metrics:
        """One iteration: any number of ``score`` and ``update`` calls; metrics are named ``<update>/...``."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...
