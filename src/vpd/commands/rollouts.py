"""Read the rollouts of a run in the terminal."""

import argparse

from vpd.commands import path

NAME = "rollouts"
ABOUT = (
    "Show rollouts of a run: the task, the teacher's prompt with its sections, the answer (coloured token by token"
    " where that was recorded), reward and feedback."
)
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=path, metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, help="of this step (default: the last that has rollouts)")
    parser.add_argument(
        "--role", choices=("student", "teacher"), help="the student's attempts or the teacher's retries"
    )
    parser.add_argument("--outcome", choices=("success", "failure"), help="only these")
    parser.add_argument(
        "--source", help="only those whose feedback comes from this source, such as environment or none"
    )
    parser.add_argument("--task", help="only tasks whose id contains this")
    parser.add_argument("--recorded", action="store_true", help="only those that were recorded token by token")
    parser.add_argument("--limit", type=int, default=5, help="at most so many; 0: all (default 5)")
    parser.add_argument("--whole", action="store_true", help="whole texts, which otherwise lose their middle")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with all columns")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.report.rollouts import Wanted, show

    wanted = Wanted(
        step=options.step,
        role=options.role,
        success={"success": True, "failure": False, None: None}[options.outcome],
        source=options.source,
        task=options.task,
        recorded=options.recorded,
        limit=options.limit,
    )
    show(options.run_folder, wanted, whole=options.whole, as_json=options.json)
