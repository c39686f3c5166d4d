"""LoRA (Hu et al., arXiv 2106.09685): the weights stay as they are, and small adapters beside them are trained.

All roles share one base model; the policy uses the trained adapter, the EMA teacher a second one of the same shape, and
the initial policy none, which is exact because B begins at 0.  peft puts the adapters into the model (by
``peft.functional``, as transformers 5.24 refuses peft 0.21 in its own methods for this), which otherwise behaves as
before.

Only a :class:`View` changes the active adapter, and only for the length of one forward pass.  Between passes, and in
the backward pass, where activation checkpointing computes layers again, the trained adapter is active.
"""

import contextlib
import copy
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpd.errors import ConfigError, ModelError, StorageError, nearest
from vpd.model.settings import LoraSettings

LIVE, AVERAGE = "default", "average"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files


def attach(model: Any, settings: LoraSettings, *, seed: int) -> None:
    """Freeze ``model`` and put an adapter into it that changes nothing yet; ``seed`` draws its A.

    The adapter of a 16-bit model is kept in fp32, where small steps do not round to nothing.  Raises ConfigError: peft
    is not installed, a target does not exist, or a target is shared by all roles (the head, the embedding).
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora needs the package peft", do="pip install peft (or 'vpd-rl[lora]').")
    from peft import LoraConfig

    targets = settings.target_modules
    if isinstance(targets, tuple):
        _check_targets(model, targets)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        _inject(model, config, LIVE)


def attach_like(model: Any, other: Any) -> None:
    """Put an adapter into ``model`` like the trained one of ``other``, which is of the same kind; its values differ."""
    _inject(model, copy.deepcopy(other.peft_config[LIVE]), LIVE)


def is_attached(model: Any) -> bool:
    """Whether ``model`` has adapters in it."""
    return "peft_config" in vars(model)


def average(model: Any) -> "View":
    """A view of ``model`` with a second adapter, which begins as a copy of the trained one: an EMA teacher."""
    _inject(model, copy.deepcopy(model.peft_config[LIVE]), AVERAGE)
    view = View(model, AVERAGE)
    view.load_state_dict(state(model))
    return view


def weights(model: Any, adapter: str = LIVE) -> dict[str, nn.Parameter]:
    """A and B of one adapter, by names that do not contain the adapter's own name."""
    mark = re.compile(rf"\.(lora_[AB])\.{adapter}\.")
    return {mark.sub(r".\1.", name): value for name, value in model.named_parameters() if mark.search(name)}


def is_weight(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return re.search(r"\.lora_[AB]\.", name) is not None


def state(model: Any, adapter: str = LIVE) -> dict[str, Tensor]:
    """The tensors of one adapter, not copied."""
    return {name: value.detach() for name, value in weights(model, adapter).items()}


@torch.no_grad()
def restore(model: Any, saved: Mapping[str, Tensor], adapter: str = LIVE) -> None:
    """Copy what :func:`state` returned into an adapter.  Raises StorageError if names or shapes differ."""
    own = weights(model, adapter)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
        raise StorageError(
            f"the saved adapter {adapter!r} does not fit this model",
            got=f"{len(saved)} tensors, {sum(value.numel() for value in saved.values())} numbers",
            expected=f"{len(own)} tensors, {sum(value.numel() for value in own.values())} numbers",
            do="Set model.name_or_path, r and target_modules of model.lora to what they were when it was saved.",
        )
    for name, value in own.items():
        value.copy_(saved[name])


def save(model: Any, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the trained adapter to a folder that peft loads; ``tensors`` is its :func:`state`, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[LIVE].save_pretrained(folder)
    named = {PREFIX + name: value.cpu().contiguous() for name, value in (tensors or state(model)).items()}
    save_file(named, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors that :func:`save` wrote, for :func:`restore`."""
    return {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS_FILE).items()}


def merge_saved(model: Any, source: str) -> Any:
    """``model`` with the adapter of a folder or Hub id merged into its weights, in their own dtype.

    Raises ModelError: peft is not installed, this kind of adapter cannot be merged, or tensors of it are missing; and
    whatever peft raises for files that it cannot read.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{source} is an adapter, which needs the package peft", do="pip install peft.")
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, source)
        except UserWarning as missing:
            raise ModelError(
                f"tensors of the adapter {source} are missing", got=str(missing)[-160:], do="Take a whole copy."
            ) from missing
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise ModelError(f"the adapter {source} cannot be merged", got=type(adapted.base_model).__name__)
        return adapted.merge_and_unload()


def merged(model: Any) -> Any:
    """A copy of ``model`` in main memory with the trained adapter merged into plain weights.

    B A is added to the weights in their own dtype, so a 16-bit model is rounded once more.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)]) for p in model.parameters()}
    plain = copy.deepcopy(model, memo)
    for name, module in list(plain.named_modules()):
        if _is_layer(module):
            module.merge(adapter_names=[LIVE])
            plain.set_submodule(name, module.get_base_layer())
    del plain.peft_config
    return plain


class View:
    """``model`` with another active adapter, or with none (None): the part of a module's interface that a scorer needs.

    Its ``state_dict`` holds the adapter alone; the base belongs to ``model``.
    """

    def __init__(self, model: Any, adapter: str | None):
        self.model = model
        self.adapter = adapter
        self._layers = [module for module in model.modules() if _is_layer(module)]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of ``model``; callers look at device and dtype."""
        return self.model.parameters()

    def buffers(self) -> Iterator[torch.Tensor]:
        """All buffers of ``model``."""
        return self.model.buffers()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    @property
    def _supports_attention_backend(self) -> bool:
        return bool(self.model._supports_attention_backend)

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    def base_model(self, **inputs: Any) -> Any:
        with self._active_adapter():
            return self.model.base_model(**inputs)

    def __call__(self, **inputs: Any) -> Any:
        with self._active_adapter():
            return self.model(**inputs)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.adapter is None else state(self.model, self.adapter)

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        if self.adapter is not None:
            restore(self.model, saved, self.adapter)

    @contextlib.contextmanager
    def _active_adapter(self) -> Iterator[None]:
        """Here this adapter is active, and no adapter takes a gradient."""
        try:
            for layer in self._layers:
                if self.adapter is None:
                    layer.enable_adapters(False)
                else:
                    layer.set_adapter(self.adapter, inference_mode=True)
            yield
        finally:
            _activate_live(self._layers)


def _inject(model: Any, config: Any, adapter: str) -> None:
    """Add one adapter; afterwards the trained one is active and only it takes gradients."""
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    try:
        with warnings.catch_warnings():  # a second adapter is intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter)
    except ValueError as error:
        raise ConfigError(
            f"model.lora cannot be put into {type(model).__name__}",
            got=" ".join(str(error).split())[:160],
            do="Name layers of its own in model.lora.target_modules.",
        ) from error
    if _is_layer(model.get_output_embeddings()) or _is_layer(model.get_input_embeddings()):
        raise ConfigError(
            "model.lora.target_modules names the head or the embedding, which all roles share",
            expected="layers between the two",
        )
    cast_adapter_dtype(model, adapter)
    _activate_live([module for module in model.modules() if _is_layer(module)])


def _activate_live(layers: list[Any]) -> None:
    for layer in layers:
        layer.set_adapter(LIVE)
        layer.enable_adapters(True)


def _is_layer(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Every name must fit a layer: peft ignores a name that fits none as long as another one fits."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            known = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
            raise ConfigError(f"model.lora.target_modules: no layer is named {target!r}", do=nearest(target, known))
