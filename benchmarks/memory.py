"""Memory and cost of one iteration against the sizes they could depend on, as tables and pictures.

    python benchmarks/memory.py --output docs/images --trl_python .trlvenv/bin/python

memory.png  peak memory above the fixed part (weights, gradients, AdamW's moments, teacher's copy) of an iteration with
            an E-step, against the vocabulary and against the completion's length; beside it one [B,T,V] tensor and,
            with --trl_python, a step of TRL's SDPO on as many rows and tokens (no E-step; ``trl_side.py``)
cost.png    seconds of the M-step against answers per prompt, completion and prompt length; beside them the same with
            every row computed alone, and the arithmetic floor (``floor.py``)

Small Llamas with random weights, random tokens, one thread.  Each point of memory is a process of its own.
"""

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from floor import floor, measure
from material import LEARNING_RATE, Shape, draw, load, prompter_of
from meters import commit, elapsed, fixed_bytes, last_line, peak, progress, reset_peak, resident
from transformers import LlamaConfig, LlamaForCausalLM

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
from vpd.types import Completion, Grade, Group, Rollout, SampleKey, Section, Task, TeacherPrompt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Held = dict[str, list[tuple[int, float]]]  # axis -> (value, MiB)

MIB = 1 << 20
BASE = Shape(prompts=2, generations=4, prompt=128, feedback=32, completion=64)
MEMORY_BASE = {"vocabulary": 32_768, "completion": 256}
MEMORY = {"vocabulary": (2048, 8192, 32_768, 65_536, 106_496, 151_936), "completion": (64, 128, 256, 512, 1024)}
TRL_MEMORY = {"vocabulary": (2048, 32_768, 65_536), "completion": (64, 256, 512)}  # more takes above 5 GB
COST = {"generations": (1, 2, 4, 8, 16), "completion": (16, 32, 64, 128, 256), "prompt": (32, 64, 128, 256, 512, 1024)}
AXES = {
    "vocabulary": "vocabulary",
    "generations": "answers per prompt (G)",
    "completion": "completion, tokens (T)",
    "prompt": "prompt, tokens (P)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cost; the shortest counts")
    parser.add_argument("--small", action="store_true", help="two points a curve, to see that it runs")
    parser.add_argument("--pictures", nargs="+", choices=["memory", "cost"], default=["memory", "cost"])
    parser.add_argument("--trl_python", help="interpreter that has trl (default: no line of TRL's)")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.point:
        print(memory_point(**options.point))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    held: Held = {}
    theirs: Held = {}
    if "memory" in options.pictures:
        held = {name: [memory_of(name, value, options) for value in few(MEMORY[name], options)] for name in MEMORY}
        if options.trl_python:
            theirs = {n: [trl_memory_of(n, value, options) for value in few(TRL_MEMORY[n], options)] for n in MEMORY}
        draw_memory(options.output / "memory.png", held, theirs)
    costs = {}
    if "cost" in options.pictures:
        costs = cost_curves(options.repeats, 2 if options.small else None)
        draw_costs(options.output / "cost.png", costs)
    print("\n".join(tables(held, theirs, costs)))


def few(values: Sequence[int], options: argparse.Namespace) -> Sequence[int]:
    return values[:2] if options.small else values


def memory_of(name: str, value: int, options: argparse.Namespace) -> tuple[int, float]:
    """(value, MiB) of an iteration of ours, in a process of its own."""
    words = [sys.executable, __file__, "--output", str(options.output), "--point"]
    held = int(last_line([*words, json.dumps(MEMORY_BASE | {name: value})])) / MIB
    progress(f"memory, {name} {value}: {held:.0f} MiB")
    return value, held


def trl_memory_of(name: str, value: int, options: argparse.Namespace) -> tuple[int, float]:
    """The same of a step of TRL's SDPO: above what its process held once it had loaded its libraries."""
    point = MEMORY_BASE | {name: value}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        record.write_text(json.dumps(trl_record(point, folder)))
        side = str(Path(__file__).with_name("trl_side.py"))
        rows = ["--micro_batch_size", str(BASE.rows)]
        found = json.loads(last_line([options.trl_python, side, "--record", str(record), "--method", "sdpo", *rows]))
    held = (found["steps"][-1]["train_peak"] - found["imported"] - found["fixed"]) / MIB
    progress(f"memory of TRL, {name} {value}: {held:.0f} MiB")
    return value, held


def trl_record(point: dict[str, int], folder: str) -> dict[str, Any]:
    """What ``trl_side.py`` trains on: a model of random weights, prompts of the tiny tokenizer, random answers."""
    _, tokenizer, _ = load("tiny")
    shape = dataclasses.replace(BASE, completion=point["completion"])
    tokenizer.save_pretrained(folder)
    make_model(point["vocabulary"], hidden=64, layers=2).save_pretrained(folder)
    prompter = prompter_of("tiny", tokenizer, shape)
    dice = random.Random(0)
    rows = [
        {
            "content": rollout.task.messages[0]["content"],
            "feedback": rollout.context[0].text,
            "reward": rollout.grade.reward,
            "prompt": rollout.prompt,
            "teacher": rollout.teacher_prompt.tokens if rollout.teacher_prompt else None,
            "completion": [dice.randrange(len(tokenizer), point["vocabulary"]) for _ in range(shape.completion)],
        }
        for group in draw(tokenizer, prompter, shape, seed=0)
        for rollout in group.rollouts
    ]
    settings = prompter.settings
    texts = {"feedback_header": settings.feedback_header, "closing": settings.closing}
    about = {"folder": folder, "learning_rate": LEARNING_RATE, "top_k": 100, "shape": dataclasses.asdict(shape)}
    return {**about, **texts, "rows": rows}


def memory_point(*, vocabulary: int, completion: int) -> int:
    """Bytes above the fixed part, and above what the process held before it had a model, at an iteration's peak."""
    before = resident()
    shape = dataclasses.replace(BASE, completion=completion)
    learner = make_learner(vocabulary, hidden=64, layers=2)
    algorithm = VPD(VPDSettings(e_every=1), Kept())
    groups = random_groups(shape, vocabulary)
    for _ in range(2):  # the optimiser's moments appear at the end of the first
        reset_peak()
        algorithm.step(groups, learner)
        learner.end_iteration()
    return peak() - before - fixed_bytes(learner.model, teacher_copy=True)


def cost_curves(repeats: int, points: int | None) -> dict[str, list[tuple[int, float, float, float]]]:
    """For each axis (value, seconds with shared prefixes, seconds without, seconds of the floor)."""
    vocabulary = 8192
    learners = [make_learner(vocabulary, hidden=256, layers=4, share=share) for share in (True, False)]
    machine = measure(learners[0].model)
    curves: dict[str, list[tuple[int, float, float, float]]] = {}
    for name, values in COST.items():
        for value in values[:points]:
            shape = dataclasses.replace(BASE, **{name: value})
            groups = random_groups(shape, vocabulary)
            found = [min(seconds(learner, groups) for _ in range(repeats)) for learner in learners]
            rows = [
                {"prompt": r.prompt, "teacher": r.teacher_prompt.tokens, "completion": r.completion.tokens}
                for group in groups
                for r in group.rollouts
                if r.teacher_prompt is not None
            ]
            recorded = {"shape": dataclasses.asdict(shape), "rows": rows}
            low = floor(learners[0].model, recorded, machine)["M-step"]
            curves.setdefault(name, []).append((value, found[0], found[1], low))
            progress(f"cost, {name} {value}: {found[0]:.2f} s, alone {found[1]:.2f} s, floor {low:.2f} s")
    return curves


def seconds(learner: AccelerateLearner, groups: Sequence[Group]) -> float:
    started = elapsed()
    Distill(SDPOSettings()).step(groups, learner)
    learner.end_iteration()
    return elapsed() - started


class Kept:
    """A prompter that leaves the teacher's prompts as they are."""

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)


def make_model(vocabulary: int, *, hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_learner(vocabulary: int, *, hidden: int, layers: int, share: bool = True) -> AccelerateLearner:
    settings = SDPOSettings()
    optim = OptimSettings(share_prefixes=share, micro_batch_size=8)
    model = make_model(vocabulary, hidden=hidden, layers=layers)
    return AccelerateLearner(model, optim, teacher=settings.teacher_settings())


def random_groups(shape: Shape, vocabulary: int) -> list[Group]:
    """Rollouts of random tokens; the teacher reads the prompt and feedback of its own."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    groups = []
    for number in range(shape.prompts):
        prompt, rollouts = ids(shape.prompt), []
        for index in range(shape.generations):
            tokens = ids(shape.completion)
            rollouts.append(
                Rollout(
                    key=SampleKey(phase="train", step=0, task=number, sample=index),
                    task=Task(id=str(number), messages=({"role": "user", "content": ""},)),
                    prompt=prompt,
                    completion=Completion(
                        tokens=tokens,
                        sampled=(True,) * len(tokens),
                        logprobs=(-5.0,) * len(tokens),
                        text="",
                        finish="length",
                    ),
                    grade=Grade(reward=float(index % 2), success=bool(index % 2)),
                    context=(Section(kind="feedback", source="environment", text="x"),),
                    teacher_prompt=TeacherPrompt(tokens=prompt + ids(shape.feedback), sources=("environment",)),
                )
            )
        groups.append(Group(rollouts=tuple(rollouts)))
    return groups


def logits_mib(name: str, value: int) -> float:
    """One fp32 tensor [B,T,V] of the point, in MiB."""
    point = MEMORY_BASE | {name: value}
    return BASE.rows * point["completion"] * point["vocabulary"] * 4 / MIB


def draw_memory(path: Path, held: Held, theirs: Held) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, (name, points) in zip(panels, held.items(), strict=True):
        xs = [x for x, _ in points]
        panel.plot(xs, [logits_mib(name, x) for x in xs], "--", color="#8c8c8c", label="one [B,T,V] tensor of logits")
        panel.plot(xs, [y for _, y in points], "o-", color="#0072b2", label="VPD, an iteration with an E-step")
        if theirs:
            panel.plot(*zip(*theirs[name], strict=True), "s-", color="#d55e00", label="TRL's SDPO, a step")
        other = next(k for k in MEMORY_BASE if k != name)
        panel.set_title(f"{other} {MEMORY_BASE[other]:,}, {BASE.rows} rows", fontsize=11)
        _finish(panel, AXES[name])
    panels[0].set_ylabel("peak above the fixed part, MiB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def draw_costs(path: Path, costs: dict[str, list[tuple[int, float, float, float]]]) -> None:
    figure, panels = plt.subplots(1, len(costs), figsize=(13, 4), layout="constrained")
    looks = (
        ("rows computed alone", ":", "#e69f00"),
        ("shared prefixes (default)", "-", "#0072b2"),
        ("floor", "--", "#8c8c8c"),
    )
    for panel, (name, points) in zip(panels, costs.items(), strict=True):
        xs, shared, alone, low = zip(*points, strict=True)
        for (label, style, colour), ys in zip(looks, (alone, shared, low), strict=True):
            panel.plot(xs, ys, style, color=colour, label=label, marker="o", markersize=3)
        fixed = [f"{AXES[k].split('(')[1][0]} {getattr(BASE, k)}" for k in COST if k != name]
        panel.set_title(", ".join(fixed), fontsize=11)
        _finish(panel, AXES[name])
    panels[0].set_ylabel("seconds of an M-step")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def _finish(panel: Any, label: str) -> None:
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def tables(held: Held, theirs: Held, costs: dict[str, Any]) -> list[str]:
    lines = [f"{commit()}, torch {torch.__version__}"]
    for name, points in held.items():
        lines += ["", f"| {AXES[name]} | peak above the fixed part, MiB | TRL's SDPO, MiB | one [B,T,V], MiB |"]
        lines.append("|---|---|---|---|")
        other = dict(theirs.get(name, ()))
        shown = {x: f"{other[x]:.0f}" if x in other else "" for x, _ in points}
        lines += [f"| {x:,} | {y:.0f} | {shown[x]} | {logits_mib(name, x):.0f} |" for x, y in points]
    for name, rows in costs.items():
        lines += ["", f"| {AXES[name]} | M-step s | rows alone s | floor s |", "|---|---|---|---|"]
        lines += [f"| {x:,} | {a:.2f} | {b:.2f} | {c:.2f} |" for x, a, b, c in rows]
    return lines


if __name__ == "__main__":
    main()
