"""The command ``vpd reproduce``: plan the runs, make them, judge the claims, write the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vpd.errors import ConfigError, nearest
from vpd.lab.reproduce.claims import Claim, Finding, Suite, by_method, difference_text, judge
from vpd.lab.reproduce.method_table import jobs_of, write_methods
from vpd.lab.reproduce.methods import RATES, find_method, has_own_rate, load_rates, rate_of
from vpd.lab.reproduce.paper import CLAIMS
from vpd.lab.reproduce.plan import RUNS, make_all
from vpd.lab.reproduce.report import STYLES, write_report
from vpd.lab.reproduce.run import Job, dtype_of
from vpd.lab.reproduce.settings_table import TINY, find_setting
from vpd.lab.reproduce.tune import SEEDS as TUNING_SEEDS
from vpd.lab.reproduce.tune import tune
from vpd.lab.runs import OTHER_OUTPUT
from vpd.report.console import Terminal
from vpd.run_folder.files import prepare_folder

SUITES: Mapping[Suite, tuple[Suite, ...]] = {  # whose claims each suite tests
    "quick": ("quick",),
    "default": ("quick", "default"),
    "all": ("quick", "default", "all"),
    "retries": ("retries",),
    "pretrained": ("pretrained",),
    "warmups": ("warmups",),
}
SEEDS: Mapping[Suite, int] = {"quick": 1, "default": 3, "all": 3, "retries": 3, "pretrained": 3, "warmups": 3}
SIDE_SEEDS = 3  # the most seeds of a claim that is not a main claim


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's options."""

    output: Path
    settings: tuple[str, ...] = ()
    suite: Suite = "default"
    only: tuple[str, ...] = ()
    seeds: int | None = None
    first_seed: int = 0
    jobs: int = 1
    rates: Path = RATES
    methods: tuple[str, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("--seeds", 1 if self.seeds is None else self.seeds), ("--jobs", self.jobs)):
            if value < 1:
                raise ConfigError(f"{name} is too small", got=value, expected="at least 1")
        if self.first_seed < 0:
            raise ConfigError("--first_seed is negative", got=self.first_seed)
        for name in self.settings:
            find_setting(name)
        for name in self.methods:
            find_method(name)
        for name in self.only:
            if name not in CLAIMS:
                raise ConfigError(f"unknown claim {name!r}", do=nearest(name, CLAIMS))

    def claims(self) -> list[Claim]:
        """The claims to test: those named in ``only``, else the suite's; limited to ``settings`` if there are any."""
        chosen = [
            claim
            for claim in CLAIMS.values()
            if (claim.name in self.only if self.only else claim.suite in SUITES[self.suite])
            and (not self.settings or claim.setting in self.settings)
        ]
        if not chosen:
            raise ConfigError(
                "these options leave no claim to test",
                got=f"settings {', '.join(self.settings)}, suite {self.suite}"
                + f", only {', '.join(self.only)}" * bool(self.only),
                do="Name other settings, or add --all.",
            )
        return chosen

    def seeds_of(self, claim: Claim) -> range:
        count = self.seeds or SEEDS[self.suite]
        return range(self.first_seed, self.first_seed + (count if claim.main else min(count, SIDE_SEEDS)))


def reproduce(options: Options, console: Terminal | None = None) -> list[Finding]:
    """Make the runs, judge the claims, and write ``claims.json``, ``reproduction.md`` and pictures."""
    console = console or Terminal()
    claims = options.claims()
    jobs = plan(claims, options, load_rates(options.rates))
    prepare_folder(options.output / RUNS, OTHER_OUTPUT)
    runs = by_method(make_all(jobs, options.output / RUNS, processes=options.jobs, console=console))
    findings = [judge(claim, runs) for claim in claims]
    console.print(table(findings))
    for path in write_report(findings, runs, options.output, rates=options.rates):
        console.print(f"Written: {path}", highlight=False)
    return findings


def compare_methods(options: Options, console: Terminal | None = None) -> Path:
    """Run ``options.methods`` (none: all that are compared) in every setting, and write the table ``methods.md``."""
    seeds = range(options.first_seed, options.first_seed + (options.seeds or SIDE_SEEDS))
    jobs, untuned = jobs_of(options.settings, options.methods, seeds, options.rates, options.dtype)
    console = console or Terminal()
    if untuned:
        tune = "vpd reproduce --methods METHOD ... --tune, then --rates reproduce-out/rates.yaml"
        console.print(f"No learning rate, so left empty: {', '.join(untuned)}. ({tune})", highlight=False)
    if not jobs:
        raise ConfigError("no cell of the table has a learning rate", do="Tune them: vpd reproduce --methods --tune.")
    prepare_folder(options.output / RUNS, OTHER_OUTPUT)
    return write_methods(jobs, options.output, processes=options.jobs, console=console)


def plan(claims: Sequence[Claim], options: Options, rates: Mapping[str, Mapping[str, float]]) -> list[Job]:
    """Every run that the claims need, once."""
    types = {name: dtype_of(name, options.dtype) for name in dict.fromkeys(claim.setting for claim in claims)}
    jobs = [
        Job(
            setting=claim.setting,
            method=method,
            seed=seed,
            learning_rate=rate_of(rates, claim.setting, method),
            dtype=types[claim.setting],
        )
        for claim in claims
        for method in claim.methods()
        for seed in options.seeds_of(claim)
    ]
    return list(dict.fromkeys(jobs))


def tune_rates(options: Options, console: Terminal | None = None) -> Path:
    """Choose the learning rates of ``options.methods``, ablations included, in ``options.settings``.

    Without methods, of all that the options' claims compare and that do not use another method's rate.
    """
    prepare_folder(options.output / RUNS, OTHER_OUTPUT)
    pairs = (
        [(setting, method) for setting in options.settings or TINY for method in options.methods]
        if options.methods
        else [(claim.setting, name) for claim in options.claims() for name in claim.methods() if has_own_rate(name)]
    )
    return tune(
        pairs,
        options.output,
        known=options.rates,
        seeds=options.seeds or TUNING_SEEDS,
        dtype=options.dtype,
        processes=options.jobs,
        console=console or Terminal(),
    )


def table(findings: Sequence[Finding]) -> Table:
    """The verdicts as a table for the terminal."""
    shown = Table("setting", "claim", "difference", "n", "verdict", title="Claims", title_justify="left")
    for finding in findings:
        for number, comparison in enumerate(finding.numbers):
            difference = difference_text(comparison["mean"], comparison["standard_error"], comparison["n"])
            verdict = comparison["verdict"]
            first = number == 0
            shown.add_row(
                finding.claim.setting if first else "",
                finding.claim.statement if first else "",
                difference,
                str(comparison["n"]),
                f"[{STYLES[verdict]}]{verdict}[/]",
            )
    return shown
