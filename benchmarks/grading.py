"""How fast programs are graded: right answers to the shipped tasks, each several times, and an empty program.

    python benchmarks/grading.py --workers 2

Prints programs and answers a second for both kinds of tests, and milliseconds from call to return of an empty program.
Wall-clock seconds: the programs are processes of their own, so other work on the machine counts.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from vpd.envs.code import Code
from vpd.sandbox import Outcome, Program, Sandbox, strongest

TASKS = Path(__file__).parent.parent / "examples" / "code.jsonl"


class Counting:
    """A sandbox that counts the programs it is given."""

    def __init__(self, inner: Sandbox):
        self.inner = inner
        self.programs = 0

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        self.programs += len(programs)
        return self.inner.run(programs)

    def rollout_metrics(self) -> str:
        return self.inner.rollout_metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8, help="copies of each answer, told apart by a comment")
    options = parser.parse_args()
    sandbox = strongest(workers=options.workers)
    print(sandbox.rollout_metrics())
    env = Code(path=str(TASKS), eval_share=0.25, workers=options.workers)
    counting = vars(env)["sandbox"] = Counting(sandbox)
    tasks = [*env.train_tasks(), *env.eval_tasks(None)]
    for kind in ("stdin", "call"):
        rows = [task for task in tasks if task.payload.cases[0].kind == kind] * options.repeats
        answers = [str(env.solution(task)).replace("```python\n", f"```python\n# {n}\n") for n, task in enumerate(rows)]
        counting.programs, began = 0, time.perf_counter()
        grades = env.grade(rows, answers)
        seconds = time.perf_counter() - began
        assert all(grade.success for grade in grades), "a right answer failed"
        rates = f"{counting.programs / seconds:.1f} programs/s, {len(rows) / seconds:.1f} answers/s"
        print(f"{kind}: {len(rows)} answers, {counting.programs} programs in {seconds:.1f} s: {rates}")
    times = [sandbox.run([Program(source="pass")])[0].seconds * 1000 for _ in range(30)]
    print(f"empty program, 30 times: least {min(times):.0f} ms, median {statistics.median(times):.0f} ms")


if __name__ == "__main__":
    main()
