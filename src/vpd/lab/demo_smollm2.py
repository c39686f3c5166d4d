"""``vpd demo --model smollm2``: the first minutes of the run that docs/evidence.md reports.

SmolLM2-135M writes sentences for clients, each of whom wants something that only the reviewer's note on a refused
sentence says.  The same model tries each refused sentence once more with its note, and learns by cross-entropy from
what is accepted.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd.config import Config, parse
from vpd.lab import packaged
from vpd.lab.demo import ROLES, check_least
from vpd.lab.reproduce import bases
from vpd.lab.reproduce.claims import WIDE
from vpd.lab.reproduce.methods import METHODS, load_rates, rate_of
from vpd.lab.reproduce.run import CurveRecorder, Job, dtype_of
from vpd.lab.reproduce.samples import held_out_samples
from vpd.lab.reproduce.settings_table import CONVENTIONS, PRETRAINED_BASE
from vpd.lab.runs import OTHER_OUTPUT, kept_run
from vpd.model.threads import threads_for
from vpd.printable import cut
from vpd.recipes.assemble import assemble
from vpd.report.console import ConsoleProgress, Terminal
from vpd.report.curves import Curve
from vpd.report.html import Options, write_report
from vpd.report.model_card import source_commit
from vpd.run_folder.files import prepare_folder, write_text

SETTING, METHOD = "conventions", "imitate"
STEPS = 20
EVAL_TASKS, EVAL_SAMPLES = 24, 2
EVAL_ITERATIONS = 1.25  # an evaluation, with the retries of teacher and control, takes as long as so many iterations
SHOWN = 4  # held-out answers that are printed
LONGEST = 200  # characters of one answer
REPORT = Options(title="The demo: SmolLM2-135M learns what clients want from a reviewer's notes")


def demo(output: Path, *, steps: int = STEPS, seed: int = 0, console: Terminal | None = None) -> dict[str, Any]:
    """Train, show the results, write ``results.json``, ``report.html`` and the run's folder; returns the results.

    Raises ConfigError for an option out of range, ModelError where the model's package is missing, StorageError if
    ``output`` cannot be written.
    """
    check_least("--steps", steps, 1)
    check_least("--seed", seed, 0)
    found = bases.find(PRETRAINED_BASE, seed)
    if found is None:
        packaged.files_of(PRETRAINED_BASE)  # an error before anything is made
    prepare_folder(output, OTHER_OUTPUT)
    console = console or Terminal()
    dtype = dtype_of(SETTING)
    console.print(introduction(steps, dtype, is_cached=found is not None), highlight=False)
    return learn(config_of(bases.ensure(PRETRAINED_BASE, seed), steps, seed, dtype), output, console)


def config_of(base: Path, steps: int, seed: int, dtype: str) -> Config:
    """The configuration that ``vpd reproduce conventions`` runs, with smaller evaluations, at the start, half-way and
    at the end.
    """
    rate = rate_of(load_rates(), SETTING, METHOD)
    job = Job(setting=SETTING, method=METHOD, seed=seed, learning_rate=rate, dtype=dtype)
    data = job.config_data()
    data["model"]["name_or_path"] = str(base)
    data["run"] |= {
        "max_steps": steps,
        "eval_steps": (steps + 1) // 2,
        "eval_limit": EVAL_TASKS,
        "eval_samples": EVAL_SAMPLES,
    }
    return parse(data)


def introduction(steps: int, dtype: str, *, is_cached: bool) -> str:
    """What will be done, and how long it takes."""
    seconds = CONVENTIONS.seconds[dtype].plain * (steps + 3 * EVAL_ITERATIONS)
    text = (
        "SmolLM2-135M-Instruct writes a sentence about a topic for one of four clients. Each client wants something "
        "that only the reviewer's note on a refused sentence says. The same model tries again with the note, and "
        f"learns from what is accepted: {steps} iterations, in {dtype} about {seconds / 60:.0f} minutes of one idle "
        "core. Topics of the evaluation are never trained on."
    )
    if not is_cached:
        text += f" First the packaged model is converted, once, about a minute, into {bases.cache_folder()}."
    return text + "\n"


def learn(config: Config, output: Path, console: Terminal) -> dict[str, Any]:
    """One run in ``output``, shown while it goes, and its results at the end."""
    started = time.perf_counter()
    folder = output / "runs" / f"{METHOD}-{config.run.seed}"
    parts = assemble(config)
    recorder = CurveRecorder(tuple(ROLES.values()), lambda _: None)
    with threads_for(parts.learner.model), ConsoleProgress(config.run.max_steps, console=console) as progress:
        parts.engine.load(parts.learner.policy())
        before = held_out_samples(parts, SHOWN)
        _show_attempt(before[0], console)
        with kept_run(parts, folder, [progress, recorder]) as loop:
            loop.run()
        parts.engine.load(parts.learner.policy())
        after = held_out_samples(parts, SHOWN)
    curves = {role: recorder.curves[metric] for role, metric in ROLES.items()}
    results = {
        "method": METHOD,
        "seed": config.run.seed,
        "commit": source_commit(),
        **curves,
        "samples": {"before": before, "after": after},
        "seconds": time.perf_counter() - started,
    }
    _show_samples(before, after, console)
    console.print("\n" + verdict(curves), highlight=False)
    write_text(output / "results.json", json.dumps(results, indent=1), OTHER_OUTPUT)
    report = write_report([folder], output / "report.html", REPORT)
    console.print(f"\nWritten: {output}/results.json and the run in {folder}", highlight=False)
    console.print(f"Look at the run in a browser: {report}", highlight=False, soft_wrap=True)
    return results


def verdict(curves: Mapping[str, Curve]) -> str:
    """What was learned, by the evaluations of held-out tasks."""
    student, teacher, control = (curves[role] for role in ROLES)
    (_, start), (steps, end) = student[0], student[-1]
    lines = []
    if teacher and control:
        lines.append(
            f"Before training {start:.2f} of the held-out answers are accepted; of the refused ones tried again, "
            f"{teacher[0][1]:.2f} with the note and {control[0][1]:.2f} without."
        )
    lines.append(f"After {steps} iterations {end:.2f} are accepted at the first attempt, without any note.")
    if end - start < WIDE:
        lines.append("That is not learned yet: add --steps. In docs/evidence.md it took 17 to 24 iterations.")
    lines.append(
        f"One seed, one method ({METHODS[METHOD].title}). All methods and the ablations of the notes: vpd reproduce "
        "--pretrained."
    )
    return "\n".join(lines)


def _show_attempt(sample: Mapping[str, Any], console: Terminal) -> None:
    console.print("One attempt, before training:", style="bold")
    for name, text in (
        ("the task is", sample["task"]),
        ("the model answers", sample["answer"]),
        ("the reviewer notes", sample["feedback"] or "(nothing)"),
    ):
        console.print(f"  {name:<19} {cut(text.strip(), LONGEST)}", markup=False, highlight=False, soft_wrap=True)
    console.print()


def _show_samples(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], console: Terminal) -> None:
    console.print("\nHeld-out tasks, before and after training:", style="bold")
    for first, last in zip(before, after, strict=True):
        console.print(f"  {first['task']}", markup=False, highlight=False, soft_wrap=True)
        for name, sample in (("before", first), ("after", last)):
            mark = "accepted" if sample["reward"] >= 1 else "refused"
            text = f"    {name:<7} ({mark}) {cut(sample['answer'].strip(), LONGEST)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
