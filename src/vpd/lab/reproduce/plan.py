"""Make the runs of a plan, in parallel.  Plans that share a folder, on one machine or several, divide their runs."""

import time
from collections.abc import Sequence
from pathlib import Path

from vpd.lab.processes import Advance, Call, run_calls
from vpd.lab.reproduce import bases
from vpd.lab.reproduce.run import Job, Run, load, make
from vpd.lab.reproduce.settings_table import find_setting
from vpd.lab.reproduce.workplace import clear, folder_beside, is_being_made, left_over
from vpd.report.console import Terminal

RUNS = "runs"  # the folder of the runs in --output_dir
BASE_SECONDS = 45.0  # to make a base, on one core
LOOK_SECONDS = 2.0  # between looks at what other processes are making


def make_all(jobs: Sequence[Job], folder: Path, *, processes: int, console: Terminal) -> dict[Job, Run]:
    """All runs of a plan, made in ``processes`` of one thread each; runs whose files exist are used again.

    What another process is making is left to it; at the end this one waits for it, and makes what it gave up.
    """
    for job in jobs:
        clear(job.file(folder))
    todo = list({job.key(): job for job in jobs if not job.file(folder).is_file()}.values())
    missing = list(dict.fromkeys(base for job in todo for base in job.bases() if bases.find(*base) is None))
    console.print(_estimate(len(jobs), todo, folder, bases_to_make=len(missing), processes=processes), highlight=False)
    if others := left_over(folder, [job.file(folder) for job in jobs]):
        console.print(others, highlight=False, soft_wrap=True)
    if missing:
        calls = [Call(arguments=base, title="bases") for base in missing]
        run_calls(_make_base, calls, processes=processes, console=console)
    todo.sort(key=Job.seconds, reverse=True)
    while todo:
        made = run_calls(make, [_call(job, folder) for job in todo], processes=processes, console=console)
        todo = [job for job, run in zip(todo, made, strict=True) if run is None]
        if todo:
            _wait_for_others([job.file(folder) for job in todo], console)
    return {job: load(job.file(folder)) for job in jobs}


def _make_base(name: str, seed: int, advance: Advance) -> Path:
    return bases.ensure(name, seed)


def _call(job: Job, folder: Path) -> Call:
    return Call(arguments=(job, folder), title="iterations", steps=find_setting(job.setting).steps)


def _wait_for_others(files: Sequence[Path], console: Terminal) -> None:
    """Wait until one of these runs, which other processes are making, is done or given up."""
    console.print(f"Other processes are making {len(files)} of the runs: waiting for them.", highlight=False)
    time.sleep(LOOK_SECONDS)  # also where a file system has locks that cannot be looked at
    while all(is_being_made(file) for file in files):
        time.sleep(LOOK_SECONDS)


def _estimate(asked: int, todo: Sequence[Job], folder: Path, *, bases_to_make: int, processes: int) -> str:
    """The plan in one line; the time is that of what no other process is making."""
    ours = [job for job in todo if not is_being_made(job.file(folder))]
    begun = sum(folder_beside(job.file(folder)).is_dir() for job in ours)
    notes = [f"{begun} of them begun before"] * bool(begun)
    notes += [f"{len(todo) - len(ours)} of them being made by other processes"] * (len(ours) < len(todo))
    seconds = sum(job.seconds() for job in ours) + BASE_SECONDS * bases_to_make
    return (
        f"{asked} runs in the plan, {len(todo)} to make{' (' * bool(notes)}{', '.join(notes)}{')' * bool(notes)}, "
        f"{bases_to_make} bases to make: "
        f"about {seconds / 60:.0f} minutes of one core, {seconds / 60 / processes:.0f} with --jobs {processes}."
    )
