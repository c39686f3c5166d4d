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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from torture.faults import KINDS, MEANING, Fault, Verdict, deck
from torture.points import PLACES, end_with_parent, located, mount, unmount
from torture.references import Reference, code_hash, prepare

INSIDE = "TORTURE_NAMESPACE"


@dataclass(frozen=True)
class Campaign:
    """The faults of a seed, the code they are tried on (its hash), and where results and folders go."""

    seed: int
    references: Mapping[str, Reference]
    code: str
    output: Path
    mounts: bool
    keep: bool

    @property
    def results(self) -> Path:
        return self.output / f"results-{self.seed}.jsonl"

    @property
    def folder(self) -> Path:
        return self.output / f"faults-{self.seed}"

    def found(self) -> dict[int, dict[str, Any]]:
        """The results so far that this code gave, by number; a line that a kill cut off is none."""
        text = self.results.read_text() if self.results.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return {line["number"]: line for line in lines if line["code"] == self.code}


def main() -> int:
    options = _options()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged model is not looked for elsewhere
    in_own_namespace()
    torch.set_num_threads(1)
    for _, _, place in PLACES:
        located(place)
    output, code, started = Path(options.output).resolve(), code_hash(), time.monotonic()
    references = prepare(output / "references", options.jobs, code)
    print(f"{len(references)} runs without a fault: {time.monotonic() - started:.0f} s", flush=True)
    campaign = Campaign(options.seed, references, code, output, can_mount(output), keep=bool(options.only))
    done = {} if options.only else campaign.found()
    numbers = options.only or numbers_of(options)
    wanted = [number for number in numbers if number not in done]
    for pid in [work(campaign, wanted[job :: options.jobs]) for job in range(options.jobs)]:
        os.waitpid(pid, 0)
    found = campaign.found()
    lines = [found[number] for number in numbers if number in found]
    text = report(lines, campaign)
    (output / f"table-{options.seed}.md").write_text(text)
    print(text)
    bad = sum(line["verdict"] in ("lost", "untidy") for line in lines) + len(numbers) - len(lines)
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=376, help="how many (default 376: four decks)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first (default 0)")
    parser.add_argument("--kind", help="only faults of this kind, such as 'disk full'")
    parser.add_argument("--seed", type=int, default=0, help="which faults (default 0)")
    parser.add_argument("--only", type=int, nargs="+", help="repeat these faults alone, and keep their folders")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    parser.add_argument("--output", default="torture-out", help="where folders and results go (default torture-out)")
    return parser.parse_args()


def numbers_of(options: argparse.Namespace) -> list[int]:
    """The numbers of the faults that are asked for.  Raises SystemExit for an unknown kind."""
    kinds = [kind.name for kind in KINDS]
    if options.kind not in (None, *kinds):
        raise SystemExit(f"torture: no kind {options.kind!r}; there are {', '.join(kinds)}")
    numbers = range(options.first, options.first + options.faults)
    return [n for n in numbers if options.kind in (None, deck()[n % len(deck())][0].name)]


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


def work(campaign: Campaign, numbers: Sequence[int]) -> int:
    """A process that strikes one fault after the other; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    end_with_parent()
    try:
        for number in numbers:
            line = strike(Fault(campaign.seed, number, campaign.references), campaign)
            with campaign.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if line["verdict"] in ("lost", "untidy") or campaign.keep:
                print(f"{number}: {line['verdict']}: {line['kind']}, {line['label']}, {line['variant']}: ", end="")
                print(f"{line['detail']}: {'; '.join(line['why'])}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(0)


def strike(fault: Fault, campaign: Campaign) -> dict[str, Any]:
    """One fault, as a line of the results; its folder stays if anything was wrong, or the campaign keeps all."""
    clear(campaign.folder, fault.number)
    started = time.monotonic()
    try:
        trial = fault.strike(campaign.folder, mounts=campaign.mounts)
        verdict, detail, why = trial.verdict, trial.detail, [*trial.losses, *trial.complaints]
        codes = [ended.code for ended in trial.ends]
    except Exception:  # a fault of the harness must not end the campaign, and must be seen
        verdict, detail, why, codes = "lost", "harness", [traceback.format_exc()[-1500:]], []
    if verdict in ("equal", "refused") and not campaign.keep:
        clear(campaign.folder, fault.number)
    return {
        "code": campaign.code,
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


def clear(folder: Path, number: int) -> None:
    for old in folder.glob(f"{number:04d}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def report(lines: Sequence[dict[str, Any]], campaign: Campaign) -> str:
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
    disk = "a tmpfs, and read-only bind mounts" if campaign.mounts else "no mounts: limits on files, and permissions"
    variants = Counter(line["variant"] for line in lines)
    return "\n".join(
        [
            f"{total.total()} faults, seed {campaign.seed}, commit {_commit()}; disks: {disk}; "
            f"{sum(line['seconds'] for line in lines):.0f} s, over all jobs.",
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
