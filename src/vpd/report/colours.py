"""Names and colours of the methods in pictures and reports; distinct to colour-blind eyes too (Okabe and Ito)."""

METHOD_COLOURS = {
    "grpo": "#7f7f7f",
    "sdpo": "#e69f00",
    "vpd": "#0072b2",
    "gated": "#009e73",
    "vpd_retries_f1": "#d55e00",
    "gated_retries_f1": "#cc79a7",
    "imitate": "#56b4e9",
}
METHOD_TITLES = {
    "grpo": "GRPO",
    "sdpo": "SDPO",
    "vpd": "VPD",
    "gated": "evidence-gated VPD",
    "gkd": "GKD",
    "hybrid": "hybrid",
}
#: for what has no colour of its own, in this order
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6d1f")
