"""Test an environment."""

import argparse

NAME = "check"
ABOUT = "Test an environment: tasks, grades and feedback as training relies on them."
SETTINGS: tuple[str, ...] = ("env",)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "env", help="a shipped environment's name or my_env.py:MyEnv; settings follow as --env.key value"
    )
    parser.add_argument("--tasks", type=int, default=32, help="training tasks to draw (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed that the tasks are drawn with (default 0)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load_env
    from vpd.recipes.check import check

    check(load_env(options.config, ["--env.name", options.env, *rest]), tasks=options.tasks, seed=options.seed)
