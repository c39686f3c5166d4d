"""Seconds of a step with and without ``rollout.overlap``, on a fake vLLM server that answers at once or after a while.

    python benchmarks/overlap.py --steps 8

VPD on a shipped base with a long E-step in every step.  The server (tests/fake_vllm.py, a process of its own) computes
every answer with the weights that it was sent.  First it answers as fast as it can.  Then each request also waits for
as long as an update took (or ``--latency`` seconds), all at the same time, as on a server that has GPUs of its own.
The first step is not counted, as nothing overlaps with it, nor the last, beside which nothing is sampled.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from meters import commit, progress, spread

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

PARTS = ("time/rollout", "time/rollout_wait", "time/update", "time/sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny-mid")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--latency", type=float, help="seconds; default: as long as an update")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve is not None:
        serve(options.base, options.serve)
        return
    rows = [measure(options, 0.0)]
    rows.append(measure(options, rows[0]["plain"]["time/update"] if options.latency is None else options.latency))
    print(f"{options.base}, {options.prompts} x {options.generations} rows, {options.steps} steps, {commit()}\n")
    print("| each request waits, s | s a step | with overlap | ratio | rollout | update | sync | wait with overlap |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        plain, ahead = row["plain"], row["ahead"]
        parts = [f"{plain[name]:.2f}" for name in ("time/rollout", "time/update", "time/sync")]
        cells = [f"{row['latency']:.2f}", spread(plain["steps"]), spread(ahead["steps"])]
        ratio = statistics.fmean(ahead["steps"]) / statistics.fmean(plain["steps"])
        print("|", " | ".join([*cells, f"{ratio:.2f}", *parts, f"{ahead['time/rollout_wait']:.2f}"]), "|")


def measure(options: argparse.Namespace, latency: float) -> dict[str, Any]:
    """Both runs on a server of this latency."""
    row: dict[str, Any] = {"latency": latency}
    with served(options.base, latency) as url:
        for name in ("plain", "ahead"):
            row[name] = run(options, url, overlap=name == "ahead")
            progress(f"latency {latency:.2f}, {name}: {statistics.fmean(row[name]['steps']):.2f} s a step")
    return row


class Clock:
    """An observer that keeps when each step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step(self, step: int, metrics: Any, groups: Sequence[Any]) -> None:
        if step:
            self.at.append(time.perf_counter())

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def run(options: argparse.Namespace, url: str, *, overlap: bool) -> dict[str, Any]:
    """Seconds of every step but the first and the last, and the mean seconds of its parts."""
    from vpd.config import parse
    from vpd.recipes.train import train

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        rollout = {"prompts_per_step": options.prompts, "num_generations": options.generations, "overlap": overlap}
        config = parse(
            {
                "model": {"name_or_path": options.base},
                "rollout": rollout | {"max_rows": options.prompts * options.generations},
                "engine": {"name": "vllm", "url": url, "sync_dir": f"{folder}/sync"},
                "algorithm": {"name": "vpd", "e_every": 1, "e_epochs": 8},
                "run": {"max_steps": options.steps, "output_dir": f"{folder}/run", "save_steps": 0, "eval_steps": 0}
                | {"record_rows": 0},
            }
        )
        with contextlib.redirect_stdout(sys.stderr):
            train(config, observers=[clock])
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:-1]
    parts = {name: statistics.fmean(line.get(name, 0.0) for line in lines) for name in PARTS}
    return parts | {"steps": [now - before for before, now in itertools.pairwise(clock.at[:-1])]}


@contextlib.contextmanager
def served(base: str, latency: float) -> Iterator[str]:
    """The address of the fake server, in a process of its own."""
    words = [sys.executable, __file__, "--base", base, "--serve", str(latency)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def serve(base: str, latency: float) -> None:
    """Answer until the standard input ends."""
    from fake_vllm import FakeVLLM, serving
    from transformers import AutoModelForCausalLM

    from vpd.bundled import load_bundled

    model = AutoModelForCausalLM.from_pretrained(load_bundled(base))
    with serving(FakeVLLM(model, window=512, dtype="torch.float32", latency=latency)) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
