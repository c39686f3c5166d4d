"""VPD, SDPO and GRPO against TRL's SDPO and GRPO: seconds and memory of one iteration, on the same recorded tokens.

    python benchmarks/vs_trl.py --model smollm2 --trl_python trlvenv/bin/python --repeats 3 --output .

Both sides train on the same prompts, completions and teacher's prompts, token for token (``trl_side.py`` says what is
overridden for that: generation alone), in fp32, with the same rows per micro-batch, top-k 100 + tail, Jensen-Shannon,
an EMA teacher, AdamW, one thread.  That they do the same work is checked: loss and gradient norm must agree.  Ours has
no token budget, which would make smaller micro-batches, and selective gradient checkpointing, unless options say
otherwise; TRL has no checkpointing, because its own repeats whole layers.

Each measurement is a process of its own; repeats alternate.  What is reported is a process's last iteration of a kind
(the first has no optimiser state yet).  Seconds are the process's CPU seconds, so that other work on the machine
counts little.  A ratio is ours / TRL's of the same repeat; printed are median and range.

=========== ==========================================================================================
rollout     sampling the completions, exactly the shape's tokens, each side with its own generation
whole       the iteration: rollout + train
train       everything after: teacher's prompts, scoring, forward, backward, optimiser, EMA teacher
score       log-probs of the completions without gradient
above       peak memory above weights + gradients + AdamW's moments + the teacher's copy
=========== ==========================================================================================

VPD takes an E-step in every fifth iteration: its average is four iterations without and one with.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from material import SHAPES
from meters import commit, last_line, progress, spread

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
SIDES = {"sdpo": ("vpd", "trl-sdpo", "sdpo"), "grpo": ("grpo", "trl-grpo")}
LIKE = {"sdpo": "trl-sdpo", "vpd": "trl-sdpo", "grpo": "trl-grpo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, or tiny")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["prompt-heavy", "completion-heavy"])
    parser.add_argument("--methods", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro_batch_size", type=int, default=16, help="rows per forward pass, on both sides")
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="selective", help="ours")
    parser.add_argument("--token_budget", type=int, help="most tokens of ours per forward pass (default: any number)")
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--trl_flags", default="{}", help="more settings of TRL's config, as JSON")
    parser.add_argument("--output", type=Path, help="folder for every measurement, as JSON")
    parser.add_argument("--table", type=Path, nargs="+", help="measure nothing: print what such files hold, together")
    options = parser.parse_args()
    if options.table:
        said = [json.loads(path.read_text()) for path in options.table]
    else:
        said = [measure(shape, options) for shape in options.shape]
    for shape in dict.fromkeys(part["shape"] for part in said):
        parts = [part for part in said if part["shape"] == shape]
        repeats = [repeat for part in parts for repeat in part["repeats"]]
        about = ", ".join(
            dict.fromkeys(f"{part['model']}, {part['rows']} rows a batch, {part['commit']}" for part in parts)
        )
        print(f"\n{shape}: {dataclasses.asdict(SHAPES[shape])}, {about}, {len(repeats)} repeats\n")
        print("\n".join(table(repeats)))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All repeats of one shape, each a dict of results by side; written to ``--output`` after each side."""
    shape = SHAPES[name]
    rows = min(options.micro_batch_size, shape.rows)
    said = {"shape": name, "model": options.model, "rows": rows, "commit": commit(), "flags": options.trl_flags}
    said |= {"checkpointing": options.checkpointing, "token_budget": options.token_budget}
    said["repeats"] = []
    with tempfile.TemporaryDirectory() as folder:
        record = str(Path(folder) / "record.json")
        ours = [sys.executable, str(HERE / "ours.py"), "--record", record, "--micro_batch_size", str(rows)]
        last_line([*ours, "--make", options.model, json.dumps(dataclasses.asdict(shape))])
        theirs = [options.trl_python, str(HERE / "trl_side.py"), *ours[2:], "--flags", options.trl_flags]
        ours += ["--checkpointing", options.checkpointing]
        ours += ["--token_budget", str(options.token_budget)] * bool(options.token_budget)
        for number in range(options.repeats):
            results: dict[str, Any] = {}
            said["repeats"].append(results)
            for side in (side for method in options.methods for side in SIDES[method]):
                start = theirs if side.startswith("trl-") else ours
                results[side] = json.loads(last_line([*start, "--method", side.removeprefix("trl-")]))
                found = last(results[side])
                shown = {k: round(found[k], 2) for k in ("rollout_s", "train_s")} | {"peak_mib": found["peak"] // MIB}
                progress(f"{name}, repeat {number + 1}, {side}: {shown}")
                if options.output:
                    (options.output / f"vs_trl-{name}.json").write_text(json.dumps(said, indent=1))
            same_work(results)
    return said


def same_work(results: dict[str, Any], tolerance: float = 1e-3) -> None:
    """Both sides' gradient norms of every step, and SDPO's losses, must agree."""
    for ours, theirs in (pair for pair in LIKE.items() if pair[0] != "vpd" and not set(pair) - set(results)):
        for mine, other in zip(results[ours]["steps"], results[theirs]["steps"], strict=True):
            for key in ("grad_norm", "loss") if ours == "sdpo" else ("grad_norm",):
                if abs(mine[key] - other[key]) > tolerance * abs(other[key]):
                    raise SystemExit(f"{ours} and {theirs} did different work: {key} {mine[key]} and {other[key]}")


def last(result: dict[str, Any], *, e_step: bool = False) -> dict[str, float]:
    """The last iteration with or without an E-step; whole = rollout + train, above = peak less the fixed part."""
    step = dict([s for s in result["steps"] if s["e_step"] == e_step][-1])
    step |= {key: result[key] for key in ("rollout_s", "score_s")}
    peak = max(step["train_peak"], result["rollout_peak"])
    return step | {"whole_s": step["rollout_s"] + step["train_s"], "peak": peak, "above": peak - result["fixed"]}


def average(result: dict[str, Any]) -> dict[str, float]:
    """VPD's mean iteration: seconds 4:1, memory of the larger."""
    without, with_e = last(result), last(result, e_step=True)
    return {
        k: max(without[k], with_e[k]) if k in ("peak", "above") else (4 * without[k] + with_e[k]) / 5 for k in without
    }


def table(repeats: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a row for each of our methods beside TRL's, then the ratios."""
    names = {
        "whole_s": "whole s",
        "train_s": "train s",
        "rollout_s": "rollout s",
        "score_s": "score s",
    }
    lines = [f"| | {' | '.join(names.values())} | peak MiB | above MiB |", "|---|" + "---|" * (len(names) + 2)]
    kinds = {
        "VPD, no E-step": ("vpd", last),
        "VPD, E-step": ("vpd", lambda result: last(result, e_step=True)),
        "VPD, average": ("vpd", average),
        "SDPO": ("sdpo", last),
        "TRL SDPO": ("trl-sdpo", last),
        "GRPO": ("grpo", last),
        "TRL GRPO": ("trl-grpo", last),
    }
    for label, (side, read) in kinds.items():
        found = [read(results[side]) for results in repeats if side in results]
        if found:
            cells = [spread([f[k] for f in found], 1) for k in names]
            cells += [spread([f[k] / MIB for f in found], 0) for k in ("peak", "above")]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    for label, (side, read) in kinds.items():
        both = [results for results in repeats if side in LIKE and side in results and LIKE[side] in results]
        if both:
            pairs = [(read(results[side]), last(results[LIKE[side]])) for results in both]
            cells = [spread([a[k] / b[k] for a, b in pairs]) for k in (*names, "peak", "above")]
            lines.append(f"| {label} / {LIKE[side].replace('trl-', 'TRL ').upper()} | {' | '.join(cells)} |")
    added = [average(r["vpd"])["whole_s"] / last(r["vpd"])["whole_s"] - 1 for r in repeats if "vpd" in r]
    if added:
        lines += ["", f"The E-step adds {statistics.median(added):.0%} to the average iteration."]
    return lines


if __name__ == "__main__":
    main()
