"""The list of claims."""

from vpd.lab.reproduce.claims import OURS, Claim, Comparison, Suite, above, below
from vpd.lab.reproduce.pretrained_claims import PRETRAINED
from vpd.lab.reproduce.settings_table import SETTINGS, TINY

PAPER = "the paper"


SPARSE = (
    Claim(
        name="vpd_over_sdpo",
        setting="sparse",
        statement="Where reward is sparse and the feedback is informative, VPD ends above SDPO.",
        source=f"{PAPER}, main tables",
        comparisons=(above("vpd", "sdpo"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="vpd_over_sdpo_at_best",
        setting="sparse",
        statement="The same, each method at its best evaluation.",
        source=f"{PAPER}, main tables",
        comparisons=(above("vpd", "sdpo", "peak"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="vpd_over_grpo",
        setting="sparse",
        statement="Where reward is sparse and the feedback is informative, VPD ends above GRPO.",
        source=f"{PAPER}, main tables",
        comparisons=(above("vpd", "grpo"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="teacher_rises",
        setting="sparse",
        statement="Trained on outcomes, the teacher gets better.",
        source=f"{PAPER}, teacher's accuracy",
        comparisons=(above("vpd", 0.0, "teacher_peak", less="teacher_start"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="teacher_over_sdpo",
        setting="sparse",
        statement="VPD's teacher gets better than SDPO's, which is not trained on outcomes.",
        source=f"{PAPER}, teacher's accuracy",
        comparisons=(above("vpd", "sdpo", "teacher_peak"),),
        suite="quick",
        main=True,
    ),
    Claim(
        name="e_step_tells",
        setting="sparse",
        statement="The E-step's implicit reward tells successes from failures (balanced accuracy above .6).",
        source=f"{PAPER}, E-step",
        comparisons=(above("vpd", 0.6, "e_accuracy"),),
    ),
    Claim(
        name="e_step_drift",
        setting="sparse",
        statement="An E-step changes the student without feedback little (KL below .01 nats a token).",
        source=f"{PAPER}, E-step on shared weights",
        comparisons=(below("vpd", 0.01, "drift", least=0.0),),
    ),
    Claim(
        name="dynamic_prior",
        setting="sparse",
        statement="The current student is a better prior of the E-step than the initial one.",
        source=f"{PAPER}, ablation of the prior (74.3 against 67.8)",
        comparisons=(above("vpd", "vpd_fixed"),),
        main=True,
    ),
    Claim(
        name="f_5_over_1",
        setting="sparse",
        statement="An E-step every fifth iteration is better than one in every iteration.",
        source=f"{PAPER}, ablation of F (74.3 against 70.2)",
        comparisons=(above("vpd", "vpd_f1"),),
    ),
    Claim(
        name="f_5_over_10",
        setting="sparse",
        statement="An E-step every fifth iteration is better than one every tenth.",
        source=f"{PAPER}, ablation of F (74.3 against 69.3)",
        comparisons=(above("vpd", "vpd_f10"),),
    ),
    Claim(
        name="vpd_over_sdpo_paper",
        setting="sparse",
        statement="VPD ends above SDPO also with a live teacher (VPD: reverse KL, the paper's reading).",
        source=f"{PAPER}, main tables",
        comparisons=(above("vpd_paper", "sdpo_live"),),
        suite="all",
    ),
    Claim(
        name="vpd_over_reshape",
        setting="sparse",
        statement="VPD ends above the additive hybrid AdvReshape.",
        source=f"{PAPER}, hybrids",
        comparisons=(above("vpd", "reshape"),),
        suite="all",
    ),
    Claim(
        name="vpd_over_reweight",
        setting="sparse",
        statement="VPD ends above the multiplicative hybrid AdvReweight.",
        source=f"{PAPER}, hybrids",
        comparisons=(above("vpd", "reweight"),),
        suite="all",
    ),
    Claim(
        name="gkd_over_vpd",
        setting="sparse",
        statement="An external teacher that is right 95 % of the time per digit teaches more than the model's own.",
        source="GKD, arXiv 2306.13649",
        comparisons=(above("gkd", "vpd"),),
        suite="all",
    ),
)


def _source(setting: str, words: str, suite: Suite) -> Claim:
    return Claim(
        name=f"{setting}_vpd_over_sdpo",
        setting=setting,
        statement=f"With {words} as the only feedback, VPD ends above SDPO.",
        source=f"{PAPER}, sources of feedback",
        comparisons=(above("vpd", "sdpo"),),
        suite=suite,
    )


SOURCES_OF_TEXT = (
    _source("sibling", "a sibling's answer", "default"),
    _source("self_critique", "the model's own critique", "all"),
)


def _limits(setting: str, situation: str, suite: Suite) -> tuple[Claim, ...]:
    return (
        Claim(
            name=f"{setting}_grpo_wins",
            setting=setting,
            statement=f"{situation}, GRPO ends above SDPO and VPD.",
            source=f"{PAPER}, limits",
            comparisons=(above("grpo", "sdpo"), above("grpo", "vpd")),
            suite=suite,
        ),
        Claim(
            name=f"{setting}_sdpo_fails",
            setting=setting,
            statement=f"{situation}, SDPO collapses: it ends below where it started.",
            source=f"{PAPER}, limits",
            comparisons=(below("sdpo", 0.0, "final", less="start", least=0.005),),
            suite=suite,
        ),
        Claim(
            name=f"{setting}_vpd_later",
            setting=setting,
            statement=f"{situation}, VPD keeps its accuracy longer than SDPO (mean over the run).",
            source=f"{PAPER}, limits",
            comparisons=(above("vpd", "sdpo", "mean"),),
            suite=suite,
        ),
    )


LIMITS = (
    *_limits("cold", "From a base that cannot read feedback", "quick"),
    *_limits("rigid", "Where feedback says no more than the verdict", "default"),
)

RIVALS = ("grpo", "sdpo", "vpd", "reshape")
SCARCE = ("sparse", "noisy", "partial", "changing")  # the reward alone teaches little here


def _gated(setting: str, suite: Suite) -> tuple[Claim, ...]:
    source = OURS + (", a setting it was not designed on" if SETTINGS[setting].tuned_as else "")
    never_worse = Claim(
        name=f"gated_{setting}",
        setting=setting,
        statement="Evidence-gated VPD is not worse than the best of GRPO, SDPO, VPD and AdvReshape: at the end, and "
        "over the run.",
        source=source,
        comparisons=tuple(
            Comparison(measure=measure, left="gated", right=RIVALS, least=0.0) for measure in ("final", "mean")
        ),
        suite=suite,
        main=True,
    )
    if setting not in SCARCE:
        return (never_worse,)
    return (
        never_worse,
        Claim(
            name=f"gated_above_{setting}",
            setting=setting,
            statement="Where reward is sparse, evidence-gated VPD ends above each of them.",
            source=source,
            comparisons=tuple(above("gated", rival) for rival in RIVALS),
            suite=suite,
            main=True,
        ),
        Claim(
            name=f"gated_e_step_{setting}",
            setting=setting,
            statement="In evidence-gated VPD the E-step helps (mean over the run), every fifth or every iteration.",
            source=OURS,
            comparisons=(above("gated", "gated_no_e", "mean"), above("gated_f1", "gated_no_e", "mean")),
            suite="all",
            main=True,
        ),
    )


GATED = tuple(
    claim
    for name in TINY
    for claim in _gated(name, "quick" if name in ("sparse", "cold") else "default" if name == "rigid" else "all")
)


def _of_retries(name: str, setting: str, statement: str, *comparisons: Comparison, main: bool = True) -> Claim:
    return Claim(
        name=f"{name}_{setting}", setting=setting, statement=statement, source=OURS,
        comparisons=comparisons, suite="retries", main=main,
    )  # fmt: skip


def _not_worse(left: str, *rivals: str) -> tuple[Comparison, ...]:
    """At the end, and over the run."""
    return tuple(Comparison(measure=measure, left=left, right=rivals, least=0.0) for measure in ("final", "mean"))


def _retries(setting: str) -> tuple[Claim, ...]:
    return (
        _of_retries(
            "retries", setting,
            "With half of its attempts spent on the teacher's retries, VPD ends above VPD without any.",
            above("vpd_retries", "vpd"),
        ),
        _of_retries(
            "retries_imitate", setting, "VPD with retries ends above imitating the retries that succeed.",
            above("vpd_retries", "imitate"),
        ),
        _of_retries(
            "retries_e_step", setting,
            "In VPD with retries the E-step helps (mean over the run), every fifth or every iteration.",
            *(above(name, "vpd_retries_no_e", "mean") for name in ("vpd_retries", "vpd_retries_f1")),
        ),
        _of_retries(
            "retries_loss", setting,
            "Cross-entropy on the retries that succeed ends above a policy gradient on all, and above KL.",
            above("imitate", "retries_pg"), above("imitate", "retries_kl"), main=False,
        ),
        _of_retries(
            "retries_gated_every", setting,
            "With an E-step in each iteration, evidence-gated VPD with retries is not worse than the best of these and"
            " of VPD with retries, F = 1: at the end, and over the run.",
            *_not_worse("gated_retries_f1", *RETRIES_RIVALS, "vpd_retries_f1"),
        ),
        _of_retries(
            "gated_every", setting,
            "Evidence-gated VPD is not worse with an E-step in each iteration than with one in every fifth.",
            *_not_worse("gated_f1", "gated"),
        ),
        _of_retries(
            "retries_gated", setting,
            "Evidence-gated VPD with retries is not worse than the best of GRPO, SDPO, VPD, gated VPD and imitation: at"
            " the end, and over the run.",
            *_not_worse("gated_retries", *RETRIES_RIVALS),
        ),
    )  # fmt: skip


RETRIES_RIVALS = ("grpo", "sdpo", "vpd", "gated", "imitate")
RETRIES = tuple(claim for name in TINY for claim in _retries(name))

LDD = "LDD, arXiv 2210.00066"
WARMUPS = (
    Claim(
        name="ldd_reads",
        setting="cold",
        statement="After LDD a base that could not read feedback can: its teacher is right on more of the failed"
        " attempts than without the feedback.",
        source=LDD,
        comparisons=(above("ldd_vpd", 0.0, "gain_start"), above("ldd_vpd", "vpd", "teacher_start")),
        suite="warmups",
        main=True,
    ),
    *(
        Claim(
            name=f"ldd_{name}",
            setting="cold",
            statement=f"{words} learns more from as many rewards after LDD: at the end, and over the run.",
            source=LDD,
            comparisons=(above(f"ldd_{name}", name), above(f"ldd_{name}", name, "mean")),
            suite="warmups",
            main=True,
        )
        for name, words in (("grpo", "GRPO"), ("vpd", "VPD"))
    ),
    *(
        Claim(
            name=f"ldd_over_sft_{name}",
            setting="cold",
            statement=f"LDD, which sees no outcome, serves {words} better than a supervised warm-up of the same cost.",
            source=OURS,
            comparisons=(above(f"ldd_{name}", f"sft_{name}", "mean"),),
            suite="warmups",
            main=True,
        )
        for name, words in (("grpo", "GRPO"), ("vpd", "VPD"))
    ),
    Claim(
        name="ldd_tied",
        setting="cold",
        statement="The auxiliary term that ties VPD to the dynamics model helps (mean over the run).",
        source=LDD,
        comparisons=(above("ldd_vpd_tied", "ldd_vpd", "mean"),),
        suite="warmups",
        main=True,
    ),
)

CLAIMS: dict[str, Claim] = {
    claim.name: claim for claim in (*SPARSE, *SOURCES_OF_TEXT, *LIMITS, *GATED, *RETRIES, *PRETRAINED, *WARMUPS)
}
