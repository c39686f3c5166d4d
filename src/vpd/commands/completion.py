"""A shell's completion of commands, options and settings."""

import argparse
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import vpd.commands
from vpd.commands import Command
from vpd.printable import for_terminal

NAME = "completion"
ABOUT = "Print a script that completes vpd's commands, options and settings in bash, zsh or fish."
SETTINGS: tuple[str, ...] = ()
EPILOG = """\
to use it
  bash   vpd completion bash > ~/.local/share/bash-completion/completions/vpd
  zsh    vpd completion zsh > ~/.zfunc/_vpd          (with fpath+=~/.zfunc before compinit in ~/.zshrc)
  fish   vpd completion fish > ~/.config/fish/completions/vpd.fish
  now    source <(vpd completion bash)

The script holds all words, so completing starts no Python; print it again after an update.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What can follow a command: options with their meaning, and the values of those that have few."""

    about: str
    options: Mapping[str, str]
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)
    arguments: Sequence[str] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    script = SCRIPTS[options.shell]({command.NAME: words_of(command) for command in all_commands()})
    for line in script.splitlines():
        print(for_terminal(line))


def all_commands() -> list[Command]:
    """The modules of :mod:`vpd.commands` that are commands."""
    modules: list[Any] = [
        importlib.import_module(found.name) for found in pkgutil.iter_modules(vpd.commands.__path__, "vpd.commands.")
    ]
    return [module for module in modules if {"NAME", "ABOUT", "SETTINGS", "options", "run"} <= vars(module).keys()]


def words_of(command: Command) -> Words:
    """A command's own options, and the settings that it takes."""
    parser = argparse.ArgumentParser(add_help=False)
    command.options(parser)
    named, values, arguments = {"--help": "show what it does"}, {}, []
    for action in parser._actions:
        for option in action.option_strings:
            named[option] = action.help or ""
            if action.choices:
                values[option] = list(map(str, action.choices))
        if not action.option_strings and action.choices:
            arguments += list(map(str, action.choices))
    if command.SETTINGS:
        for option, (meaning, choices) in _settings(command.SETTINGS):
            named[option] = meaning
            if choices:
                values[option] = list(dict.fromkeys([*values.get(option, ()), *choices]))
    return Words(about=command.ABOUT, options=named, values=values, arguments=arguments)


def _settings(sections: Sequence[str]) -> Iterator[tuple[str, tuple[str, list[str]]]]:
    """``--section.key`` of every part that can be chosen, with its meaning and its values where there are few."""
    from vpd.config.sections import BESIDE, CHOICES, PLAIN, settings_class

    for section in sections:
        if section == "feedback":
            yield "--feedback", ("sources of the teacher's context", list(CHOICES["feedback"].table))
        elif section in CHOICES:
            choice = CHOICES[section]
            yield f"--{section}.name", (f"which {choice.kind}", list(choice.table))
            for place in choice.table.values():
                yield from _keys(section, settings_class(place))
        else:
            yield from _keys(section, settings_class({**PLAIN, **BESIDE}[section]))


def _keys(section: str, kind: Any) -> Iterator[tuple[str, tuple[str, list[str]]]]:
    from vpd.settings import declarations

    types = {one.name: one.type for one in dataclasses.fields(kind)}
    for key, declared in declarations(kind).items():
        if key != "name":
            switch = ["true", "false"] if "bool" in str(types[key]) and not declared.choices else []
            yield f"--{section}.{key}", (declared.meaning, [*map(str, declared.choices), *switch])


def _bash(commands: Mapping[str, Words]) -> str:
    cases = [
        f"    {_command_case(name, option)}) choices={_quoted(' '.join(values))};;"
        for name, words in commands.items()
        for option, values in words.values.items()
    ]
    options = [
        f"    {name}) options={_quoted(' '.join(words.options))}; arguments={_quoted(' '.join(words.arguments))};;"
        for name, words in commands.items()
    ]
    return "\n".join(
        [
            "_vpd() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local command="${COMP_WORDS[1]}" options="" arguments="" choices=""',
            "  COMPREPLY=()",
            '  case "$command $previous" in',
            *cases,
            "  esac",
            f"  (( COMP_CWORD == 1 )) && choices={_quoted(' '.join((*commands, '--help', '--version')))}",
            '  if [[ -n "$choices" ]]; then COMPREPLY=($(compgen -W "$choices" -- "$current")); return; fi',
            '  case "$command" in',
            *options,
            "  esac",
            '  if [[ "$current" == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$current"))',
            '  elif [[ -n "$arguments" ]]; then COMPREPLY=($(compgen -W "$arguments" -- "$current")); fi',
            "}",
            "complete -o default -F _vpd vpd",
        ]
    )


def _zsh(commands: Mapping[str, Words]) -> str:
    cases = [
        f"    {_command_case(name, option)}) compadd -- {' '.join(map(_quoted, values))}; return;;"
        for name, words in commands.items()
        for option, values in words.values.items()
    ]
    options = [
        f"    {name}) named=({' '.join(words.options)}); arguments=({' '.join(map(_quoted, words.arguments))});;"
        for name, words in commands.items()
    ]
    return "\n".join(
        [
            "#compdef vpd",
            "_vpd() {",
            '  local previous="${words[CURRENT-1]}" command="${words[2]}"',
            "  local -a named arguments",
            f"  if (( CURRENT == 2 )); then compadd -- {' '.join(commands)} --help --version; return; fi",
            '  case "$command $previous" in',
            *cases,
            "  esac",
            '  case "$command" in',
            *options,
            "  esac",
            '  if [[ "${words[CURRENT]}" == -* ]]; then compadd -- $named',
            "  else",
            "    (( $#arguments )) && compadd -- $arguments",
            "    _files",
            "  fi",
            "}",
            "compdef _vpd vpd",
        ]
    )


def _fish(commands: Mapping[str, Words]) -> str:
    lines = []
    for name, words in commands.items():
        lines.append(f"complete -c vpd -n __fish_use_subcommand -f -a {name} -d {_quoted(_short(words.about))}")
        here = f"-n '__fish_seen_subcommand_from {name}'"
        if words.arguments:
            lines.append(f"complete -c vpd {here} -a {_quoted(' '.join(words.arguments))}")
        for option, meaning in words.options.items():
            values = words.values.get(option)
            takes = f" -x -a {_quoted(' '.join(values))}" if values else "" if option == "--help" else " -r"
            lines.append(f"complete -c vpd {here} -l {option.removeprefix('--')}{takes} -d {_quoted(_short(meaning))}")
    return "\n".join(lines)


def _command_case(name: str, option: str) -> str:
    return _quoted(f"{name} {option}")


def _short(meaning: str) -> str:
    """The beginning of a meaning, up to its first stop."""
    first = meaning.partition(";")[0].partition(". ")[0]
    return first if len(first) <= 70 else f"{first[:66]} ..."


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
