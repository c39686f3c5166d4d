"""Tables and pictures of the methods in docs/evidence.md, from docs/evidence_runs.csv: python website/evidence_page.py.

Tables of runs that are given (``runs.csv`` of a ``vpd reproduce``) are put into that one first.
"""

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpd.lab.reproduce.claims import standard_error
from vpd.lab.reproduce.methods import METHODS
from vpd.lab.reproduce.pictures import EVIDENCE, draw_evidence, evidence_file
from vpd.lab.reproduce.run import Run
from vpd.lab.reproduce.runs_table import COLUMNS, Row, read_runs, rewards_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RUNS, PICTURES = DOCS / "evidence.md", DOCS / "evidence_runs.csv", DOCS / "images"
HEAD = (
    "| method | rate | seeds | held out, before | after | last ten iterations | plain English | instructions | "
    "minutes |"
)
SHOWN = {"start": "", "held_out": "", "final": "", "text_nll": "+", "instructions": "+"}
DEVICES = {"cpu": "one core", "NVIDIA H100 80GB HBM3": "H100"}


def rows_by_method(setting: str) -> dict[str, list[Row]]:
    """The runs in a setting that the page reports, methods in the order of their definition."""
    rows = [row for row in read_runs(RUNS) if row["setting"] == setting]
    found = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    return {method: rows for method, rows in found.items() if rows}


def marker(setting: str) -> str:
    """The line of the page that stands before a setting's table."""
    return f"<!-- the runs of {setting} -->\n"


def table_on(page: str, setting: str) -> str:
    """A setting's table as it stands on the page."""
    return page.split(marker(setting))[1].split("\n\n")[0]


def table(setting: str) -> str:
    """A setting's table as it should be."""
    lines = [_line(method, rows) for method, rows in rows_by_method(setting).items()]
    return "\n".join([HEAD, "|---" * (HEAD.count("|") - 1) + "|", *lines])


def runs_to_draw(setting: str) -> Mapping[str, Mapping[str, Sequence[Run]]]:
    """Setting -> method -> runs, of which the table has no more than the rewards."""
    methods = rows_by_method(setting).items()
    return {setting: {method: [{"curves": {"reward": rewards_of(row)}} for row in rows] for method, rows in methods}}


def _line(method: str, rows: Sequence[Row]) -> str:
    minutes = statistics.fmean(float(row["cpu"]) for row in rows) / 60
    devices = " and ".join(sorted({DEVICES[row["device"]] for row in rows}))
    seeds = ", ".join(row["seed"] for row in rows)
    cells = [METHODS[method].title, f"{float(rows[0]['learning_rate']):g}", seeds]
    cells += [_cell(rows, column, sign) for column, sign in SHOWN.items()]
    return f"| {' | '.join(cells)} | {minutes:.0f}, {devices} |"


def _cell(rows: Sequence[Row], column: str, sign: str) -> str:
    """Mean and standard error over the seeds; of one seed its value."""
    values = [float(row[column]) for row in rows]
    error = f" ± {_number(standard_error(values), '')}" if len(values) > 1 else ""
    return _number(statistics.fmean(values), sign) + error


def _number(value: float, sign: str) -> str:
    text = f"{value:{sign}.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _put_in(tables: Sequence[Path]) -> None:
    """Put the runs of other tables into the page's; a newer run of the same seed takes the place of an older one."""
    rows = {
        (row["setting"], row["method"], int(row["seed"])): row for path in (RUNS, *tables) for row in read_runs(path)
    }
    with RUNS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    _put_in([Path(name) for name in sys.argv[1:]])
    for shown in EVIDENCE:
        page, head = PAGE.read_text(), marker(shown)
        PAGE.write_text(page.replace(head + table_on(page, shown), head + table(shown)))
        draw_evidence(PICTURES / evidence_file(shown), shown, runs_to_draw(shown))
