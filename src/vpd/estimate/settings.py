"""The section ``dry_run``: what a dry run assumes of the machine and of the answers, which nobody knows beforehand."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Interval

from vpd.settings import Settings, Share


@dataclass(frozen=True, kw_only=True)
class DryRunSettings(Settings, section="dry_run"):
    """Assumptions of ``vpd train --dry_run``.  The defaults are one H100's with 80 GB."""

    gpus: Annotated[int, Ge(1), "GPUs that train, one process on each"] = 1
    server_gpus: Annotated[int, Ge(0), "GPUs of a server that samples; 0: the training GPUs sample"] = 0
    memory_gb: Annotated[float, Gt(0), "memory of one GPU in GiB"] = 80.0
    context_gb: Annotated[
        float, Ge(0), "GiB of it that are no tensors: the CUDA context, and what the allocator holds unused"
    ] = 3.0
    tflops: Annotated[float, Gt(0), "peak rate of one GPU's matrix products in bfloat16, in TFLOP/s"] = 989.0
    tflops_fp32: Annotated[float, Gt(0), "the same for fp32 weights without optim.mixed_precision"] = 67.0
    utilisation: Annotated[float, Interval(gt=0.0, le=1.0), "share of the peak rate that training reaches"] = 0.35
    gb_per_s: Annotated[float, Gt(0), "memory bandwidth of one GPU in GB/s"] = 3350.0
    bandwidth_used: Annotated[float, Interval(gt=0.0, le=1.0), "share of it that decoding reaches"] = 0.5
    link_gb_per_s: Annotated[float, Gt(0), "what one GPU sends to the others, in GB/s"] = 300.0
    step_ms: Annotated[
        float, Ge(0), "least milliseconds for one more token of all rows that decode at once: launching kernels"
    ] = 20.0
    price: Annotated[float, Ge(0), "price of one GPU for an hour, in whatever currency"] = 2.5
    completion_tokens: Annotated[
        int | None, Ge(1), "mean length of an answer; null: half of rollout.max_completion_length"
    ] = None
    longest_tokens: Annotated[
        int | None,
        Ge(1),
        "longest of the answers that decode at once, which the embedded engine waits for; null: three times the mean,"
        " at most rollout.max_completion_length",
    ] = None
    success: Annotated[float, Share, "share of the answers that are right"] = 0.5
    prompt_tokens: Annotated[
        int | None, Ge(1), "assume prompts of this length, and read no data; null: the environment's own tasks"
    ] = None
    feedback_tokens: Annotated[
        int, Ge(1), "length of the feedback on a wrong answer where no data are read, and of every critique"
    ] = 150
