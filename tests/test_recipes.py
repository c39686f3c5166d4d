"""Every recipe is dry-run for every method, and trains three steps with a small model."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vpd.config import load
from vpd.config.dry_run import load_dry_run
from vpd.recipes.dry_run import dry_run
from vpd.recipes.train import train

ROOT = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(path.name for path in ROOT.glob("*.yaml"))
MACHINES = sorted(path.name for path in (ROOT / "hardware").glob("*.yaml"))
MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "allenai/Olmo-3-7B-Instruct")
SMALL = ["--rollout.prompts_per_step", "2", "--rollout.num_generations", "2", "--run.eval_steps", "0"]


def pairs(ones: Sequence[str], others: Sequence[str]) -> list[Any]:
    """Every pair; each of both appears in one that is not slow."""
    quick = {(ones[n % len(ones)], others[n % len(others)]) for n in range(max(len(ones), len(others)))}
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in itertools.product(ones, others)
    ]


@pytest.fixture(autouse=True)
def domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAIN", "physics")


@pytest.mark.parametrize(("recipe", "method"), pairs(RECIPES, ("vpd", "sdpo", "grpo", "gated")))
def test_a_recipe_dry_runs(recipe: str, method: str) -> None:
    files = [str(ROOT / recipe), str(ROOT / "hardware" / "1x80gb.yaml")]
    machine, _ = load_dry_run(files, ["--dry_run.prompt_tokens", "300"], wanted=True)
    config = load(files, ["--algorithm.name", method, *SMALL])
    found = dry_run(config, machine).estimate
    assert config.method == method and found.peak > 0 and found.run_seconds > 0


@pytest.mark.parametrize(("machine", "model"), pairs(MACHINES, MODELS))
def test_a_machine_dry_runs(machine: str, model: str) -> None:
    files = [str(ROOT / "sciknoweval.yaml"), str(ROOT / "hardware" / machine)]
    assumed, _ = load_dry_run(files, ["--dry_run.prompt_tokens", "300"], wanted=True)
    found = dry_run(load(files, ["--model.name_or_path", model, *SMALL]), assumed).estimate
    assert found.peak > 0


@pytest.mark.parametrize("name", ["biology", "chemistry", "material", "physics"])
def test_a_domain_is_a_word_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAIN", name)
    config = load(str(ROOT / "sciknoweval.yaml"))
    assert config.env.path == f"sciknoweval/{name}-train.jsonl" and config.run.output_dir.endswith(name)


def data_of(recipe: str, folder: Path) -> str:
    """A few records of the recipe's kind, made here."""
    words = ["energy", "mass", "charge", "field", "force", "light", "wave", "atom"]
    tool = 'weather: How warm it is.\nParameters: {"city": "Required. string."}\nOutput: a number.\n\nHow warm is it in'
    calls = [json.dumps([{"Action": "weather", "Action_Input": json.dumps({"city": word})}]) for word in words]
    asked = [f"Which is the {word}?\n\nA: one\nB: two\nC: three\nD: four" for word in words]
    made: dict[str, list[dict[str, object]]] = {
        "sciknoweval": [{"prompt": q, "answer": "ABCD"[n % 4], "kind": "mcq"} for n, q in enumerate(asked)],
        "tooluse": [{"prompt": f"{tool} {word}?", "answer": call} for word, call in zip(words, calls, strict=True)],
        "maths": [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(8)],
    }
    if recipe == "livecodebench":
        return str(ROOT.parent / "examples" / "code.jsonl")
    made["cold_start"] = made["sciknoweval"]
    path = folder / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, made[recipe])))
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_three_steps(recipe: str, tmp_path: Path) -> None:
    recipe = recipe.removesuffix(".yaml")
    words = ["--env.path", data_of(recipe, tmp_path), "--env.eval_path", "null", "--env.eval_share", "0.25"]
    words += ["--model.name_or_path", "tiny", "--rollout.max_completion_length", "6", "--run.max_steps", "3", *SMALL]
    words += ["--run.output_dir", str(tmp_path / "out"), "--algorithm.distillation_topk", "20"]
    words += ["--prompts.max_prompt_length", "null"]
    folder = train(load(str(ROOT / f"{recipe}.yaml"), words))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert sum(step["m_step/rows"] for step in steps) > 0
