"""Train a model."""

import argparse
from pathlib import Path

from vpd.commands import SECTIONS, add_config

NAME = "train"
ABOUT = (
    "Train a model with VPD, evidence-gated VPD, SDPO, GKD, GRPO or a hybrid. Without any argument: evidence-gated VPD "
    "on the shipped tiny base and the task digits, less than a minute on one core."
)
SETTINGS: tuple[str, ...] = (*SECTIONS, "dry_run")


def options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="train nothing: build settings, data and prompts, and print memory by item, seconds by phase, tokens and"
        " price; no weights are loaded, and --dry_run.key value says what to assume",
    )


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.config.dry_run import load_dry_run
    from vpd.ranks import launched
    from vpd.run_folder.state import refuse_begun

    machine, rest = load_dry_run(options.config, rest, wanted=options.dry_run)
    config = load(options.config, rest)
    config.require_something_to_train()
    if options.dry_run:
        from vpd.recipes.dry_run import dry_run, show

        found = dry_run(config, machine)
        if launched()[0] == 0:
            show(found)
        return
    if not config.run.resume:
        refuse_begun(Path(config.run.output_dir))
    from vpd.recipes.train import train  # after the settings are checked: it loads torch

    train(config)
