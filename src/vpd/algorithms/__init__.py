"""Algorithms: each turns groups of rollouts into calls of ``learner.score`` and ``learner.update``.

======== ============================================================================================
grpo     ``update("policy")``: the outcome alone
distill  ``update("m_step")`` towards a teacher: SDPO, and GKD with an external one
hybrid   ``update("policy")`` with the teacher's log-ratio in the advantage
vpd      when due ``update("e_step")`` of the teacher on outcomes; always what ``distill`` does
plare    ``update("preference")``: which of two attempts a judge prefers
gated    like vpd, with a policy gradient; the distillation is scaled by how often the teacher was right
sft      ``update("sft")``: maximum likelihood on successes and demonstrations, recorded or fresh
ldd      ``update("ldd")``: maximum likelihood on the environment's text, recorded or fresh; no outcome is read
======== ============================================================================================

:mod:`~vpd.algorithms.off_policy` lets any of them learn from recorded answers, :mod:`~vpd.algorithms.dynamics` puts an
auxiliary term beside any of them.

An algorithm imports no environment, no engine and no optimiser.  What it keeps between steps is in ``state()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from vpd.learners import Learner, Update
from vpd.learners.settings import TeacherSettings
from vpd.prompts import Prompter
from vpd.types import Group


class Algorithm(Protocol):
    """Turns the groups of one iteration into updates of a learner."""

    def step(self, groups: Sequence[Group], learner: Learner) -> Update:
        """One iteration: any number of ``score`` and ``update`` calls, and what the updates reported, combined."""
        ...

    def state(self) -> dict[str, Any]:
        """What it keeps between iterations, as plain JSON; part of every checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTeacher:
    """A teacher's server: its address, the model's name there, and the variable that holds its token, if there is one.

    It reads the task alone, or with ``reads_context`` the teacher's prompt, where there is one.
    """

    url: str
    model: str
    api_key_env: str | None = None
    reads_context: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a method needs of the rest of a run; :mod:`vpd.recipes.assemble` provides it or raises ConfigError.

    ``group``: it compares the answers to one task, so ``rollout.num_generations`` must be at least 2.
    ``feedback``: it learns from text, so at least one feedback source must be there.
    ``preferences``: it learns from comparisons, so a feedback source must make some (``judge``).
    ``teacher``: whose weights play the teacher; None: the student's own, at this moment.
    ``initial_copy``: it scores with the initial weights, so these are kept.
    ``external_model``: Hub id or folder of a second model with the student's tokenizer (``teacher`` of kind external).
    ``on_policy``: its rows are the student's samples, up to an importance ratio; False: it learns from any answer.
    ``remote_teacher``: a frozen teacher behind a server, asked for its ``top_k`` likeliest tokens at every token.
    ``student_fraction``: share of the prompts that the student answers; the rest is answered as ``other_answers`` says:
    by the external model, or by the data (the environment's solution).
    ``own_chat_template``: the external or remote teacher reads the task as its own chat template writes it.
    ``top_k``: tokens that a top-k divergence compares on, at most the vocabulary.
    ``learns_from_retries``: it uses the teacher's own attempts; for another, ``rollout.retries`` would be for nothing.
    ``learns_answers``: it learns tokens of answers; False: what the environment says about them alone.
    """

    group: bool = False
    feedback: bool = False
    teacher: TeacherSettings | None = None
    initial_copy: bool = False
    external_model: str | None = None
    student_fraction: float = 1.0
    other_answers: Literal["teacher", "data"] = "teacher"
    own_chat_template: bool = False
    top_k: int | None = None
    learns_from_retries: bool = False
    remote_teacher: RemoteTeacher | None = None
    preferences: bool = False
    on_policy: bool = True
    learns_answers: bool = True


@runtime_checkable
class AlgorithmSettings(Protocol):
    """A section ``algorithm``: a dataclass of settings with what the method needs, and with a method that builds it.

    A user's own is chosen with ``--algorithm.name my_algorithm.py:MySettings``.
    """

    @property
    def needs(self) -> Needs: ...

    def build(self, prompter: Prompter) -> Algorithm:
        """The algorithm; ``prompter`` builds prompts of the run's tokenizer."""
        ...
