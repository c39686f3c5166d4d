"""Start a sampling server."""

import argparse

from vpd.commands import SECTIONS, add_config

NAME = "serve"
ABOUT = (
    "Start a vLLM server that fits a run (engine.name vllm), in an environment of its own (engine.python), for this"
    " machine alone; it is stopped at Ctrl-C or SIGTERM."
)
SETTINGS: tuple[str, ...] = SECTIONS


def options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load

    config = load(options.config, rest)
    from vpd.recipes.serve import serve  # loads torch

    serve(config)
