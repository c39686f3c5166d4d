"""Model and tokenizer from a folder or the Hub, checked before anything is trained.

A folder that is damaged, incomplete or not what this library trains is a ModelError of one line.  Weights in pickles
are read with ``weights_only``; code that a model brings along runs only where the settings allow it.
"""

import dataclasses
import json
import logging
import math
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vpd.errors import ModelError, nearest
from vpd.model import lora
from vpd.model.settings import ModelSettings

LOG = logging.getLogger("vpd")
LOADING = threading.Lock()  # transformers sets global state while it loads a model
#: ``name`` or ``owner/name``.
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
#: Files of a model's folder that are JSON.
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
GGUF_HINT = "Weights for llama.cpp cannot be trained; take the model that they were made from."
#: Names of the files that hold a tokenizer.
TOKENIZER = re.compile(r"tok|vocab|spiece|sentencepiece|tekken|\.model$|\.tiktoken$|merges")
LFS_POINTER = b"version https://git-lfs"
SECONDS = 10.0  # that the Hub has to answer in
#: What transformers, tokenizers, safetensors and torch raise for files that they cannot read.
RAISED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ImportError, RuntimeError, AssertionError,
    EOFError, UnpicklingError, SafetensorError, StrictDataclassError,
)  # fmt: skip
Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A folder or a Hub id; ``options`` go to every ``from_pretrained``, and ``what`` names the model in messages."""

    source: str
    what: str
    options: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a model of the Hub."""
        return Path(self.source) if Path(self.source).is_dir() else None


def load(source: str, settings: ModelSettings, *, known: Sequence[str] = (), finite: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or a Hub id; an adapter is merged into its base.

    ``known`` are other names that the setting takes, for a hint; ``finite``: every weight must be.  Raises ModelError:
    nothing is there, the files are damaged, or the model is not one that can be trained.
    """
    what = f"the model {settings.name_or_path!r}"
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its table of weights that do not fit; here that is an error
    try:
        place = _find(source, what, {"trust_remote_code": settings.trust_remote_code}, known)
        with LOADING:
            model, tokenizer = _load(place, settings, adapters=())
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    check(model, tokenizer, what, finite=finite)
    return model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, without the model.  Raises ModelError."""
    return _load_tokenizer(_find(str(folder), f"the model {str(folder)!r}", {}, ()))


@torch.no_grad()
def check(model: Any, tokenizer: Any, what: str, *, finite: bool = True) -> None:
    """Raise ModelError unless these are a whole causal language model and a tokenizer with a chat template for it."""
    if not isinstance(model, transformers.PreTrainedModel):
        got = f"{type(model).__module__}.{type(model).__qualname__}"
        do = "Merge its adapters (merge_and_unload), or pass the base and set model.lora." if "peft" in got else None
        raise ModelError(f"{what} is no model of transformers", got=got, expected="a PreTrainedModel", do=do)
    if lora.is_attached(model):
        raise ModelError(f"{what} has adapters in it", do="Merge them (merge_and_unload), and set model.lora.")
    if absent := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ModelError(
            f"{what} has weights without data", got=f"{absent[0]} on the device meta", do="Load them first."
        )
    for weight, value in model.named_parameters() if finite else ():
        if value.numel() and value.is_floating_point() and not all(map(math.isfinite, _extremes(value))):
            raise ModelError(
                f"a weight of {what} is not finite", got=f"NaN or infinity in {weight}", do="Take an undamaged copy."
            )
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {what} has no chat template, as that of a base model",
            do="Take the instruction-tuned model, or put a chat_template.jinja into a copy of its folder.",
        )
    _check_vocabulary(model, tokenizer, what)


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end-of-sequence tokens of model and tokenizer, in order of their ids."""
    config = model.generation_config
    ends = None if config is None else config.eos_token_id
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, (list, tuple)) else [ends])} - {None}
    return tuple(sorted(found))


def _extremes(value: torch.Tensor) -> list[float]:
    """Smallest and largest entry; NaN where there is one."""
    return [float(end) for end in torch.aminmax(value)]


def _check_vocabulary(model: Any, tokenizer: Any, what: str) -> None:
    """Text must encode to rows of the embedding.  A special token without one is refused where a prompt has it."""
    rows = model.get_input_embeddings().weight.shape[0]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {text: number for text, number in tokenizer.get_vocab().items() if number >= rows}
    plain = [text for text, number in beyond.items() if number not in special]
    if plain:
        raise ModelError(
            f"the tokenizer of {what} has more entries than the model's embedding has rows",
            got=f"{len(tokenizer)} entries, {rows} rows; {min(plain, key=beyond.__getitem__)!r} has none",
            do="Take the tokenizer that belongs to the model, or call resize_token_embeddings and save it.",
        )


def _find(source: str, what: str, options: dict[str, Any], known: Sequence[str] = ()) -> _Place:
    """The folder of that name, else the Hub's model.  Raises ModelError at once if there is neither."""
    path = Path(source).expanduser()
    place = _Place(source=str(path) if path.is_dir() else source, what=what, options=options)
    if source and place.folder:
        _check_folder(path, what)
        return place
    if source and path.exists():
        hint = GGUF_HINT if path.suffix == ".gguf" else f"Name the folder it is in, {str(path.parent)!r}."
        raise ModelError(f"{what} is a file", expected="a folder that from_pretrained loads", do=hint)
    is_id = HUB_ID.fullmatch(source) is not None and not source.startswith(".")
    if is_id and hub_answers():
        return place
    if is_id and _is_cached(source):
        return dataclasses.replace(place, options=options | {"local_files_only": True})
    beside = path.parent.iterdir() if source.strip("./~") and path.parent.is_dir() else ()
    hint = nearest(source, [*known, *(str(other) for other in beside if other.is_dir())])
    raise ModelError(
        f"{what}: there is no such folder" + (", and the Hub cannot be reached" if is_id else ""),
        expected="a folder" + (", or an id that is in the Hub's cache" if is_id else " or a Hub id (owner/name)"),
        do=hint if hint.startswith("Did you mean") else None,
    )


def _is_cached(name: str) -> bool:
    """Whether a Hub id's files were downloaded before."""
    found = [huggingface_hub.try_to_load_from_cache(name, file) for file in ("config.json", lora.CONFIG_FILE)]
    return any(isinstance(path, str) for path in found)


def hub_answers() -> bool:
    """Whether the Hub can be reached: one try, where a download would try for a minute."""
    if huggingface_hub.constants.is_offline_mode():
        return False
    if "all" in urllib.request.getproxies():
        return True  # urllib knows no such proxy, and whether it works shows soon
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # another client may know the certificate
    except OSError:
        return False
    return True


def _check_folder(folder: Path, what: str) -> None:
    """Raise ModelError for a folder that from_pretrained would read wrongly, or refuse without a reason."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with path.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{path} is a pointer of Git LFS, not the file", do="Run git lfs pull there.")
        if path.name in JSON_FILES:
            _check_json(path)
    names = {path.name for path in files}
    if names & {"config.json", lora.CONFIG_FILE}:
        return
    inner = [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json")]
    gguf = [file for file in names if file.endswith(".gguf")]
    inner.sort(key=lambda found: (found.name != "model", found))  # a run's model/ before its checkpoints
    hint = f"Did you mean {str(inner[0])!r}?" if inner else GGUF_HINT if gguf else None
    raise ModelError(f"{what} has no config.json", expected="a folder that from_pretrained loads", do=hint)


def _check_json(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged", got=_line(error), expected="JSON", do="Take a whole copy.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged", got=type(content).__name__, expected="a mapping")


def _load(place: _Place, settings: ModelSettings, adapters: tuple[str, ...]) -> tuple[Any, Any]:
    """Model and tokenizer of a whole model, or of an adapter and its base; ``adapters`` are those that led here."""
    adapter = _read(lambda: _adapter_config(place), f"cannot load {place.what}", place)
    if adapter is not None:
        return _load_adapter(place, adapter, settings, (*adapters, place.source))
    config = _read(
        lambda: AutoConfig.from_pretrained(place.source, **place.options),
        f"cannot read the configuration of {place.what}",
        place,
    )
    _check_kind(config, place.what)
    tokenizer = _load_tokenizer(place)
    return _read(lambda: _load_weights(place, settings), f"cannot load {place.what}", place), tokenizer


def _load_weights(place: _Place, settings: ModelSettings) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place.source,
        dtype=getattr(torch, settings.dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and refused here
        **place.options,
    )
    model, found = loaded
    _check_complete(model, found, place.what)
    return model


def _load_tokenizer(place: _Place) -> Any:
    if place.folder and not _has_tokenizer(place.folder):
        raise ModelError(f"{place.what} has no tokenizer", do="Copy the tokenizer's files into its folder.")
    return _read(
        lambda: AutoTokenizer.from_pretrained(place.source, **place.options),
        f"cannot load the tokenizer of {place.what}",
        place,
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(TOKENIZER.search(path.name) for path in folder.iterdir())


def _check_kind(config: Any, what: str) -> None:
    """Refuse what is no causal language model with plain weights."""
    quantised = config.to_dict().get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(f"{what} has quantised weights ({method})", do="Take the model before quantisation.")
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    own = "AutoModelForCausalLM" in (config.to_dict().get("auto_map") or {})
    if config.is_encoder_decoder or not (known or own):
        raise ModelError(
            f"{what} is no causal language model",
            got=f"model type {config.model_type}"
            + (" (an encoder and a decoder)" if config.is_encoder_decoder else ""),
            expected="a model that AutoModelForCausalLM loads (docs/models.md)",
        )


def _check_complete(model: Any, found: dict[str, Any], what: str) -> None:
    """Every weight must come from the files, and every layer of the files must have its place in the model."""
    wrong = {weight: f"{tuple(saved)} instead of {tuple(own)}" for weight, saved, own in found["mismatched_keys"]}
    left_out = sorted(found["unexpected_keys"])
    layers = {re.sub(r"\d+", "#", weight) for weight in model.state_dict()}
    surplus = [weight for weight in left_out if re.sub(r"\d+", "#", weight) in layers]
    for weights, wrong_with in (
        (sorted(wrong), "have another shape than config.json says"),
        (sorted(found["missing_keys"]), "are not in its files"),
        (surplus, "belong to layers that config.json does not have"),
    ):
        if weights:
            raise ModelError(
                f"weights of {what} {wrong_with}",
                got=f"{len(weights)} of them, such as {weights[0]}"
                + (f" of shape {wrong[weights[0]]}" if weights[0] in wrong else ""),
                do="Take a whole copy of the model, with the config.json that belongs to it.",
            )
    if left_out:
        kind = type(model).__name__
        LOG.warning(
            "%s: %d weights of its files have no place in a %s and are left out, such as %s",
            *(what, len(left_out), kind, left_out[0]),
        )


def _adapter_config(place: _Place) -> Any:
    """The adapter's configuration, None for a whole model."""
    options = {key: value for key, value in place.options.items() if key != "trust_remote_code"}
    path = transformers.utils.peft_utils.find_adapter_config_file(place.source, **options)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _load_adapter(
    place: _Place, adapter: dict[str, Any], settings: ModelSettings, adapters: tuple[str, ...]
) -> tuple[Any, Any]:
    """The base of an adapter with the adapter merged into its weights, and the adapter's tokenizer if it has one."""
    base = adapter.get("base_model_name_or_path")
    if settings.lora is not None:
        raise ModelError(
            f"{place.what} is an adapter, and model.lora would train a second one",
            do="Name a whole model (a run keeps the merged one in model/, beside adapter/), or leave model.lora out:"
            " the adapter is then merged and the whole model trained.",
        )
    if not isinstance(base, str) or not base or base in adapters:
        raise ModelError(
            f"{place.what} is an adapter that names no base",
            got=f"base_model_name_or_path {base!r} in {lora.CONFIG_FILE}",
            do="Set it to the model that the adapter was trained on.",
        )
    options = {"trust_remote_code": settings.trust_remote_code}
    model, tokenizer = _load(_find(base, f"the base {base!r} of {place.what}", options), settings, adapters)
    merged = _read(lambda: lora.merge_saved(model, place.source), f"cannot merge the adapter of {place.what}", place)
    merged.requires_grad_(True)
    merged.name_or_path = place.source
    LOG.info("%s is an adapter: it is merged into %s, and all weights are trained", place.what, base)
    return merged, _load_tokenizer(place) if place.folder and _has_tokenizer(place.folder) else tokenizer


def _read(load: Callable[[], Part], what: str, place: _Place) -> Part:
    """``load()``; what the libraries raise for bad files as a ModelError of one line."""
    try:
        return load()
    except ModelError:
        raise
    except RAISED as error:
        raise _refusal(error, what, place) from error
    except Exception as error:
        if type(error) is Exception:  # the only kind that tokenizers has
            raise _refusal(error, what, place) from error
        raise


def _refusal(error: Exception, what: str, place: _Place) -> ModelError:
    if "trust_remote_code" in str(error) and not place.options["trust_remote_code"]:
        return ModelError(
            f"{place.what} brings its own code, which is not run unless you say so",
            do="Read that code, and set model.trust_remote_code true if you trust it.",
        )
    if isinstance(error, UnpicklingError):
        return ModelError(
            what, got="a pickle that is damaged or holds more than tensors", do="Take a copy in safetensors."
        )
    if isinstance(error, SafetensorError):
        return ModelError(what, got=f"weights that are damaged or not whole ({_line(error)})", do="Fetch them again.")
    return ModelError(what, got=_line(error))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
