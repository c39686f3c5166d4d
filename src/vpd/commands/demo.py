"""Four methods learn one task."""

import argparse
from pathlib import Path

from vpd.commands import path

NAME = "demo"
ABOUT = "GRPO, SDPO, VPD and evidence-gated VPD learn one task from one tiny model, in about a minute on two cores."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir",
        type=path,
        default=Path("demo-out"),
        help="where results.json, curves.png, report.html and the runs go (default demo-out)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per method (default 1)")
    parser.add_argument("--steps", type=int, default=100, help="iterations per run (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default 0)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.lab.demo import demo

    demo(options.output_dir, seeds=options.seeds, steps=options.steps, first_seed=options.seed)
