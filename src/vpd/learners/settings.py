"""Settings of the optimiser and of the teacher's weights; they load without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from vpd.errors import ConfigError
from vpd.model.settings import Checkpointing
from vpd.settings import Settings, Share

TeacherKind: TypeAlias = Literal["live", "ema", "frozen", "trust_region", "external"]
#: The schedules of transformers that need no more than warmup_steps and max_steps.
Schedule: TypeAlias = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
CopyType: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """Whose weights play the teacher in the M-step, and how they move."""

    kind: Annotated[TeacherKind, "whose weights play the teacher"] = "ema"
    ema_rate: Annotated[
        float, Share, "share of the live weights that enters the average at the end of an iteration; 0: it never moves"
    ] = 0.05
    trust_region_mix: Annotated[
        float, Share, "share of the live logits in a trust-region teacher; 0: it never moves"
    ] = 0.05
    dtype: Annotated[
        CopyType | None, "number type of a copy of the weights; null: the live weights', averaged in at least fp32"
    ] = None

    @property
    def moves(self) -> bool:
        """Whether training ever changes this teacher."""
        share = {"ema": self.ema_rate, "trust_region": self.trust_region_mix}
        return self.kind == "live" or share.get(self.kind, 0.0) > 0.0

    def check(self) -> None:
        super().check()
        if self.kind == "ema" and self.dtype == "bfloat16":
            raise ConfigError(
                "a teacher that is an average needs more than bfloat16: its steps would round to nothing",
                got=f"teacher ema, rate {self.ema_rate}, teacher_dtype bfloat16",
                do="Take float32 or null, or a frozen or trust_region teacher.",
            )


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Settings, section="optim"):
    """The optimiser, its schedule, and how much is held in memory at once."""

    learning_rate: Annotated[float, Ge(0), "peak learning rate"] = 1e-5
    optimizer: Annotated[Literal["adamw", "sgd"], "torch optimiser"] = "adamw"
    adam_beta1: Annotated[float, Interval(ge=0.0, lt=1.0), "AdamW's first-moment decay"] = 0.9
    adam_beta2: Annotated[float, Interval(ge=0.0, lt=1.0), "AdamW's second-moment decay"] = 0.999
    weight_decay: Annotated[float, Ge(0), "decoupled weight decay"] = 0.01
    max_grad_norm: Annotated[float | None, Gt(0), "gradient clipping by global norm; null for none"] = 1.0
    lr_scheduler_type: Annotated[Schedule, "a schedule of transformers, counted in iterations"] = "constant_with_warmup"
    warmup_steps: Annotated[
        int,
        Ge(0),
        "iterations of linear warm-up; the first is trained at 1 / warmup_steps of the peak, and the E-step at the rate"
        " of its iteration times algorithm.e_lr_scale",
    ] = 0
    master_weights: Annotated[
        bool,
        "train an fp32 copy of 16-bit weights (8 bytes a weight with its gradient); false is refused for such weights,"
        " whose steps would round to nothing; nothing to do for fp32 weights and with model.lora",
    ] = True
    micro_batch_size: Annotated[int, Ge(1), "most rows per forward pass and process"] = 16
    max_tokens_per_microbatch: Annotated[
        int | None,
        Ge(1),
        "most tokens per forward pass, shared ones counted once; a longer row stands alone; null: any number",
    ] = 2048
    chunk_tokens: Annotated[
        int | None, Ge(1), "tokens that reach the head at once; null: by vocabulary (64 MiB of logits)"
    ] = None
    share_prefixes: Annotated[bool, "compute a prefix that several rows share only once, where the model allows it"] = (
        True
    )
    gradient_checkpointing: Annotated[
        Checkpointing,
        "what the backward pass computes again: nothing, all but matrix products (selective) or whole layers (full)",
    ] = "none"
    mixed_precision: Annotated[Literal["no", "bf16"], "autocast of matrix products; weights stay fp32"] = "no"
    sharding: Annotated[
        Literal["none", "fsdp2"],
        "where the weights are with several processes: whole on each (none), or in shards over all (fsdp2), with"
        " gradients, optimiser and the teacher's copies",
    ] = "none"
    cpu_offload: Annotated[
        bool, "with sharding fsdp2: keep shards, gradients and optimiser in the CPU's memory; slower"
    ] = False

    @property
    def decays(self) -> bool:
        """Whether the rate at an iteration depends on how many there are to be."""
        return self.lr_scheduler_type in ("linear", "cosine", "cosine_with_restarts", "polynomial")

    def check(self) -> None:
        super().check()
        if self.cpu_offload and self.sharding == "none":
            raise ConfigError(
                "optim.cpu_offload is of weights in shards",
                got="optim.sharding none",
                do="Set optim.sharding: fsdp2, also with one process.",
            )

    def check_types(self, dtypes: Iterable[str]) -> None:
        """Raise ConfigError where weights that are trained cannot lie in shards with these number types.

        All of a group of shards that is trained has one number type, and there are no fp32 masters in shards.  Adapters
        are fp32 by themselves, whatever the base is.
        """
        types = set(dtypes)
        if self.sharding != "none" and (len(types) > 1 or not types <= {"float32", "float64"}):
            raise ConfigError(
                "optim.sharding fsdp2 holds all weights, the teacher's too, in one number type of at least 32 bits",
                got=", ".join(sorted(types)),
                do="Set model.dtype: float32, algorithm.teacher_dtype: null and optim.mixed_precision: bf16, which"
                " computes in bfloat16; or train adapters (model.lora), whose base may have 16 bits.",
            )
