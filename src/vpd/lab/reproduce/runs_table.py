"""Runs as a table, a line for each: what one would compute further with, or keep beside the runs of other machines."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vpd.errors import StorageError
from vpd.lab.reproduce.claims import Runs
from vpd.lab.reproduce.run import MEASURES, Run, measure

FILE = "runs.csv"
MEASURED = (*MEASURES, "instructions", "text_nll", "cpu")
COLUMNS = ("setting", "method", "seed", "learning_rate", "dtype", "device", "commit", *MEASURED, "rewards")

Row: TypeAlias = Mapping[str, str]


def write_runs(path: Path, runs: Runs) -> None:
    """Write a line for each run: what it was, its summary numbers (empty where a method has none), and the mean reward
    of each iteration, separated by spaces.  Raises OSError.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for (setting, method), seeds in runs.items():
            for seed, run in sorted(seeds.items()):
                writer.writerow({"setting": setting, "method": method, "seed": seed, **_cells(run)})


def read_runs(path: Path) -> list[Row]:
    """The lines of a table that :func:`write_runs` wrote.  Raises StorageError."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows: list[Row] = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise StorageError(f"cannot read the runs {path}", got=str(error)) from error
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise StorageError(f"{path} is no table of runs", got=f"no column {missing[0]}", expected=", ".join(COLUMNS))
    return rows


def rewards_of(row: Row) -> list[tuple[int, float]]:
    """The curve of the mean reward: (iteration, value)."""
    return [(step, float(value)) for step, value in enumerate(row["rewards"].split(), 1)]


def _cells(run: Run) -> dict[str, Any]:
    values = {name: measure(run, name) for name in MEASURED}
    return {
        "learning_rate": f"{run['job']['learning_rate']:g}",
        "dtype": run["settings"]["model"]["dtype"],
        "device": run["device"],
        "commit": run["commit"],
        **{name: "" if value is None else f"{value:.5g}" for name, value in values.items()},
        "rewards": " ".join(f"{value:.4g}" for _, value in run["curves"]["reward"]),
    }
