"""Write transcripts: what a model answers, and what the environment says about it."""

import argparse

from vpd.commands import SECTIONS, add_config, path

NAME = "collect"
ABOUT = (
    "Sample answers to training tasks and write them as JSON lines with what the environment said: task, attempt, "
    "text, outcome, log-probs. Nothing is trained; env.name recorded reads the file."
)
SETTINGS: tuple[str, ...] = SECTIONS


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=path, metavar="FILE", help="a new file of JSON lines")
    add_config(parser)
    parser.add_argument(
        "--tasks", type=int, help="how many training tasks (default 256, or all of a data set with fewer)"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="the first task's place in the stream of training tasks (default 0)"
    )
    parser.add_argument(
        "--no_outcome", action="store_true", help="leave out reward and success, and feedback that is a bare verdict"
    )


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load_to_sample
    from vpd.config.collect import CollectOptions

    chosen = CollectOptions(tasks=options.tasks, first=options.first, outcome=not options.no_outcome)
    config = load_to_sample(options.config, rest)
    from vpd.recipes.collect import collect  # loads torch

    collect(config, options.output, chosen)
