"""docs/metrics.md, written from the table of metrics and the rules of the monitor: python website/metrics_page.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpd.monitor import RULES, Rule
from vpd.report.metric_table import PARTS, UPDATES, Metric, Part, find_metric

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEAD = f"""# Metrics

Every metric that a run writes: a line for each step in `metrics.jsonl`, the same to trackers (`run.report_to`), and as
a table from Python (`run.metrics`). What is missing in a step was not measured there. What to look at first is
`eval/accuracy`, and whether `eval_teacher/gain` is above 0.

*Healthy* is a rule of thumb, and *alarm* the rule that watches the metric
([when it goes wrong](troubleshooting.md#an-alarm)). In braces: `{{update}}` is one of
{", ".join(f"`{name}`" for name in UPDATES)}; `{{evaluation}}` is `eval` or
`eval_teacher`; `{{k}}` a number; the rest are names. The page is made by `python website/metrics_page.py` from the
table in `src/vpd/report/metric_table.py`, which the tests hold against what runs write.
"""


def page() -> str:
    """The page in Markdown."""
    return HEAD + "".join(f"\n{line}\n" for part in PARTS for line in _part(part))


def alarms_of(metric: Metric) -> list[str]:
    """The rules that look at a metric."""
    return [rule.name for rule in RULES if metric in {find_metric(name) for name in names_read(rule)}]


def _part(part: Part) -> Iterator[str]:
    yield f"## {part.title}"
    yield part.about
    rows = ["| metric | meaning | unit | written by | healthy | alarm |", "|---|---|---|---|---|---|"]
    for metric in part.metrics:
        alarms = ", ".join(f"`{name}`" for name in alarms_of(metric))
        cells = (f"`{metric.name}`", metric.meaning, metric.unit, metric.written_by, metric.healthy, alarms)
        rows.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    yield "\n".join(rows)


def names_read(rule: Rule) -> set[str]:
    """The metrics that a rule looks at, found by showing it steps that have any metric."""
    names: set[str] = set()
    for value in (0.0, 0.01, 0.5, 1.0, 5.0):  # a rule that fires at once may not look at all
        rule.look([_Asked(value, names) for _ in range(30)])
    return names


class _Asked(dict[str, float]):
    """Metrics that hold ``value`` under any name and keep the names that were asked for."""

    def __init__(self, value: float, names: set[str]):
        super().__init__()
        self.value, self.names = value, names

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return True

    def __getitem__(self, name: str) -> float:
        self.names.add(name)
        return self.value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


if __name__ == "__main__":
    PAGE.write_text(page())
