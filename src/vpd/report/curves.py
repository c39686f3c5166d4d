"""Learning curves as a picture: a panel for the student, one for retries with and without feedback, by method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vpd.report.methods import METHOD_COLOURS, METHODS

Curve: TypeAlias = Sequence[tuple[int, float]]  # (iteration, value)

LEARNS_FROM = {
    "grpo": "reward only",
    "sdpo": "teacher not trained",
    "vpd": "trained teacher",
    "gated": "trained teacher\nand reward",
}
LABEL_GAP = {1: 0.06, 2: 0.1, 3: 0.15}  # lines of text -> the height they need, as a share of the axis


def draw_curves(
    path: Path,
    students: Mapping[str, Sequence[Curve]],
    teachers: Mapping[str, Sequence[Curve]],
    controls: Mapping[str, Sequence[Curve]],
) -> None:
    """Write a PNG with one panel for the student and one for the teacher beside its control.

    Each holds a method's curves, one per seed; thin lines are seeds, thick ones their mean.  ``teachers`` and
    ``controls`` are over retries of the same failed attempts, so their distance is what the feedback adds.  A method
    without a teacher's curve is left out of that panel.
    """
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    titles = ("Student: all held-out tasks", "Retries of its failed attempts, with and without feedback")
    for panel, title, curves, style in zip(panels, titles, (students, teachers), ("-", "--"), strict=True):
        _draw_panel(panel, _present(curves), style)
        panel.set_title(title, fontsize=11, loc="left")
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(-0.02, 1.02)
    panels[0].set_ylabel("share of answers that are right")
    _draw_controls(panels[1], _present(controls))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def mean_curve(runs: Sequence[Curve]) -> list[tuple[int, float]]:
    """Point by point mean over runs measured at the same steps."""
    return [(points[0][0], sum(value for _, value in points) / len(points)) for points in zip(*runs, strict=True)]


def spread(heights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Label heights near the given ones such that neighbours do not overlap; label i needs ``gaps[i]``.

    >>> [round(height, 2) for height in spread([0.5, 0.9, 0.5], [0.1, 0.1, 0.1])]
    [0.45, 0.9, 0.55]
    """
    blocks: list[tuple[list[int], float, float]] = []  # (labels from below, their common centre, height)
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        block = ([index], heights[index], gaps[index])
        while blocks and blocks[-1][1] + (blocks[-1][2] + block[2]) / 2 > block[1]:
            below = blocks.pop()
            labels = below[0] + block[0]
            centre = (below[1] * len(below[0]) + block[1] * len(block[0])) / len(labels)
            block = (labels, centre, below[2] + block[2])
        blocks.append(block)
    placed = [0.0] * len(heights)
    for labels, centre, height in blocks:
        bottom = centre - height / 2
        for index in labels:
            placed[index] = bottom + gaps[index] / 2
            bottom += gaps[index]
    return placed


def _present(curves: Mapping[str, Sequence[Curve]]) -> dict[str, list[Curve]]:
    """The methods that have a curve."""
    return {name: [run for run in runs if run] for name, runs in curves.items() if any(runs)}


def _draw_controls(panel: Any, controls: Mapping[str, Sequence[Curve]]) -> None:
    """Mean curves of the retries without feedback, and a legend that tells them from the teacher's."""
    for name, runs in controls.items():
        panel.plot(*zip(*mean_curve(runs), strict=True), ":", color=METHOD_COLOURS[name], linewidth=1.6)
    for style, text in (("--", "teacher: with feedback"), (":", "control: without")):
        panel.plot([], [], style, color="#444444", linewidth=1.8, label=text)
    panel.legend(loc="upper left", frameon=False, fontsize=9)


def _draw_panel(panel: Any, curves: Mapping[str, Sequence[Curve]], style: str) -> None:
    means = {name: mean_curve(runs) for name, runs in curves.items()}
    for name, runs in curves.items():
        for run in runs if len(runs) > 1 else ():
            panel.plot(*zip(*run, strict=True), style, color=METHOD_COLOURS[name], alpha=0.25, linewidth=0.8)
        panel.plot(*zip(*means[name], strict=True), style, color=METHOD_COLOURS[name], linewidth=2.2)
    texts = [f"{METHODS[name].title}\n({LEARNS_FROM[name]})" for name in means]
    gaps = [LABEL_GAP[text.count("\n") + 1] for text in texts]
    heights = spread([mean[-1][1] for mean in means.values()], gaps)
    for name, text, height in zip(means, texts, heights, strict=True):
        at = {"xy": (1.02, height), "xycoords": ("axes fraction", "data"), "va": "center"}
        panel.annotate(text, fontsize=9, color=METHOD_COLOURS[name], **at)
