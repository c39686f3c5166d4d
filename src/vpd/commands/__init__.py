"""One file for each command of the command line; :mod:`vpd.cli` lists them.

A command is a module.  It loads without torch: what its ``run`` needs is imported there, once the settings are checked.
"""

import argparse
from pathlib import Path
from typing import Any, Protocol

from vpd.settings import expand_path

SECTIONS = ("model", "env", "feedback", "prompts", "rollout", "engine", "algorithm", "dynamics", "optim", "run")


class Command(Protocol):
    """What a module in this folder has."""

    NAME: str
    ABOUT: str  # what it does, for --help
    SETTINGS: tuple[str, ...]  # the sections that it takes as --section.key value; none: no settings

    def options(self, parser: argparse.ArgumentParser) -> None:
        """Declare its own options."""
        ...

    def run(self, options: argparse.Namespace, rest: list[str]) -> None:
        """Do it; ``rest`` are the settings.  Raises VPDError for what the user can mend."""
        ...


class _Paths(argparse.Action):
    """Takes a path, and further ones after it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [*(vars(namespace)[self.dest] or ()), expand_path(values, str(option))])


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare ``--config``, for a command that reads files of settings."""
    about = "YAML file of settings; of several (--config A --config B) a later one wins, key by key"
    parser.add_argument("--config", action=_Paths, help=f"{about}, and --section.key value over all")


def path(text: str) -> Path:
    """The type of an option that is a path."""
    return Path(expand_path(text, "the command line"))
