"""The arithmetic floor of one iteration, and how near we are to it.

    python benchmarks/floor.py --model smollm2 --repeats 3

What must be computed, each token once: a prompt once for its group, completions, what the group's teacher's prompts do
not share; forward 1, backward 2; the head for the tokens it must predict.  The E-step needs the student forward once
and the teacher forward and backward.  Decoding must multiply as much, or read all weights and the cache at each token.
Optimiser and EMA teacher are bytes.  Operations are divided by the best rate at which this machine multiplies matrices
of the model's own shapes, bytes by its best measured bandwidth.  Nothing is added for softmax, norms, activations,
Python, or for recomputing what was thrown away, so 1.0 is out of reach.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from material import SHAPES, Shape, load
from meters import commit, elapsed, last_line, progress, spread

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Counts:
    """Operations of one forward pass, in multiply-adds times two: all layers, and the head."""

    body: float
    head: float

    def passes(self, number: float) -> float:
        return number * (self.body + self.head)


@dataclass(frozen=True)
class Machine:
    """Operations a second and bytes a second."""

    rate: float
    bandwidth: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, or tiny")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["prompt-heavy", "completion-heavy"])
    parser.add_argument("--micro_batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print what the operators of an M-step cost")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, _, _ = load(options.model)
    for name in options.shape:
        found, floors = [], []
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "record.json"
            ours = [sys.executable, str(HERE / "ours.py"), "--record", str(record)]
            last_line([*ours, "--make", options.model, json.dumps(dataclasses.asdict(SHAPES[name]))])
            recorded = json.loads(record.read_text())
            rows = ["--micro_batch_size", str(options.micro_batch_size)]
            for _ in range(options.repeats):
                machine = measure(model)
                floors.append(floor(model, recorded, machine))
                found.append(parts(json.loads(last_line([*ours, *rows, "--method", "vpd"]))))
                progress(f"{name}: {machine.rate / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s, {found[-1]}")
            words = [*ours, *rows, "--method", "sdpo", "--profile"]
            profiled = json.loads(last_line(words))["profile"] if options.profile else []
        print(f"\n{name}: {SHAPES[name]}, {options.model}, {options.repeats} repeats, {commit()}\n")
        print("| | floor s | measured s | measured / floor |\n|---|---|---|---|")
        for part in floors[0]:
            low, real = [f[part] for f in floors], [f[part] for f in found]
            ratio = [b / a for a, b in zip(low, real, strict=True)]
            print(f"| {part} | {spread(low)} | {spread(real)} | {spread(ratio)} |")
        if profiled:
            print("\nOperators of an M-step, by the time they spend themselves:\n\n| | share |\n|---|---|")
            print("\n".join(f"| {operator} | {share:.0%} |" for operator, share in profiled))


def parts(result: dict[str, Any]) -> dict[str, float]:
    """What ``ours.py --method vpd`` measured, by the names of :func:`floor`: the last iterations of each kind."""
    with_e = [step for step in result["steps"] if step["e_step"]][-1]
    without = [step for step in result["steps"] if not step["e_step"]][-1]
    return {
        "rollout": result["rollout_s"],
        "scoring": result["score_s"],
        "M-step": without["train_s"],
        "E-step": with_e["train_s"] - without["train_s"],
        "iteration, average": result["rollout_s"] + without["train_s"] + (with_e["train_s"] - without["train_s"]) / 5,
    }


def floor(model: Any, recorded: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Seconds that each part needs at least."""
    shape = Shape(**recorded["shape"])
    groups = [recorded["rows"][i : i + shape.generations] for i in range(0, shape.rows, shape.generations)]
    student = count(model, [[(row["prompt"], row["completion"]) for row in rows] for rows in groups])
    teacher = count(model, [[(row["teacher"], row["completion"]) for row in rows] for rows in groups])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    step = 7 * weights / machine.bandwidth  # AdamW reads weights, gradients, two moments; writes all but the gradients
    average = 3 * weights / machine.bandwidth
    m_step = (student.passes(3) + teacher.passes(1)) / machine.rate + step + average
    e_step = (student.passes(1) + teacher.passes(3)) / machine.rate + step
    rollout = _rollout(model, groups, machine)
    return {
        "rollout": rollout,
        "scoring": student.passes(1) / machine.rate,
        "M-step": m_step,
        "E-step": e_step,
        "iteration, average": rollout + m_step + e_step / 5,
    }


def count(model: Any, groups: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]) -> Counts:
    """One forward pass over rows of (prompt, completion); tokens that a group's rows begin with alike count once."""
    tokens, pairs = 0, 0
    for rows in groups:
        before: list[int] = []
        for row in sorted([*prompt, *completion[:-1]] for prompt, completion in rows):
            shared = next((i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), len(before))
            tokens += len(row) - shared
            pairs += (len(row) * (len(row) + 1) - shared * (shared + 1)) // 2
            before = row
    predicted = sum(len(completion) for rows in groups for _, completion in rows)
    return Counts(body=_body(model, tokens, pairs), head=_head(model, predicted))


def _body(model: Any, tokens: float, pairs: float) -> float:
    config = model.config.get_text_config()
    weights = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    return 2.0 * weights * tokens + 4.0 * width * config.num_hidden_layers * pairs


def _head(model: Any, tokens: float) -> float:
    return 2.0 * model.get_output_embeddings().weight.numel() * tokens


def _rollout(model: Any, groups: Sequence[Sequence[dict[str, Any]]], machine: Machine) -> float:
    """Prompts once, then for each token of the answers the larger of multiplying and reading."""
    config = model.config.get_text_config()
    width = config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    prompts = [len(rows[0]["prompt"]) for rows in groups]
    seconds = sum(_body(model, p, p * (p + 1) / 2) + _head(model, 1) for p in prompts) / machine.rate
    answers = [row for rows in groups for row in rows]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for place in range(max(len(row["completion"]) for row in answers) - 1):
        running = [row for row in answers if len(row["completion"]) > place + 1]
        seen = sum(len(row["prompt"]) + place + 1 for row in running)
        operations = _body(model, len(running), seen) + _head(model, len(running))
        read = weights + 2 * seen * width * config.num_hidden_layers * 4
        seconds += max(operations / machine.rate, read / machine.bandwidth)
    return seconds


def measure(model: Any, sizes: Sequence[int] = (256, 512, 1024, 2048)) -> Machine:
    """The best rate over ``sizes`` of rows for the mixture of the model's own matrices, and the best bandwidth."""
    mixture: dict[tuple[int, int], int] = {}
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = (module.in_features, module.out_features)
            mixture[shape] = mixture.get(shape, 0) + 1
    rates = []
    for rows in sizes:
        seconds = sum(n * _best(_product(rows, *shape)) for shape, n in mixture.items())
        rates.append(sum(2 * rows * a * b * n for (a, b), n in mixture.items()) / seconds)
    block = torch.zeros(1 << 27)  # 512 MiB
    other = torch.empty_like(block)
    size = block.numel() * block.element_size()
    vector = torch.ones(1 << 13)
    matrix = block.view(-1, 1 << 13)
    bandwidths = [
        size / _best(block.sum),
        size / _best(lambda: matrix @ vector),
        2 * size / _best(lambda: other.copy_(block)),
    ]
    return Machine(rate=max(rates), bandwidth=max(bandwidths))


def _product(rows: int, inner: int, outer: int) -> Any:
    left, right = torch.randn(rows, inner), torch.randn(outer, inner)
    return lambda: F.linear(left, right)


def _best(function: Any, repeats: int = 5) -> float:
    """The shortest of some runs, in seconds, after one that does not count."""
    function()
    seconds = []
    for _ in range(repeats):
        started = elapsed()
        function()
        seconds.append(elapsed() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
