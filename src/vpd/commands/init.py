"""A first configuration."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vpd.commands import SECTIONS, path
from vpd.errors import ConfigError
from vpd.printable import for_terminal

NAME = "init"
ABOUT = (
    "Write a first configuration with comments: from the settings that are given, and on a terminal from a few"
    " questions about the others."
)
SETTINGS: tuple[str, ...] = SECTIONS


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=path, default=Path("run.yaml"), help="the file to write (default run.yaml)")
    parser.add_argument("--yes", action="store_true", help="ask nothing: what is not given is the recommended setting")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config.starter import starter
    from vpd.run_folder.files import write_text

    for word in rest:
        if word.endswith((".yaml", ".yml")) and not word.startswith("-"):
            raise ConfigError(f"unexpected argument {word!r}", do=f"Write --output {word}.")
    if options.output.exists():
        raise ConfigError(f"{options.output} exists", do="Choose another --output.")
    if not options.yes and sys.stdin.isatty():
        rest = [*rest, *asked(rest, input)]
    text = starter(rest)
    write_text(options.output, text)
    print(for_terminal(f"{options.output} is written. What comes next:"))
    print(for_terminal(f"  vpd eval --config {options.output} --teacher   # can the model make use of the feedback?"))
    print(for_terminal(f"  vpd train --config {options.output}"))


def asked(rest: list[str], ask: Callable[[str], str]) -> list[str]:
    """Settings from questions about what ``rest`` does not say; an empty answer is the default."""
    from vpd.config import pairs_of
    from vpd.config.reading import read_value
    from vpd.config.starter import questions

    given, words = dict(pairs_of(rest)), []
    for question in questions(given):
        default = "" if question.default is None else f" [{question.default}]"
        answer = ""
        while not answer:
            answer = ask(for_terminal(f"{question.text}{default}: ")).strip() or question.default or ""
        given[question.key] = read_value(answer, question.key)
        words.append(f"--{question.key}={answer}")
    return words
