"""Hydra's overrides in a shell script, ``a.b=value``, with the variables that the script sets.  It is not executed.

A variable has the value that it was last given above.  One that is set in a branch, a loop or a function, or from what
a command prints, is computed: it stands as it is written, and what it is in is not read.
"""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

from vpd.config.convert import Unread
from vpd.config.reading import read_value
from vpd.errors import ConfigError

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
OVERRIDE = re.compile(r"[+~]*([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::-(?P<otherwise>[^}]*))?\}|(?P<plain>\w+))")
ARRAY = re.compile(r"^\s*\w+\+?=\(", re.MULTILINE)
OPENING, CLOSING = ("if", "for", "while", "until", "case", "select", "{"), ("fi", "done", "esac", "}")
BEFORE_A_COMMAND = (";", ";;", "&", "&&", "|", "||", "then", "do", "else", "elif", "{", "(", "!", "time")
HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
COMPUTED = "it is computed: set in a branch, or from what a command prints; give it as --section.key VALUE"
NAMES = {"True": "true", "False": "false", "None": "null"}


def read_shell(path: Path) -> dict[str, Any]:
    """The overrides by key; of several for one key the last.  Raises ConfigError."""
    try:
        text = path.read_text().replace("\\\n", " ")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path}", got=reason) from error
    found: dict[str, Any] = {}
    variables: dict[str, str | None] = {}
    depth, heredoc = 0, None
    for line in ARRAY.sub("", text).splitlines():
        if heredoc is not None:
            heredoc = None if line.strip() == heredoc else heredoc
            continue
        branch, is_command = False, True
        for word in _words(line):
            if is_command:
                depth = max(depth + (word in OPENING) - (word in CLOSING), 0)
            is_command = word in BEFORE_A_COMMAND or word.endswith("()")
            branch = (branch or word in ("&&", "||")) and word != ";"
            override, assignment = OVERRIDE.fullmatch(word), ASSIGNMENT.fullmatch(word)
            if override:
                key, value = override[1], _value(_filled(override[2], variables), override[1], variables)
                differs = depth > 0 and key in found and found[key] != value
                found[key] = Unread(f"{found[key]} or {value}", COMPUTED) if differs else value
            elif assignment:
                variables[assignment[1]] = _assigned(assignment, variables, certain=depth == 0 and not branch)
        heredoc = begun[1] if (begun := HEREDOC.search(line)) else None
    return found


def _assigned(assignment: re.Match[str], variables: dict[str, str | None], *, certain: bool) -> str | None:
    """What a variable then holds, None where that is computed."""
    value = _filled(assignment[3], variables)
    if assignment[2]:
        before = variables.get(assignment[1], "")
        value = f"${assignment[1]}" if before is None else f"{before}{value}"
    return value if certain and not _is_computed(value, variables) else None


def _is_computed(text: str, variables: dict[str, str | None]) -> bool:
    names = [match["braced"] or match["plain"] for match in VARIABLE.finditer(text)]
    return "$(" in text or "`" in text or any(name in variables for name in names)


def _words(line: str) -> list[str]:
    words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    words.whitespace_split, words.commenters = True, ""
    try:
        split = list(words)
    except ValueError:  # a quote that goes on in the next line: no override that could be read alone
        split = line.split()
    split = list(itertools.takewhile(lambda word: not word.startswith("#"), split))
    return [word[:-1] if word.endswith(")") and word.count(")") > word.count("(") else word for word in split]


def _filled(text: str, variables: dict[str, str | None]) -> str:
    """A text with the variables that are known; one that is computed stays as it is written."""

    def value(match: re.Match[str]) -> str:
        name, otherwise = match["braced"] or match["plain"], match["otherwise"]
        if name not in variables:
            return match[0] if otherwise is None else otherwise
        known = variables[name]
        return f"${name}" if known is None else known

    return VARIABLE.sub(value, text)


def _value(text: str, key: str, variables: dict[str, str | None]) -> Any:
    if _is_computed(text, variables):
        return Unread(text, COMPUTED)
    if re.fullmatch(r"\$\{?\w+\}?", text):
        return Unread(text)
    if "$" in text and not text.startswith("["):
        return text
    try:
        return read_value(NAMES.get(text, text), key)
    except ConfigError:
        if "$" in text:
            return Unread(text)
        raise
