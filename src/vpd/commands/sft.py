"""Fine-tune on answers that are there: demonstrations, or the successes of a run."""

import argparse

from vpd.commands import SECTIONS, add_config

NAME = "sft"
ABOUT = (
    "Fine-tune a model on recorded answers: demonstrations (JSON lines, parquet, a data set), or the attempts and "
    "retries of a run that succeeded (rejection sampling). A warm-up for vpd train, in a run folder like any other."
)
SETTINGS: tuple[str, ...] = SECTIONS


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a file of records (messages that end with the answer, or prompt and completion), owner/name on the Hub,"
        " or a run folder, whose model and environment are then the defaults",
    )
    add_config(parser)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config.sft import load_sft

    config = load_sft(options.data, options.config, rest)
    from vpd.recipes.train import train  # after the settings are checked: it loads torch

    train(config)
