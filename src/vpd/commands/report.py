"""One HTML file about one or several runs."""

import argparse
from pathlib import Path

from vpd.commands import path

NAME = "report"
ABOUT = (
    "Write one HTML file about one or several runs: curves, settings that differ, alarms, time, and a browser of"
    " rollouts with the teacher's prompts and every token's probability. It needs no server and no network."
)
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="a run folder, or a folder with run folders in it"
    )
    parser.add_argument(
        "--output", type=path, help="the file (default: report.html, in the run folder where there is one run)"
    )
    parser.add_argument("--title", default="", help="the headline (default: the methods)")
    parser.add_argument(
        "--megabytes",
        type=float,
        default=6.0,
        help="the most that the file may take; rollouts are left out (default 6)",
    )
    parser.add_argument(
        "--watch", action="store_true", help="write it again while the runs go on; an open page loads itself again"
    )
    parser.add_argument("--every", type=int, default=30, help="with --watch: seconds between two reports (default 30)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.report.console import Terminal
    from vpd.report.html import Options, runs_in, watch, write_report

    folders = runs_in(options.runs)
    output = options.output or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    wanted = Options(title=options.title, megabytes=options.megabytes)
    console = Terminal()
    if options.watch:
        watch(folders, output, wanted, every=options.every, console=console)
    else:
        write_report(folders, output, wanted)
    console.print(f"Written: {output} ({output.stat().st_size / 1e6:.1f} MB, {len(folders)} run(s))", highlight=False)
