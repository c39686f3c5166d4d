"""Names and colours of the methods; colours are distinct to colour-blind eyes too (Okabe and Ito)."""

from collections.abc import Mapping
from dataclasses import dataclass

METHOD_COLOURS = {
    "grpo": "#7f7f7f",
    "sdpo": "#e69f00",
    "vpd": "#0072b2",
    "gated": "#009e73",
    "vpd_retries_f1": "#d55e00",
    "gated_retries_f1": "#cc79a7",
    "imitate": "#56b4e9",
}


@dataclass(frozen=True, slots=True)
class MethodName:
    """A shipped method: its ``title`` in tables and pictures, its name in a sentence, its paper on arXiv, if any."""

    title: str
    in_words: str
    paper: str | None = None


METHODS: Mapping[str, MethodName] = {
    "grpo": MethodName("GRPO", "GRPO", "2402.03300"),
    "sdpo": MethodName("SDPO", "SDPO, distillation from a teacher that reads feedback", "2601.20802"),
    "vpd": MethodName("VPD", "Variational Policy Distillation", "2605.15113"),
    "gated": MethodName("evidence-gated VPD", "evidence-gated Variational Policy Distillation", "2605.15113"),
    "gkd": MethodName("GKD", "GKD, on-policy distillation", "2306.13649"),
    "hybrid": MethodName("hybrid", "a hybrid of GRPO and distillation", "2605.15113"),
    "plare": MethodName("PLARE", "PLARE, learning from a judge's preferences", "2507.23391"),
    "sft": MethodName("SFT", "supervised fine-tuning"),
    "ldd": MethodName("LDD", "language dynamics distillation", "2210.00066"),
}
#: for what has no colour of its own, in this order
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6d1f")
