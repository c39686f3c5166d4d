"""Which context C each row of the E-step is scored with.

The E-step learns from outcomes, so the *kind* of C must not name the outcome: if only failures carried a critique,
the teacher would learn to make any attempt with a critique less likely, and VPD collapses.  The default, ``matched``,
gives both classes of a group the same kinds of sections.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from vpd.types import Group, Rollout, Section

SuccessContext: TypeAlias = Literal["matched", "own", "failed_sibling", "drop"]


def e_step_contexts(groups: Sequence[Group], mode: SuccessContext) -> list[Group]:
    """The groups with the contexts of the E-step; a row that is left with none leaves the E-step.

    ``matched``: a success that lacks a kind (a source) its failed siblings have takes that section from its first
    failed sibling, never one that quotes the success itself; a kind that only one class then has is dropped.
    ``own``: every row keeps its own.  ``failed_sibling``: a success takes the whole context of its first failed
    sibling.  ``drop``: successes take no part.  A row that nobody graded has no outcome to learn from and takes none.
    """
    graded = [[r if r.grade.graded else dataclasses.replace(r, context=()) for r in group.rollouts] for group in groups]
    return [Group(rollouts=tuple(_contexts(rollouts, mode))) for rollouts in graded]


def kind_predicts_success(groups: Sequence[Group]) -> float:
    """Balanced accuracy with which the kinds of C *alone* predict success, 0.5 = not at all; above 0.6 is an alarm.

    0.5 plus half the total variation between the two classes' distributions over sets of kinds; 0.5 where a class
    is missing.
    """
    counts: dict[bool, Counter[tuple[str, ...]]] = {True: Counter(), False: Counter()}
    for group in groups:
        for rollout in group.rollouts:
            if rollout.teacher_prompt is not None:
                counts[rollout.success][rollout.teacher_prompt.sources] += 1
    successes, failures = counts[True], counts[False]
    if not successes or not failures:
        return 0.5
    kinds = set(successes) | set(failures)
    gaps = [successes[kind] / successes.total() - failures[kind] / failures.total() for kind in kinds]
    return 0.5 + 0.5 * sum(gap for gap in gaps if gap > 0)


def _contexts(rollouts: Sequence[Rollout], mode: SuccessContext) -> list[Rollout]:
    if mode == "own":
        return list(rollouts)
    if mode == "drop":
        return [dataclasses.replace(r, context=() if r.success else r.context) for r in rollouts]
    failures = [r for r in rollouts if not r.success and r.grade.graded]
    if mode == "failed_sibling":
        return [
            r if not r.success else dataclasses.replace(r, context=_borrowed((), failures, index))
            for index, r in enumerate(rollouts)
        ]
    contexts = [
        r.context + _borrowed(r.context, failures, index) if r.success else r.context
        for index, r in enumerate(rollouts)
    ]
    kinds = [
        {s.source for r, context in zip(rollouts, contexts, strict=True) if r.success == success for s in context}
        for success in (True, False)
    ]
    if failures and any(r.success for r in rollouts):
        shared = kinds[0] & kinds[1]
        contexts = [tuple(s for s in context if s.source in shared) for context in contexts]
    return [dataclasses.replace(r, context=context) for r, context in zip(rollouts, contexts, strict=True)]


def _borrowed(own: Sequence[Section], failures: Sequence[Rollout], index: int) -> tuple[Section, ...]:
    """Sections of the kinds that row ``index`` lacks, each from the first failure that has one not quoting that row."""
    own_sources = {section.source for section in own}
    borrowed: dict[str, tuple[Section, ...]] = {}
    for failure in failures:
        for source in dict.fromkeys(section.source for section in failure.context):
            sections = tuple(s for s in failure.context if s.source == source)
            if source not in own_sources and source not in borrowed and all(s.quotes != index for s in sections):
                borrowed[source] = sections
    return tuple(section for sections in borrowed.values() for section in sections)
