"""What SECURITY.md promises about secrets, files and what is shown."""

import ast
import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import endpoint
from helpers import tiny_learner, tiny_model, vpd_train

from vpd.config import load
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.assemble import load_model

ROOT = Path(__file__).resolve().parent.parent
SECRETS = {
    "OPENAI_API_KEY": "sk-1f0e9d",
    "HF_TOKEN": "hf_2a7b6c",
    "WANDB_API_KEY": "wandb-3c5d4e",
    "OWN_SECRET": "own-4d8f",
}
VALUE = "|".join(SECRETS.values()).encode()


def files_of(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "settings",
    [
        ["--run.save_steps", "1", "--run.report_to", "[tensorboard]"],
        ["--optim.learning_rate", "1e29", "--optim.optimizer", "sgd"],
    ],
)
def test_no_secret_of_the_environment_reaches_a_file_or_the_terminal(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    small = ["--run.max_steps", "2", "--rollout.prompts_per_step", "2", "--rollout.num_generations", "2"]
    reply = json.dumps({"choices": [{"message": {"content": "Mind the sign."}}]}).encode()
    with endpoint(lambda body: (200, reply)) as (url, posted):
        source = f"{{name: critic, when: missing, endpoint: '{url}', model: m, api_key_env: OWN_SECRET}}"
        command = [
            sys.executable,
            "-m",
            "vpd.cli",
            "train",
            *small,
            "--feedback",
            f"[environment, {source}]",
            *settings,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=240, check=False)
    assert SECRETS["OWN_SECRET"] in posted[0].headers["authorization"]
    found = [path.name for path in files_of(tmp_path) if re.search(VALUE, path.read_bytes())]
    assert (tmp_path / "out" / "config.yaml").is_file() and b"OWN_SECRET" in (
        tmp_path / "out" / "config.yaml"
    ).read_bytes()
    assert not found and not re.search(VALUE, done.stdout + done.stderr)
    assert done.returncode in (0, 2), done.stderr
    assert bool(list(tmp_path.rglob("nonfinite-step-*"))) == (done.returncode == 2)


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_a_checkpoints_files_is_not_run(tmp_path: Path) -> None:
    learner, harmed = tiny_learner(tiny_model()), tmp_path / "harmed"
    learner.save(tmp_path)
    torch.save({"optimizer": Harm(harmed)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        learner.load(tmp_path)
    learner.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harm(harmed)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        learner.load(tmp_path)
    assert not harmed.exists()


ONLY_AN_ERROR = "from pickle import UnpicklingError"
OWN_PIPE = ROOT / "src/vpd/envs/adapters/callers.py"  # a run sends rows to a process that it has started, never back
VETTED = ROOT / "src/vpd/learners/sharding.py"


def test_nothing_is_unpickled_anywhere() -> None:
    """The one ``torch.load`` takes weights alone; ``pickle`` is not imported but for an error's name, for a run's own
    pipe, and by the reader of shards, which refuses every name that torch does not write (``pickletools`` only reads).
    """
    loads = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and ast.unparse(node) != ONLY_AN_ERROR:
                names = {alias.name for alias in node.names} | (
                    {node.module} if isinstance(node, ast.ImportFrom) else set()
                )
                assert path in (OWN_PIPE, VETTED) or not names & {
                    "pickle",
                    "cloudpickle",
                    "dill",
                    "joblib",
                    "shelve",
                }, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads.append({k.arg: ast.unparse(k.value) for k in node.keywords})
    assert loads and all(options.get("weights_only") == "True" for options in loads)


@pytest.mark.parametrize(
    "settings", [{}, {"model__lora": "{r: 4}"}, {"algorithm__name": "gkd", "algorithm__teacher_model": "tiny"}]
)
def test_other_libraries_have_nothing_to_warn_of(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        changes = {"run__max_steps": 1, "run__save_steps": 1, "run__eval_steps": 1} | settings
        assert vpd_train(tmp_path / "out", optim__gradient_checkpointing="selective", **changes) == 0
    # text longer than the model's window is cut, and nothing is said of its length
    prompter = Prompter(load_model(load(None, []).model)[1], PromptSettings(), window=96, max_completion_length=8)
    assert prompter.fit("wrong : " * 999, budget=9).cut and "sequence length" not in capfd.readouterr().err
    kinds = (DeprecationWarning, FutureWarning, UserWarning)
    assert not [str(w.message) for w in seen if issubclass(w.category, kinds)]
