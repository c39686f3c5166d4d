"""Comparisons: a judge reads the task and two attempts of a group, and says which one is better (PLARE, 2507.23391).

It writes a comparison and ends with first, second or unsure.  Every pair is asked about in both orders, so that a
liking for the first place shows: two verdicts that disagree, or one that cannot be read, count as unsure.  What it
prefers is kept with the rollouts (``Rollout.comparisons``) for a method that learns from preferences; what it wrote can
also be the context C that the teacher reads about each of the two attempts.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge

from vpd.errors import ConfigError
from vpd.feedback import When, Writer, extend, without_thinking
from vpd.feedback.reading import Template, attempt_text, check_template, plain_texts, task_text
from vpd.feedback.writers import Endpoint, ModelWriter
from vpd.prompts import FittedText, Prompter
from vpd.prompts.settings import PromptSettings, saved_settings
from vpd.settings import IsPath
from vpd.types import Comparison, Group, Message, Rollout, Section

Verdict: TypeAlias = Literal["first", "second", "unsure"]
FIELDS = ("task", "first", "second")
VERDICT = re.compile(
    r"\W*(?:(?:verdict|answer|better)\W+)?(?:the\W+)?(first|second|unsure)(?:\W+(?:attempt|one))?\W*", re.IGNORECASE
)
TEMPLATE = """A task:

{task}

The first attempt at it:

{first}

The second attempt at it:

{second}

Compare the two attempts in at most three sentences: what is right and what is wrong in each. Then write, on a last line
of its own, one word: first or second for the better attempt, or unsure."""
ABOUT = "Another attempt was compared with this one, which is called the first here:\n\n"


@dataclass(frozen=True, kw_only=True)
class Judge(Endpoint, section="feedback"):
    """A judge compares attempts of a group in pairs: labels for a method that learns from preferences, or context."""

    name: Literal["judge"] = "judge"
    judge: Annotated[
        Literal["self", "model", "endpoint", "reward"],
        "who compares: the model being trained, another one loaded here (judge_model), one behind endpoint, or the"
        " environment's reward, which writes nothing",
    ] = "self"
    use: Annotated[
        Literal["label", "context", "both"],
        "label: preferences alone (plare); context: the teacher reads what the judge wrote, with judge reward the"
        " grader's text; both",
    ] = "label"
    when: Annotated[When, "of a context; missing: only where the sources before it said nothing"] = "always"
    max_pairs: Annotated[
        int | None, Ge(1), "pairs compared in a group; null: every attempt with one other, G / 2 pairs"
    ] = None
    judge_model: Annotated[str | None, IsPath(), "judge model: Hub id or folder; it needs no common tokenizer"] = None
    template: Annotated[str, "the judge's prompt, with {task}, {first} and {second}"] = TEMPLATE
    max_comparison_length: Annotated[int, Ge(1), "tokens of one comparison"] = 192
    max_attempt_length: Annotated[int, Ge(1), "tokens of each attempt; a longer one loses its middle"] = 1024
    max_task_length: Annotated[int, Ge(1), "tokens of the task; a longer one loses its middle"] = 2048
    temperature: Annotated[float, Ge(0), "the judge's sampling temperature; 0 is greedy"] = 0.0

    def check(self) -> None:
        super().check()
        check_template("the judge's template", self.template, FIELDS)
        if not {"first", "second"} <= self._template.shown:
            raise ConfigError(
                "feedback: the judge's template does not show both attempts",
                got=repr(self.template[:60]),
                expected="a text with {first} and {second}, and {task} where wanted",
            )
        if (self.judge == "model") != (self.judge_model is not None):
            raise ConfigError(
                "feedback: judge model and judge_model go together",
                got=f"judge {self.judge}, judge_model {self.judge_model}",
                do="Set judge_model to a Hub id or a folder, and judge to model.",
            )

    def __call__(self, groups: Sequence[Group], writer: Writer) -> list[Group]:
        pairs = [(n, i, j) for n, group in enumerate(groups) for i, j in self._pairs(group)]
        attempts = [(groups[n].rollouts[i], groups[n].rollouts[j]) for n, i, j in pairs]
        judged: Sequence[_Judged | _Rewarded] = (
            [_Rewarded(*two) for two in attempts] if self.judge == "reward" else self._asked(attempts, writer)
        )
        comparisons: list[list[list[Comparison]]] = [[[] for _ in group.rollouts] for group in groups]
        sections: list[list[list[Section]]] = [[[] for _ in group.rollouts] for group in groups]
        for (number, first, second), found in zip(pairs, judged, strict=True):
            comparisons[number][first].append(found.comparison(second))
            for index, section in zip((first, second), found.sections(self.name), strict=True):
                sections[number][index] += [one for one in section if one not in sections[number][index]]
        if self.use != "context":
            groups = [_labelled(group, found) for group, found in zip(groups, comparisons, strict=True)]
        if self.use == "label":
            return list(groups)
        return [extend(group, more, self.when) for group, more in zip(groups, sections, strict=True)]

    def _pairs(self, group: Group) -> list[tuple[int, int]]:
        """The pairs of a group's attempts that are compared; attempts that say the same are not."""
        count = len(group.rollouts)
        chosen = itertools.islice(rounds(count), self.max_pairs or count // 2)
        texts = [attempt_text(rollout) for rollout in group.rollouts]
        return [(first, second) for first, second in chosen if texts[first] != texts[second]]

    def contact(self) -> None:
        """Load the judge's model, or ask once behind the endpoint, before any answer is sampled."""
        if self.judge == "endpoint":
            self.try_endpoint(
                self.name, self.shortest_prompt, max_tokens=self.max_comparison_length, temperature=self.temperature
            )
        elif self.judge == "model":
            self._model_writer.excess(self.shortest_prompt, self.max_comparison_length)

    @property
    def shortest_prompt(self) -> list[Message]:
        """The judge's prompt without task and attempts: what any window must have room for."""
        return self._template.messages({})

    @property
    def _template(self) -> Template:
        return Template(self.template, FIELDS)

    @property
    def asks_student(self) -> bool:
        """Whether the model that is trained is the judge."""
        return self.judge == "self"

    def _asked(self, pairs: Sequence[tuple[Rollout, Rollout]], writer: Writer) -> "list[_Judged]":
        """What the judge says of each pair, in both orders; the first of a pair is asked about as the first first."""
        match self.judge:
            case "endpoint":
                writer = self.endpoint_writer(self.name)
            case "model":
                writer = self._model_writer
        orders = [order for pair in pairs for order in (pair, pair[::-1])]
        keys = [dataclasses.replace(a.key, phase=f"{a.key.phase}/against-{b.key.sample}") for a, b in orders]
        read = [self._fields(*order, writer) for order in orders]
        written = writer.write(
            [self._template.messages(plain_texts(fields)) for fields in read],
            keys=keys,
            max_tokens=self.max_comparison_length,
            temperature=self.temperature,
        )
        answers = [
            _Answer(
                text=without_thinking(one.text, thinking_open=one.thinking_open),
                tokens=one.tokens,
                cut=sum(field.cut for field in fields.values()),
                control_tokens=sum(field.control_tokens for field in fields.values()),
                clipped=one.clipped,
            )
            for one, fields in zip(written, read, strict=True)
        ]
        return [_Judged(*two) for two in zip(answers[::2], answers[1::2], strict=True)]

    def _fields(self, first: Rollout, second: Rollout, writer: Writer) -> dict[str, FittedText]:
        """What fills the template's placeholders, within their budgets and the judge's window."""
        texts = {"task": task_text(first.task), "first": attempt_text(first), "second": attempt_text(second)}
        budgets = {
            "task": self.max_task_length,
            "first": self.max_attempt_length,
            "second": self.max_attempt_length,
        }
        return self._template.fitted(texts, budgets, writer, self.max_comparison_length)

    @functools.cached_property
    def _model_writer(self) -> ModelWriter:
        """The judge's own model, loaded once in each process."""
        import torch

        from vpd.engines.torch_engine import TorchEngine
        from vpd.model import loading
        from vpd.model.forward import longest_input
        from vpd.model.settings import ModelSettings
        from vpd.policy import FixedPolicy

        source = str(self.judge_model)
        model, tokenizer = loading.load(source, ModelSettings(name_or_path=source))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        model = model.eval() if device is None else model.eval().to(device)
        engine = TorchEngine(tokenizer, eos_ids=loading.end_tokens(model, tokenizer))
        engine.load(FixedPolicy(model))
        saved = saved_settings(Path(source)) or PromptSettings()
        prompter = Prompter(tokenizer, saved, window=longest_input(model), max_completion_length=1)
        return ModelWriter(engine, prompter, seed=0)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """One answer of the judge."""

    text: str
    tokens: int
    cut: int
    control_tokens: int
    clipped: bool

    @property
    def verdict(self) -> Verdict | None:
        """The word on its last line; None where there is none."""
        return verdict_of(self.text)


@dataclass(frozen=True)
class _Judged:
    """The judge's answers about a pair: with its first attempt as the first, and the other way round."""

    there: _Answer
    back: _Answer

    @property
    def preferred(self) -> bool | None:
        """Whether the pair's first attempt is the better one; None: the two answers are unsure or disagree."""
        match self.there.verdict, self.back.verdict:
            case "first", "second":
                return True
            case "second", "first":
                return False
            case _:
                return None

    def comparison(self, other: int) -> Comparison:
        verdicts = (self.there.verdict, self.back.verdict)
        return Comparison(
            other=other,
            preferred=self.preferred,
            disagree=verdicts in (("first", "first"), ("second", "second")),
            unreadable=verdicts.count(None),
            tokens=self.there.tokens + self.back.tokens,
        )

    def sections(self, source: str) -> list[list[Section]]:
        """For each attempt the answer in which it is the first; none where the judge is unsure."""
        if self.preferred is None:
            return [[], []]
        return [
            [
                Section(
                    kind="feedback",
                    source=source,
                    text=ABOUT + answer.text,
                    tokens=answer.tokens,
                    cut=answer.cut,
                    control_tokens=answer.control_tokens,
                    clipped=answer.clipped,
                )
            ]
            for answer in (self.there, self.back)
        ]


@dataclass(frozen=True)
class _Rewarded:
    """A pair that the environment's reward decides; the context is what the grader wrote."""

    first: Rollout
    second: Rollout

    def comparison(self, other: int) -> Comparison:
        rewards = self.first.grade.reward, self.second.grade.reward
        return Comparison(other=other, preferred=None if rewards[0] == rewards[1] else rewards[0] > rewards[1])

    def sections(self, source: str) -> list[list[Section]]:
        return [
            [Section(kind="feedback", source=source, text=r.grade.feedback)]
            if r.grade.feedback and r.grade.informative
            else []
            for r in (self.first, self.second)
        ]


def verdict_of(text: str) -> Verdict | None:
    """The judge's last line as a verdict; None where it is something else.

    >>> verdict_of("Answer: second.")
    'second'
    >>> verdict_of("The first attempt is") is None
    True
    """
    lines = text.strip().splitlines()
    found = VERDICT.fullmatch(lines[-1]) if lines else None
    match found[1].lower() if found else "":
        case "first":
            return "first"
        case "second":
            return "second"
        case "unsure":
            return "unsure"
    return None


def rounds(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of ``count`` attempts, in rounds in which each meets one other as far as possible.

    >>> list(rounds(4))
    [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
    """
    left = list(itertools.combinations(range(count), 2))
    while left:
        met: set[int] = set()
        for pair in list(left):
            if met.isdisjoint(pair):
                met |= set(pair)
                left.remove(pair)
                yield pair


def _labelled(group: Group, found: Sequence[Sequence[Comparison]]) -> Group:
    """The group with more comparisons at each rollout."""
    return Group(
        rollouts=tuple(
            dataclasses.replace(r, comparisons=(*r.comparisons, *more)) if more else r
            for r, more in zip(group.rollouts, found, strict=True)
        )
    )
