"""Test an environment."""

import argparse
import json

from vpd.commands import add_config
from vpd.printable import for_terminal

NAME = "check"
ABOUT = "Test an environment: tasks, grades and feedback as training relies on them."
SETTINGS: tuple[str, ...] = ("env",)


def options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "env", help="a shipped environment's name or my_env.py:MyEnv; settings follow as --env.key value"
    )
    parser.add_argument("--tasks", type=int, default=32, help="training tasks to draw (default 32)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON, and nothing else on stdout")
    parser.add_argument("--seed", type=int, default=0, help="seed that the tasks are drawn with (default 0)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load_env
    from vpd.recipes.check import check, examine

    spec = load_env(options.config, ["--env.name", options.env, *rest])
    if not options.json:
        check(spec, tasks=options.tasks, seed=options.seed)
        return
    report = examine(spec, tasks=options.tasks, seed=options.seed)
    found = [{"promise": one.name, "status": one.status, "found": one.detail} for one in report.checks]
    print(for_terminal(json.dumps({"env": spec.name, "checks": found}, indent=1)))
    report.require()
