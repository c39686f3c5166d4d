"""The page about the command line, written from the parsers each time the site is built."""

import argparse
import textwrap

from vpd import cli


def pages() -> dict[str, str]:
    """Markdown of the page, by its path in the site."""
    commands = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    rows = [f"| [{command.NAME}](#{command.NAME}) | {_prose(command.ABOUT)} |" for command in cli.COMMANDS]
    parts = [
        "# Commands",
        "Made from the code when this site is built; `vpd COMMAND --help` shows the same.",
        "\n".join(["| command | |", "|---|---|", *rows]),
        *(_command(command, commands.choices[command.NAME]) for command in cli.COMMANDS),
        "## Exit codes",
        f"```text\n{cli.EXIT_CODES.partition(chr(10))[2]}```",
    ]
    return {"commands.md": "\n\n".join(parts) + "\n"}


def _command(command: cli.Command, parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().removeprefix("usage: ") + (" [--section.key value ...]" if command.SETTINGS else "")
    usage = "\n".join(textwrap.wrap(" ".join(usage.split()), 72, subsequent_indent="    ", break_on_hyphens=False))
    parts = [f"## {command.NAME}", _prose(command.ABOUT), f"```text\n{usage}\n```"]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    if shown:
        parts += ["\n".join(["| | |", "|---|---|", *map(_row, shown)])]
    if command.SETTINGS:
        links = ", ".join(f"[{section}](settings/{section}.md)" for section in command.SETTINGS)
        parts += [f"Settings: {links}."]
    elif parser.epilog:
        parts += [f"```text\n{parser.epilog.rstrip()}\n```"]
    return "\n\n".join(parts)


def _row(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    value = ""
    if action.option_strings and action.nargs != 0:
        value = " " + (
            "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest).upper()
        )
    elif action.choices:
        value = ": " + ", ".join(map(str, action.choices))
    names = f"{names}{value}".replace("|", "\\|")
    return f"| `{names}` | {_prose((action.help or '') % {**vars(action), 'prog': 'vpd'})} |"


def _prose(text: str) -> str:
    for character in "\\`*[]|<":
        text = text.replace(character, "&lt;" if character == "<" else f"\\{character}")
    return text
