"""The report: claims with verdicts, each method's results by setting, and curves."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from vpd.lab.reproduce import runs_table, samples_page
from vpd.lab.reproduce.claims import RULE, Finding, Runs, Verdict, difference_text, standard_error
from vpd.lab.reproduce.methods import METHODS, entry_of, load_table
from vpd.lab.reproduce.pictures import EVIDENCE, draw_evidence, draw_setting, draw_students, evidence_file
from vpd.lab.reproduce.run import BLOCK, EVAL_ANSWERS, Run, measure
from vpd.lab.reproduce.settings_table import CONVENTIONS, DIGITS, SETTINGS
from vpd.lab.runs import OTHER_OUTPUT
from vpd.report.model_card import source_commit
from vpd.run_folder.files import storage_errors

STYLES: Mapping[Verdict, str] = {
    "holds": "bold green",
    "does not hold": "bold red",
    "undecided": "yellow",
    "not run": "dim",
}
COLUMNS = (
    "start",
    "final",
    "peak",
    "mean",
    "held_out",
    "teacher_start",
    "teacher_peak",
    "gain_start",
    "e_accuracy",
    "drift",
    "trust",
    "length",
    "quoted",
    "entropy",
    "instructions",
    "text_nll",
    "cpu",
)


def write_report(findings: Sequence[Finding], runs: Runs, output: Path, *, rates: Path) -> list[Path]:
    """Write ``claims.json``, ``reproduction.md``, ``runs.csv``, ``samples.md`` where runs keep answers, and pictures.

    One is of each setting, one of the student in several, and of each of :data:`EVIDENCE` one of the student by method.
    Returns the paths.
    """
    shown = [name for name in SETTINGS if _runs_in(name, runs)]
    written = [output / "claims.json", output / "reproduction.md", output / runs_table.FILE]
    with storage_errors(output, OTHER_OUTPUT):
        (output / "images").mkdir(exist_ok=True)
        written[0].write_text(json.dumps([as_data(finding) for finding in findings], indent=1))
        for name in shown:
            picture = output / "images" / f"reproduce-{name}.png"
            draw_setting(picture, SETTINGS[name], _runs_in(name, runs))
            written.append(picture)
        if len(shown) > 1:
            written.append(output / "images" / "reproduce-students.png")
            draw_students(
                written[-1], [SETTINGS[name] for name in shown], {name: _runs_in(name, runs) for name in shown}
            )
        for name in [name for name in EVIDENCE if name in shown and len(shown) > 1]:
            written.append(output / "images" / evidence_file(name))
            draw_evidence(written[-1], name, {name: _runs_in(name, runs) for name in shown})
        written[1].write_text(markdown(findings, runs, rates=rates))
        runs_table.write_runs(written[2], runs)
        if (samples := samples_page.markdown(runs)) is not None:
            written.append(output / "samples.md")
            written[-1].write_text(samples)
    return written


def as_data(finding: Finding) -> dict[str, Any]:
    """An entry of ``claims.json``; its key ``regime`` holds the setting."""
    claim = finding.claim
    return {
        "claim": claim.name,
        "statement": claim.statement,
        "source": claim.source,
        "regime": claim.setting,
        "numbers": list(finding.numbers),
        "verdict": finding.verdict,
    }


def markdown(findings: Sequence[Finding], runs: Runs, *, rates: Path) -> str:
    """The whole report."""
    made = {json.dumps(run["settings"]): run for seeds in runs.values() for run in seeds.values()}
    minutes = sum(run["cpu_seconds"] for run in made.values()) / 60
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in STYLES}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [
        "# The paper in miniature",
        "",
        f"{len(findings)} claims tested on a CPU: {summary}. {len(made)} runs, {minutes:.0f} minutes of one core. "
        f"Written by `vpd reproduce` at {source_commit() or 'no commit'}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        *_tasks(runs),
        "The student's accuracy is measured on its training rollouts, whose tasks are new in every iteration: "
        f"*final* is the mean of the last {2 * BLOCK} iterations, *peak* the best {BLOCK} iterations in a row. "
        f"*Held out* and *teacher* are evaluations of {EVAL_ANSWERS} answers; the teacher answers the student's "
        "failed attempts again, with feedback; the control, dotted in the pictures, answers them again without. "
        + _rates(runs, rates),
        "",
        RULE,
        "",
        "## Claims",
        "",
        "| claim | setting | source | comparison | difference | n | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for finding in findings:
        lines += _rows_of(finding)
    if sum(bool(_runs_in(name, runs)) for name in SETTINGS) > 1:
        lines += ["", "![The student's curves in all settings](images/reproduce-students.png)"]
    for name, setting in SETTINGS.items():
        if here := _runs_in(name, runs):
            lines += ["", f"## {name}", "", _sentence(setting.title), "", *_method_table(here)]
            lines += ["", f"![Curves of {name}](images/reproduce-{name}.png)"]
    return "\n".join(lines) + "\n"


def _tasks(runs: Runs) -> list[str]:
    """What the task is, in each family of settings that was run."""
    types: dict[str, set[str]] = {}
    for (setting, _), seeds in runs.items():
        here = types.setdefault(SETTINGS[setting].family.env, set())
        here |= {run["settings"]["model"]["dtype"] for run in seeds.values()}
    shown = []
    if DIGITS.env in types:
        shown.append(
            "The task is `digits`: a letter stands for an unknown operation on digits; an answer is right if all its "
            f"digits are. The bases have 0.24 M parameters; every iteration is {DIGITS.prompts_per_step} tasks × "
            f"{DIGITS.num_generations} answers, for every method. Each seed has its own base, tasks and samples. "
        )
    if CONVENTIONS.env in types:
        shown.append(
            "In the settings `conventions` the base is SmolLM2-135M-Instruct, its weights in "
            f"{' and in '.join(sorted(types[CONVENTIONS.env]))}, and the task `conventions`: a sentence "
            "for a client, who wants in it what only the reviewer's note on an attempt says. Every iteration is "
            f"{CONVENTIONS.prompts_per_step} tasks × {CONVENTIONS.num_generations} answers (with retries: half of them "
            "are retries); evaluation asks for topics that training never names. Each seed has its own tasks and "
            "samples; the base is the same. *Instructions* and *text nll* are changes by training: the share of "
            "held-out `instructions` that is followed, and nats a token of plain English. "
        )
    return shown


def _rates(runs: Runs, rates: Path) -> str:
    """Where the learning rates are from, and for which methods none was chosen."""
    table = load_table(rates)
    untuned: dict[str, list[str]] = {}
    for setting, method in runs:
        if not entry_of(table, setting, method)["seeds"]:
            untuned.setdefault(SETTINGS[setting].tuned_as or setting, []).append(method)
    listed = "; ".join(f"in `{setting}` {', '.join(dict.fromkeys(names))}" for setting, names in untuned.items())
    return f"Learning rates were chosen on other seeds (`{rates.name}`)" + f"; not tuned: {listed}" * bool(listed) + "."


def _runs_in(name: str, runs: Runs) -> dict[str, list[Run]]:
    """The runs made in one setting, by method."""
    return {method: list(seeds.values()) for (setting, method), seeds in runs.items() if setting == name}


def _rows_of(finding: Finding) -> list[str]:
    claim, rows = finding.claim, []
    for number, comparison in enumerate(finding.numbers):
        difference = difference_text(comparison["mean"], comparison["standard_error"], comparison["n"])
        head = (claim.statement, claim.setting, claim.source) if number == 0 else ("", "", "")
        verdict = f"**{comparison['verdict']}**"
        rows.append(
            "| " + " | ".join([*head, comparison["comparison"], difference, str(comparison["n"]), verdict]) + " |"
        )
    return rows


def _method_table(here: Mapping[str, Sequence[Run]]) -> list[str]:
    shown = [name for name in COLUMNS if any(measure(r, name) is not None for runs in here.values() for r in runs)]
    titles = [name.replace("_", " ").replace("cpu", "CPU s") for name in shown]
    lines = ["| method | rate | n | " + " | ".join(titles) + " |", "|---" * (3 + len(shown)) + "|"]
    for name in (name for name in METHODS if name in here):
        cells = [_cell([measure(run, column) for run in here[name]], column) for column in shown]
        rate = f"{here[name][0]['job']['learning_rate']:g}"
        lines.append("| " + " | ".join([METHODS[name].title, rate, str(len(here[name])), *cells]) + " |")
    return lines


def _cell(values: Sequence[float | None], column: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = {"drift": 4, "cpu": 0}.get(column, 2)
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 or column == "cpu" else f"{mean} ± {standard_error(known):.{digits}f}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
