"""What a base is trained with before a method begins: language dynamics (LDD), or answers that succeeded (SFT).

Both read the same transcripts of the base, and cost the same: as many updates on as many rows, with the same rate.  LDD
looks at the environment's text and at no outcome; SFT at the outcomes, for it learns the attempts that succeeded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vpd.config import parse
from vpd.config.collect import CollectOptions
from vpd.lab import tiny
from vpd.prompts.settings import save_settings
from vpd.recipes.assemble import assemble
from vpd.recipes.collect import collect
from vpd.recipes.train import make_loop

TASKS = 2048  # transcripts, an attempt each
STEPS, ROWS, RATE = 60, 64, 3e-4
SECONDS = 12.0  # on one core
SEED = 7  # of the tasks; those of the method are others


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """``name``: ldd or sft; ``base``: name and seed; ``length`` of an answer; ``env``: the setting's."""

    name: str
    base: tuple[str, int]
    length: int
    env: Mapping[str, Any] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """All that its result depends on, besides the code."""
        return asdict(self) | {"tasks": TASKS, "steps": STEPS, "rows": ROWS, "rate": RATE, "first_seed": SEED}


def warm_up(warmup: Warmup, base: Path, folder: Path) -> Path:
    """Collect transcripts of the base, train it on them, and give the folder of the model, inside of ``folder``."""
    common = {
        "model": {"name_or_path": str(base)},
        "prompts": asdict(tiny.TEMPLATE),
        "optim": {"learning_rate": RATE, "weight_decay": 0.0, "micro_batch_size": 128},
        "run": {"max_steps": STEPS, "seed": 1000 * SEED + warmup.base[1]},
    }
    rollout = {"max_completion_length": warmup.length, "max_rows": 512}
    env = {"name": "digits", **warmup.env}
    log = folder / "transcripts.jsonl"
    sampled = parse(common | {"env": env, "rollout": {**rollout, "prompts_per_step": 256, "num_generations": 1}})
    collect(sampled, log, CollectOptions(tasks=TASKS, outcome=warmup.name == "sft"))
    recorded = {"name": "recorded", "path": str(log), "only": "success" if warmup.name == "sft" else "all"}
    rows = {**rollout, "prompts_per_step": ROWS}
    parts = assemble(parse(common | {"env": recorded, "algorithm": {"name": warmup.name}, "rollout": rows}))
    make_loop(parts, [], output=None).run()
    parts.learner.export(folder)
    parts.tokenizer.save_pretrained(folder / "model")
    save_settings(tiny.TEMPLATE, folder / "model")
    return folder / "model"
