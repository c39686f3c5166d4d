"""Which part of a teacher's prompt is what: the task, each section of the context, and what was cut from it.

A run folder has the prompt as text and the sections as they were written.  The parts are found again from the lines
that the prompt settings put above each section, or, where the layout puts none, from a section's first characters.
Spaces do not count in the comparison: tokenizers of words lose them, and control tokens that a section spelled have a
gap in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

PartKind: TypeAlias = Literal["task", "header", "demonstration", "feedback", "closing"]
Span: TypeAlias = tuple[int, int]

HEADERS = ("demonstration", "feedback")
OPENING = 12  # characters by which a section without a line above it is found


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt; ``missing`` is the text that was cut from it, where that is known."""

    kind: PartKind
    text: str
    missing: str = ""


class _Squeezed:
    """A text without its white space, and where each of its characters stood."""

    def __init__(self, text: str):
        self.places = [place for place, character in enumerate(text) if not character.isspace()]
        self.text = "".join(text[place] for place in self.places)
        self._end = len(text)

    def place(self, index: int) -> int:
        """Where the character ``index`` of the squeezed text stands; the end of the text after the last."""
        return self.places[index] if index < len(self.places) else self._end


def parts_of(
    prompt: str, teacher_prompt: str, context: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Part]:
    """The parts of a teacher's prompt, in order; together they are its text.

    ``context`` are the sections (``text``, ``kind``, ``source``), ``settings`` the run's section ``prompts``.  A prompt
    in which no section is found again is one part, the task.
    """
    whole, student = _Squeezed(teacher_prompt), _Squeezed(prompt)
    same = _common(whole.text, student.text)
    back = min(_common(whole.text[::-1], student.text[::-1]), len(student.text) - same, len(whole.text) - same)
    end = len(whole.text) - back  # where the template goes on as in the student's prompt
    closing = _squeeze(str(settings.get("closing", "")))
    close = whole.text.rfind(closing, same, end) if closing else end
    close = end if close < 0 else close
    found: list[tuple[PartKind, int, int, str]] = []
    place = same
    texts = _texts(context)
    for kind, text in texts.items():
        header, start = _start_of(whole.text, kind, text, settings, (place, close))
        if start < 0:
            continue
        begins = start + len(header)
        following = _start_of(whole.text, "feedback", texts.get("feedback", ""), settings, (begins, close))[1]
        stop = following if kind == "demonstration" and following >= 0 else close
        ends, missing = _end_of(whole.text, begins, stop, text)
        found += [("header", start, begins, "")] if header else []
        found.append((kind, begins, ends, missing))  # type: ignore[arg-type]
        place = ends
    return _cut_up(teacher_prompt, whole, found, (close, end) if found else None)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _start_of(whole: str, kind: str, text: str, settings: Mapping[str, Any], inside: Span) -> tuple[str, int]:
    """The line above a section, and where it begins; without the line, "" and where the text does; -1: nowhere.

    Its first characters may be what the student's prompt goes on with, before ``inside``.
    """
    low, high = inside
    for line, mark in ((_squeeze(str(settings.get(f"{kind}_header", ""))), ""), ("", _squeeze(text)[:OPENING])):
        sought = line or mark
        start = whole.find(sought, low, high)
        start = start if start >= 0 else whole.find(sought, max(low - len(sought), 0), high)
        if sought and start >= 0:
            return line, start
    return "", -1


def _end_of(whole: str, begins: int, stop: int, text: str) -> tuple[int, str]:
    """Where a section ends in the squeezed prompt, ``stop`` at the latest, and what was cut from it."""
    squeezed = _Squeezed(text)
    if whole.startswith(squeezed.text, begins):
        return begins + len(squeezed.text), ""
    kept = whole[begins:stop]
    head = _common(kept, squeezed.text)
    tail = min(_common(kept[::-1], squeezed.text[::-1]), len(squeezed.text) - head)
    return stop, text[squeezed.place(head) : squeezed.place(len(squeezed.text) - tail)]


def _cut_up(
    text: str, whole: _Squeezed, found: Sequence[tuple[PartKind, int, int, str]], closing: Span | None
) -> list[Part]:
    """The text in parts, with the task before, between and after what was found."""
    if closing is not None and closing[1] > closing[0]:
        found = [*found, ("closing", *closing, "")]
    parts: list[Part] = []
    last = 0
    for kind, start, stop, missing in found:
        low = whole.place(start)
        high = whole.place(stop - 1) + 1 if stop > start else low
        between, low = (text[last:low], low) if text[last:low].strip() else ("", last)  # or white space, of this part
        if between:
            parts.append(Part("task", between))
        if parts and parts[-1].kind == "header":  # whose line ends in white space of its own
            inner = text[low:high].lstrip()
            parts[-1] = Part("header", parts[-1].text + text[low : high - len(inner)])
            low = high - len(inner)
        parts.append(Part(kind, text[low:high], missing))
        last = max(high, last)
    if last < len(text):
        parts.append(Part("task", text[last:]))
    return [part for part in parts if part.text or part.missing]


def _texts(context: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the teacher reads under each header: the first demonstration, and all feedback."""
    texts: dict[str, list[str]] = {kind: [] for kind in HEADERS}
    for section in context:
        kind = str(section.get("kind") or ("demonstration" if section.get("source") == "sibling" else "feedback"))
        if kind in texts and not (kind == "demonstration" and texts[kind]):
            texts[kind].append(str(section.get("text", "")))
    return {kind: "\n\n".join(found) for kind, found in texts.items() if found}


def _common(one: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length
    while low < high - 1:  # one[:low] == other[:low], one[:high] != other[:high]
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low
