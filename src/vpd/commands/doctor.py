"""Examine the machine and the installation."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vpd.commands import path
from vpd.errors import ConfigError
from vpd.printable import for_terminal

if TYPE_CHECKING:
    from vpd.recipes.doctor import Finding

NAME = "doctor"
ABOUT = (
    "Examine this machine and installation: versions, devices, memory, disk, sandbox, the Hub, optional packages, and a"
    " run of two iterations (10 to 20 seconds where a core is free). Every line that is not ok says what to do; exit"
    " code 2 where something is broken."
)
SETTINGS: tuple[str, ...] = ()
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "fault": "bold red"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", type=path, default=Path(), help="where runs are to lie, to look at its disk (default .)"
    )
    parser.add_argument("--no_network", action="store_true", help="do not ask whether the Hub answers")
    parser.add_argument("--no_run", action="store_true", help="leave out the run")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    try:
        from vpd.recipes.doctor import as_json, doctor, require_whole
        from vpd.report.console import Terminal
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "vpd":
            raise
        raise ConfigError(
            f"the package {error.name.partition('.')[0]} is missing", do="Install vpd-rl with what it needs (README)."
        ) from error

    console = Terminal()

    def show(finding: "Finding") -> None:
        console.print(f"{finding.status:<8}", style=STYLES[finding.status], end="", markup=False, highlight=False)
        console.print(f"{finding.part}: {finding.detail}", markup=False, highlight=False, soft_wrap=True)
        if finding.do is not None:
            console.print(f"        {finding.do}", style="dim", markup=False, highlight=False, soft_wrap=True)

    findings = doctor(
        options.output_dir,
        network=not options.no_network,
        smoke_run=not options.no_run,
        on_finding=(lambda finding: None) if options.json else show,
    )
    if options.json:
        print(for_terminal(json.dumps(as_json(findings), indent=1)))
    require_whole(findings)
