"""``vpd reproduce --methods``: all methods over all settings, as one table of final accuracies."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vpd.errors import ConfigError
from vpd.lab.reproduce.claims import Runs, by_method, standard_error
from vpd.lab.reproduce.methods import COMPARED, METHODS, load_rates, rate_of
from vpd.lab.reproduce.plan import RUNS, make_all
from vpd.lab.reproduce.run import BLOCK, Job, Run, dtype_of, measure
from vpd.lab.reproduce.settings_table import SETTINGS, TINY
from vpd.lab.runs import OTHER_OUTPUT
from vpd.report.console import Terminal
from vpd.report.model_card import source_commit
from vpd.run_folder.files import write_text

FILE = "methods.md"
MEASURES = ("final", "mean", "held_out")
CLOSE = 2.0  # a mean within so many standard errors of the difference of the best one is printed bold too


def jobs_of(
    settings: Sequence[str], methods: Sequence[str], seeds: Sequence[int], rates: Path, dtype: str | None = None
) -> tuple[list[Job], list[str]]:
    """A run for each cell and seed, and the cells whose learning rate is not tuned, which are left empty."""
    known = load_rates(rates)
    types = {setting: dtype_of(setting, dtype) for setting in settings or TINY}
    jobs: list[Job] = []
    untuned: list[str] = []
    for setting, method in itertools.product(settings or tuple(TINY), methods or COMPARED):
        try:
            rate = rate_of(known, setting, method)
        except ConfigError:
            untuned.append(f"{method} in {setting}")
            continue
        jobs += [
            Job(setting=setting, method=method, seed=seed, learning_rate=rate, dtype=types[setting]) for seed in seeds
        ]
    return jobs, untuned


def write_methods(jobs: Sequence[Job], output: Path, *, processes: int, console: Terminal) -> Path:
    """Make the runs, and write the table; returns its path."""
    text = markdown(by_method(make_all(jobs, output / RUNS, processes=processes, console=console)))
    path = output / FILE
    write_text(path, text, OTHER_OUTPUT)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {path}", highlight=False)
    return path


def markdown(runs: Runs) -> str:
    """A table for each measure: a row for each method, a column for each setting, mean ± standard error over seeds."""
    settings = [name for name in SETTINGS if any(setting == name for setting, _ in runs)]
    methods = [name for name in METHODS if any(method == name for _, method in runs)]
    seeds = sorted({len(found) for found in runs.values()})
    lines = [
        "# All methods over all settings",
        "",
        f"Written by `vpd reproduce --methods` at {source_commit() or 'no commit'}; {_range(seeds)} seeds a cell. "
        "Every method samples as many answers in an iteration. *Final* is the share "
        f"of right answers in the last {2 * BLOCK} iterations, *mean* that of the whole run, *held out* that of the "
        "last evaluation, the one number of a method that learns from the answers of a data set. "
        f"Bold: the best mean of a column, and those within {CLOSE:g} standard errors of it.",
    ]
    for measured in MEASURES:
        cells = {
            (setting, method): [_known(run, measured) for run in found.values()]
            for (setting, method), found in runs.items()
            if measured == "held_out" or METHODS[method].samples
        }
        lines += ["", f"## {measured.replace('_', ' ').capitalize()}", "", "| method | " + " | ".join(settings) + " |"]
        lines.append("|---" * (1 + len(settings)) + "|")
        shown = {setting: column(cells, setting, methods) for setting in settings}
        for method in methods:
            lines.append(f"| {METHODS[method].title} | " + " | ".join(shown[s][method] for s in settings) + " |")
    return "\n".join(lines) + "\n"


def column(cells: Mapping[tuple[str, str], Sequence[float]], setting: str, methods: Sequence[str]) -> dict[str, str]:
    """The cells of one setting by method; empty where a method was not run there."""
    here = {method: cells[setting, method] for method in methods if cells.get((setting, method))}
    best = max(here, key=lambda method: statistics.fmean(here[method]), default="")
    is_best = _as_good_as(here[best]) if best else lambda values: False
    texts = {}
    for method, values in here.items():
        mean, error = statistics.fmean(values), standard_error(values)
        text = f"{mean:.2f} ± {error:.2f}" if len(values) > 1 else f"{mean:.2f}"
        texts[method] = f"**{text}**" if is_best(values) else text
    return {method: texts.get(method, "") for method in methods}


def _as_good_as(best: Sequence[float]) -> Callable[[Sequence[float]], bool]:
    """Whether the mean of some values is the best one, or within the noise of both of it."""
    top, top_error = statistics.fmean(best), standard_error(best)

    def is_close(values: Sequence[float]) -> bool:
        error = (top_error**2 + standard_error(values) ** 2) ** 0.5
        return top - statistics.fmean(values) <= CLOSE * error

    return is_close


def _known(run: Run, measured: str) -> float:
    value = measure(run, measured)
    if value is None:
        raise ConfigError(f"a run of {run['job']['method']} has no {measured}", do="Remove its file; it is made again.")
    return value


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "no"
