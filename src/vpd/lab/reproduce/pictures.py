"""Curves of one setting by number of rollouts: student, teacher, the E-step's accuracy, and the student's drift.

Few methods are drawn, so that each has a colour that no other is like; the numbers of their variants are in the table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vpd.lab.reproduce.methods import METHODS
from vpd.lab.reproduce.run import Run, curve
from vpd.lab.reproduce.settings_table import CHANGE, CONVENTIONS, DIGITS, Setting
from vpd.report.curves import Curve, mean_curve
from vpd.report.methods import METHOD_COLOURS, PALETTE

PANELS = (
    ("student", "Student: reads the task alone", "share of right answers"),
    ("eval_teacher/accuracy", "Retries of failed attempts with feedback (dotted: without)", ""),
    ("e_step/accuracy", "E-step: implicit reward tells success from failure", "balanced accuracy"),
    ("e_step/student_drift_kl", "Drift of the student caused by an E-step", "KL, nats a token"),
)
STOPPED = 30  # steps without an E-step before the end that mean that there are no more
DRAWN = ("grpo", "sdpo", "vpd", "gated")
DRAWN_PRETRAINED = ("grpo", "sdpo", "vpd_f1", "gated_f1", "imitate", "vpd_retries_f1", "gated_retries_f1")
OVERVIEW = ("grpo", "sdpo", "vpd", "gated", "vpd_retries_f1", "gated_retries_f1")
ACROSS = 4  # panels in a row
SHARES = (-0.02, 1.02)  # the y axis of shares
DASHES = {
    "gated_retries_f1": (0, (4, 1)),
    "sdpo": (0, (7, 1.2)),
    "gated": (0, (5, 1, 1, 1)),
    "gated_f1": (0, (5, 1, 1, 1)),
}  # so that lines that meet are both seen


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
        _style(panel, *((0.0, None) if "drift" in name else SHARES))
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
    _save(figure, path)


def draw_students(path: Path, settings: Sequence[Setting], runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> None:
    """Write a PNG with the student's curve in every setting, each method's mean over its seeds."""
    shown = [name for name in OVERVIEW if any(name in runs[setting.name] for setting in settings)]
    rows = -(-len(settings) // ACROSS)
    figure, grid = plt.subplots(
        rows, ACROSS, figsize=(3.1 * ACROSS, 2.7 * rows), sharey=True, layout="constrained", squeeze=False
    )
    for panel, setting in zip(grid.flat, settings, strict=False):
        for method in shown:
            curves = [curve(run, "student") for run in runs[setting.name].get(method, ())]
            _draw(panel, _by_rollouts(curves, setting.family.rollouts), method, 0)
        panel.set_title(setting.name.replace("_", "-"), fontsize=11, loc="left")
        _style(panel)
    for panel in list(grid.flat)[len(settings) :]:
        panel.set_visible(False)
    grid[-1][0].set_xlabel("answers sampled")
    grid[0][0].set_ylabel("share of right answers")
    lines = {line.get_label(): line for panel in grid.flat for line in panel.lines if line.get_linewidth() > 1}
    titles = [METHODS[name].title for name in shown if METHODS[name].title in lines]
    figure.legend([lines[title] for title in titles], titles, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


#: setting -> what the reviewer's notes say in it, where not what the client wants
TEXTS = {
    "conventions_noisy": "three notes in ten: another client's wish",
    "conventions_shuffled": "the notes: another client's wish",
    "conventions_verdict": "the notes: right or wrong, no more",
    "conventions_silent": "no notes",
}


#: settings of a pretrained model that have a picture with a panel for each method
EVIDENCE = ("conventions", "conventions_themes", "conventions_cold")


def evidence_file(setting: str) -> str:
    """The name of that picture."""
    return f"{setting.replace('conventions', 'evidence')}.png"


def draw_evidence(path: Path, setting: str, runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> None:
    """Write a PNG with a panel for each method's pretrained student, beside those of ``conventions`` one for each kind
    of notes of ``imitate``.
    """
    here = runs[setting]
    panels = [(METHODS[name].title, _colour(name), here[name]) for name in METHODS if here.get(name)]
    for other, notes in TEXTS.items() if setting == "conventions" else ():
        if seeds := runs.get(other, {}).get("imitate"):
            panels.append((f"{METHODS['imitate'].title},\n{notes}", _colour("imitate"), seeds))
    across = min(ACROSS, len(panels))
    rows = -(-len(panels) // across)
    size = (3.1 * across, 2.2 * rows + 0.4)
    figure, grid = plt.subplots(
        rows, across, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for panel, (title, colour, seeds) in zip(grid.flat, panels, strict=False):
        _draw_students(panel, seeds, colour)
        panel.set_title(title.replace(", then ", ",\nthen "), fontsize=10, loc="left")
        _style(panel)
    for panel in list(grid.flat)[len(panels) :]:
        panel.set_visible(False)
    figure.supxlabel("answers sampled", fontsize=10)
    figure.supylabel("share of right answers in training", fontsize=10)
    _save(figure, path)


def _style(panel: Any, bottom: float = SHARES[0], top: float | None = SHARES[1]) -> None:
    panel.grid(alpha=0.2)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylim(bottom, top)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_students(panel: Any, runs: Sequence[Run], colour: str) -> None:
    """Each seed thin, and their mean."""
    curves = _by_rollouts([curve(run, "student") for run in runs], CONVENTIONS.rollouts)
    for points in curves if len(curves) > 1 else ():
        panel.plot(*zip(*points, strict=True), color=colour, alpha=0.5, linewidth=0.9)
    if curves:
        panel.plot(*zip(*_mean(curves), strict=True), color=colour, linewidth=2.4)


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
    """A method's colour in all pictures, whatever its F; of one that has none, one of the palette."""
    chosen = METHOD_COLOURS.get(method) or METHOD_COLOURS.get(method.removesuffix("_f1"))
    return chosen or PALETTE[list(METHODS).index(method) % len(PALETTE)]
