"""Text from outside as a terminal and a file can take it: nothing hidden, nothing endless, always valid Unicode."""

import logging
import reprlib
import unicodedata
from typing import Any

LONGEST = 2000  # characters of one part of a message
LONGEST_SHOWN = 20_000  # characters of one text on the terminal

_JOINERS = "\u200c\u200d"  # inside words of Persian and Hindi, and inside emoji


def printable(text: str, *, lines: bool = True) -> str:
    r"""``text`` with control characters, bidirectional marks and half surrogate pairs as escapes.

    ``lines``: newlines and tabs stay what they are.

    >>> printable("a\x1b]52;c;aGk=\x07b")
    'a\\x1b]52;c;aGk=\\x07b'
    >>> printable("one\ntwo", lines=False)
    'one\\ntwo'
    """
    if text.isprintable():
        return text
    kept = _JOINERS + "\n\t" if lines else _JOINERS
    return "".join(c if _is_visible(c) or c in kept else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, longest: int = LONGEST) -> str:
    """``text``, without its middle where it has more than ``longest`` characters.

    >>> cut("0123456789" * 20, 20)
    '0123456789 [... 180 characters left out ...] 0123456789'
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[len(text) - half :]}"


def one_line(text: str) -> str:
    """``text`` as a part of a message of one line: printable, and not too long."""
    return printable(cut(text), lines=False)


def for_terminal(text: str) -> str:
    """``text`` as it may reach a terminal: printable, and without its middle if it is very long."""
    return printable(cut(text, LONGEST_SHOWN))


class LogFormatter(logging.Formatter):
    """A log record as its text alone, fit for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def shown(value: Any) -> str:
    """``repr(value)`` for a message, made without the parts that no message needs.

    >>> len(shown([["a"] * 100] * 100)) < 400
    True
    """
    return cut(_SHORT.repr(value), 300)


def well_formed(text: str) -> str:
    r"""``text`` as it can be encoded in UTF-8: half surrogate pairs as escapes.

    >>> well_formed("half \ud83d")
    'half \\ud83d'
    """
    return text.encode(errors="backslashreplace").decode()


def _is_visible(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 8
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlong = 60
