"""Answer held-out tasks."""

import argparse
import dataclasses

from vpd.commands import SECTIONS, add_config, path
from vpd.printable import for_terminal

NAME = "eval"
ABOUT = "Sample answers to the held-out tasks and print avg@k and pass@k with standard errors."
SETTINGS: tuple[str, ...] = SECTIONS


def options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--num_samples", type=int, default=8, help="k, answers per task, at least 1 (default 8)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature, at least 0; 0 is greedy (default 1)"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling, above 0 to 1 (default 1: off)")
    parser.add_argument("--limit", type=int, help="at most so many held-out tasks (default all)")
    parser.add_argument(
        "--teacher",
        action="store_true",
        help="answer failed attempts again, with their feedback and (unless run.eval_control is false) without",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, and nothing else on stdout")
    parser.add_argument(
        "--show", type=int, default=3, help="print the answers to so many tasks, failures first; 0: none (default 3)"
    )
    parser.add_argument("--output", type=path, help="also write the numbers to this JSON file")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.errors import ConfigError
    from vpd.evaluation import EvalOptions
    from vpd.ranks import launched
    from vpd.recipes.results import as_json, check_output, write_results

    chosen = EvalOptions(**{field.name: vars(options)[field.name] for field in dataclasses.fields(EvalOptions)})
    config = load(options.config, rest)
    if options.output:
        check_output(options.output)
    if options.show < 0:
        raise ConfigError("--show is negative", got=options.show, expected="0 (none) or more")
    from vpd.recipes.evaluation import evaluate, show, show_answers  # loads torch

    result = evaluate(config, chosen)
    if launched()[0] > 0:
        return  # the first process shows it
    numbers = {"student": result.student, "teacher": result.teacher, "control": result.control}
    if options.json:
        print(for_terminal(as_json(numbers)))
    else:
        show_answers(result, options.show)
        show(result, chosen.num_samples)
    if options.output:
        write_results(options.output, numbers)
