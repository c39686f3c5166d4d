"""``samples.md``: what the models write before and after training, method by method."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from vpd.lab.reproduce.claims import Runs
from vpd.lab.reproduce.methods import METHODS
from vpd.lab.reproduce.settings_table import SETTINGS
from vpd.printable import cut, one_line

LONGEST = 300  # characters of one answer that are shown
Sample: TypeAlias = Mapping[str, Any]


def markdown(runs: Runs) -> str | None:
    """Tables of samples, a section for each setting and method, of its lowest seed that has any; None without any."""
    lines = [
        "# What the models write",
        "",
        "Answers to held-out tasks before and after training, one seed of each method; **bold**: accepted.",
    ]
    for setting in SETTINGS:
        for method in METHODS:
            seeds = runs.get((setting, method), {})
            seed = min((seed for seed in seeds if seeds[seed]["samples"]), default=None)
            if seed is not None:
                lines += ["", f"## {setting}: {METHODS[method].title} (seed {seed})", "", *_table(seeds[seed])]
    return "\n".join(lines) + "\n" if len(lines) > 3 else None


def _table(run: Mapping[str, Any]) -> list[str]:
    before, after = _counted(run["samples"]["before"]), _counted(run["samples"]["after"])
    rows = zip(run["samples"]["before"], run["samples"]["after"], strict=True)
    return [
        f"| task | before: {before} | after: {after} |",
        "|---|---|---|",
        *(f"| {_cell(first['task'])} | {_answer(first)} | {_answer(last)} |" for first, last in rows),
    ]


def _counted(samples: Sequence[Sample]) -> str:
    return f"{sum(sample['reward'] >= 1 for sample in samples)} of {len(samples)} accepted"


def _answer(sample: Sample) -> str:
    text = _cell(sample["answer"]) or "(empty)"
    return f"**{text}**" if sample["reward"] >= 1 else text


def _cell(text: str) -> str:
    """A text in one line of a table, whose characters mean nothing in Markdown or HTML."""
    plain = html.escape(one_line(cut(text, LONGEST)).strip(), quote=False)
    return "".join(f"\\{character}" if character in "|*_`[]~\\#" else character for character in plain)
