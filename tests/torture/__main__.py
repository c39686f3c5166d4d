"""Hundreds of random faults against whole runs, each of which must be survived: ``make torture``.

    PYTHONPATH=tests python -m torture --faults 376 --seed 0 --jobs 2 --output torture-out

A fault strikes a run of a tiny model (every algorithm, every kind of teacher, whole weights and adapters): a kill at a
named point, a full disk, a damaged file, a grader that misbehaves, a signal, a second process.  What the fault did is
then mended, the run continued, and its folder compared with that of the run without a fault: weights, optimiser,
metrics, rollouts, alarms and settings, bit for bit (times apart).  The user's files in the folder must be as they were.

The same seed gives the same faults; ``--only 17`` repeats one and keeps its folder.  A campaign that was interrupted
goes on with the same command.  Mounts (small disks, read-only) are made in a mount namespace of its own, which ends
with it; where none can be made, limits on the size of files and permissions stand in, and the table says so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from torture.faults import MEANING, Fault, Verdict
from torture.points import PLACES, located, mount, unmount
from torture.references import Reference, prepare

INSIDE = "TORTURE_NAMESPACE"


def main() -> int:
    options = _options()
    in_own_namespace()
    torch.set_num_threads(1)
    for _, _, place in PLACES:
        located(place)
    output = Path(options.output).resolve()
    started = time.monotonic()
    references = prepare(output / "references", options.jobs)
    print(f"{len(references)} runs without a fault: {time.monotonic() - started:.0f} s", flush=True)
    mounts = can_mount(output)
    results = output / f"results-{options.seed}.jsonl"
    done = {line["number"] for line in read(results)}
    wanted = options.only or [n for n in range(options.first, options.first + options.faults) if n not in done]
    workers = [work(wanted[job :: options.jobs], references, options, results, mounts) for job in range(options.jobs)]
    for pid in workers:
        os.waitpid(pid, 0)
    found = {line["number"]: line for line in read(results)}
    numbers = options.only or range(options.first, options.first + options.faults)
    lines = [found[number] for number in numbers if number in found]
    text = report(lines, options.seed, mounts, time.monotonic() - started)
    (output / f"table-{options.seed}.md").write_text(text)
    print(text)
    bad = sum(line["verdict"] in ("lost", "untidy") for line in lines) + len(list(numbers)) - len(lines)
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=376, help="how many (default 376: four decks)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="which faults (default 0)")
    parser.add_argument("--only", type=int, nargs="+", help="repeat these faults alone, and keep their folders")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    parser.add_argument("--output", default="torture-out", help="where folders and results go (default torture-out)")
    return parser.parse_args()


def in_own_namespace() -> None:
    """Become a process that may mount, in namespaces of its own, if this machine allows it."""
    if INSIDE in os.environ:
        return
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        able = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        able = False
    os.environ[INSIDE] = "own" if able else "none"
    words = [sys.executable, "-m", "torture", *sys.argv[1:]]
    if able:
        os.execvp(command[0], [*command, *words])


def can_mount(folder: Path) -> bool:
    """Whether a small disk can be mounted here; only in a namespace of our own, so that nothing is left."""
    if os.environ[INSIDE] != "own":
        return False
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    try:
        mount("tmpfs", place, kind="tmpfs", options="size=1m")
    except OSError:
        return False
    unmount(place)
    return True


def work(
    numbers: Sequence[int], references: dict[str, Reference], options: argparse.Namespace, results: Path, mounts: bool
) -> int:
    """A process that strikes one fault after the other; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in numbers:
            line = strike(Fault(options.seed, number, references), results.parent, mounts, keep=bool(options.only))
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if line["verdict"] in ("lost", "untidy") or options.only:
                print(f"{number}: {line['verdict']}: {line['kind']}, {line['label']}, {line['variant']}: ", end="")
                print(f"{line['detail']}: {'; '.join(line['why'])}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(0)


def strike(fault: Fault, output: Path, mounts: bool, *, keep: bool) -> dict[str, Any]:
    """One fault, as a line of the results; its folder stays if anything was wrong, or ``keep``."""
    folder = output / "faults"
    for old in folder.glob(f"{fault.number:04d}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    started = time.monotonic()
    try:
        trial = fault.strike(folder, mounts=mounts)
        verdict, detail, why = trial.verdict, trial.detail, [*trial.losses, *trial.complaints]
        codes = [ended.code for ended in trial.ends]
    except Exception:  # a fault of the harness must not end the campaign, and must be seen
        verdict, detail, why, codes = "lost", "harness", [traceback.format_exc()[-1500:]], []
    if verdict in ("equal", "refused") and not keep:
        for old in folder.glob(f"{fault.number:04d}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return {
        "number": fault.number,
        "kind": fault.kind.name,
        "label": fault.label,
        "variant": fault.variant,
        "detail": detail,
        "verdict": verdict,
        "why": why,
        "codes": codes,
        "seconds": round(time.monotonic() - started, 2),
    }


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def report(lines: Sequence[dict[str, Any]], seed: int, mounts: bool, seconds: float) -> str:
    """The table: a row for each kind and what it was done at, with how many of each verdict."""
    verdicts = get_args(Verdict)
    rows: dict[tuple[str, str], Counter[str]] = {}
    for line in sorted(lines, key=lambda line: (line["kind"], line["label"])):
        rows.setdefault((line["kind"], ""), Counter())[line["verdict"]] += 1
        rows.setdefault((line["kind"], line["label"]), Counter())[line["verdict"]] += 1
    text = [f"| fault | tried | {' | '.join(verdicts)} |", "|---|--:|" + "--:|" * len(verdicts)]
    for (kind, label), counts in rows.items():
        name = label or f"**{kind}**"
        text.append(f"| {name} | {counts.total()} | {' | '.join(str(counts[v] or '') for v in verdicts)} |")
    total = Counter(line["verdict"] for line in lines)
    text.append(f"| **all** | **{total.total()}** | {' | '.join(f'**{total[v]}**' for v in verdicts)} |")
    disk = "a tmpfs, and read-only bind mounts" if mounts else "no mounts: limits on file sizes, and permissions"
    variants = Counter(line["variant"] for line in lines)
    return "\n".join(
        [
            f"{total.total()} faults, seed {seed}, commit {_commit()}, {seconds:.0f} s; disks: {disk}.",
            f"Runs: {', '.join(f'{name} {count}' for name, count in sorted(variants.items()))}.",
            "",
            *text,
            "",
            *(f"* {verdict}: {MEANING[verdict]}." for verdict in verdicts),
            "",
            *(
                f"{line['verdict']} {line['number']} ({line['kind']}, {line['label']}, {line['variant']}; "
                f"{line['detail']}): {'; '.join(line['why'])[:600]}"
                for line in lines
                if line["verdict"] in ("lost", "untidy")
            ),
            f"lost: {total['lost']}",
            "",
        ]
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
