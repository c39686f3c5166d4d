"""What sharing prefixes saves: one VPD iteration (E-step and M-step) with and without, alternating, on the same rows.

    python benchmarks/shared_prefixes.py --model smollm2 --prompt 250 --completion 64 --prompts 4 --generations 4

Prints seconds of the update and peak resident memory above what the process held before it, each from a process of its
own (peaks do not come down), and their ratios.  The rows are random tokens: their words do not matter.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, default=250, help="tokens of a prompt; the teacher reads 80 more")
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["shared", "alone"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options)))
        return
    words = [word for word in sys.argv[1:]]
    results: dict[str, list[dict[str, float]]] = {"shared": [], "alone": []}
    for _ in range(options.repeats):
        for kind in results:
            command = [sys.executable, __file__, *words, "--only", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(kind, results[kind][-1], flush=True)
    for key in ("update_s", "peak_gib"):
        shared, alone = ([run[key] for run in results[kind]] for kind in ("shared", "alone"))
        ratios = [a / b for a, b in zip(shared, alone, strict=True)]
        print(f"{key}: shared / alone = {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def measure(options: argparse.Namespace) -> dict[str, float]:
    from vpd.algorithms.vpd import VPD, VPDSettings
    from vpd.config import ModelSettings
    from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
    from vpd.prompts import Prompter, PromptSettings
    from vpd.recipes.assemble import load_model

    model, tokenizer = load_model(ModelSettings(name_or_path=options.model))
    settings = VPDSettings(e_every=1)
    optim = OptimSettings(share_prefixes=options.only == "shared", micro_batch_size=options.micro_batch_size)
    learner = AccelerateLearner(model, optim, teacher=settings.teacher_settings())
    prompter = Prompter(tokenizer, PromptSettings(), window=None, max_completion_length=options.completion)
    groups = rows(options, len(tokenizer))

    class Kept(Prompter):
        def attach(self, given):  # type: ignore[no-untyped-def]
            return list(given)

    prompter.__class__ = Kept
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    metrics = VPD(settings, prompter).step(groups, learner)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"update_s": seconds, "e_step_s": metrics["time/e_step"], "peak_gib": (peak - held) / 2**20}


def rows(options: argparse.Namespace, vocabulary: int):  # type: ignore[no-untyped-def]
    from vpd.types import Completion, Grade, Group, Rollout, Section, Task, TeacherPrompt

    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, vocabulary) for _ in range(count))

    groups = []
    for number in range(options.prompts):
        prompt = ids(options.prompt)
        rollouts = []
        for index in range(options.generations):
            tokens = ids(options.completion)
            rollouts.append(
                Rollout(
                    task=Task(id=str(number), messages=({"role": "user", "content": ""},)),
                    prompt=prompt,
                    completion=Completion(
                        tokens=tokens,
                        sampled=(True,) * len(tokens),
                        logprobs=(-5.0,) * len(tokens),
                        text="",
                        finish="stop",
                    ),
                    grade=Grade(reward=float(index % 2), success=bool(index % 2)),
                    context=(Section(kind="feedback", source="environment", text="x"),),
                    teacher=TeacherPrompt(tokens=prompt + ids(80), sources=("environment",)),
                )
            )
        groups.append(Group(rollouts=tuple(rollouts)))
    return groups


if __name__ == "__main__":
    main()
