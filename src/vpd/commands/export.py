"""Take a run's model out of its folder."""

import argparse

from vpd.commands import path
from vpd.errors import ConfigError

NAME = "export"
ABOUT = (
    "Copy a run's model to a folder (an adapter merged into its base), its adapter, or a GGUF file, and upload it to "
    "the Hub if asked."
)
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="the run folder")
    parser.add_argument("destination", type=path, nargs="?", help="a new folder, or with --form gguf a new file")
    parser.add_argument(
        "--form", choices=["model", "adapter", "gguf"], default="model", help="what is written (default model)"
    )
    parser.add_argument("--checkpoint", type=int, help="the step of a checkpoint (default: the exported model)")
    parser.add_argument(
        "--converter", type=path, help="llama.cpp's convert_hf_to_gguf.py (default: the one on the PATH)"
    )
    parser.add_argument("--outtype", default="f16", help="number type of a GGUF file (default f16)")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the run's model or adapter there")
    parser.add_argument("--public", action="store_true", help="with --push_to_hub: a new repository is not private")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    if options.destination is None and options.push_to_hub is None:
        raise ConfigError("nowhere to export to", expected="a destination, or --push_to_hub OWNER/NAME")
    if options.push_to_hub is not None and (options.form == "gguf" or options.checkpoint is not None):
        raise ConfigError(
            "--push_to_hub uploads what the run exported", expected="--form model or adapter, no checkpoint"
        )
    from vpd.run_folder.reading import read_run

    read_run(options.run)  # before torch is loaded: a folder without a run is refused at once
    from vpd.recipes.export import export_run, push_run

    if options.destination is not None:
        export_run(
            options.run,
            options.destination,
            form=options.form,
            step=options.checkpoint,
            converter=None if options.converter is None else str(options.converter),
            outtype=options.outtype,
        )
    if options.push_to_hub is not None:
        push_run(options.run, options.push_to_hub, private=not options.public, form=options.form)
