"""Whole runs through the command line on the shipped base: what they leave behind, resume, determinism, bad input."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import metrics_of, vpd_train
from transformers import AutoModelForCausalLM

from vpd.bundled import load_bundled
from vpd.cli import main
from vpd.config import parse
from vpd.envs import held_out_tasks
from vpd.evaluation import EvalSettings, evaluate
from vpd.lab import tiny
from vpd.recipes.assemble import assemble
from vpd.run_folder import checkpoint


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_run_folder_holds_what_the_readme_says(tmp_path: Path) -> None:
    vpd = {"algorithm__name": "vpd", "algorithm__e_every": 2}
    assert vpd_train(tmp_path / "run", **vpd, run__save_steps=2, run__eval_steps=2) == 0
    run = tmp_path / "run"
    steps = metrics_of(run)
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert all("eval/avg@2" in steps[i] and "eval_teacher/avg@2_se" in steps[i] for i in (0, 2, 4))
    assert [line["e_step/rows"] > 0 for line in steps[1:]] == [True, False, True, False]
    for name in ("loss", "shift", "implicit_reward_failure", "accuracy", "saturation", "student_drift_kl"):
        assert f"e_step/{name}" in steps[1]
    for name in ("reward", "reward_std", "completions/mean_length", "teacher/rows_with_context", "m_step/divergence"):
        assert name in steps[1]
    assert "completions/clipped_ratio" not in steps[1]  # digits answers have a fixed length
    table = pq.read_table(run / "rollouts").to_pylist()
    assert len(table) == 4 * 16
    failed = next(row for row in table if not row["success"])
    assert failed["feedback"].startswith("wrong : rule") and failed["feedback"] in failed["teacher_prompt"]
    assert (run / "checkpoint-4" / "model.safetensors").exists() and (run / "config.yaml").exists()
    AutoModelForCausalLM.from_pretrained(run / "model")


PARTIAL = f"{Path(__file__).resolve().parent}/partial_env.py:Partial"
#: settings of runs that are stopped after 2 of 4 steps
STOPPED: dict[str, dict[str, object]] = {
    "vpd": {"algorithm__e_every": 2},
    "sdpo": {},
    "grpo": {"env__name": PARTIAL},
    "hybrid": {"env__name": PARTIAL},
    "gkd": {"algorithm__teacher_model": tiny.FOLDER, "algorithm__student_fraction": 0.5},
    "gkd, data": {
        "algorithm__teacher_model": tiny.FOLDER,
        "algorithm__student_fraction": 0.5,
        "algorithm__other_answers": "data",
    },
    "plare": {"feedback": "[{name: judge, judge: reward, max_pairs: 5}]", "env__name": PARTIAL},
    "sft": {"env__name": PARTIAL},
    "ldd": {},
}


@pytest.mark.parametrize("name", STOPPED)
def test_same_seed_same_run_and_resume_is_uninterrupted(name: str, tmp_path: Path) -> None:
    extra = STOPPED[name] | {"algorithm__name": name.split(",")[0], "run__save_steps": 2}
    assert vpd_train(tmp_path / "whole", **extra) == 0
    assert vpd_train(tmp_path / "again", **extra) == 0
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "again")
    assert vpd_train(tmp_path / "parts", **(extra | {"run__max_steps": 2})) == 0
    assert vpd_train(tmp_path / "parts", **(extra | {"run__resume": "true"})) == 0
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    start = AutoModelForCausalLM.from_pretrained(load_bundled()).state_dict()
    assert not all(torch.equal(whole[key], start[key]) for key in whole)


def test_resume_passes_over_a_damaged_checkpoint_and_a_finished_run_exits_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert vpd_train(run, run__save_steps=2) == 0
    first = metrics_of(run)
    assert vpd_train(run, run__save_steps=2, run__resume="true") == 0
    assert "nothing to do" in capsys.readouterr().out
    damaged = run / "checkpoint-4" / "state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    good, faults = checkpoint.newest_good(run)
    assert good == run / "checkpoint-2" and "state.pt" in faults[0]
    assert vpd_train(run, run__save_steps=2, run__resume="true", run__max_steps=5) == 0
    assert metrics_of(run)[:4] == first and len(metrics_of(run)) == 5
    assert "passed over a damaged checkpoint" in capsys.readouterr().out


def test_e_every_null_is_sdpo(tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "vpd", algorithm__name="vpd", algorithm__e_every="null") == 0
    assert vpd_train(tmp_path / "sdpo", algorithm__name="sdpo") == 0
    vpd, sdpo = weights_of(tmp_path / "vpd"), weights_of(tmp_path / "sdpo")
    assert all(torch.equal(vpd[key], sdpo[key]) for key in vpd)


ENV = """
from vpd.envs import per_row
from vpd.types import Grade, Task

class Base:
    def task(self, index, *, seed):
        return Task(id=str(index), messages=({"role": "user", "content": "apply rule A to 1 2 3"},))
    def eval_tasks(self, limit):
        return [self.task(0, seed=0)][:limit]

class Raises(Base):
    @per_row
    def grade(self, task, text):
        raise KeyError("oops")

class NotANumber(Base):
    @per_row
    def grade(self, task, text):
        return Grade(reward=float("nan"))

class TooFew(Base):
    def grade(self, tasks, texts):
        return [Grade(reward=0.0)]

class LongPrompt(Base):
    def task(self, index, *, seed):
        return Task(id="long", messages=({"role": "user", "content": "1 " * 200},))
    @per_row
    def grade(self, task, text):
        return Grade(reward=0.0)

class NotText(Base):
    def grade(self, tasks, texts):
        from dataclasses import replace
        return [replace(Grade(reward=0.0), feedback=3) for _ in tasks]
"""

MISTAKES = {
    "unknown key": ({"algorithm.e_evry": 3}, ["algorithm.e_evry", "e_every"]),
    "unknown section": ({"algorithms.e_every": 3}, ["'algorithms'", "'algorithm'"]),
    "wrong type": ({"rollout.num_generations": "many"}, ["rollout.num_generations", "'many'"]),
    "unknown algorithm": ({"algorithm.name": "vdp"}, ["'vdp'", "'vpd'"]),
    "top-k above V": ({"algorithm.distillation_topk": 1000}, ["distillation_topk", "at most 36"]),
    "alpha": ({"algorithm.distillation_alpha": 1.5}, ["distillation_alpha", "1.5"]),
    "GRPO with G = 1": ({"algorithm.name": "grpo", "rollout.num_generations": 1}, ["num_generations 1"]),
    "frozen teacher": ({"algorithm.teacher": "frozen"}, ["never moves"]),
    "missing model": ({"model.name_or_path": "/nowhere/model"}, ["'/nowhere/model': there is no such folder"]),
    "missing key": ({"env.name": "science"}, ["env.path is missing", "--env.path"]),
    "no window": ({"rollout.max_completion_length": 4096}, ["does not fit the model's window"]),
    "missing env file": ({"env.name": "nowhere.py:Env"}, ["nowhere.py"]),
    "missing data": ({"env.name": "science", "env.path": "nowhere.jsonl"}, ["nowhere.jsonl"]),
    "zero temperature": ({"rollout.temperature": 0}, ["rollout.temperature"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_2_and_no_folder(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, told = MISTAKES[mistake]
    assert vpd_train(tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err
    assert error.startswith("vpd: error: ") and error.count("\n") == 1
    assert all(piece in error for piece in told), error
    assert not (tmp_path / "run").exists()


def test_metrics_reach_a_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "run", run__max_steps=1, run__report_to="[tensorboard]") == 0
    assert any(file.stat().st_size > 500 for file in (tmp_path / "run" / "vpd").glob("events*"))
    assert metrics_of(tmp_path / "run")[0]["learning_rate"] == 1e-3
    if importlib.util.find_spec("wandb") is None:
        assert vpd_train(tmp_path / "other", run__report_to="[wandb]") == 2
        assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_feedback_is_a_list_on_the_command_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "run", feedback="[environment, sibling]", run__max_steps=1) == 0
    assert [s["name"] for s in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["feedback"]] == [
        "environment",
        "sibling",
    ]
    assert vpd_train(tmp_path / "other", feedback="[]") == 2 and "needs feedback" in capsys.readouterr().err
    assert vpd_train(tmp_path / "other", feedback__name="sibling") == 2 and "is a list" in capsys.readouterr().err


def test_sibling_needs_a_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("feedback: [sibling]\nrollout: {num_generations: 1}\n")
    assert main(["train", "--config", str(config), "--run.output_dir", str(tmp_path / "run")]) == 2
    assert "sibling" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Raises", ["KeyError", "row 0", "oops", "env.py:"]),
        ("NotANumber", ["the grader on row 0 (task ", "env.py:19: a grade's reward", "finite number", "nan"]),
        ("NotText", ["the grader on a batch of 16 rows at ", "env.py:35: a grade's feedback"]),
        ("TooFew", ["1 grades", "list of 16"]),
        ("LongPrompt", ["'long'", "window"]),
    ],
)
def test_a_broken_environment_is_one_clear_error(
    name: str, told: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.py").write_text(ENV)
    assert vpd_train(tmp_path / "run", env__name=f"{tmp_path}/env.py:{name}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(piece in error for piece in told), error
    assert not (tmp_path / "run" / "model").exists()
    assert vpd_train(tmp_path / "run", run__max_steps=1) == 0  # once mended, the same folder serves


def test_an_unwritable_folder_and_a_used_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert vpd_train(tmp_path / "file" / "run", model__name_or_path="no_such_model") == 2  # known before it is loaded
    assert "cannot write" in capsys.readouterr().err
    assert vpd_train(tmp_path / "run", run__max_steps=1) == 0
    capsys.readouterr()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert vpd_train(tmp_path / "run", run__max_steps=1) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_full_disk_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert vpd_train(tmp_path / "run", run__save_steps=2) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_eval_reports_student_and_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "eval.json"
    words = ["eval", "--num_samples", "2", "--limit", "64", "--teacher", "--output", str(numbers)]
    assert main([*words, "--rollout.max_completion_length", "6"]) == 0
    result = json.loads(numbers.read_text())
    assert result["student"]["tasks"] == 64 and result["student"]["answers"] == 128
    assert result["teacher"]["avg@2"] > result["student"]["avg@2"] + 0.05  # the base follows hints
    assert 0 <= result["teacher"]["avg@2_se"] < 0.1


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_what_the_external_teacher_sampled_is_compared_with_the_teacher(estimator: str) -> None:
    """A student far from its teacher raised the alarm that the sampler's weights are not the learner's."""
    algorithm = {
        "name": "gkd",
        "teacher_model": str(load_bundled("tiny-mid")),
        "student_fraction": 0.5,
        "distillation_alpha": 1.0,
        "distillation_estimator": estimator,
    }
    data = {"model": {"name_or_path": "tiny-cold"}, "algorithm": algorithm}
    parts = assemble(parse(data | {"rollout": {"max_completion_length": 6}}))
    groups, _ = parts.source.take(0)
    by_teacher = [rollout.completion.by_teacher for group in groups for rollout in group.rollouts]
    metrics = parts.algorithm.step(groups, parts.learner).metrics
    assert 0 < sum(by_teacher) < len(by_teacher)
    assert metrics["m_step/sampling_logp_difference"] < 1e-4


def test_evaluation_asks_the_student_alone_whatever_share_of_the_training_the_teacher_answers() -> None:
    def answers(student_fraction: float) -> tuple[list[str], list[str]]:
        algorithm = {
            "name": "gkd",
            "teacher_model": str(load_bundled("tiny-mid")),
            "student_fraction": student_fraction,
        }
        run = {"eval_limit": 8, "eval_samples": 2}
        data = {"model": {"name_or_path": "tiny-cold"}, "algorithm": algorithm, "run": run}
        parts = assemble(parse(data | {"rollout": {"max_completion_length": 6}}))
        settings = EvalSettings(sampling=parts.config.rollout.sampling, num_samples=2)
        result = evaluate(parts.source, held_out_tasks(parts.env, 8), settings)
        rollouts = [
            [r for group in groups for r in group.rollouts] for groups in (result.groups, parts.source.take(0)[0])
        ]
        held_out = [*rollouts[0], *result.retries, *result.control_retries]
        return [r.completion.text for r in held_out], [r.completion.text for r in rollouts[1]]

    student, trained_on = answers(1.0)
    for fraction in (0.5, 0.0):
        evaluated, sampled = answers(fraction)
        assert evaluated == student and sampled != trained_on
