"""Curves of one setting by number of rollouts: student, teacher, the E-step's accuracy, and the student's drift.

Four methods are drawn, so that each has a colour that no other is like; the numbers of their variants are in the table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vpd.lab.reproduce.methods import METHODS
from vpd.lab.reproduce.run import Run, curve
from vpd.lab.reproduce.settings_table import CHANGE, DIGITS, Setting
from vpd.report.colours import METHOD_COLOURS, PALETTE
from vpd.report.curves import Curve, mean_curve

PANELS = (
    ("student", "Student: reads the task alone", "share of right answers"),
    ("eval_teacher/accuracy", "Retries of failed attempts with feedback (dotted: without)", ""),
    ("e_step/accuracy", "E-step: implicit reward tells success from failure", "balanced accuracy"),
    ("e_step/student_drift_kl", "Drift of the student caused by an E-step", "KL, nats a token"),
)
STOPPED = 30  # steps without an E-step before the end that mean that there are no more
DRAWN = ("grpo", "sdpo", "vpd", "gated")
DRAWN_PRETRAINED = ("grpo", "sdpo", "vpd_f1", "imitate", "vpd_retries")
DASHES = {"sdpo": (0, (7, 1.2)), "gated": (0, (5, 1, 1, 1))}  # so that lines that meet are both seen


def draw_setting(path: Path, setting: Setting, runs: Mapping[str, Sequence[Run]]) -> None:
    """Write a PNG of four panels; thin lines are seeds, thick ones their mean.

    Where a method's E-steps end before the run does (the gate stops them), a cross marks the last.
    """
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), sharex=True, layout="constrained")
    drawn = DRAWN if setting.family is DIGITS else DRAWN_PRETRAINED
    order = [name for name in drawn if name in runs] or [name for name in METHODS if name in runs][: len(DRAWN)]
    rollouts = setting.family.rollouts
    last = (setting.steps - STOPPED) * rollouts
    for panel, (name, title, unit) in zip(grid.flat, PANELS, strict=True):
        for method in order:
            _draw(
                panel,
                _by_rollouts([curve(run, name) for run in runs[method]], rollouts),
                method,
                last if name.startswith("e_step") else 0,
            )
            if name == "eval_teacher/accuracy":
                control = [curve(run, "eval_teacher/student_accuracy") for run in runs[method]]
                _draw_control(panel, _by_rollouts(control, rollouts), method)
        panel.set_title(title, fontsize=11, loc="left")
        panel.set_ylabel(unit)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(*((0, None) if "drift" in name else (-0.02, 1.02)))
        if setting.name == "changing":
            change = CHANGE * rollouts
            panel.axvline(change, color="black", linewidth=0.8, linestyle=":", label="the feedback turns wrong")
        if not panel.lines:
            panel.text(0.5, 0.5, "not measured here", transform=panel.transAxes, ha="center", color="grey")
    for panel in grid[1]:
        panel.set_xlabel("rollouts")
    if any(line.get_marker() == "x" for panel in grid.flat for line in panel.lines):
        grid[0][0].plot([], [], "x", color="#444444", markersize=8, markeredgewidth=2, label="last E-step")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=10)
    figure.suptitle(f"{setting.name.replace('_', '-')}: {setting.title}", fontsize=12.5, x=0.01, ha="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_control(panel: Any, curves: Sequence[Curve], method: str) -> None:
    """The mean of the seeds, thin and dotted."""
    if curves:
        panel.plot(*zip(*_mean(curves), strict=True), ":", color=_colour(method), linewidth=1.2)


def _by_rollouts(curves: Sequence[Curve], rollouts: int) -> list[list[tuple[int, float]]]:
    """The curves that hold anything, with rollouts, so many in each, in the place of iterations."""
    return [[(step * rollouts, value) for step, value in points] for points in curves if points]


def _mean(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    """The mean at the places that all curves have."""
    shared = set.intersection(*(set(dict(points)) for points in curves))
    return mean_curve([[point for point in points if point[0] in shared] for points in curves])


def _draw(panel: Any, curves: Sequence[Curve], method: str, last: int) -> None:
    if not curves:
        return
    colour = _colour(method)
    for points in curves if len(curves) > 1 else ():
        panel.plot(*zip(*points, strict=True), color=colour, alpha=0.18, linewidth=0.8)
    mean = _mean(curves)
    style = DASHES.get(method, "-")
    panel.plot(*zip(*mean, strict=True), color=colour, linewidth=2.2, linestyle=style, label=METHODS[method].title)
    if mean and mean[-1][0] < last:
        panel.plot(*mean[-1], "x", color=colour, markersize=9, markeredgewidth=2.2)


def _colour(method: str) -> str:
    """A method's colour in all pictures; of one that has none, one of the palette."""
    return METHOD_COLOURS.get(method) or PALETTE[list(METHODS).index(method) % len(PALETTE)]
