"""Which model, and what of it is trained: settings that load without torch."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge

from vpd.errors import ConfigError
from vpd.settings import IsPath, Settings

Checkpointing: TypeAlias = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings, section="model.lora"):
    """An adapter, in the words of peft's LoraConfig.  There is no dropout: a policy is one distribution."""

    r: Annotated[int, Ge(1), "rank"] = 16
    lora_alpha: Annotated[int, Ge(1), "the adapter's output is scaled by lora_alpha / r"] = 32
    target_modules: Annotated[
        tuple[str, ...] | Literal["all-linear"] | None,
        "names of the layers that get one; all-linear: all but the head; null: what peft takes for the architecture",
    ] = None

    def check(self) -> None:
        super().check()
        if self.target_modules == ():
            raise ConfigError("model.lora.target_modules is empty", do="Name layers, or take null or all-linear.")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings, section="model"):
    """Which model is trained."""

    name_or_path: Annotated[
        str,
        IsPath(),
        "a Hub id, a local folder, or 'tiny' for the shipped base; an adapter is merged into its base",
    ] = "tiny"
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], "number type of the weights"] = "float32"
    lora: Annotated[LoraSettings | None, "train adapters of this kind; null: all weights"] = None
    trust_remote_code: Annotated[
        bool, "run the code that a model or tokenizer brings along; false: such a model is refused"
    ] = False
