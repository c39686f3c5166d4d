"""What a base is trained with before a method begins: language dynamics (LDD), or answers that succeeded (SFT).

Both read the same transcripts of the base, and cost the same: as many updates on as many rows, with the same rate.  LDD
looks at the environment's text and at no outcome; SFT at the outcomes, for it learns the attempts that succeeded, and
where none did the base stays as it is.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpd.config import parse
from vpd.config.collect import CollectOptions
from vpd.lab.reproduce.settings_table import Family
from vpd.prompts.settings import save_settings
from vpd.recipes.assemble import assemble
from vpd.recipes.collect import collect
from vpd.recipes.loops import make_loop

SEED = 7  # of the tasks; those of the method are others


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """``name``: ldd or sft; ``base``: name and seed, of weights of ``dtype``; ``length`` of an answer; ``env``: the
    whole section.
    """

    name: str
    base: tuple[str, int]
    dtype: str = "float32"
    length: int
    env: Mapping[str, Any]
    family: Family

    def as_data(self) -> dict[str, Any]:
        """All that its result depends on, besides the code and the run that follows."""
        sizes = asdict(self.family.warming)
        return {
            "name": self.name,
            "base": self.base,
            "dtype": self.dtype,
            "length": self.length,
            "env": self.env,
            "first_seed": SEED,
        } | sizes


def warm_up(warmup: Warmup, base: Path, folder: Path) -> Path:
    """Collect transcripts of the base in ``folder``, train it on them, and give the folder of the model."""
    family, sizes = warmup.family, warmup.family.warming
    common = {
        "model": {"name_or_path": str(base), "dtype": warmup.dtype},
        "prompts": dict(family.prompts),
        "optim": {**family.optim, "learning_rate": sizes.rate},
        "run": {"max_steps": sizes.steps, "seed": 1000 * SEED + warmup.base[1]},
    }
    rollout = {"max_completion_length": warmup.length, **family.rollout}
    log = folder / "transcripts.jsonl"
    batch = {**rollout, "prompts_per_step": sizes.batch, "num_generations": 1}
    sampled = parse(common | {"env": dict(warmup.env), "algorithm": {"name": warmup.name}, "rollout": batch})
    collect(sampled, log, CollectOptions(tasks=sizes.tasks, outcome=warmup.name == "sft"))
    if warmup.name == "sft" and not any(json.loads(line)["success"] for line in log.read_text().splitlines()):
        return base
    recorded = {"name": "recorded", "path": str(log), "only": "success" if warmup.name == "sft" else "all"}
    rows = {**rollout, "prompts_per_step": sizes.rows}
    parts = assemble(parse(common | {"env": recorded, "algorithm": {"name": warmup.name}, "rollout": rows}))
    make_loop(parts, [], output=None).run()
    parts.learner.export(folder)
    parts.tokenizer.save_pretrained(folder / "model")
    save_settings(parts.prompter.settings, folder / "model")
    return folder / "model"
