"""Critiques: a model reads the task, an attempt and its verdict, and writes what is wrong.

The gold answer is not shown to the critic, and it writes once for each failed attempt.  ``self_critique`` asks the
model that is being trained (as the paper does), ``critic`` another one behind an OpenAI-compatible endpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from vpd.errors import ConfigError
from vpd.feedback import When, Writer, Written, without_thinking
from vpd.feedback.reading import Template, attempt_text, check_template, plain_texts, task_text
from vpd.feedback.writers import Endpoint
from vpd.prompts import FittedText
from vpd.settings import Settings
from vpd.types import Group, Message, Rollout, Section

CRITICS = ("self_critique", "critic")  # the sources here, by name
FIELDS = ("task", "attempt", "verdict", "feedback")
TEMPLATE = """A task:

{task}

An attempt at it:

{attempt}

{verdict}

In at most three sentences, say what is wrong with the attempt and what to do differently. Do not write the solution."""


@dataclass(frozen=True, kw_only=True)
class _Critique(Settings, section="feedback"):
    """Settings of both kinds of critique."""

    when: Annotated[When, "missing: only where the sources before it said nothing"] = "always"
    template: Annotated[str, "the critic's prompt, with {task}, {attempt}, {verdict} and, if wanted, {feedback}"] = (
        TEMPLATE
    )
    failed_verdict: Annotated[str, "text of {verdict} for a failed attempt"] = "Verdict: the attempt is wrong."
    passed_verdict: Annotated[str, "text of {verdict} for a successful attempt"] = "Verdict: the attempt is right."
    critique_successes: Annotated[bool, "also ask about successful attempts"] = False
    max_critique_length: Annotated[int, Ge(1), "tokens of one critique"] = 128
    max_attempt_length: Annotated[
        int, Ge(1), "tokens of the attempt that the critic reads; a longer one loses its middle"
    ] = 1024
    max_task_length: Annotated[
        int, Ge(1), "tokens of the task that the critic reads; a longer one loses its middle"
    ] = 2048
    max_feedback_length: Annotated[
        int, Ge(1), "tokens of the grader's feedback that the critic reads; more loses its middle"
    ] = 1024
    temperature: Annotated[float, Ge(0), "the critic's sampling temperature; 0 is greedy"] = 1.0

    def check(self) -> None:
        super().check()
        check_template("the critic's template", self.template, FIELDS)
        for verdict in (self.failed_verdict, self.passed_verdict):
            check_template("the text of {verdict}", verdict, ())
        if "{attempt}" not in self.template:
            raise ConfigError(
                "feedback: the critic's template does not show the attempt",
                got=repr(self.template[:60]),
                expected="a text with {attempt}, and {task}, {verdict}, {feedback} where wanted",
            )

    def _extend(self, groups: Sequence[Group], writer: Writer, source: str) -> list[Group]:
        chosen = [
            (number, index)
            for number, group in enumerate(groups)
            for index, rollout in enumerate(group.rollouts)
            if rollout.grade.graded
            and (self.critique_successes or not rollout.success)
            and (self.when == "always" or not rollout.context)
        ]
        rollouts = [groups[number].rollouts[index] for number, index in chosen]
        read = [self._fitting_fields(rollout, writer) for rollout in rollouts]
        written = writer.write(
            [
                self._template.messages({"verdict": self._verdict(rollout), **plain_texts(fields)})
                for rollout, fields in zip(rollouts, read, strict=True)
            ],
            keys=[rollout.key for rollout in rollouts],
            max_tokens=self.max_critique_length,
            temperature=self.temperature,
        )
        criticised = [list(group.rollouts) for group in groups]
        for (number, index), critique, fields in zip(chosen, written, read, strict=True):
            criticised[number][index] = _with_critique(criticised[number][index], critique, fields, source)
        return [Group(rollouts=tuple(rollouts)) for rollouts in criticised]

    @property
    def shortest_prompt(self) -> list[Message]:
        """The critic's prompt without task, attempt and feedback: what any window must have room for."""
        return self._template.messages({"verdict": max(self.failed_verdict, self.passed_verdict, key=len)})

    @property
    def _template(self) -> Template:
        return Template(self.template, FIELDS)

    def _verdict(self, rollout: Rollout) -> str:
        return self.passed_verdict if rollout.success else self.failed_verdict

    def _fitting_fields(self, rollout: Rollout, writer: Writer) -> dict[str, FittedText]:
        """What fills the template's placeholders, within their budgets and the writer's window."""
        budgets = {
            "task": self.max_task_length,
            "attempt": self.max_attempt_length,
            "feedback": self.max_feedback_length,
        }
        texts = {
            "task": task_text(rollout.task),
            "attempt": attempt_text(rollout),
            "feedback": rollout.grade.feedback or "",
        }
        length = self.max_critique_length
        return self._template.fitted(texts, budgets, writer, length, verdict=self._verdict(rollout))


def _with_critique(rollout: Rollout, critique: Written, fields: Mapping[str, FittedText], source: str) -> Rollout:
    """The rollout with what was written about it, or with the source among those that wrote nothing."""
    text = without_thinking(critique.text, thinking_open=critique.thinking_open)
    if not text:
        return dataclasses.replace(rollout, silent=(*rollout.silent, source))
    section = Section(
        kind="feedback",
        source=source,
        text=text,
        tokens=critique.tokens,
        cut=sum(field.cut for field in fields.values()),
        control_tokens=sum(field.control_tokens for field in fields.values()),
        clipped=critique.clipped,
    )
    return dataclasses.replace(rollout, context=(*rollout.context, section))


@dataclass(frozen=True, kw_only=True)
class SelfCritique(_Critique):
    """The model being trained criticises its own attempts; costs one more generation per failed attempt."""

    name: Literal["self_critique"] = "self_critique"

    def __call__(self, groups: Sequence[Group], writer: Writer) -> list[Group]:
        return self._extend(groups, writer, self.name)


@dataclass(frozen=True, kw_only=True)
class Critic(Endpoint, _Critique):
    """Another model criticises, behind an OpenAI-compatible endpoint (vLLM, llama.cpp, a provider)."""

    name: Literal["critic"] = "critic"

    def __call__(self, groups: Sequence[Group], writer: Writer) -> list[Group]:
        return self._extend(groups, self.endpoint_writer(self.name), self.name)

    def contact(self) -> None:
        """Ask for one critique of nothing."""
        self.try_endpoint(
            self.name, self.shortest_prompt, max_tokens=self.max_critique_length, temperature=self.temperature
        )
