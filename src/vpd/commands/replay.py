"""Run an iteration again that stopped at a number that is not finite."""

import argparse
from pathlib import Path

NAME = "replay"
ABOUT = "Run an iteration again that stopped at a number that is not finite, and show where the first one is."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, help="the folder that the error names, OUT/nonfinite-step-N")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.recipes.replay import replay

    replay(options.dump)
