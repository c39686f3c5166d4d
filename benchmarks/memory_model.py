"""The dry run's memory model against measured peaks: one process for each setting, a small Qwen3 with random weights.

    python benchmarks/memory_model.py

Measured is the process's peak resident size (on a GPU: what torch allocates there) in two iterations of VPD, each with
an E-step, less what it held before the model was made (and after a first iteration of a very small one).  Computed are
the fixed items and the larger of the two updates' peaks, as ``vpd train --dry_run`` has them.
``MALLOC_MMAP_THRESHOLD_`` gives freed blocks back at once, so that what is resident is in use.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from material import Shape
from memory import Kept, random_groups
from meters import commit, last_line, machine, peak, progress, reset_peak, resident
from transformers import AutoModelForCausalLM, Qwen3Config

from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.estimate.architecture import Architecture
from vpd.estimate.memory import Trained, Weights, update_peak
from vpd.estimate.rehearsal import Rehearsal
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings
from vpd.model import lora
from vpd.model.settings import LoraSettings, ModelSettings

MIB = 1 << 20
SHAPE = Shape(prompts=4, generations=4, prompt=128, feedback=32, completion=128)
BASE: dict[str, Any] = {
    "vocabulary": 32_768, "layers": 8, "dtype": "float32", "checkpointing": "none", "teacher": "ema", "lora": False,
    "tokens": None, "share": True, "tied": True, "autocast": "no",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "fp32, nothing computed again, EMA teacher": {},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "live teacher": {"teacher": "live"},
    "frozen teacher": {"teacher": "trust_region"},
    "LoRA on all layers, selective": {"lora": True, "checkpointing": "selective"},
    "bf16 with fp32 masters": {"dtype": "bfloat16"},
    "bf16 with fp32 masters, selective": {"dtype": "bfloat16", "checkpointing": "selective"},
    "bf16 with fp32 masters, full, live": {"dtype": "bfloat16", "checkpointing": "full", "teacher": "live"},
    "fp32, autocast to bf16": {"autocast": "bf16"},
    "micro-batches of 512 tokens": {"tokens": 512},
    "bf16, micro-batches of 512 tokens": {"tokens": 512, "dtype": "bfloat16"},
    "rows computed alone": {"share": False},
    "vocabulary 2 048": {"vocabulary": 2048},
    "vocabulary 151 936": {"vocabulary": 151_936, "checkpointing": "selective"},
    "vocabulary 151 936, untied": {"vocabulary": 151_936, "checkpointing": "selective", "tied": False},
    "16 layers, selective": {"layers": 16, "checkpointing": "selective"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other (default 1)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        print(measured(options.case))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    lines = [
        f"{commit()}, torch {torch.__version__}, {machine()}",
        "",
        "| setting | measured MiB | computed MiB | computed / measured |",
    ]
    lines.append("|---|---|---|---|")
    ratios = []
    cases = {name: BASE | change for name, change in CASES.items() if (options.only or "") in name}
    words = [[sys.executable, __file__, "--case", json.dumps(case)] for case in cases.values()]
    with ThreadPoolExecutor(options.jobs) as pool:
        peaks = [int(line) for line in pool.map(last_line, words)]
    for (name, case), found in zip(cases.items(), peaks, strict=True):
        said = computed(case)
        ratios.append(said / found)
        lines.append(f"| {name} | {found / MIB:.0f} | {said / MIB:.0f} | {said / found:.2f} |")
        progress(lines[-1])
    print("\n".join(lines))
    print(f"\nfarthest from 1: {max(ratios, key=lambda ratio: abs(ratio - 1)):.2f}")


def architecture(case: dict[str, Any], *, small: bool = False) -> Architecture:
    hidden = 64 if small else 512
    config = Qwen3Config(
        vocab_size=2048 if small else case["vocabulary"],
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=2 if small else case["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        tie_word_embeddings=case["tied"],
        bos_token_id=None,
        eos_token_id=None,
    )
    return Architecture(config=config, origin="this script")


def settings(case: dict[str, Any]) -> tuple[ModelSettings, OptimSettings, VPDSettings]:
    adapter = LoraSettings(target_modules="all-linear") if case["lora"] else None
    return (
        ModelSettings(dtype=case["dtype"], lora=adapter),
        OptimSettings(
            gradient_checkpointing=case["checkpointing"],
            max_tokens_per_microbatch=case["tokens"],
            share_prefixes=case["share"],
            mixed_precision=case["autocast"],
        ),
        VPDSettings(e_every=1, teacher=case["teacher"]),
    )


def measured(case: dict[str, Any]) -> int:
    """Bytes of this process at the peak of two iterations, above what it held before."""
    iterate(case, small=True)
    before = resident()
    reset_peak()
    iterate(case)
    return peak() - before


def iterate(case: dict[str, Any], *, small: bool = False) -> None:
    model_settings, optim, algorithm = settings(case)
    torch.manual_seed(0)
    made = architecture(case, small=small)
    model = AutoModelForCausalLM.from_config(made.config, dtype=getattr(torch, case["dtype"]))
    if model_settings.lora is not None:
        lora.attach(model, model_settings.lora, seed=0)
    learner = AccelerateLearner(model, optim, teacher=algorithm.teacher_settings())
    method, groups = VPD(algorithm, Kept()), random_groups(SHAPE, made.config.vocab_size)
    for _ in range(2):  # the optimiser's moments appear at the end of the first
        method.step(groups, learner)
        learner.end_iteration()


def computed(case: dict[str, Any]) -> int:
    """The same by the dry run's model."""
    model_settings, optim, algorithm = settings(case)
    made = architecture(case)
    trained = Trained(
        architecture=made,
        model=model_settings,
        optim=optim,
        teacher=algorithm.teacher_settings(),
        on_gpu=torch.cuda.is_available(),
    )
    rehearsal = Rehearsal()
    VPD(algorithm, Kept()).step(random_groups(SHAPE, made.config.vocab_size), rehearsal)
    peaks = [update_peak(trained, call).bytes for call in rehearsal.calls if call.kind == "update"]
    return sum(item.bytes for item in Weights(trained).fixed()) + max(peaks)


if __name__ == "__main__":
    main()
