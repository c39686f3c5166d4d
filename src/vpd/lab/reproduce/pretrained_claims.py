"""The claims about a pretrained model, SmolLM2-135M-Instruct, and the conventions of clients."""

from vpd.lab.reproduce.claims import OURS, Claim, Comparison, above, below

LEARNED, NOTHING = 0.3, 0.1  # shares of right answers on held-out topics


def _pretrained(name: str, setting: str, statement: str, *comparisons: Comparison) -> Claim:
    return Claim(
        name=name, setting=setting, statement=statement, source=OURS,
        comparisons=comparisons, suite="pretrained", main=True,
    )  # fmt: skip


def _themes(name: str, statement: str, *comparisons: Comparison) -> Claim:
    return _pretrained(f"themes_{name}", "conventions_themes", statement, *comparisons)


#: Where reward is not sparse, as the paper would have it for any task with informative feedback.
THEMES = (
    _themes(
        "text",
        "Before training the teacher is right on more of the failed attempts than without the note (by more than .1).",
        above("imitate", 0.1, "gain_start"),
    ),
    _themes(
        "reward",
        "Where reward is not sparse, GRPO learns from it alone: it ends above its start.",
        above("grpo", 0.0, "held_out", less="start"),
    ),
    _themes("vpd", "VPD (an E-step in each iteration) ends above GRPO.", above("vpd_f1", "grpo", "held_out")),
    _themes("sdpo", "SDPO ends above GRPO.", above("sdpo", "grpo", "held_out")),
    _themes("e_step", "VPD ends above SDPO.", above("vpd_f1", "sdpo", "held_out")),
    _themes(
        "gated",
        "Evidence-gated VPD (an E-step in each iteration) is not worse than the best of GRPO, SDPO and VPD.",
        Comparison(measure="held_out", left="gated_f1", right=("grpo", "sdpo", "vpd_f1"), least=0.0),
    ),
    _themes(
        "retries",
        "Imitating the teacher's retries ends above GRPO, with equal answers.",
        above("imitate", "grpo", "held_out"),
    ),
    _themes(
        "vpd_retries",
        "VPD with retries (an E-step in each iteration) ends above imitating them.",
        above("vpd_retries_f1", "imitate", "held_out"),
    ),
    _themes(
        "gated_retries",
        "Evidence-gated VPD with retries is not worse than the best of the others.",
        Comparison(
            measure="held_out",
            left="gated_retries_f1",
            right=("grpo", "sdpo", "vpd_f1", "gated_f1", "imitate"),
            least=0.0,
        ),
    ),
)


def _cold(name: str, statement: str, *comparisons: Comparison) -> Claim:
    return _pretrained(f"cold_notes_{name}", "conventions_cold", statement, *comparisons)


COLD = (
    _cold(
        "ldd_reads",
        "After LDD the base reads the notes better: its teacher is right on more of the failed attempts.",
        above("ldd_imitate", "imitate", "teacher_start"),
    ),
    _cold(
        "ldd",
        "After LDD, imitating retries ends above the same without a warm-up.",
        above("ldd_imitate", "imitate", "held_out"),
    ),
    _cold(
        "sft",
        "After a supervised warm-up on accepted answers, imitating retries ends above the same without one.",
        above("sft_imitate", "imitate", "held_out"),
    ),
    _cold(
        "ldd_over_sft", "LDD serves it better than the supervised one.", above("ldd_imitate", "sft_imitate", "held_out")
    ),
    _cold(
        "grpo",
        "From a base that hardly reads notes, GRPO ends above imitating retries.",
        above("grpo", "imitate", "held_out"),
    ),
)


PRETRAINED = (
    _pretrained(
        "conventions_imitate",
        "conventions",
        f"By imitating the teacher's retries it learns what the notes say (above {LEARNED:g} on held-out topics).",
        above("imitate", LEARNED, "held_out"),
    ),
    _pretrained(
        "conventions_retries",
        "conventions",
        "Imitating the teacher's retries ends above GRPO, SDPO, VPD and evidence-gated VPD, with equal answers.",
        *(above("imitate", rival, "held_out") for rival in ("grpo", "sdpo", "vpd_f1", "gated_f1")),
    ),
    _pretrained(
        "conventions_vpd_retries",
        "conventions",
        "VPD with retries (an E-step in each iteration) ends above imitating them.",
        above("vpd_retries_f1", "imitate", "held_out"),
    ),
    _pretrained(
        "conventions_gated_retries",
        "conventions",
        "Evidence-gated VPD with retries (an E-step in each iteration) is not worse than the best of the others.",
        Comparison(
            measure="held_out",
            left="gated_retries_f1",
            right=("grpo", "sdpo", "vpd_f1", "gated_f1", "imitate"),
            least=0.0,
        ),
    ),
    _pretrained(
        "conventions_e_step",
        "conventions",
        "VPD ends above SDPO, with an E-step in each iteration and in every fifth.",
        above("vpd_f1", "sdpo", "held_out"),
        above("vpd", "sdpo", "held_out"),
    ),
    _pretrained(
        "conventions_gated",
        "conventions",
        "Evidence-gated VPD, with an E-step in each iteration and in every fifth, is not worse than the best of GRPO, "
        "SDPO and VPD with as many.",
        *(
            Comparison(measure="held_out", left=f"gated{often}", right=("grpo", "sdpo", f"vpd{often}"), least=0.0)
            for often in ("_f1", "")
        ),
    ),
    _pretrained(
        "conventions_others",
        "conventions",
        f"AdvReshape and forward KL learn it, too (above {LEARNED:g} on held-out topics).",
        above("reshape", LEARNED, "held_out"),
        above("sdpo_forward", LEARNED, "held_out"),
    ),
    _pretrained(
        "conventions_noisy",
        "conventions_noisy",
        f"It is learned where three notes in ten are wrong (above {NOTHING:g} on held-out topics).",
        above("imitate", NOTHING, "held_out"),
    ),
    *(
        _pretrained(
            f"conventions_{text}",
            f"conventions_{text}",
            f"{what} nothing is learned (below {NOTHING:g} on held-out topics): the gain is from what the notes say.",
            below("imitate", NOTHING, "held_out"),
        )
        for text, what in (
            ("shuffled", "From notes about another client's wish"),
            ("verdict", "From verdicts alone"),
            ("silent", "Without notes"),
        )
    ),
    *THEMES,
    *COLD,
)
