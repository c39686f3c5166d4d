"""The command ``vpd``; each of its commands is a file in :mod:`vpd.commands`.

A user's mistake is one line on stderr and exit code 2.
"""

import argparse
import contextlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TextIO

import vpd
from vpd.commands import (
    Command,
    check,
    collect,
    completion,
    convert,
    demo,
    doctor,
    eval,
    export,
    init,
    model,
    replay,
    report,
    reproduce,
    rollouts,
    runs,
    serve,
    sft,
    solve,
    train,
)
from vpd.commands.settings_help import settings_help
from vpd.errors import ConfigError, Interrupted, RankError, VPDError, nearest
from vpd.printable import LogFormatter, for_terminal
from vpd.ranks import after_the_one_that_failed, end_process, launched, leave_for_launcher
from vpd.report.streams import FAREWELL, keep_open
from vpd.settings import split_words

STOPPED_AND_SAVED = 75
EXIT_CODES = """\
exit codes
  0    done
  1    a traceback: a fault of vpd (please report it), or of an engine or method of your own (its last line says so)
  2    a mistake or an outside fault (settings, data, grader, disk), in one line; nothing was lost
  75   stopped by Ctrl-C or SIGTERM, and a checkpoint of the last whole step is saved: run it again with
       --run.resume true
  130, 143  stopped by Ctrl-C or SIGTERM before there was a step to save, or at once by a second Ctrl-C
"""
COMMANDS: tuple[Command, ...] = (
    init,
    train,
    sft,
    collect,
    eval,
    solve,
    serve,
    report,
    rollouts,
    runs,
    export,
    check,
    doctor,
    replay,
    convert,
    demo,
    reproduce,
    model,
    completion,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code is one of EXIT_CODES.  One of several processes ends here, without returning."""
    code = _main(arguments)
    if launched()[1] > 1:
        end_process(code)
    return code


def _main(arguments: Sequence[str] | None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.excepthook = _show_traceback
    outputs = keep_open()
    parser = _parser()
    try:
        _check_command(sys.argv[1:] if arguments is None else arguments)
        # argparse would take the value of a setting for a file
        settings, words = split_words(sys.argv[1:] if arguments is None else arguments, _is_setting)
        options, rest = parser.parse_known_args(words)
        rest = [*settings, *rest]
        if rest and not options.command.SETTINGS:
            parser.error(for_terminal(f"unknown arguments: {' '.join(rest)}"))
        for output in outputs:
            output.farewell = FAREWELL
        _check_processes(options.command)
        with after_the_one_that_failed():
            return _run(options, rest)
    except RankError:  # its own process shows the line
        return 2
    except VPDError as error:
        print(for_terminal(f"vpd: error: {error}"), file=sys.stderr)
        leave_for_launcher(for_terminal(f"vpd: error: {error}"))
        return 2
    except Interrupted as stop:
        if launched()[0] == 0:
            print(for_terminal(f"vpd: {stop}"), file=sys.stderr)
        return STOPPED_AND_SAVED if stop.saved else 128 + stop.signal
    except KeyboardInterrupt:
        print("vpd: interrupted; checkpoints already written are whole", file=sys.stderr)
        return 130


def _is_setting(key: str) -> bool:
    return "." in key or key == "--feedback"


def _check_command(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a first word that is no command."""
    names = [command.NAME for command in COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        raise ConfigError(f"unknown command {arguments[0]!r}", do=f"{nearest(arguments[0], names)} See vpd --help.")


def _check_processes(command: Command) -> None:
    """Raise ConfigError where a launcher has started several processes of a command that runs in one."""
    several = [one.NAME for one in COMMANDS if one in (train, sft, eval)]
    if launched()[1] > 1 and command.NAME not in several:
        raise ConfigError(
            f"vpd {command.NAME} runs in one process",
            got=f"{launched()[1]} processes",
            expected=f"one, or vpd {' or vpd '.join(several)}",
            do="Run it without torchrun.",
        )


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the command; a part that is not ours may exit in it, which is never a success."""
    try:
        with _log_shown(sys.stderr if vars(options).get("json") else sys.stdout):
            options.command.run(options, rest)
    except SystemExit as error:
        message = f"vpd: error: something in the run called exit({error.code!r}); it is not done"
        print(for_terminal(message), file=sys.stderr)
        return 1
    return 0


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of ours, or of code that we called, with its traceback; its message may quote text from outside."""
    from vpd.envs.user_code import raised_outside

    lines = traceback.format_exception(kind, error, trace)
    if place := raised_outside(error):
        lines.append(f"vpd: error: this was raised at {place}, which vpd called and is no part of it\n")
    sys.stderr.write(for_terminal("".join(lines)))


@contextlib.contextmanager
def _log_shown(stream: TextIO) -> Iterator[None]:
    """What the library logs, such as which sandbox runs programs, as plain lines; with --json stdout has that alone."""
    logger, handler = logging.getLogger("vpd"), logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(message)s" if launched()[0] == 0 else f"rank {launched()[0]}: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if launched()[0] == 0 else logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Parser(argparse.ArgumentParser):
    """A command; ``sections`` of the settings follow its help, and are only loaded when that is asked for."""

    sections: tuple[str, ...] = ()

    def format_help(self) -> str:
        if self.sections:
            self.epilog = f"{EXIT_CODES}\n{settings_help(self.sections)}"
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    about = "Post-train language models from language feedback."
    parser = argparse.ArgumentParser(
        prog="vpd", description=about, epilog=EXIT_CODES, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"vpd {vpd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)
    for command in COMMANDS:
        text = textwrap.fill(command.ABOUT, 100)
        sub: _Parser = commands.add_parser(
            command.NAME, help=command.ABOUT, description=text, formatter_class=_Help, allow_abbrev=False
        )
        sub.set_defaults(command=command)
        sub.sections = command.SETTINGS
        command.options(sub)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's layout."""


if __name__ == "__main__":
    sys.exit(main())
