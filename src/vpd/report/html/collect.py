"""What a report says about its runs: names, groups of seeds, curves, settings that differ, alarms, time and tokens."""

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

from vpd.printable import one_line
from vpd.report.html.charts import TIMES, TOKENS
from vpd.report.methods import METHOD_COLOURS, METHODS, PALETTE
from vpd.report.public import public, short_names
from vpd.run_folder.reading import RunRecord, read_run
from vpd.settings import flat

Flat: TypeAlias = dict[str, str]

MOST_POINTS = 600  # of one curve; longer ones show means of neighbouring steps
#: settings in which runs of one group may differ: what does not change what is learned, and the seed
BY_SEED = ("run.seed", "run.output_dir", "run.resume", "run.report_to", "run.save_*", "run.record_*", "env.seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as a report shows it: without the machine's folders; ``group`` is the place of its group."""

    record: RunRecord
    name: str
    settings: Flat
    group: int = 0

    @property
    def method(self) -> str:
        return self.settings.get("algorithm.name") or self.settings.get("algorithm.object") or "?"

    @property
    def seed(self) -> str:
        return self.settings.get("run.seed", "?")

    @property
    def env(self) -> str:
        return one_line(self.settings.get("env.name", self.settings.get("env.object", "?")))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGroup:
    """Runs that differ in the seed alone; ``label`` names it among the others."""

    label: str
    colour: str
    runs: tuple[int, ...]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[RunGroup]]:
    """The runs in these folders, and their groups.  Raises StorageError."""
    records = [read_run(folder) for folder in folders]
    names = _names([record.folder for record in records])
    paths = short_names(record.settings for record in records)
    runs = [
        Run(record=record, name=one_line(name), settings=flatten(public(record.settings, paths)))
        for record, name in zip(records, names, strict=True)
    ]
    keys = [json.dumps({k: v for k, v in run.settings.items() if not _by_seed(k)}, sort_keys=True) for run in runs]
    order = list(dict.fromkeys(keys))
    runs = [
        Run(record=run.record, name=run.name, settings=run.settings, group=order.index(key))
        for run, key in zip(runs, keys, strict=True)
    ]
    members = [tuple(place for place, run in enumerate(runs) if run.group == group) for group in range(len(order))]
    labels = _labels([runs[places[0]] for places in members])
    colours = _colours([runs[places[0]].method for places in members])
    return runs, [
        RunGroup(label=label, colour=colour, runs=places)
        for label, colour, places in zip(labels, colours, members, strict=True)
    ]


def flatten(settings: Mapping[str, Any]) -> Flat:
    """Settings as ``section.key`` and text; lists are JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(_short(value)) for key, value in flat(settings).items()
    }


def _short(value: Any) -> Any:
    """A list of parts by their names, where a name is all that was said (``when: always`` is the default)."""
    if not isinstance(value, list):
        return value
    plain = [
        {k: v for k, v in part.items() if (k, v) != ("when", "always")} if isinstance(part, Mapping) else part
        for part in value
    ]
    return [part["name"] if isinstance(part, Mapping) and list(part) == ["name"] else part for part in plain]


def differing(groups: Sequence[RunGroup], runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """The settings in which groups differ, each with the groups' values: those that ``both`` have, or all of several,
    and those that ``some`` lack (``-``)."""
    tables = [runs[group.runs[0]].settings for group in groups]
    found: dict[str, list[tuple[str, list[str]]]] = {"both": [], "some": []}
    for key in dict.fromkeys(key for table in tables for key in table if not _by_seed(key)):
        values = {table[key] for table in tables if key in table}
        everywhere = all(key in table for table in tables)
        if len(values) > 1 or not everywhere:
            row = [one_line(table.get(key, "-")) for table in tables]
            found["both" if len(values) > 1 else "some"].append((one_line(key), row))
    return found


def curves(runs: Sequence[Run]) -> dict[str, list[list[Any]]]:
    """Every metric's curves: name -> [place of the run, steps, values], at most ``MOST_POINTS`` of each."""
    found: dict[str, list[list[Any]]] = {}
    for place, run in enumerate(runs):
        for name in run.record.names():
            points = thinned(run.record.series(name))
            if points:
                values = [float(f"{value:.5g}") for _, value in points]
                found.setdefault(one_line(name), []).append([place, [step for step, _ in points], values])
    return dict(sorted(found.items()))


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most ``most`` points: each the mean of as many neighbours, at the step of the last of them."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def alarms(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each rule that raised an alarm, with what to do, and for each run the steps and what it saw last."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        by_rule: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for alarm in run.record.alarms:
            key = (one_line(str(alarm.get("rule", "?"))), one_line(str(alarm.get("do", ""))))
            by_rule.setdefault(key, []).append(alarm)
        for (rule, do), raised in by_rule.items():
            entry = found.setdefault((rule, do), {"rule": rule, "do": do, "runs": []})
            steps, saw = [int(alarm["step"]) for alarm in raised], one_line(str(raised[-1].get("saw", "")))
            entry["runs"].append({"run": run.name, "steps": steps, "saw": saw})
    return list(found.values())


def seconds_of(run: Run) -> dict[str, float]:
    """Seconds of a run by what they went to (``charts.TIMES``)."""
    sums = {name: sum(value for _, value in run.record.series(name)) for name in TIMES}
    if run.record.series("time/rollout_wait"):  # rollouts were made beside the update: only the wait for them counts
        sums |= dict.fromkeys(("time/rollout", "time/feedback", "time/retries"), 0.0)
    sums["time/update"] = max(sums["time/update"] - sums["time/e_step"], 0.0)
    return {name: value for name, value in sums.items() if value}


def tokens_of(run: Run) -> dict[str, float]:
    """Tokens of a run by what they were for (``charts.TOKENS``)."""
    sums: dict[str, float] = {}
    for line in run.record.metrics:
        counts = {name: line.get(name, 0.0) for name in TOKENS}
        counts["sampled"] = line.get("rows/drawn", 0.0) * line.get("completions/mean_length", 0.0)
        counts["critiques"] = sum(
            value
            for name, value in line.items()
            if fnmatch(name, "feedback/*_tokens") and name != "feedback/tokens_cut"
        )
        for name, value in counts.items():
            sums[name] = sums.get(name, 0.0) + (value if math.isfinite(value) else 0.0)
    return {name: value for name, value in sums.items() if value}


def summary(run: Run) -> dict[str, Any]:
    """What the overview says of a run: numbers are None where nothing was measured."""
    accuracy = run.record.series("eval/accuracy")
    best = run.record.best("eval/accuracy")
    measured = {
        "first": accuracy[0][1] if accuracy else None,
        "last": accuracy[-1][1] if accuracy else None,
        "best": None if best is None else best[1],
        "best_step": None if best is None else best[0],
        "reward": run.record.last("reward"),
        "gain": run.record.last("eval_teacher/gain"),
        "gain_se": run.record.last("eval_teacher/gain_se"),
        "seconds": sum(seconds_of(run).values()),
        "memory": run.record.last("memory/peak_rss_gib"),
    }
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measured.items()}
    steps = max((int(line["step"]) for line in run.record.metrics), default=0)
    return {**known, "steps": steps, "of": run.settings.get("run.max_steps", "?"), "alarms": len(run.record.alarms)}


def mean_se(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _by_seed(key: str) -> bool:
    return any(fnmatch(key, pattern) for pattern in BY_SEED)


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their names, or as much of their paths as it takes."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(paths))
    return [str(path.relative_to(common)) if path != common else path.name for path in paths]


def _labels(firsts: Sequence[Run]) -> list[str]:
    """The method's name of each group, with the settings that tell it from other groups of that method."""
    titles = [METHODS[run.method].title if run.method in METHODS else run.method for run in firsts]
    labels = []
    for run, title in zip(firsts, titles, strict=True):
        same = [other.settings for other, its in zip(firsts, titles, strict=True) if its == title]
        keys = dict.fromkeys(itertools.chain.from_iterable(same))
        differ = [k for k in keys if not _by_seed(k) and len({table.get(k) for table in same}) > 1]
        shown = [f"{key.rpartition('.')[2]} {run.settings.get(key, '-')}" for key in differ[:2]]
        labels.append(one_line(", ".join([title, *shown])) if len(same) > 1 else one_line(title))
    seen: dict[str, int] = {}
    unique = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        unique.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return unique


def _colours(methods: Sequence[str]) -> list[str]:
    """Each method's own colour where it occurs once, else one after the other of the palette."""
    chosen = [METHOD_COLOURS.get(m) if methods.count(m) == 1 else None for m in methods]
    free = itertools.cycle([colour for colour in PALETTE if colour not in chosen] or PALETTE)
    return [colour or next(free) for colour in chosen]
