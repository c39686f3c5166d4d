"""Each method's learning rate, from one grid for all, on seeds that are never reported."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from vpd.errors import StorageError
from vpd.lab.reproduce.methods import GRID, load_table, method
from vpd.lab.reproduce.regimes import REGIMES
from vpd.lab.reproduce.run import Job, Run, make_all, measure

FIRST_SEED, SEEDS = 100, 2
TIE = 0.02  # rates whose finals are this close are equally good: the lowest of them is taken
HEAD = f"""\
# Learning rates, as `vpd reproduce REGIME --tune --all --seeds N` chose them: of the grid the lowest whose mean final
# accuracy, on seeds that are not reported, is within {TIE} of the best.  The same grid and rollouts for every method.
"""


def tuning_jobs(pairs: Iterable[tuple[str, str]], seeds: int) -> list[Job]:
    """The grid of every (regime, method) that has a rate of its own."""
    own = dict.fromkeys((REGIMES[where].tuned_as or where, who) for where, who in pairs if method(who).tuned_as is None)
    return [
        Job(regime=where, method=who, seed=FIRST_SEED + seed, learning_rate=rate)
        for where, who in own
        for rate in GRID
        for seed in range(seeds)
    ]


def tune(
    pairs: Iterable[tuple[str, str]], output: Path, *, known: Path, seeds: int, processes: int, console: Console
) -> Path:
    """Run the grid and write ``rates.yaml``; what was not asked for stays as in ``known``."""
    table = load_table(known)
    jobs = tuning_jobs(pairs, seeds)
    runs = make_all(jobs, output / "runs", processes=processes, console=console)
    path = output / "rates.yaml"
    for where, rows in choose(runs).items():
        table.setdefault(where, {}).update(rows)
    try:
        path.write_text(HEAD + yaml.safe_dump({"rates": table}, sort_keys=False, width=120, default_flow_style=None))
    except OSError as error:
        raise StorageError(f"cannot write {path}", got=error.strerror) from error
    console.print(f"Written: {path}")
    return path


def choose(runs: Mapping[Job, Run]) -> dict[str, dict[str, Any]]:
    """For every regime and method the lowest rate whose final accuracy is all but the best, and all finals."""
    finals: dict[str, dict[str, dict[float, list[float]]]] = {}
    seeds: dict[tuple[str, str], set[int]] = {}
    for job, run in runs.items():
        value = measure(run, "final")
        assert value is not None, "every run is evaluated"
        finals.setdefault(job.regime, {}).setdefault(job.method, {}).setdefault(job.learning_rate, []).append(value)
        seeds.setdefault((job.regime, job.method), set()).add(job.seed)
    table: dict[str, dict[str, Any]] = {}
    for where, methods in finals.items():
        for who, by_rate in methods.items():
            means = {rate: round(statistics.fmean(values), 3) for rate, values in sorted(by_rate.items())}
            good = min(rate for rate, mean in means.items() if mean >= max(means.values()) - TIE)
            table.setdefault(where, {})[who] = {
                "learning_rate": good,
                "seeds": sorted(seeds[where, who]),
                "final": means,
            }
    return table
