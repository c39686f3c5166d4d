"""``vpd reproduce``: plan, run, judge, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vpd.errors import ConfigError, StorageError, nearest
from vpd.lab.reproduce.claims import Claim, Finding, Suite, difference_text, judge
from vpd.lab.reproduce.methods import RATES, load_rates, rate_of
from vpd.lab.reproduce.paper import CLAIMS
from vpd.lab.reproduce.regimes import regime
from vpd.lab.reproduce.report import STYLES, write_report
from vpd.lab.reproduce.run import Job, Run, make_all
from vpd.lab.reproduce.tune import SEEDS as TUNING_SEEDS
from vpd.lab.reproduce.tune import tune

LEVEL: Mapping[Suite, int] = {"quick": 0, "default": 1, "all": 2}
SEEDS: Mapping[Suite, int] = {"quick": 1, "default": 3, "all": 3}
SIDE_SEEDS = 3  # the most that a claim gets which is not a main one


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    output: Path
    regimes: tuple[str, ...] = ()
    suite: Suite = "default"
    only: tuple[str, ...] = ()
    seeds: int | None = None
    first_seed: int = 0
    jobs: int = 1
    rates: Path = RATES

    def __post_init__(self) -> None:
        for name, value in (("--seeds", 1 if self.seeds is None else self.seeds), ("--jobs", self.jobs)):
            if value < 1:
                raise ConfigError(f"{name} is too small", got=value, expected="at least 1")
        if self.first_seed < 0:
            raise ConfigError("--first_seed is negative", got=self.first_seed)
        for name in self.regimes:
            regime(name)
        for name in self.only:
            if name not in CLAIMS:
                raise ConfigError(f"unknown claim {name!r}", do=nearest(name, CLAIMS))

    def claims(self) -> list[Claim]:
        """The claims to test: those named, else the suite's; of the regimes named, else of all."""
        chosen = [
            claim
            for claim in CLAIMS.values()
            if (claim.name in self.only if self.only else LEVEL[claim.suite] <= LEVEL[self.suite])
            and (not self.regimes or claim.regime in self.regimes)
        ]
        if not chosen:
            raise ConfigError(
                "no claim is left to test",
                got=f"regimes {', '.join(self.regimes)}, suite {self.suite}"
                + f", only {', '.join(self.only)}" * bool(self.only),
                do="Name other regimes, or add --all.",
            )
        return chosen

    def seeds_of(self, claim: Claim) -> range:
        count = self.seeds or SEEDS[self.suite]
        return range(self.first_seed, self.first_seed + (count if claim.main else min(count, SIDE_SEEDS)))


def reproduce(options: Options, console: Console | None = None) -> list[Finding]:
    """Make the runs of a plan, judge the claims, and write ``claims.json``, ``reproduction.md`` and pictures."""
    console = console or Console()
    claims = options.claims()
    jobs = plan(claims, options, load_rates(options.rates))
    folder = prepare(options.output)
    made = make_all(jobs, folder, processes=options.jobs, console=console)
    runs: dict[tuple[str, str], dict[int, Run]] = {}
    for job, run in sorted(made.items()):
        runs.setdefault((job.regime, job.method), {})[job.seed] = run
    findings = [judge(claim, runs) for claim in claims]
    console.print(table(findings))
    for path in write_report(findings, runs, options.output, rates=options.rates):
        console.print(f"Written: {path}", highlight=False)
    return findings


def plan(claims: Sequence[Claim], options: Options, rates: Mapping[str, Mapping[str, float]]) -> list[Job]:
    """Every run that the claims compare, once."""
    jobs = [
        Job(regime=claim.regime, method=who, seed=seed, learning_rate=rate_of(rates, claim.regime, who))
        for claim in claims
        for who in claim.methods()
        for seed in options.seeds_of(claim)
    ]
    return list(dict.fromkeys(jobs))


def tune_rates(options: Options, console: Console | None = None) -> Path:
    """Choose the learning rates of everything that the options' claims compare."""
    prepare(options.output)
    pairs = [(claim.regime, who) for claim in options.claims() for who in claim.methods()]
    return tune(
        pairs,
        options.output,
        known=options.rates,
        seeds=options.seeds or TUNING_SEEDS,
        processes=options.jobs,
        console=console or Console(),
    )


def prepare(output: Path) -> Path:
    """Make the folder of raw runs and prove that it can be written."""
    folder = output / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {output}", got=error.strerror, do="Choose another --output_dir."
        ) from error
    return folder


def table(findings: Sequence[Finding]) -> Table:
    """The verdicts for a terminal."""
    shown = Table("regime", "claim", "difference", "n", "verdict", title="Claims", title_justify="left")
    for finding in findings:
        for number, comparison in enumerate(finding.numbers):
            difference = difference_text(comparison["mean"], comparison["standard_error"], comparison["n"])
            verdict = comparison["verdict"]
            first = number == 0
            shown.add_row(
                finding.claim.regime if first else "",
                finding.claim.statement if first else "",
                difference,
                str(comparison["n"]),
                f"[{STYLES[verdict]}]{verdict}[/]",
            )
    return shown
