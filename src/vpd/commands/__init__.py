"""One file for each command of the command line; :mod:`vpd.cli` lists them.

A command is a module.  It loads without torch: what its ``run`` needs is imported there, once the settings are checked.
"""

import argparse
from pathlib import Path
from typing import Protocol

from vpd.settings import expand_path

SECTIONS = ("model", "env", "feedback", "prompts", "rollout", "engine", "algorithm", "optim", "run")


class Command(Protocol):
    """What a module in this folder has."""

    NAME: str
    ABOUT: str  # what it does, for --help
    SETTINGS: tuple[str, ...]  # the sections that it takes as --section.key value, with --config; none: no settings

    def options(self, parser: argparse.ArgumentParser) -> None:
        """Declare its own options."""
        ...

    def run(self, options: argparse.Namespace, rest: list[str]) -> None:
        """Do it; ``rest`` are the settings.  Raises VPDError for what the user can mend."""
        ...


def path(text: str) -> Path:
    """The type of an option that is a path."""
    return Path(expand_path(text, "the command line"))
