"""Messages to token ids: the student's prompt, and the teacher's, with a budget for each segment.

The teacher reads the task and C, a sibling's solution or the feedback or both, where ``prompts.layout`` puts them
(:mod:`vpd.prompts.layouts`).  The assistant header follows, and after it the scored completion, token for token.  The
failed attempt is not quoted: it *is* the scored continuation.

A demonstration or a feedback over its budget loses its middle (the start and the end say most), and so does an
environment's reply; the task and the assistant header are never cut.  Text stays text: where it spells a control token
of the tokenizer (``<|im_end|>``, ``<think>``), a gap keeps it from becoming one (:mod:`vpd.control_tokens`).  Tokens
cut and control tokens removed are counted where the text ends up.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError

from vpd.control_tokens import ControlTokens
from vpd.errors import EnvError, ModelError
from vpd.printable import well_formed
from vpd.prompts.layouts import KINDS, Kind, frame, with_context
from vpd.prompts.settings import PromptSettings
from vpd.tool_messages import check_shown
from vpd.types import Group, Message, Rollout, Section, Task, TeacherPrompt, Tokens

LEAST_CONTEXT = 4  # tokens: a context that is cut to fewer says nothing
CHARACTERS = 64  # more than a token has, but for runs of one character
KEYS = ("role", "content")  # of every message


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedText:
    """A text within its budget.

    ``length`` is the most tokens that it takes, ``cut`` the tokens that its middle lost, ``control_tokens`` how many
    control tokens it spelled, which are plain text now.
    """

    text: str
    length: int
    cut: int = 0
    control_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyTokens:
    """An environment's reply as tokens, with the headers around it; ``cut`` and ``control_tokens`` as in FittedText."""

    tokens: Tokens
    cut: int = 0
    control_tokens: int = 0


class Prompter:
    """Builds prompts for one tokenizer and one model window.

    ``window`` is the model's longest input in tokens (None: unknown), ``max_completion_length`` what must fit
    behind every prompt.
    """

    def __init__(self, tokenizer: Any, settings: PromptSettings, *, window: int | None, max_completion_length: int):
        self.tokenizer = tokenizer
        self.settings = settings
        self.window = window
        self.max_completion_length = max_completion_length
        self._remembered = functools.lru_cache(maxsize=512)(self._tokens)  # a group's prompts are often one
        self._control = ControlTokens(tokenizer)
        self._least_room = LEAST_CONTEXT + len(self._encode(settings.cut_marker))

    def build_student_prompt(self, task: Task) -> Tokens:
        """The student's prompt [P].

        Raises ModelError if it does not fit the budget or the model's window, or if the chat template refuses the
        task's messages; EnvError for a task without a user message.
        """
        _last_user_message(task)
        tokens = self.prompt_of(task)
        check_shown(partial(self._render, what=f"task {task.id!r}"), task.messages, task.tools, f"task {task.id!r}")
        limit = self.settings.max_prompt_length
        if limit is not None and len(tokens) > limit:
            raise ModelError(
                f"the prompt of task {task.id!r} is too long",
                got=f"{len(tokens)} tokens",
                expected=f"at most {limit} (prompts.max_prompt_length)",
                do="Raise the limit or drop the task; prompts are never cut.",
            )
        self._check_window(task, len(tokens))
        return tokens

    def prompt_of(self, task: Task) -> Tokens:
        """What the chat template makes of a task's messages and tools, whatever its length."""
        return self._render(*self.shown(task), what=f"task {task.id!r}")

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        """Give every rollout that has a context its teacher's prompt; the others get None."""

        def of(rollout: Rollout) -> Rollout:
            made = self.build_teacher_prompt(rollout.task, rollout.context)
            return dataclasses.replace(rollout, teacher_prompt=made)

        return [Group(rollouts=tuple(map(of, group.rollouts))) for group in groups]

    def used(self, context: Sequence[Section]) -> tuple[Section, ...]:
        """What the teacher reads of a context: the first demonstration and all feedback, or either; nothing blank."""
        sections = [section for section in context if not section.is_blank]
        demonstrations = tuple(section for section in sections if section.kind == "demonstration")[:1]
        feedback = tuple(section for section in sections if section.kind == "feedback")
        if demonstrations and not self.settings.feedback_with_demonstration:
            return demonstrations
        return demonstrations + feedback

    def build_teacher_prompt(self, task: Task, context: Sequence[Section]) -> TeacherPrompt | None:
        """The teacher's prompt [Q] for a context; None where it says nothing or the window has no room.

        With nothing to say the teacher's prompt would be the student's own, and distilling towards it a hidden
        regulariser: such a row has no teacher.  There is room if ``LEAST_CONTEXT`` tokens of a longer context fit.
        """
        sections = self.used(context)
        if not sections:
            return None
        room = self._room(task, _texts(sections))
        made = self._with_context(task, sections, room)
        while room > 1 and (excess := self._excess(len(made.tokens))) > 0:  # the template may lengthen the texts
            room = max(room - max(excess // 4, 1), 1)
            made = self._with_context(task, sections, room)
        no_room = self._excess(len(made.tokens)) > 0 or (made.cut > 0 and room < self._least_room)
        return None if no_room else made

    def has_room(self, task: Task) -> bool:
        """Whether the teacher's prompt of a task has room for feedback of any length, cut if need be."""
        return self._room(task, {"feedback": ""}) >= self._least_room

    def shows_context(self, task: Task) -> bool:
        """Whether the chat template shows the teacher its context: other feedback must give another prompt."""
        texts = ("0 yes", "1 no")
        sections = [Section(kind="feedback", source="environment", text=text) for text in texts]
        first, second = (self._with_context(task, [section], 1 << 30).tokens for section in sections)
        return first != second

    def answer_end(self) -> Tokens:
        """What the chat template puts behind an assistant's last answer, as tokens; nothing where it hides answers."""
        try:
            behind = self._behind_an_answer(what="an answer", add_generation_prompt=False)
        except ModelError:  # it takes no answers, as it need not for single turns
            return ()
        return tuple(self._encode(behind or ""))

    def shown(self, task: Task) -> tuple[list[Any], list[Any]]:
        """A task's messages and tools as the chat template gets them."""
        return self._clean(list(task.messages)), self._clean(list(task.tools))

    def answer(self, text: str) -> Tokens:
        """An answer that was not sampled, as tokens, with the special token that the chat template ends answers with.

        Special tokens that it spells become plain text; ``<think>`` and its kind stay.
        """
        return (*self._encode(self._control.neutralise(text, "special")[0]), *self._special_end)

    def spells(self, tokens: Tokens, text: str) -> bool:
        """Whether these are tokens of the tokenizer that read as an answer's text."""
        if max(tokens, default=0) >= len(self.tokenizer):
            return False
        return bool(self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip() == text.strip())

    @functools.cached_property
    def _special_end(self) -> Tokens:
        added = self.tokenizer.added_tokens_decoder
        return tuple(token for token in self.answer_end()[:1] if token in added and added[token].special)

    def excess(self, messages: Sequence[Message], max_tokens: int) -> int:
        """Tokens that a prompt of any messages and its answer take beyond the window; 0 where they fit."""
        if self.window is None:
            return 0
        length = len(self._render(self._clean(list(messages)), what="a feedback source"))
        return max(length + max_tokens - self.window, 0)

    def conversation(self, messages: Sequence[Message], max_tokens: int) -> Tokens:
        """Any messages as a prompt that leaves ``max_tokens`` for the answer.  Raises ModelError if it does not.

        As in a task, control tokens become plain text unless ``control_tokens_in_tasks`` lets them be.
        """
        tokens = self._render(self._clean(list(messages)), what="a feedback source")
        if self.excess(messages, max_tokens):
            raise ModelError(
                "a critic's prompt does not fit the model's window",
                got=f"{len(tokens)} prompt tokens + {max_tokens} for the critique",
                expected=f"at most {self.window} together",
                do="Lower max_attempt_length, max_task_length, max_feedback_length or max_critique_length of the"
                " feedback source.",
            )
        return tokens

    def reply(self, message: Message, after: int | None) -> ReplyTokens:
        """What a template puts between an assistant's answer and the next: its end, ``message``, a new header.

        ``after`` is the answer's last token; where that is the end-of-turn token itself, it is not repeated.
        A message longer than ``max_reply_length`` loses its middle.  Raises ModelError if the chat template refuses it.
        """
        fitted = self.fit(message["content"], self.settings.max_reply_length)
        others = {key: value for key, value in message.items() if key != "content"}
        shown = {**_map_text(others, lambda text: self._control.neutralise(text)[0]), "content": fitted.text}
        following = self._behind_an_answer(shown, what="an environment's reply")
        if following is None:
            raise ModelError(
                "the chat template does not show the assistant's answers, so that an environment cannot reply",
                do="Take a model with another chat template, or set rollout.max_turns to 1.",
            )
        tokens = tuple(self._encode(self._without_end(following, after)))
        return ReplyTokens(tokens=tokens, cut=fitted.cut, control_tokens=fitted.control_tokens)

    def environment_text(self, text: str, before: Tokens) -> tuple[Tokens, tuple[bool, ...]]:
        """A text of the environment behind an attempt, as the next user message: tokens, and which are the text's own.

        ``before`` are the tokens of task and attempt.  Control tokens become plain text; the middle of a text that is
        longer than ``max_feedback_length`` or than what the window has left makes way.  Without any room: no tokens.
        """
        spoken = "\N{REPLACEMENT CHARACTER}"
        behind = self._behind_an_answer({"role": "user", "content": spoken}, what="what an environment says")
        header = (behind or "").partition(spoken)[0]
        head = self._encode(self._without_end(header, before[-1] if before else None))
        room = self.settings.max_feedback_length
        if self.window is not None:
            room = min(room, self.window - len(before) - len(head))
        own = self._encode(self.fit(text, room).text) if room > 0 else []
        return ((*head, *own), (False,) * len(head) + (True,) * len(own)) if own else ((), ())

    def _behind_an_answer(self, *messages: Mapping[str, Any], what: str, **options: Any) -> str | None:
        """What the chat template puts behind an answer that these messages follow; None where it hides answers.

        Raises ModelError where it refuses them; ``what`` names them there.
        """
        answer = "\N{OBJECT REPLACEMENT CHARACTER}"
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}, *messages]
        try:
            rendered: str = self._apply_template(conversation, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise _refusal(what, messages, error) from error
        _, found, behind = rendered.partition(answer)
        return behind if found else None

    def _without_end(self, following: str, after: int | None) -> str:
        """What follows an answer, without the end-of-turn token where that is the answer's last, ``after``."""
        if after is None:
            return following
        end = re.escape(self.tokenizer.decode([after]))
        return re.sub(rf"\A\s*?{end}", "", following)  # some templates set a space before it

    def opens_thinking(self, prompt: Tokens) -> bool:
        """Whether a prompt ends in ``<think>``: its answer then begins inside the thinking."""
        return bool(self.tokenizer.decode(list(prompt[-16:])).rstrip().endswith("<think>"))

    def control_tokens_in(self, task: Task) -> int:
        """How many control tokens a task's messages and tools spell that are read as text instead."""
        counts: list[int] = []

        def count(text: str) -> str:
            cleaned, found = self._clean_text(text)
            counts.append(found)
            return cleaned

        _map_text([*task.messages, *task.tools], count)
        return sum(counts)

    def unknown_tokens_in(self, task: Task) -> int:
        """How many tokens of what a task's messages say are the tokenizer's unknown token: text that is lost."""
        return sum(self._unknown(self._clean_text(message["content"])[0]) for message in task.messages)

    @property
    def unknown_word(self) -> str:
        """How the tokenizer spells the token that unknown text becomes; empty without one."""
        unknown = self._control.unknown
        return "" if unknown is None else str(self.tokenizer.decode([unknown]))

    def _unknown(self, text: str) -> int:
        unknown = self._control.unknown
        return 0 if unknown is None else self._encode(text).count(unknown)

    def fit(self, text: str, budget: int) -> FittedText:
        """``text`` without its control tokens, within a budget of tokens also when it is encoded again.

        The middle makes way for ``cut_marker``; a budget that holds not even that leaves nothing.  What is far beyond
        the budget (``CHARACTERS`` for each token) is cut before it is tokenised, and its tokens are then estimated.
        """
        text, dropped = self._without_far_middle(text, budget)
        text, control = self._control.neutralise(text)
        tokens = self._encode(text)
        unread = -(-dropped * len(tokens) // max(len(text), 1))  # tokens that were never made
        if len(tokens) <= budget:
            return FittedText(text=text, length=len(tokens), cut=unread, control_tokens=control)
        marker = len(self._encode(self.settings.cut_marker))
        keep = max(budget - marker, 0)
        while keep > 0:
            joined, _ = self._control.neutralise(self._without_middle(tokens, keep))
            excess = len(self._encode(joined)) - budget
            if excess <= 0:
                cut = len(tokens) - keep + unread
                return FittedText(text=joined, length=keep + marker, cut=cut, control_tokens=control)
            keep -= excess
        cut = len(tokens) + unread
        if marker <= budget:
            return FittedText(text=self.settings.cut_marker, length=marker, cut=cut, control_tokens=control)
        return FittedText(text="", length=0, cut=cut, control_tokens=control)

    def _without_far_middle(self, text: str, budget: int) -> tuple[str, int]:
        """A text without characters that no budget of tokens reaches, and how many these are."""
        half = budget * CHARACTERS // 2
        if len(text) <= 2 * half:
            return text, 0
        return f"{text[:half]}{self.settings.cut_marker}{text[len(text) - half :]}", len(text) - 2 * half

    def _without_middle(self, tokens: Sequence[int], keep: int) -> str:
        """The first and the last of ``keep`` tokens as text, without the characters that the cut leaves incomplete."""
        head = self.tokenizer.decode(tokens[: (keep + 1) // 2]).rstrip("\N{REPLACEMENT CHARACTER}")
        tail = self.tokenizer.decode(tokens[len(tokens) - keep // 2 :]).lstrip("\N{REPLACEMENT CHARACTER}")
        return f"{head}{self.settings.cut_marker}{tail}"

    def _with_context(self, task: Task, sections: Sequence[Section], room: int) -> TeacherPrompt:
        """The teacher's prompt with the sections in ``room`` tokens."""
        settings = self.settings
        texts: dict[Kind, str] = {}
        cut = control = unknown = 0
        budgets: dict[Kind, int] = {
            "demonstration": settings.max_demonstration_length,
            "feedback": settings.max_feedback_length,
        }
        for kind, text in _texts(sections).items():
            fitted = self.fit(text, min(budgets[kind], room))
            room = max(room - fitted.length, 0)
            cut += fitted.cut
            control += fitted.control_tokens
            unknown += self._unknown(fitted.text)
            texts[kind] = fitted.text or settings.cut_marker
        messages = with_context(self._clean(list(task.messages)), _last_user_message(task), texts, settings)
        return TeacherPrompt(
            tokens=self._render(messages, self._clean(list(task.tools)), what=f"task {task.id!r}"),
            sources=tuple(dict.fromkeys(section.source for section in sections)),
            cut=cut,
            control_tokens=control,
            unknown_tokens=unknown,
        )

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, what: str) -> Tokens:
        try:
            return self._remembered(json.dumps([list(messages), list(tools)]))
        except (TemplateError, TypeError, ValueError) as error:
            raise _refusal(what, messages, error) from error

    def _tokens(self, conversation: str) -> Tokens:
        """A conversation (JSON: messages and tools) as the chat template writes it, ready for an answer."""
        messages, tools = json.loads(conversation)
        quiet = {"verbose": False}  # about a long conversation: whether it fits the window is checked here
        options = {"tools": tools or None, "tokenizer_kwargs": quiet}
        return tuple(self._apply_template(messages, tokenize=True, return_dict=False, **options))

    def _apply_template(self, messages: Sequence[Any], **options: Any) -> Any:
        usual = {"add_generation_prompt": True, "enable_thinking": self.settings.enable_thinking}
        return self.tokenizer.apply_chat_template(messages, **(usual | options))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(well_formed(text), add_special_tokens=False, verbose=False))

    def _clean(self, value: list[Any]) -> list[Any]:
        """Messages or tools of a task with the control tokens removed that they may not spell."""
        cleaned: list[Any] = _map_text(value, lambda text: self._clean_text(text)[0])
        return cleaned

    def _clean_text(self, text: str) -> tuple[str, int]:
        match self.settings.control_tokens_in_tasks:
            case "all":
                return well_formed(text), 0
            case "tags":
                return self._control.neutralise(text, "special")
            case "none":
                return self._control.neutralise(text)

    def _room(self, task: Task, texts: Mapping[Kind, str]) -> int:
        """Tokens left for such texts once task, headers and completion have their place in the window."""
        if self.window is None:
            return 1 << 30
        fixed = len(self.prompt_of(task)) + len(self._encode(frame(texts, self.settings)))
        return max(self.window - self.max_completion_length - fixed, 1)

    def _excess(self, length: int) -> int:
        """Tokens that a prompt and its completion take beyond the window; 0 or less where they fit."""
        return -1 if self.window is None else length + self.max_completion_length - self.window

    def _check_window(self, task: Task, length: int) -> None:
        if self._excess(length) > 0:
            raise ModelError(
                f"the prompt of task {task.id!r} does not fit the model's window",
                got=f"{length} prompt tokens + {self.max_completion_length} completion tokens",
                expected=f"at most {self.window} together",
                do="Lower rollout.max_completion_length, drop the task, or take a model with a longer window.",
            )


def _texts(sections: Sequence[Section]) -> dict[Kind, str]:
    """What there is to read of each kind, in the order of the prompt."""
    joined = {kind: "\n\n".join(section.text for section in sections if section.kind == kind) for kind in KINDS}
    return {kind: text for kind, text in joined.items() if text}


def _last_user_message(task: Task) -> int:
    """Where context is added.  Raises EnvError for a task without a user message."""
    places = [place for place, message in enumerate(task.messages) if message["role"] == "user"]
    if not places:
        raise EnvError(
            f"task {task.id!r} has no user message",
            got=f"only {_roles(task.messages)}",
            expected="a message with the role 'user', where the teacher reads the feedback",
        )
    return places[-1]


def _refusal(what: str, messages: Sequence[Mapping[str, Any]], error: Exception) -> ModelError:
    """The chat template's own words in one line."""
    system = any(message["role"] == "system" for message in messages)
    return ModelError(
        f"the model's chat template refuses the messages of {what} ({_roles(messages)})",
        got=" ".join(str(error).split())[:160] or type(error).__name__,
        do="Put the system message's text at the start of the question, or take a model whose template has that role."
        if system
        else "Change the messages, or take a model with another chat template.",
    )


def _roles(messages: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(message["role"]) for message in messages)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` (as JSON has them) with every text in it changed."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {key if key in KEYS else change(key): _map_text(entry, change) for key, entry in value.items()}
        case list() | tuple():
            return [_map_text(entry, change) for entry in value]
        case _:
            return value
