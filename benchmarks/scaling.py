"""The tables of docs/scaling.md, computed by the dry run's memory model; nothing is measured.

python benchmarks/scaling.py
"""

from typing import Any

from vpd.config import Config, parse
from vpd.estimate.settings import DryRunSettings
from vpd.recipes.dry_run import dry_run

GIB = 1 << 30
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
WHOLE, ADAPTER = "all weights", "LoRA, r 32"
LENGTHS = {"short": (512, 1024), "paper": (2048, 8192)}  # prompt, longest answer
ONE_GPU = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
MANY = (("Qwen/Qwen3-8B", 1), ("Qwen/Qwen3-8B", 8), ("Qwen/Qwen3-8B", 64), ("meta-llama/Llama-3.3-70B-Instruct", 8),
        ("meta-llama/Llama-3.3-70B-Instruct", 64))  # fmt: skip
MANY_ADAPTERS = (("Qwen/Qwen3-8B", 8), ("meta-llama/Llama-3.3-70B-Instruct", 8))


def config_of(
    model: str, lengths: str, *, adapter: bool, rows: int = 16, checkpointing: str = "full", shards: bool = False
) -> Config:
    prompt, answer = LENGTHS[lengths]
    optim = {"gradient_checkpointing": checkpointing, "max_tokens_per_microbatch": prompt + answer}
    dtype = "float32" if shards and not adapter else "bfloat16"
    optim |= {"sharding": "fsdp2"} if shards else {}
    if shards and not adapter:
        optim |= {"mixed_precision": "bf16"}
    settings: dict[str, Any] = {
        "model": {"name_or_path": model, "dtype": dtype, "lora": LORA if adapter else None},
        "env": {"name": "digits"},
        "feedback": ["environment", "sibling"],
        "prompts": {"max_demonstration_length": answer - 1024 if answer > 1024 else 512},
        "rollout": {
            "prompts_per_step": 8, "num_generations": 8, "max_completion_length": answer, "max_rows": rows,
        },
        "algorithm": {"name": "vpd", "distillation_topk": 100},
        "optim": optim,
        "run": {"max_steps": 5},
    }  # fmt: skip
    return parse(settings)


def one_gpu() -> list[str]:
    lines = ["| model | trained | lengths | needs, GiB | 24 GB | 80 GB |", "|---|---|---|---|---|---|"]
    for model in ONE_GPU:
        for trained in (WHOLE, ADAPTER):
            for lengths, (prompt, answer) in LENGTHS.items():
                rows = 4 if lengths == "paper" else 16
                machine = DryRunSettings(prompt_tokens=prompt, memory_gb=80, context_gb=1.5)
                config = config_of(model, lengths, adapter=trained == ADAPTER, rows=rows)
                peak = dry_run(config, machine).estimate.peak / GIB
                cells = ["**yes**" if peak <= size else "no" for size in (24, 80)]
                short = model.rpartition("/")[2]
                lines.append(f"| {short} | {trained} | {prompt} + {answer} | {peak:.1f} | {' | '.join(cells)} |")
    return lines


def many_gpus(*, adapter: bool) -> list[str]:
    lines = [
        "| model | GPUs that train | checkpointing | fixed | e_step | m_step | all, GiB of 80 | fits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, gpus in MANY_ADAPTERS if adapter else MANY:
        for checkpointing in ("selective", "full"):
            machine = DryRunSettings(gpus=gpus, server_gpus=max(gpus // 4, 1), prompt_tokens=2048)
            config = config_of(model, "paper", adapter=adapter, checkpointing=checkpointing, shards=gpus > 1)
            found = dry_run(config, machine).estimate
            fixed = sum(item.bytes for item in found.fixed) / GIB
            added = {stage.name: stage.added / GIB for stage in found.stages}
            fits = "**yes**" if found.peak <= found.available else "no"
            cells = f"{fixed:.1f} | {added['e_step']:.1f} | {added['m_step']:.1f} | {found.peak / GIB:.1f} | {fits}"
            lines.append(f"| {model.rpartition('/')[2]} | {gpus} | {checkpointing} | {cells} |")
    return lines


if __name__ == "__main__":
    print("\n".join(one_gpu()), flush=True)
    print()
    print("\n".join(many_gpus(adapter=False)), flush=True)
    print()
    print("\n".join(many_gpus(adapter=True)))
