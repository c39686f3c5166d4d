"""Choose each method's learning rate, from one grid for all methods, on seeds that are not reported."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vpd.lab.reproduce.methods import load_table
from vpd.lab.reproduce.plan import RUNS, make_all
from vpd.lab.reproduce.run import Job, Run, dtype_of, measure
from vpd.lab.reproduce.settings_table import SETTINGS
from vpd.lab.runs import OTHER_OUTPUT
from vpd.report.console import Terminal
from vpd.run_folder.files import write_text

FIRST_SEED, SEEDS = 100, 2
TIE = 0.02  # final accuracies this close count as equal: the lowest rate is chosen
HEAD = f"""\
# Learning rates, chosen by `vpd reproduce SETTING --tune [--methods ...]`: the lowest of the grid whose mean final
# accuracy, on seeds that are not reported, is within {TIE} of the best (the best itself where none learns even that).
# All methods have the same grid and rollouts.
"""


def tuning_jobs(pairs: Iterable[tuple[str, str]], seeds: int, dtype: str | None = None) -> list[Job]:
    """The whole grid for every (setting, method); for a setting that uses another's rates, in that one."""
    own = dict.fromkeys((SETTINGS[setting].tuned_as or setting, method) for setting, method in pairs)
    types = {setting: dtype_of(setting, dtype) for setting, _ in own}
    return [
        Job(setting=setting, method=method, seed=FIRST_SEED + seed, learning_rate=rate, dtype=types[setting])
        for setting, method in own
        for rate in SETTINGS[setting].family.grid
        for seed in range(seeds)
    ]


def tune(
    pairs: Iterable[tuple[str, str]],
    output: Path,
    *,
    known: Path,
    seeds: int,
    dtype: str | None,
    processes: int,
    console: Terminal,
) -> Path:
    """Run the grid and write ``rates.yaml``; all other entries are copied from the file ``known``."""
    table = load_table(known)
    jobs = tuning_jobs(pairs, seeds, dtype)
    runs = make_all(jobs, output / RUNS, processes=processes, console=console)
    path = output / "rates.yaml"
    for setting, rows in choose(runs).items():
        table.setdefault(setting, {}).update(rows)
    text = HEAD + yaml.safe_dump({"rates": table}, sort_keys=False, width=120, default_flow_style=None)
    write_text(path, text, OTHER_OUTPUT)
    console.print(f"Written: {path}")
    return path


def choose(runs: Mapping[Job, Run]) -> dict[str, dict[str, Any]]:
    """For every setting and method the lowest rate within :data:`TIE` of the best, and all final accuracies.

    Where the best is no more than that, every rate would be; then it is the best.
    """
    finals: dict[str, dict[str, dict[float, list[float]]]] = {}
    seeds: dict[tuple[str, str], set[int]] = {}
    for job, run in runs.items():
        value = measure(run, "final")
        assert value is not None, "every run is evaluated"
        finals.setdefault(job.setting, {}).setdefault(job.method, {}).setdefault(job.learning_rate, []).append(value)
        seeds.setdefault((job.setting, job.method), set()).add(job.seed)
    table: dict[str, dict[str, Any]] = {}
    for setting, methods in finals.items():
        for method, by_rate in methods.items():
            means = {rate: round(statistics.fmean(values), 3) for rate, values in sorted(by_rate.items())}
            best = max(means.values())
            good = min(rate for rate, mean in means.items() if mean >= best - (TIE if best > TIE else 0.0))
            table.setdefault(setting, {})[method] = {
                "learning_rate": good,
                "seeds": sorted(seeds[setting, method]),
                "final": means,
            }
    return table
