"""The command ``vpd``: train, eval, check, demo, reproduce, model.

A user's mistake is one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import json
import os
import sys
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPRODUCE = """\
Writes claims.json, reproduction.md (claims with their numbers and verdicts) and a picture of each setting to
--output_dir. Raw runs stay in its runs/ and are used again while configuration and code are the same, so the same
command continues an interrupted suite.

settings (SETTING): sparse sibling self_critique rigid cold noisy partial changing

Base models for seeds other than 0 are made on first use (under a minute each) and cached in $VPD_CACHE, else
$XDG_CACHE_HOME/vpd, else ~/.cache/vpd. The default suite takes about 15 minutes with --jobs 2.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a VPDError into one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    from vpd.errors import VPDError

    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_settings:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        options.command(options, rest)
    except VPDError as error:
        print(f"vpd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vpd: interrupted; checkpoints already written are whole", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vpd", description="Post-train language models from language feedback.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: Any, text: str, *, settings: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
        sub.set_defaults(command=function, takes_settings=settings)
        if settings:
            sub.add_argument("--config", help="YAML file of settings; --section.key value overrides it")
            if "--help" in sys.argv or "-h" in sys.argv:
                sub.epilog = _settings_help()
        return sub

    command("train", _train, "Train a model: VPD, SDPO, GKD or GRPO.", settings=True)
    evaluation = command("eval", _eval, "avg@k and pass@k on held-out tasks, with standard errors.", settings=True)
    evaluation.add_argument("--num_samples", type=int, default=8, help="k, answers per task (default 8)")
    evaluation.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    evaluation.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    evaluation.add_argument("--limit", type=int, help="at most so many held-out tasks (default all)")
    evaluation.add_argument("--teacher", action="store_true", help="answer failed attempts again, with their feedback")
    evaluation.add_argument("--output", help="also write the numbers to this JSON file")
    check = command("check", _check, "Test an environment: does it keep what training relies on?", settings=True)
    check.add_argument("env", help="digits, ... or my_env.py:MyEnv; its settings follow as --env.key value")
    check.add_argument("--tasks", type=int, default=32, help="training tasks to draw (default 32)")
    check.add_argument("--seed", type=int, default=0, help="that they are drawn with (default 0)")
    demo = command(
        "demo",
        _demo,
        "GRPO, SDPO, VPD and evidence-gated VPD learn one task from one tiny model, in about a minute on two cores.",
        settings=False,
    )
    demo.add_argument(
        "--output_dir", default="demo-out", help="where results.json and curves.png go (default demo-out)"
    )
    demo.add_argument("--seeds", type=int, default=1, help="runs per method (default 1)")
    demo.add_argument("--steps", type=int, default=100, help="iterations per run (default 100)")
    demo.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    suite = command("reproduce", _reproduce, "Test the paper's claims in miniature, on a CPU.", settings=False)
    suite.epilog = REPRODUCE
    suite.add_argument("settings", nargs="*", metavar="SETTING", help="only the claims of these settings (default all)")
    size = suite.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two minutes: shipped bases, one seed, two settings")
    size.add_argument("--all", action="store_true", help="all claims, at most 90 minutes on two cores")
    suite.add_argument("--only", action="append", default=[], metavar="CLAIM", help="test only this claim (repeatable)")
    suite.add_argument(
        "--seeds", type=int, help="runs per method (default 3, with --quick 1; side claims get at most 3)"
    )
    suite.add_argument("--first_seed", type=int, default=0, help="first seed (default 0)")
    suite.add_argument("--jobs", type=int, default=1, help="parallel processes of one thread each (default 1)")
    suite.add_argument(
        "--tune", action="store_true", help="choose learning rates instead of testing claims; writes rates.yaml"
    )
    suite.add_argument("--rates", type=Path, help="rates.yaml written by --tune (default: the shipped table)")
    suite.add_argument("--output_dir", type=Path, default=Path("reproduce-out"), help="(default reproduce-out)")
    model = command("model", _model, "Make a from_pretrained folder: smollm2-135m, or tiny anew.", settings=False)
    model.add_argument("name", choices=["smollm2-135m", "tiny"])
    model.add_argument("folder", type=Path)
    model.add_argument("--seed", type=int, help="tiny: seed of its weights and warm-up (default 0)")
    return parser


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.recipes.train import train

    train(load(options.config, rest))


def _eval(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.errors import ConfigError
    from vpd.evaluate import EvalSettings
    from vpd.recipes.evaluation import run_eval, show

    if options.num_samples < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("eval needs --num_samples >= 1, --temperature >= 0 and --top_p in (0, 1]")
    config = load(options.config, rest)
    settings = EvalSettings(
        sampling=dataclasses.replace(config.rollout.sampling, temperature=options.temperature, top_p=options.top_p),
        num_samples=options.num_samples,
        success_threshold=config.rollout.success_threshold,
        seed=config.run.seed,
    )
    result = run_eval(config, settings, limit=options.limit, teacher=options.teacher)
    rows = [("student", result.student)] + ([("teacher", result.teacher)] if options.teacher else [])
    show(rows, options.num_samples)
    if options.output:
        Path(options.output).write_text(json.dumps(dict(rows), indent=1))


def _check(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.recipes.check import check

    check(load(options.config, ["--env.name", options.env, *rest]).env, tasks=options.tasks, seed=options.seed)


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.lab.demo import demo

    demo(Path(options.output_dir), seeds=options.seeds, steps=options.steps, first_seed=options.seed)


def _reproduce(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.lab.reproduce.methods import RATES
    from vpd.lab.reproduce.suite import Options, reproduce, tune_rates

    chosen = Options(
        output=options.output_dir,
        settings=tuple(options.settings),
        suite="quick" if options.quick else "all" if options.all else "default",
        only=tuple(options.only),
        seeds=options.seeds,
        first_seed=options.first_seed,
        jobs=options.jobs,
        rates=options.rates or RATES,
    )
    if options.tune:
        tune_rates(chosen)
    else:
        reproduce(chosen)


def _model(options: argparse.Namespace, rest: list[str]) -> None:
    if options.name == "tiny":
        from vpd.lab import tiny

        tiny.build(options.folder, tiny.SEED if options.seed is None else options.seed)
    else:
        from vpd.lab import smollm2

        smollm2.build(options.folder)
    print(f"{options.folder} is ready: --model.name_or_path {options.folder}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's layout."""


def _settings_help() -> str:
    """Every setting with its default and meaning, read off the dataclasses themselves."""
    from vpd.config import ALGORITHMS, ENVS, PLAIN, SOURCES
    from vpd.model.lora import LoraSettings

    lines = ["settings (in the file, or as --section.key value):"]
    named = [
        (f"{section} (name: {name})", kind)
        for section, kinds in (("env", ENVS), ("feedback", SOURCES), ("algorithm", ALGORITHMS))
        for name, kind in kinds.items()
    ]
    for title, kind in [*PLAIN.items(), ("model.lora", LoraSettings), *named]:
        lines.append(f"\n  {title}")
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            if field.name == "name" or not field.init:
                continue
            meaning = next(iter(getattr(hints[field.name], "__metadata__", [""])))
            default = "" if field.default is dataclasses.MISSING else f" [{_show(field.default)}]"
            lines.append(f"    {field.name:<30}{meaning}{default}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main())
