"""How prompts are laid out, and the file that keeps it beside a model."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge

from vpd.errors import ConfigError, ModelError
from vpd.settings import Settings

SETTINGS_FILE = "vpd_prompts.json"  # in a model's folder: the prompt settings that it was trained with
LINES = ("feedback_header", "closing")  # settings that are lines around feedback
Layout: TypeAlias = Literal["block", "request", "system"]


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
    max_reply_length: Annotated[int, Ge(1), "tokens of one reply of the environment; a longer one loses its middle"] = (
        1024
    )
    layout: Annotated[
        Layout | None,
        "where the teacher reads: request: one line of feedback behind the task, as if the user had written it there,"
        " and anything longer as in block; block: behind the task, between a line that says what it is and a closing"
        " line; system: in the system message; null: block where feedback_header or closing is set, else request",
    ] = None
    feedback_with_demonstration: Annotated[bool, "show feedback also where there is a demonstration"] = False
    demonstration_header: Annotated[str, "line above the demonstration"] = "\n\nA correct solution to this task:\n\n"
    feedback_header: Annotated[str, "layouts block and request: line above the feedback"] = (
        "\n\nFeedback on an earlier, unsuccessful attempt:\n\n"
    )
    closing: Annotated[str, "layouts block and request: the teacher's last line"] = "\n\nNow solve the original task."
    cut_marker: Annotated[str, "text that replaces a middle that was cut"] = " [...] "
    enable_thinking: Annotated[bool, "passed to chat templates that have the argument enable_thinking"] = False
    control_tokens_in_tasks: Annotated[
        Literal["tags", "none", "all"],
        "control tokens that a task's own messages may spell; tags: those that the tokenizer does not mark special"
        " (<think>, which a system message may ask for); all: also the special ones (image tokens, put there on"
        " purpose); the others are read as text, and feedback, demonstrations and replies may never spell any",
    ] = "tags"

    def __post_init__(self) -> None:
        if self.layout is None:
            object.__setattr__(self, "layout", "block" if self._changed_lines() else "request")
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.layout == "system" and (changed := self._changed_lines()):
            raise ConfigError(
                f"prompts.{changed[0]} has no place in the layout 'system'",
                do="Remove it, or set prompts.layout to block.",
            )

    def over(self, saved: "PromptSettings", given: Mapping[str, Any]) -> "PromptSettings":
        """These settings where ``given`` names them, and ``saved`` elsewhere.

        Lines around feedback that are given bring the layout that they need, and a layout without them drops them.
        """
        chosen = {name for name, value in with_layout(given).items() if not (name == "layout" and value is None)}
        if self.layout == "system" and "layout" in chosen:
            chosen |= {*LINES}
        return dataclasses.replace(saved, **{name: vars(self)[name] for name in chosen})

    def _changed_lines(self) -> list[str]:
        """The lines around feedback that are not those that every prompt has."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in LINES if vars(self)[name] != defaults[name]]


def with_layout(given: Mapping[str, Any]) -> dict[str, Any]:
    """A section as it was given, with the layout ``block`` where it says what stands around feedback and not where."""
    lines = any(name in given for name in LINES)
    return {**given, "layout": "block"} if lines and given.get("layout") is None else dict(given)


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
