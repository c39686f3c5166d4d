"""A run's model taken out of its folder: copied, merged, converted to GGUF, or uploaded to the Hub."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from vpd.errors import ConfigError, StorageError
from vpd.model import lora
from vpd.model.settings import ModelSettings
from vpd.printable import one_line
from vpd.prompts.settings import save_settings, saved_settings
from vpd.recipes.assemble import load_model
from vpd.report.model_card import FILE, model_card, source_commit
from vpd.run_folder import checkpoint
from vpd.run_folder.files import FileSystem
from vpd.run_folder.reading import RunRecord, read_run

LOG = logging.getLogger("vpd")
Form: TypeAlias = Literal["model", "adapter", "gguf"]
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
#: The Hub's own error derives from that of the HTTP library beneath it: httpx, or httpx2 since huggingface_hub 2.
UPLOAD_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, HfHubHTTPError, *HfHubHTTPError.__bases__)


class Hub(Protocol):
    """What is used of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any: ...


def export_run(
    run: Path,
    destination: Path,
    *,
    form: Form = "model",
    step: int | None = None,
    converter: str | None = None,
    outtype: str = "f16",
) -> Path:
    """Write a run's model to ``destination``, which must not exist; with a card, unless it is a GGUF file.

    ``form``: ``model`` is a folder for ``from_pretrained`` with an adapter merged into its base, ``adapter`` one for
    peft, ``gguf`` a file for llama.cpp, made by its ``convert_hf_to_gguf.py`` (``converter``: where that is; None: on
    the PATH) with numbers of type ``outtype``.  ``step`` takes a checkpoint in the place of the exported model.  Raises
    StorageError: the run has no such part, or the destination exists; ConfigError without a converter.
    """
    record = read_run(run)
    if destination.exists() or destination.is_symlink():
        raise StorageError(f"{destination} exists", expected="a new place", do="Give another, or remove it.")
    files = FileSystem()
    if form == "gguf":
        command = _converter(converter)
        source = _part(record, "model", step)
        if (source / lora.CONFIG_FILE).is_file():
            raise ConfigError("GGUF is made of a whole model", do="Export the form model first, then convert that.")
        files.write_atomically(destination, lambda file: _convert(command, source, file, outtype))
    else:
        fill = _filler(record, form, step)
        files.write_folder(destination, fill)
    LOG.info("%s is written", destination)
    return destination


def push_run(run: Path, hub_model_id: str, *, private: bool, form: Form = "model", api: Hub | None = None) -> str:
    """Upload the exported model or adapter of a run with its card, and return the repository's address.

    Raises ConfigError without a token, StorageError where the Hub cannot be reached or refuses.
    """
    source = _part(read_run(run), "adapter" if form == "adapter" else "model", None)
    hub: Hub = api or _api()
    try:
        place = hub.create_repo(hub_model_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=hub_model_id, folder_path=source, commit_message=f"Trained with vpd: {form}")
    except UPLOAD_ERRORS as error:
        raise StorageError(
            f"cannot upload {source} to {hub_model_id}",
            got=one_line(" ".join(str(error).split()))[:300].rstrip("."),
            do=f"The run is whole; try again with: vpd export {run} --push_to_hub {hub_model_id}",
        ) from error
    LOG.info("%s is uploaded to %s", source, place)
    return str(place)


def check_hub() -> None:
    """Raise ConfigError unless a token of the Hub is there, so that a run does not end without its upload."""
    _api()


def write_card(folder: Path, record: RunRecord, step: int | None = None) -> None:
    """Write the model card into an exported folder."""
    (folder / FILE).write_text(model_card(record, step=step, commit=source_commit()), encoding="utf-8")


def _api() -> Hub:
    if huggingface_hub.get_token() is None:
        raise ConfigError("uploading to the Hub needs a token", got="none", do="Run hf auth login, or set HF_TOKEN.")
    api: Hub = huggingface_hub.HfApi()
    return api


def _part(record: RunRecord, form: str, step: int | None) -> Path:
    """The folder of a part of a run.  Raises StorageError."""
    run = record.folder
    folder = run / form if step is None else run / f"checkpoint-{step}"
    if folder.is_dir():
        return folder
    kept = sorted(checkpoint.checkpoints(run), key=checkpoint.step_of)
    names = ", ".join(path.name for path in kept)
    do = f"There is {names}: --checkpoint {checkpoint.step_of(kept[-1])} exports the last." if kept else None
    if step is None and form == "adapter" and record.settings.get("model", {}).get("lora") is None:
        do = "It trained the whole model; export the form model."
    raise StorageError(f"{run} has no {folder.name}", got=f"a run in phase {record.phase}", do=do)


def _filler(record: RunRecord, form: str, step: int | None) -> Callable[[Path], None]:
    """What writes a folder for ``from_pretrained`` or peft."""
    source = _part(record, form, step)
    is_adapter = (source / lora.CONFIG_FILE).is_file()
    if form == "adapter" and not is_adapter:
        raise StorageError(f"{source} has no adapter", do="It is a whole model; export the form model.")
    loaded = load_model(ModelSettings(name_or_path=str(source))) if form == "model" and is_adapter else None
    skipped = shutil.ignore_patterns(checkpoint.DATA, checkpoint.TENSORS)

    def fill(folder: Path) -> None:
        if loaded is None:
            shutil.copytree(source, folder, ignore=skipped, dirs_exist_ok=True)
        else:
            checkpoint.save_model(*loaded, folder)
            settings = saved_settings(source)
            if settings is not None:
                save_settings(settings, folder)
        write_card(folder, record, step)

    return fill


def _converter(given: str | None) -> list[str]:
    """The command of llama.cpp's converter.  Raises ConfigError where there is none."""
    found = given if given is not None else next((p for name in CONVERTERS if (p := shutil.which(name))), None)
    if found is None or not Path(found).is_file():
        raise ConfigError(
            "GGUF needs llama.cpp's convert_hf_to_gguf.py",
            got=f"no file {given}" if given is not None else "none on the PATH",
            do="Install llama.cpp, or pass --converter path/to/convert_hf_to_gguf.py.",
        )
    return [sys.executable, found] if found.endswith(".py") else [found]


def _convert(command: list[str], source: Path, file: Path, outtype: str) -> None:
    words = [*command, str(source), "--outfile", str(file), "--outtype", outtype]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    whole = file.is_file() and file.open("rb").read(4) == b"GGUF"
    if done.returncode or not whole:
        file.unlink(missing_ok=True)
        messages = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ConfigError(
            f"{Path(command[-1]).name} made no GGUF file of {source}",
            got=f"exit code {done.returncode}: {messages[-1] if messages else 'no message'}",
            do="Does it know this architecture? Its messages: run it by hand.",
        )
