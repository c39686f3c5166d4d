"""Train a model."""

import argparse

from vpd.commands import SECTIONS

NAME = "train"
ABOUT = (
    "Train a model with VPD, evidence-gated VPD, SDPO, GKD, GRPO or a hybrid. Without any argument: VPD on the "
    "shipped tiny base and the task digits, less than a minute on one core."
)
SETTINGS: tuple[str, ...] = SECTIONS


def options(parser: argparse.ArgumentParser) -> None:
    """None beside the settings."""


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load

    config = load(options.config, rest)
    from vpd.recipes.train import train  # after the settings are checked: it loads torch

    train(config)
