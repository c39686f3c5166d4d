"""The list of claims."""

from vpd.lab.reproduce.claims import Claim, Comparison, Suite
from vpd.lab.reproduce.regimes import REGIMES

PAPER = "the paper"
OURS = "ours"


def _above(left: str, right: str | float, measure: str = "final", **more: object) -> Comparison:
    return Comparison(measure=measure, left=left, right=right, **more)  # type: ignore[arg-type]


def _below(left: str, bound: float, measure: str, **more: object) -> Comparison:
    return Comparison(measure=measure, left=left, right=bound, sign=-1, **more)  # type: ignore[arg-type]


SPARSE = (
    Claim(
        name="vpd_over_sdpo",
        regime="sparse",
        statement="Where reward is sparse and the text informs, VPD ends above SDPO.",
        source=f"{PAPER}, main tables",
        comparisons=(_above("vpd", "sdpo"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="vpd_over_sdpo_at_best",
        regime="sparse",
        statement="The same, each at the best of its evaluations.",
        source=f"{PAPER}, main tables",
        comparisons=(_above("vpd", "sdpo", "peak"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="vpd_over_grpo",
        regime="sparse",
        statement="Where reward is sparse and the text informs, VPD ends above GRPO.",
        source=f"{PAPER}, main tables",
        comparisons=(_above("vpd", "grpo"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="teacher_rises",
        regime="sparse",
        statement="Trained on outcomes, the teacher gets better.",
        source=f"{PAPER}, teacher's accuracy",
        comparisons=(_above("vpd", 0.0, "teacher_peak", less="teacher_start"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="teacher_over_sdpo",
        regime="sparse",
        statement="VPD's teacher gets better than SDPO's, which is never trained.",
        source=f"{PAPER}, teacher's accuracy",
        comparisons=(_above("vpd", "sdpo", "teacher_peak"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="e_step_tells",
        regime="sparse",
        statement="The E-step's implicit reward tells successes from failures (balanced accuracy above .6).",
        source=f"{PAPER}, E-step",
        comparisons=(_above("vpd", 0.6, "e_accuracy"),),
    ),
    Claim(
        name="e_step_drift",
        regime="sparse",
        statement="An E-step moves the feedback-free student little (KL below .01 nats a token).",
        source=f"{PAPER}, E-step on shared weights",
        comparisons=(_below("vpd", 0.01, "drift", least=0.0),),
    ),
    Claim(
        name="dynamic_prior",
        regime="sparse",
        statement="The current student is a better prior of the E-step than the initial one.",
        source=f"{PAPER}, ablation of the prior (74.3 against 67.8)",
        comparisons=(_above("vpd", "vpd_fixed"),),
        main=True,
    ),
    Claim(
        name="f_5_over_1",
        regime="sparse",
        statement="One E-step in five iterations is better than one in each.",
        source=f"{PAPER}, ablation of F (74.3 against 70.2)",
        comparisons=(_above("vpd", "vpd_f1"),),
    ),
    Claim(
        name="f_5_over_10",
        regime="sparse",
        statement="One E-step in five iterations is better than one in ten.",
        source=f"{PAPER}, ablation of F (74.3 against 69.3)",
        comparisons=(_above("vpd", "vpd_f10"),),
    ),
    Claim(
        name="vpd_over_sdpo_paper",
        regime="sparse",
        statement="VPD ends above SDPO also with a live teacher (VPD: reverse KL, the paper's reading).",
        source=f"{PAPER}, main tables",
        comparisons=(_above("vpd_paper", "sdpo_live"),),
        suite="all",
    ),
    Claim(
        name="vpd_over_reshape",
        regime="sparse",
        statement="VPD ends above the additive hybrid AdvReshape.",
        source=f"{PAPER}, hybrids",
        comparisons=(_above("vpd", "reshape"),),
        suite="all",
    ),
    Claim(
        name="vpd_over_reweight",
        regime="sparse",
        statement="VPD ends above the multiplicative hybrid AdvReweight.",
        source=f"{PAPER}, hybrids",
        comparisons=(_above("vpd", "reweight"),),
        suite="all",
    ),
    Claim(
        name="gkd_over_vpd",
        regime="sparse",
        statement="An external teacher that is right 95 % of the time per digit teaches more than one's own.",
        source="GKD, arXiv 2306.13649",
        comparisons=(_above("gkd", "vpd"),),
        suite="all",
    ),
)


def _source(regime: str, words: str, suite: Suite) -> Claim:
    return Claim(
        name=f"{regime}_vpd_over_sdpo",
        regime=regime,
        statement=f"With {words} as the only text, VPD ends above SDPO.",
        source=f"{PAPER}, sources of feedback",
        comparisons=(_above("vpd", "sdpo"),),
        suite=suite,
    )


SOURCES_OF_TEXT = (
    _source("sibling", "a sibling's answer", "default"),
    _source("self_critique", "the model's own critique", "all"),
)


def _limits(regime: str, where: str, suite: Suite) -> tuple[Claim, ...]:
    return (
        Claim(
            name=f"{regime}_grpo_wins",
            regime=regime,
            statement=f"{where}, GRPO ends above SDPO and VPD.",
            source=f"{PAPER}, limits",
            comparisons=(_above("grpo", "sdpo"), _above("grpo", "vpd")),
            suite=suite,
        ),
        Claim(
            name=f"{regime}_sdpo_fails",
            regime=regime,
            statement=f"{where}, SDPO collapses: it ends below where it started.",
            source=f"{PAPER}, limits",
            comparisons=(_below("sdpo", 0.0, "final", less="start", least=0.005),),
            suite=suite,
        ),
        Claim(
            name=f"{regime}_vpd_later",
            regime=regime,
            statement=f"{where}, VPD holds out longer than SDPO (mean over the run).",
            source=f"{PAPER}, limits",
            comparisons=(_above("vpd", "sdpo", "mean"),),
            suite=suite,
        ),
    )


LIMITS = (
    *_limits("cold", "From a base that cannot read the text", "quick"),
    *_limits("rigid", "Where the text says no more than the verdict", "default"),
)

RIVALS = ("grpo", "sdpo", "vpd", "reshape")
SCARCE = ("sparse", "noisy", "partial", "changing")  # where reward alone does not get far


def _gated(regime: str, suite: Suite) -> tuple[Claim, ...]:
    source = OURS + (", a regime it was not designed on" if REGIMES[regime].tuned_as else "")
    never_worse = Claim(
        name=f"gated_{regime}",
        regime=regime,
        statement="Gated VPD is not worse than the best of GRPO, SDPO, VPD and AdvReshape: at the end, over the run.",
        source=source,
        comparisons=tuple(
            Comparison(measure=measure, left="gated", right=RIVALS, least=0.0) for measure in ("final", "mean")
        ),
        suite=suite,
        main=True,
    )
    if regime not in SCARCE:
        return (never_worse,)
    return (
        never_worse,
        Claim(
            name=f"gated_above_{regime}",
            regime=regime,
            statement="Where reward is sparse, gated VPD ends above every one of them.",
            source=source,
            comparisons=tuple(_above("gated", rival) for rival in RIVALS),
            suite=suite,
            main=True,
        ),
        Claim(
            name=f"gated_e_step_{regime}",
            regime=regime,
            statement="In gated VPD an E-step helps (mean over the run): one in five iterations, one in each.",
            source=OURS,
            comparisons=(_above("gated", "gated_no_e", "mean"), _above("gated_f1", "gated_no_e", "mean")),
            suite="all",
            main=True,
        ),
    )


GATED = tuple(
    claim
    for name in REGIMES
    for claim in _gated(name, "quick" if name in ("sparse", "cold") else "default" if name == "rigid" else "all")
)

CLAIMS: dict[str, Claim] = {claim.name: claim for claim in (*SPARSE, *SOURCES_OF_TEXT, *LIMITS, *GATED)}
