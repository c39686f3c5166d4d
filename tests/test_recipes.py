"""Every recipe is dry-run for every method; one for each environment trains three steps with a small model."""

import dataclasses
import json
from pathlib import Path

import pytest

from vpd.config import load
from vpd.config.dry_run import load_dry_run
from vpd.config.sections import ENGINES
from vpd.learners.settings import OptimSettings
from vpd.recipes.dry_run import dry_run

ROOT = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(path.name for path in ROOT.glob("*.yaml"))
MACHINES = sorted(path.name for path in (ROOT / "hardware").glob("*.yaml"))
SHARDS = "sharding" in {field.name for field in dataclasses.fields(OptimSettings)} and "vllm" in ENGINES
MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "allenai/Olmo-3-7B-Instruct")
SMALL = ["--rollout.prompts_per_step", "2", "--rollout.num_generations", "2", "--run.eval_steps", "0"]


@pytest.fixture(autouse=True)
def domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAIN", "physics")


@pytest.mark.parametrize("method", ["vpd", "sdpo", "grpo", "gated"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_dry_runs(recipe: str, method: str) -> None:
    files = [str(ROOT / recipe), str(ROOT / "hardware" / "1x80gb.yaml")]
    machine, _ = load_dry_run(files, ["--dry_run.prompt_tokens", "300"], wanted=True)
    config = load(files, ["--algorithm.name", method, *SMALL])
    found = dry_run(config, machine).estimate
    assert config.method == method and found.peak > 0 and found.run_seconds > 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_dry_runs(machine: str, model: str) -> None:
    if "8x80" in machine and not SHARDS:
        pytest.skip("needs optim.sharding and engine.name vllm")
    files = [str(ROOT / "sciknoweval.yaml"), str(ROOT / "hardware" / machine)]
    assumed, _ = load_dry_run(files, ["--dry_run.prompt_tokens", "300"], wanted=True)
    found = dry_run(load(files, ["--model.name_or_path", model, *SMALL]), assumed).estimate
    assert found.peak > 0


@pytest.mark.parametrize("name", ["biology", "chemistry", "material", "physics"])
def test_a_domain_is_a_word_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAIN", name)
    config = load(str(ROOT / "sciknoweval.yaml"))
    assert config.env.path == f"sciknoweval/{name}-train.jsonl" and config.run.output_dir.endswith(name)


def write(path: Path, records: list[dict[str, object]]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)
