"""How a run looks in a notebook: what it is, its newest numbers, and two curves, without a script or a server."""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

from vpd.printable import one_line
from vpd.run_folder.reading import RunRecord

Points: TypeAlias = Sequence[tuple[int, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 150, 44, 22, 20
#: title of a chart -> (label, metric, colour, dashes) of its lines
CHARTS = {
    "on training tasks": (("reward", "reward", "#0072b2", ""), ("success", "success", "#d55e00", "5 3")),
    "on held-out tasks": (
        ("student", "eval/accuracy", "#0072b2", ""),
        ("teacher, with feedback", "eval_teacher/accuracy", "#d55e00", "5 3"),
        ("control, without", "eval_teacher/student_accuracy", "#777777", "2 3"),
    ),
}
NUMBERS = (
    "reward",
    "success",
    "completions/mean_length",
    "teacher/rows_with_context",
    "eval/accuracy",
    "eval_teacher/accuracy",
    "eval_teacher/gain",
)


def run_html(record: RunRecord) -> str:
    """The run as HTML that holds no text of the model or the environment."""
    method = one_line(record.method)
    title = f"<b>{escape(str(record.folder))}</b>: {escape(method)}, {record.phase}, step {record.step}"
    last = [(name, record.last(name)) for name in NUMBERS if record.series(name)]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{value:.4g}</td></tr>" for name, value in last)
    seen = [(int(alarm["step"]), escape(one_line(str(alarm.get("saw"))))) for alarm in record.alarms[:5]]
    alarms = "".join(f"<li>step {step}: {text}</li>" for step, text in seen)
    charts = "".join(_chart(record, chart) for chart in CHARTS)
    listed = f"<p>alarms:</p><ul>{alarms}</ul>" if alarms else ""
    return f"<div><p>{title}</p><table><tr><th>metric</th><th>newest</th></tr>{cells}</table>{charts}{listed}</div>"


def _chart(record: RunRecord, chart: str) -> str:
    """One chart as SVG; nothing where no line of it has two points."""
    lines = [(label, record.series(metric), colour, dashes) for label, metric, colour, dashes in CHARTS[chart]]
    lines = [line for line in lines if len(line[1]) > 1]
    if not lines:
        return ""
    points = [point for line in lines for point in line[1]]
    low, high = min(0.0, *(y for _, y in points)), max(1.0, *(y for _, y in points))
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    drawn, legend = [], []
    for number, (label, series, colour, dashes) in enumerate(lines):
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        places = " ".join(_place(x, y, (first, last), (low, high)) for x, y in series)
        drawn.append(f'<polyline {style} points="{places}"/>')
        legend.append(f'<text x="{LEFT + 130 * number}" y="12" font-size="11" fill="{colour}">{escape(label)}</text>')
    axis = (
        f'<text x="2" y="{TOP + 8}" font-size="11" fill="currentColor">{high:.3g}</text>'
        f'<text x="2" y="{HEIGHT - BOTTOM}" font-size="11" fill="currentColor">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}" font-size="11" fill="currentColor">step {first}</text>'
        f'<text x="{WIDTH - 4}" y="{HEIGHT - 6}" font-size="11" text-anchor="end" fill="currentColor">{last}</text>'
    )
    view = f'role="img" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f"<p>{chart}</p><svg {view}><title>{chart}</title>{axis}{''.join(legend)}{''.join(drawn)}</svg>"


def _place(x: int, y: float, steps: tuple[int, int], values: tuple[float, float]) -> str:
    across = (x - steps[0]) / max(steps[1] - steps[0], 1)
    up = (y - values[0]) / (values[1] - values[0])
    return f"{LEFT + across * (WIDTH - LEFT - 6):.1f},{TOP + (1 - up) * (HEIGHT - TOP - BOTTOM):.1f}"
