"""Make a model folder."""

import argparse

from vpd.commands import path
from vpd.printable import for_terminal

NAME = "model"
ABOUT = "Make a from_pretrained folder: smollm2-135m or gemma3-270m from their packages, or tiny made again."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["smollm2-135m", "gemma3-270m", "tiny"], help="which model to make")
    parser.add_argument("folder", type=path, help="where it is written")
    parser.add_argument("--seed", type=int, help="tiny only: seed of its weights and warm-up (default 0)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    if options.name == "tiny":
        from vpd.lab import tiny

        tiny.build(options.folder, tiny.SEED if options.seed is None else options.seed)
    else:
        from vpd.lab import packaged

        packaged.build(options.name, options.folder)
    print(for_terminal(f"{options.folder} is ready: --model.name_or_path {options.folder}"))
