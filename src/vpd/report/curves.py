"""Learning curves as a picture: student solid, teacher dashed, one colour per method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve: TypeAlias = Sequence[tuple[int, float]]

COLOURS = {"grpo": "#8c8c8c", "sdpo": "#e69f00", "vpd": "#0072b2", "gkd": "#009e73"}
LABELS = {"grpo": "GRPO (reward only)", "sdpo": "SDPO (passive teacher)", "vpd": "VPD (trained teacher)"}


def draw_curves(path: Path, students: Mapping[str, Sequence[Curve]], teachers: Mapping[str, Sequence[Curve]]) -> None:
    """Write a PNG: one panel for the student, one for the teacher; thin lines are seeds, thick ones their mean."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, sharex=True, layout="constrained")
    titles = ("Student: reads the task alone", "Teacher: the same weights, told what was wrong")
    for panel, title, curves, style in zip(panels, titles, (students, teachers), ("-", "--"), strict=True):
        for name, runs in curves.items():
            colour = COLOURS.get(name)
            for run in runs if len(runs) > 1 else ():
                panel.plot(*zip(*run, strict=True), style, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(
                *zip(*mean_curve(runs), strict=True), style, color=colour, linewidth=2.2, label=LABELS.get(name, name)
            )
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("share of answers that are right")
    panels[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def mean_curve(runs: Sequence[Curve]) -> list[tuple[int, float]]:
    """Point by point mean over runs measured at the same steps."""
    return [(points[0][0], sum(value for _, value in points) / len(points)) for points in zip(*runs, strict=True)]
