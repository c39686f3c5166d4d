"""Long runs stay healthy: 500 steps of every method, and memory, handles, threads and processor time a step stay flat.

    python tests/health.py [--steps 500] [--only grpo ...] [--seed 0] [--output health.json]

Each method runs in a process of its own with the tiny base, evaluation and checkpoints included.  The learning rate is
0 and half of the answers are right, so that every step has the same work.  The steps from 10 % to 30 % are compared
with the last 20 %.  ``make health``; exit code 1 where a bound below is broken.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "vpd": {},
    "gated": {},
    "sdpo": {},
    "grpo": {},
    "hybrid": {},
    "gkd": {"algorithm.teacher_model": "tiny"},
    "plare": {"feedback": "[{name: judge, judge: reward, max_pairs: 12}]"},
    "vpd with LoRA": {"algorithm.name": "vpd", "model.lora": "{r: 4, target_modules: all-linear}"},
}
MOST_RSS = 0.03  # share of the memory that may be added in the steps between the two spans
MOST_SECONDS = 0.2  # share of a step's processor time
MOST_HANDLES = MOST_THREADS = 0


@dataclass(frozen=True)
class Sample:
    """One step: resident memory in MiB, open handles, threads, processor seconds since the step before."""

    rss: float
    handles: int
    threads: int
    seconds: float


class Watch:
    """An observer that keeps a sample of every step."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._before = time.process_time()

    def on_step(self, step: int, metrics: Any, groups: Any) -> None:
        now = time.process_time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.samples.append(
            Sample(
                rss=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
                handles=len(os.listdir("/proc/self/fd")),
                threads=len(os.listdir("/proc/self/task")),
                seconds=now - self._before,
            )
        )
        self._before = now

    def rewind(self, step: int) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def compare(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """The early and the late span by quantity: medians; of the time the first decile, which others disturb least."""
    n = len(samples)
    spans = samples[n // 10 : 3 * n // 10], samples[8 * n // 10 :]
    found: dict[str, tuple[float, float]] = {}
    for name in ("rss", "handles", "threads", "seconds"):
        early, late = ([asdict(sample)[name] for sample in span] for span in spans)
        found[name] = statistics.median(early), statistics.median(late)
        if name == "seconds":
            found[name] = statistics.quantiles(early, n=10)[0], statistics.quantiles(late, n=10)[0]
    return found


def broken(found: dict[str, tuple[float, float]]) -> list[str]:
    """The quantities that grew beyond their bound."""
    most = {"rss": MOST_RSS, "seconds": MOST_SECONDS}
    faults = [name for name, share in most.items() if found[name][1] > found[name][0] * (1 + share)]
    counts = {"handles": MOST_HANDLES, "threads": MOST_THREADS}
    return faults + [name for name, extra in counts.items() if found[name][1] > found[name][0] + extra]


def run_one(method: str, steps: int, seed: int) -> dict[str, tuple[float, float]]:
    """One method in this process."""
    import vpd
    from vpd import Grade
    from vpd.config import load
    from vpd.envs.digits import Digits

    class Parity(Digits):
        """Half of the answers are right, and every answer gets feedback."""

        def grade(self, tasks: Any, texts: Sequence[str]) -> list[Grade]:
            odd = [sum(map(ord, text)) % 2 for text in texts]
            return [Grade(reward=float(right), feedback="right" if right else "wrong") for right in odd]

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "algorithm.name": method, "run.max_steps": steps, "run.save_steps": 50, "run.save_total_limit": 2,
            "run.eval_steps": 100, "run.eval_limit": 8, "run.seed": seed, "run.output_dir": f"{folder}/out",
            "rollout.prompts_per_step": 4, "rollout.num_generations": 4, "rollout.max_completion_length": 6,
            "optim.learning_rate": 0.0,
        } | METHODS[method]  # fmt: skip
        watch = Watch()
        config = load(None, [word for key, value in settings.items() for word in (f"--{key}", str(value))])
        vpd.train(config, env=Parity(), callbacks=[watch])
    return compare(watch.samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_one(options.only[0], options.steps, options.seed)))
        return 0
    print(
        f"{'method':<15}{'MiB':>16}{'handles':>12}{'threads':>12}{'ms a step':>16}   {options.steps} steps", flush=True
    )
    results = {}
    for method in options.only:
        command = [sys.executable, __file__, "--child", "--only", method, "--steps", str(options.steps)]
        done = subprocess.run([*command, "--seed", str(options.seed)], stdout=subprocess.PIPE, text=True, check=True)
        found = results[method] = {k: tuple(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
        memory, handles, threads, seconds = (found[name] for name in ("rss", "handles", "threads", "seconds"))
        cells = (
            f"{memory[0]:.1f} {memory[1]:.1f}",
            f"{handles[0]:.0f} {handles[1]:.0f}",
            f"{threads[0]:.0f} {threads[1]:.0f}",
        )
        line = f"{method:<15}{cells[0]:>16}{cells[1]:>12}{cells[2]:>12}{seconds[0] * 1e3:>9.1f} {seconds[1] * 1e3:.1f}"
        print(line + "   " + (", ".join(broken(found)) + " grew" if broken(found) else "flat"), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    return int(any(map(broken, results.values())))


if __name__ == "__main__":
    sys.exit(main())
