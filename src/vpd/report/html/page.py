"""From run folders to the page: the tables are HTML, curves and rollouts are data that its script shows.

The data and the charting library are compressed, so that the page of four runs has a few megabytes.  The policy of the
page names its scripts by their hashes; nothing else can run in it.
"""

import base64
import gzip
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from vpd.errors import ConfigError
from vpd.printable import one_line
from vpd.report.html.charts import PARTS, TIMES, TOKENS, charts_with
from vpd.report.html.collect import (
    Run,
    RunGroup,
    alarms,
    curves,
    differing,
    mean_se,
    read_runs,
    seconds_of,
    summary,
    tokens_of,
)
from vpd.report.html.rows import Row, Texts, candidates, page_row
from vpd.report.methods import PALETTE
from vpd.run_folder.files import FileSystem

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("page.js", "charts.js", "tokens.js", "rollouts.js", "start.js")
MEGABYTE = 1_000_000
SMALLEST = 2.5  # megabytes: the charting library takes 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``megabytes``: the most that the file may take, rollouts are left out beyond it; ``reload``: seconds after which
    an open page loads itself again, 0: never."""

    title: str = ""
    megabytes: float = 6.0
    reload: int = 0


def write_report(
    folders: Sequence[Path], output: Path, options: Options | None = None, files: FileSystem | None = None
) -> Path:
    """Write the report of the runs in these folders.

    Raises StorageError: a folder holds no run, or ``output`` cannot be written; ConfigError: no folder, or too small.
    """
    options = options or Options()
    if not folders:
        raise ConfigError("no run to report", expected="the folder of at least one run")
    if not options.megabytes >= SMALLEST:
        raise ConfigError("the report is too small", got=f"{options.megabytes} MB", expected=f"at least {SMALLEST} MB")
    runs, groups = read_runs(folders)
    page = render(runs, groups, options)
    (files or FileSystem()).write_atomically(output, page.encode())
    return output


def render(runs: Sequence[Run], groups: Sequence[RunGroup], options: Options) -> str:
    """The page."""
    library = plotly()
    packed_library = _packed_plotly()
    fixed = len(packed_library) + 200_000
    data = _data(runs, groups, options)
    data["rollouts"], packed = _rollouts(runs, data, int(options.megabytes * MEGABYTE) - fixed)
    script = "\n".join((STATIC / name).read_text() for name in SCRIPTS)
    return _template().render(
        title=data["title"],
        runs=runs,
        groups=groups,
        summaries=[summary(run) for run in runs],
        outcomes=[_outcome(group, runs) for group in groups],
        differing=differing(groups, runs),
        settings=[sorted(runs[group.runs[0]].settings.items()) for group in groups],
        alarms=alarms(runs),
        spent=data["spent"],
        shown=data["rollouts"],
        parts={part: titles for part, titles in PARTS.items() if any(c["part"] == part for c in data["charts"])},
        version=one_line(importlib.metadata.version("vpd-rl")),
        style=(STATIC / "report.css").read_text(),
        script=script,
        hashes=[_hash(script), _hash(library)],
        library=packed_library,
        data=packed,
        clean=one_line,
    )


def _data(runs: Sequence[Run], groups: Sequence[RunGroup], options: Options) -> dict[str, Any]:
    measured = curves(runs)
    return {
        "title": one_line(options.title or ", ".join(dict.fromkeys(group.label for group in groups))),
        "reload": options.reload,
        "runs": [
            {
                "name": run.name,
                "group": run.group,
                "seed": run.seed,
                "env": run.env,
                "beta": _float(run.settings.get("algorithm.teacher_beta")),
                "mean": run.settings.get("algorithm.log_ratio") == "mean",
            }
            for run in runs
        ],
        "groups": [{"label": g.label, "colour": g.colour, "runs": g.runs} for g in groups],
        "charts": charts_with(set(measured)),
        "curves": measured,
        "spent": _spent(groups, runs),
    }


def _rollouts(runs: Sequence[Run], data: Mapping[str, Any], most: int) -> tuple[dict[str, Any], str]:
    """As many rollouts as fit, and all the data, packed."""
    found, counts = candidates(runs)
    texts = Texts()
    made = [page_row(place, runs[place], row, tokens, texts) for place, row, tokens in found]
    take = len(made)
    while True:
        kept = made[:take]
        pool, page_rows = _with_used_texts(kept, texts.pool)
        shown = {"rows": page_rows, "texts": pool, "read": len(made), "counts": counts}
        packed = _packed(json.dumps({**data, "rollouts": shown}, separators=(",", ":")))
        if len(packed) <= most or not take:
            return shown, packed
        take = min(int(take * 0.95 * most / len(packed)), take - 1)


def _with_used_texts(kept: Sequence[Row], pool: Sequence[str]) -> tuple[list[str], list[Row]]:
    """The texts that these rows use, and the rows with their places among these."""
    texts = Texts()

    def place(old: int | None) -> int | None:
        return None if old is None else texts.add(pool[old])

    found = []
    for row in kept:
        new = {**row, **{name: place(row[name]) for name in ("task", "start", "prompt", "feedback")}}
        new["context"] = [[source, kind, place(text)] for source, kind, text in row["context"]]
        if "teacher" in row:
            new["teacher"] = [[kind, place(text), place(missing)] for kind, text, missing in row["teacher"]]
        if "top" in row.get("by_token", {}):
            new["by_token"] = {**row["by_token"], "top": [place(text) for text in row["by_token"]["top"]]}
        found.append(new)
    return texts.pool, found


def _outcome(group: RunGroup, runs: Sequence[Run]) -> dict[str, Any]:
    """A group's accuracy at the end and at its best, the gain that is left, and its seconds: means over seeds."""
    found: dict[str, Any] = {}
    summaries = [summary(runs[place]) for place in group.runs]
    for name in ("first", "last", "best", "gain", "reward", "seconds"):
        values = [float(s[name]) for s in summaries if s[name] is not None]
        found[name] = mean_se(values) if values else None
    return found


def _spent(groups: Sequence[RunGroup], runs: Sequence[Run]) -> dict[str, list[tuple[str, list[float], str]]]:
    """Seconds and tokens a run, by what they went to, each with a colour: means over the runs of each group."""
    found: dict[str, list[tuple[str, list[float], str]]] = {}
    for what, names, of_run in (("seconds", TIMES, seconds_of), ("tokens", TOKENS, tokens_of)):
        sums = [[of_run(runs[place]) for place in group.runs] for group in groups]
        table: list[tuple[str, list[float], str]] = []
        for name, title in names.items():
            row = [sum(one.get(name, 0.0) for one in of_group) / len(of_group) for of_group in sums]
            if any(row):
                table.append((title, row, PALETTE[len(table) % len(PALETTE)]))
        found[what] = table
    return found


@cache
def plotly() -> str:
    """The charting library's source.  Raises ConfigError where the package is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("a report needs the package plotly", do="pip install plotly") from error
    return str(get_plotlyjs()).replace("\r\n", "\n")


@cache
def _packed_plotly() -> str:
    return _packed(plotly())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("vpd.report.html", "static"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
