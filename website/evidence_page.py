"""Table and picture of the methods in docs/evidence.md, from docs/evidence_runs.csv: python website/evidence_page.py.

Tables of runs that are given (``runs.csv`` of a ``vpd reproduce``) are put into that one first.
"""

import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from vpd.lab.reproduce.claims import standard_error
from vpd.lab.reproduce.methods import METHODS
from vpd.lab.reproduce.pictures import draw_evidence
from vpd.lab.reproduce.run import Run
from vpd.lab.reproduce.runs_table import COLUMNS, Row, read_runs, rewards_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RUNS, PICTURE = DOCS / "evidence.md", DOCS / "evidence_runs.csv", DOCS / "images" / "evidence.png"
HEAD = "| method | weights | rate | seeds | held out, before | after | last ten iterations | minutes of a core |"
SHOWN = ("start", "held_out", "final")


def rows_by_method() -> dict[str, list[Row]]:
    """The runs that the page reports."""
    found: dict[str, list[Row]] = {}
    for row in read_runs(RUNS):
        found.setdefault(row["method"], []).append(row)
    return found


def table_on(page: str) -> str:
    """The table as it stands on the page."""
    return page[page.index(HEAD) :].split("\n\n")[0]


def table() -> str:
    """The table as it should be."""
    lines = [_line(method, rows) for method, rows in rows_by_method().items()]
    return "\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *lines])


def runs_to_draw() -> dict[str, dict[str, list[Run]]]:
    """Setting -> method -> runs, of which the table has no more than the rewards."""
    return {
        "conventions": {
            method: [{"curves": {"reward": rewards_of(row)}} for row in rows]
            for method, rows in rows_by_method().items()
        }
    }


def _line(method: str, rows: Sequence[Row]) -> str:
    minutes = statistics.fmean(float(row["cpu"]) for row in rows) / 60
    seeds = ", ".join(row["seed"] for row in rows)
    cells = [METHODS[method].title, rows[0]["dtype"], f"{float(rows[0]['learning_rate']):g}", seeds]
    return f"| {' | '.join([*cells, *(_cell(rows, column) for column in SHOWN)])} | {minutes:.0f} |"


def _cell(rows: Sequence[Row], column: str) -> str:
    """Mean and standard error over the seeds; of one seed its value."""
    values = [float(row[column]) for row in rows]
    return _number(statistics.fmean(values)) + f" ± {_number(standard_error(values))}" * (len(values) > 1)


def _number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


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
    PAGE.write_text(PAGE.read_text().replace(table_on(PAGE.read_text()), table()))
    draw_evidence(PICTURE, runs_to_draw())
