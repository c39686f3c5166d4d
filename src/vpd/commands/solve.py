"""Solve one task at test time."""

import argparse
import dataclasses

from vpd.commands import SECTIONS, add_config, path
from vpd.printable import for_terminal

NAME = "solve"
ABOUT = "Adapt a copy of the model to one task from its own failed attempts, within a budget of sampled tokens."
SETTINGS: tuple[str, ...] = SECTIONS
SOLVE = """\
The task is attempted rollout.num_generations times; while no attempt succeeds, the algorithm takes a step on them and
their feedback, and the adapted model attempts it again. The same budget is spent on independent attempts (best of k)
and on a conversation in which the model reads its answer and the feedback and answers again (repair in turns). The
model on disk stays as it is; --output keeps the adapted one.
"""


def options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.epilog = SOLVE
    parser.add_argument("--task", type=int, default=0, help="place of the task among the held-out ones (default 0)")
    parser.add_argument("--train", action="store_true", help="count among the training tasks")
    parser.add_argument(
        "--budget", type=int, default=20_000, help="tokens that each way of solving may sample (default 20000)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each way, each from the same weights (default 1)"
    )
    parser.add_argument(
        "--no_compare", dest="compare", action="store_false", help="adapt alone: no best of k, no repair in turns"
    )
    parser.add_argument("--output", type=path, help="a new folder for the adapted model (OUTPUT/model)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, and nothing else on stdout")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.solving import SolveOptions

    chosen = SolveOptions(**{field.name: vars(options)[field.name] for field in dataclasses.fields(SolveOptions)})
    config = load(options.config, rest)
    from vpd.recipes.results import as_json
    from vpd.recipes.solve import show, solve  # loads torch

    solution = solve(config, chosen, output=options.output)
    if options.json:
        print(for_terminal(as_json(solution.numbers())))
    else:
        show(solution)
