"""Messages to token ids: the student's prompt, and the teacher's, with a budget for each segment.

The teacher reads the task and C.  Its system messages are the task's own; its last user message is the task,
then (if there is one) a header and a sibling's solution, then (if there is one) a header and the feedback, then a
closing line.  The assistant header follows, and after it the scored completion, token for token.  The failed
attempt is not quoted: it *is* the scored continuation.

A demonstration or a feedback over its budget loses its middle (the start and the end say most); the task and the
assistant header are never cut.  Every token cut is counted on the :class:`~vpd.types.TeacherPrompt`.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from vpd.errors import ModelError
from vpd.settings import Settings
from vpd.types import Group, Message, Rollout, Section, Task, TeacherPrompt, Tokens


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings, section="prompts"):
    """How the student's and the teacher's prompts are laid out."""

    max_prompt_length: Annotated[
        int | None,
        Ge(1),
        "longest task prompt in tokens; a longer one is an error, never cut; null: the window decides",
    ] = None
    max_demonstration_length: Annotated[int, Ge(1), "tokens of a sibling's solution that the teacher reads"] = 2048
    max_feedback_length: Annotated[int, Ge(1), "tokens of feedback that the teacher reads"] = 1024
    feedback_with_demonstration: Annotated[bool, "show feedback also where a demonstration stands"] = False
    demonstration_header: Annotated[str, "line above the demonstration"] = "\n\nA correct solution to this task:\n\n"
    feedback_header: Annotated[str, "line above the feedback"] = "\n\nFeedback on an earlier, unsuccessful attempt:\n\n"
    closing: Annotated[str, "last line of the teacher's user message"] = "\n\nNow solve the original task."
    cut_marker: Annotated[str, "text that replaces a middle that was cut"] = " [...] "
    enable_thinking: Annotated[bool, "passed to chat templates that have the argument enable_thinking"] = False


SETTINGS_FILE = "vpd_prompts.json"  # in a model's folder: the prompt settings that it was trained with


def save_settings(settings: PromptSettings, folder: Path) -> None:
    """Write the settings into a model's folder, so that it is prompted in the same way wherever it is loaded."""
    (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")


def saved_settings(folder: Path) -> PromptSettings | None:
    """The settings that a model's folder holds; None without any.  Raises ModelError for a damaged file."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return PromptSettings(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path} holds no prompt settings",
            got=" ".join(str(error).split())[:160],
            do="Remove the file, or set the section prompts.",
        ) from error


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
        self._remembered = functools.lru_cache(maxsize=4096)(self._tokens)  # a group's prompts are often one
        self._specials = sorted(filter(str.strip, tokenizer.all_special_tokens), key=len, reverse=True)

    def build_student_prompt(self, task: Task) -> Tokens:
        """The student's prompt [P]. Raises ModelError if it does not fit the budget or the model's window."""
        tokens = self._render(task.messages, task.tools)
        limit = self.settings.max_prompt_length
        if limit is not None and len(tokens) > limit:
            raise ModelError(
                f"the prompt of task {task.id!r} is too long",
                got=f"{len(tokens)} tokens",
                expected=f"at most {limit} (prompts.max_prompt_length)",
                do="Raise the limit or drop the task; prompts are never cut.",
            )
        self._check_window(task, len(tokens), "the prompt")
        return tokens

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        """Give every rollout that has a context its teacher's prompt; the others get None."""
        return [
            Group(rollouts=tuple(dataclasses.replace(r, teacher_prompt=self._teacher_of(r)) for r in group.rollouts))
            for group in groups
        ]

    def used(self, context: Sequence[Section]) -> tuple[Section, ...]:
        """The sections that the teacher reads: the first demonstration and all feedback, or either alone."""
        demonstrations = tuple(section for section in context if section.kind == "demonstration")[:1]
        feedback = tuple(section for section in context if section.kind == "feedback")
        if demonstrations and not self.settings.feedback_with_demonstration:
            return demonstrations
        return demonstrations + feedback

    def build_teacher_prompt(self, task: Task, context: Sequence[Section]) -> TeacherPrompt | None:
        """The teacher's prompt [Q] for a context, None for an empty one.

        With nothing to say the teacher's prompt would be the student's own, and distilling towards it a hidden
        regulariser: such a row has no teacher.
        """
        sections = self.used(context)
        if not sections:
            return None
        settings = self.settings
        room = self._room(task)
        parts, cut = [], 0
        for kind, header, budget in (
            ("demonstration", settings.demonstration_header, settings.max_demonstration_length),
            ("feedback", settings.feedback_header, settings.max_feedback_length),
        ):
            text = "\n\n".join(section.text for section in sections if section.kind == kind)
            if text:
                text, dropped, length = self.fit(text, min(budget, room))
                room -= length
                cut += dropped
                parts.append(header + text)
        last = max(i for i, message in enumerate(task.messages) if message["role"] == "user")
        messages = list(task.messages)
        messages[last] = {"role": "user", "content": messages[last]["content"] + "".join(parts) + settings.closing}
        tokens = self._render(messages, task.tools)
        self._check_window(task, len(tokens), "the teacher's prompt")
        sources = tuple(dict.fromkeys(section.source for section in sections))
        return TeacherPrompt(tokens=tokens, sources=sources, cut=cut)

    def conversation(self, messages: Sequence[Message], max_tokens: int) -> Tokens:
        """Any messages as a prompt that leaves ``max_tokens`` for the answer.  Raises ModelError if it does not."""
        tokens = self._render(messages)
        if self.window is not None and len(tokens) + max_tokens > self.window:
            raise ModelError(
                "a critic's prompt does not fit the model's window",
                got=f"{len(tokens)} prompt tokens + {max_tokens} for the critique",
                expected=f"at most {self.window} together",
                do="Lower max_attempt_length or max_critique_length of the feedback source.",
            )
        return tokens

    def reply(self, message: Message, after: int | None) -> Tokens:
        """What a template puts between an assistant's answer and the next: its end, ``message``, a new header.

        ``after`` is the answer's last token; where that is the end-of-turn token itself it does not stand twice.
        """
        answer = "\N{OBJECT REPLACEMENT CHARACTER}"
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}, message]
        text: str = self.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False, enable_thinking=self.settings.enable_thinking
        )
        following = text.partition(answer)[2]
        if after is not None:
            following = following.removeprefix(self.tokenizer.decode([after]))
        return tuple(self.tokenizer.encode(following, add_special_tokens=False))

    def fit(self, text: str, budget: int) -> tuple[str, int, int]:
        """``text`` within a budget of tokens: (text, tokens cut, tokens kept); special tokens become gaps."""
        for special in self._specials:
            text = text.replace(special, " ")
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) <= budget:
            return text, 0, len(tokens)
        marker = self.tokenizer.encode(self.settings.cut_marker, add_special_tokens=False)
        keep = max(budget - len(marker), 0)
        head, tail = tokens[: (keep + 1) // 2], tokens[len(tokens) - keep // 2 :]
        joined = self.tokenizer.decode(head) + self.settings.cut_marker + self.tokenizer.decode(tail)
        return joined, len(tokens) - keep, keep + len(marker)

    def _teacher_of(self, rollout: Rollout) -> TeacherPrompt | None:
        return self.build_teacher_prompt(rollout.task, rollout.context)

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Tokens:
        return self._remembered(json.dumps([list(messages), list(tools)]))

    def _tokens(self, conversation: str) -> Tokens:
        """A conversation (JSON: messages and tools) as the chat template writes it, ready for an answer."""
        messages, tools = json.loads(conversation)
        tokens = self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=self.settings.enable_thinking,
        )
        return tuple(tokens)

    def _room(self, task: Task) -> int:
        """Tokens left for the sections once task, headers and completion have their place in the window."""
        if self.window is None:
            return 1 << 30
        settings = self.settings
        frame = settings.demonstration_header + settings.feedback_header + settings.closing
        fixed = (
            len(self._render(task.messages, task.tools))
            + len(self.tokenizer.encode(frame, add_special_tokens=False))
            + 8
        )
        return max(self.window - self.max_completion_length - fixed, 1)

    def _check_window(self, task: Task, length: int, what: str) -> None:
        if self.window is not None and length + self.max_completion_length > self.window:
            raise ModelError(
                f"{what} of task {task.id!r} does not fit the model's window",
                got=f"{length} prompt tokens + {self.max_completion_length} completion tokens",
                expected=f"at most {self.window} together",
                do="Lower rollout.max_completion_length, drop the task, or take a model with a longer window.",
            )
