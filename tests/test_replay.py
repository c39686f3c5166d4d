"""A number that is not finite stops a run before the step, with a dump that ``vpd replay`` runs again."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, flat, tiny_learner, tiny_model, vpd_train

from vpd.cli import main
from vpd.config import load
from vpd.errors import NonFiniteError, StorageError
from vpd.learners.nonfinite import Trace, weights_not_finite
from vpd.recipes.assemble import Parts, assemble, load_model
from vpd.recipes.loops import make_loop
from vpd.recipes.replay import replay
from vpd.recipes.train import run
from vpd.run_folder import faults

TWO = {"run.max_steps": 2, "run.save_steps": 0}


def parts_of(output: Path, model: Any = None, tokenizer: Any = None, **changes: Any) -> Parts:
    settings = SMALL | TWO | {"run.output_dir": output} | {key.replace("__", "."): v for key, v in changes.items()}
    config = load(None, [word for key, value in settings.items() for word in (f"--{key}", str(value))])
    return assemble(config, model=model, tokenizer=tokenizer)


def model_that_overflows_on(word: str) -> tuple[Any, Any]:
    """The tiny base with an embedding of one word that is finite and makes everything after it not so."""
    model, tokenizer = load_model(load(None, []).model)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        model.get_output_embeddings().weight = torch.nn.Parameter(embedding.clone())  # the student never reads the word
        embedding[tokenizer.convert_tokens_to_ids(word)] = 3e38
    return model, tokenizer


@pytest.mark.parametrize("algorithm", ["sdpo", "vpd", "gated", "hybrid", "grpo"])
def test_a_step_that_breaks_the_weights_stops_every_method(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        """
from vpd import Grade
from vpd.envs.digits import Digits

class Parity(Digits):
    def grade(self, tasks, texts):
        return [Grade(reward=float(sum(map(ord, text)) % 2), feedback="odd") for text in texts]
"""
    )
    monkeypatch.chdir(tmp_path)
    huge = {"optim__learning_rate": 1e29, "optim__optimizer": "sgd"}
    assert vpd_train(Path("out"), env__name="own.py:Parity", algorithm__name=algorithm, **huge) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite" in error and "vpd replay out/nonfinite-step-" in error
    [folder] = Path("out").glob("nonfinite-step-*")
    assert main(["replay", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert error.split(";")[0].removeprefix("vpd: error: ") in shown and "  first " in shown


def test_a_rate_that_no_step_can_be_taken_with_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "out", algorithm__name="sdpo", optim__learning_rate=1e38) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the learning rate of the update 'm_step' is out of range; got 1e+38" in error


def test_a_context_that_overflows_is_found_in_its_rows(tmp_path: Path) -> None:
    model, tokenizer = model_that_overflows_on("wrong")
    parts = parts_of(tmp_path / "out", model, tokenizer, algorithm__name="vpd")
    before = flat(parts.learner.model)
    with pytest.raises(NonFiniteError, match=r"the update 'e_step'.*vpd replay .*nonfinite-step-000001$") as stopped:
        run(parts)
    assert flat(parts.learner.model).equal(before) and "\n" not in str(stopped.value)
    folder = tmp_path / "out" / "nonfinite-step-000001"
    found = replay(folder)
    assert found[0].startswith("gradient of model model.layers.1.mlp.down_proj.weight: ")
    fault, _ = faults.read(folder)
    assert fault.call is not None and fault.call.name == "e_step"
    context = {e.name for e in fault.call.examples if e.teacher is not None}
    rows = {line.partition(" alone: ")[0] for line in found if " alone: " in line}
    assert rows and rows <= context


def test_a_dump_is_read_back_as_it_was(tmp_path: Path) -> None:
    model, tokenizer = model_that_overflows_on("wrong")
    parts = parts_of(tmp_path / "out", model, tokenizer, algorithm__name="vpd")
    kept: list[Any] = []
    loop = make_loop(parts, [], output=tmp_path)
    inner = loop.dump
    assert inner is not None

    def dump(fault: Any) -> Path:
        kept.append(fault)
        return inner(fault)

    loop.dump = dump
    with pytest.raises(NonFiniteError):
        loop.run()
    fault, settings = faults.read(tmp_path / "nonfinite-step-000001")
    [before] = kept
    assert fault.call == before.call and fault.algorithm == before.algorithm and fault.step == before.step == 1
    rollouts = [r for group in before.groups for r in group.rollouts]
    bare = [dataclasses.replace(r, task=dataclasses.replace(r.task, payload=None)) for r in rollouts]
    assert [r for group in fault.groups for r in group.rollouts] == bare
    assert settings["algorithm"]["name"] == "vpd"


def test_a_folder_without_a_dump_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fault.json").write_text(json.dumps({"step": 1}))
    for folder, reason in ((tmp_path / "none", "got No such file or directory; "), (tmp_path, "")):
        with pytest.raises(StorageError, match=f"holds no dump of an iteration; {reason}"):
            faults.read(folder)
    assert main(["replay", str(tmp_path)]) == 2


def test_a_weight_that_no_loss_sees_stops_the_run_all_the_same() -> None:
    model = tiny_model()
    learner = tiny_learner(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[22, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"weights are not finite after this iteration.*embed_tokens.*1 of 368"):
        learner.end_iteration()
    assert learner.version == 0
    assert weights_not_finite(model)[0].startswith("model.embed_tokens.weight: 1 of")


def test_the_first_place_comes_first() -> None:
    model, trace = tiny_model(), Trace()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e308)
    with trace.watching({"model": model}):
        model(torch.tensor([[1, 2, 3]]))
    assert trace.found[0].startswith("output of model model.layers.1.mlp.down_proj: ")
    trace.found.clear()
    model(torch.tensor([[1, 2, 3]]))
    assert not trace.found  # nothing is left behind in the model
