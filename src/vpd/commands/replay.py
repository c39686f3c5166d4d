"""Run an iteration again that stopped at a number that is not finite."""

import argparse

from vpd.commands import path
from vpd.errors import StorageError

NAME = "replay"
ABOUT = "Run an iteration again that stopped at a number that is not finite, and show where the first one is."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=path, help="the folder that the error names, OUT/nonfinite-step-N")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    if not options.dump.is_dir():  # before torch is loaded
        raise StorageError(f"{options.dump} is no folder", expected="a folder nonfinite-step-N of a run")
    from vpd.recipes.replay import replay

    replay(options.dump)
