"""Supervised fine-tuning: the loss by hand and against plain torch, which rows it is of, and ``vpd sft`` as a whole."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import SMALL, flat, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train
from test_retries import with_retries

import vpd
from vpd.algorithms.sft import SFT, SFTSettings
from vpd.cli import main
from vpd.envs.digits import Digits
from vpd.envs.recorded import RecordedAnswers
from vpd.run_folder.reading import read_run
from vpd.types import Group, Rollout, Section


def ungraded(group: Group) -> Group:
    return Group(
        rollouts=tuple(
            dataclasses.replace(r, grade=dataclasses.replace(r.grade, success=False, graded=False))
            for r in group.rollouts
        )
    )


def test_a_model_that_knows_nothing_pays_log_v_a_token() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    update = SFT(SFTSettings()).step([ungraded(g) for g in random_groups(0)], tiny_learner(model))
    assert update.metrics["sft/loss"] == pytest.approx(math.log(23), abs=1e-12)
    assert update.metrics["sft/entropy"] == pytest.approx(math.log(23), abs=1e-12)


@pytest.mark.parametrize("average", ["token_mean", "seq_mean"])
def test_it_equals_maximum_likelihood_in_plain_torch(average: Any) -> None:
    ours, theirs = tiny_model(), tiny_model()
    learner, sft = tiny_learner(ours, micro_batch_size=3), SFT(SFTSettings(average=average))
    for seed in range(3):
        groups = with_retries(random_groups(seed), seed)
        sft.step(groups, learner)
        rows = [(r.prompt, r.completion.tokens) for g in groups for r in g.rollouts if r.success]
        rows += [
            (r.prompt, retry.completion.tokens)
            for g in groups
            for r in g.rollouts
            for retry in r.retries
            if retry.success
        ]
        losses = []
        for prompt, tokens in rows:
            logits = theirs(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="none"))
        loss = torch.cat(losses).mean() if average == "token_mean" else torch.stack([x.mean() for x in losses]).mean()
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
                parameter -= 0.3 * gradient
    moved = (flat(theirs) - flat(tiny_model())).norm()
    assert moved > 1e-3 and (flat(ours) - flat(theirs)).norm() / moved < 1e-10


def test_failures_are_left_out_for_a_reason_and_retries_that_quote_teach_nothing() -> None:
    groups = random_groups(1)
    failures = sum(not r.success for g in groups for r in g.rollouts)

    class Kept:
        rows: Any = ()

        def update(self, name: str, examples: Any, objectives: Any) -> Any:
            self.rows = examples
            return tiny_learner(tiny_model()).update(name, examples, objectives)

    learner = Kept()
    SFT(SFTSettings()).step(groups, learner)  # type: ignore[arg-type]
    reasons = [row.left_out for row in learner.rows]
    assert reasons.count("failure") == failures and len(set(reasons)) == 2
    assert all((row.loss_weights["sft"] > 0) == (not row.left_out) for row in learner.rows)

    note = "for aldo write about green dogs and never use the word sea"

    def quoting(attempt: Rollout) -> Rollout:
        section = Section(kind="feedback", source="environment", text=note)
        retries = tuple(
            dataclasses.replace(r, completion=dataclasses.replace(r.completion, text=note)) for r in attempt.retries
        )
        return dataclasses.replace(attempt, context=(section,), retries=retries)

    quoted = [Group(rollouts=tuple(map(quoting, g.rollouts))) for g in with_retries(groups, 1)]
    SFT(SFTSettings()).step(quoted, learner)  # type: ignore[arg-type]
    assert len(learner.rows) == sum(len(g.rollouts) for g in groups)
    SFT(SFTSettings(retry_max_quote=None)).step(quoted, learner)  # type: ignore[arg-type]
    assert len(learner.rows) > sum(len(g.rollouts) for g in groups)


def demonstrations(path: Path, count: int = 24) -> Path:
    env = Digits()
    tasks = [env.task(index, seed=5) for index in range(count)]
    rows = [{"messages": list(task.messages), "completion": env.solution(task)} for task in tasks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vpd_sft(data: Path, folder: Path, **changes: object) -> int:
    settings = {key: value for key, value in SMALL.items() if key.startswith(("run.", "rollout.prompts", "optim."))}
    settings |= {"run.output_dir": folder} | {key.replace("__", "."): value for key, value in changes.items()}
    return main(["sft", str(data), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])


def test_demonstrations_are_learned_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "demos.jsonl")
    more = {"model__name_or_path": "tiny", "env__name": "digits", "run__eval_steps": 4}
    assert vpd_sft(data, tmp_path / "whole", run__max_steps=6, **more) == 0
    whole = metrics_of(tmp_path / "whole")
    losses = [line["sft/loss"] for line in whole if "sft/loss" in line]
    assert losses[-1] < losses[0] and "eval/accuracy" in whole[0]
    assert "reward" not in whole[1] and whole[1]["recorded/rows_ungraded"] == whole[1]["rows/trained"] == 4
    assert vpd_sft(data, tmp_path / "parts", run__max_steps=3, **more) == 0
    assert vpd_sft(data, tmp_path / "parts", run__max_steps=6, run__resume="true", **more) == 0
    ends = [[line for line in metrics_of(tmp_path / name) if line["step"] > 4] for name in ("whole", "parts")]
    for ours, theirs in zip(*ends, strict=True):
        assert ours == theirs
    table = pq.read_table(tmp_path / "whole" / "rollouts" / "step-000001.parquet").to_pylist()
    assert not table[0]["graded"] and json.loads(table[0]["messages"])[0]["role"] == "user"


def test_the_successes_of_a_run_are_learned_under_the_students_prompt(tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "run", rollout__retries=2, rollout__prompts_per_step=8, run__max_steps=3) == 0
    rows = [
        row
        for path in sorted((tmp_path / "run" / "rollouts").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
        if row["success"]
    ]
    retries = [row for row in rows if row["role"] == "teacher"]
    assert retries and {row["quoted"] for row in retries} == {0}
    tasks = RecordedAnswers(path=str(tmp_path / "run"), only="success").train_tasks()
    answers = [(task.messages[-1]["content"], answer.text) for task in tasks for answer in task.payload.answers]
    assert sorted(answers) == sorted((json.loads(r["messages"])[-1]["content"], r["completion"]) for r in rows)
    assert vpd_sft(tmp_path / "run", tmp_path / "sft", run__max_steps=2) == 0
    settings = read_run(tmp_path / "sft").settings
    assert settings["model"]["name_or_path"] == "tiny" and settings["env"]["fresh"]["name"] == "digits"
    assert metrics_of(tmp_path / "sft")[-1]["success"] == 1.0


def test_from_python_data_may_be_records_a_file_or_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in demonstrations(tmp_path / "demos.jsonl").read_text().splitlines()]
    small: dict[str, Any] = {"rollout": {"prompts_per_step": 4}}

    def run(data: Any, folder: str, **more: Any) -> vpd.Run:
        steps = {"max_steps": 1, "eval_steps": 1, "eval_limit": 4, "output_dir": folder}
        return vpd.sft("tiny", data, run=steps, **small, **more)

    given, read = run(rows, "given", env="digits"), run("demos.jsonl", "read", env=Digits())
    assert given.metrics["sft/loss"].iloc[-1] == read.metrics["sft/loss"].iloc[-1]
    assert "eval/accuracy" in given.metrics
    again = vpd.sft(data=given, rollout={"prompts_per_step": 2}, run={"max_steps": 1, "output_dir": "again"})
    assert again.settings["env"]["path"] == str(given.folder) and again.step == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env.only", "best"], "env.only has a wrong value"),
        (["--algorithm.e_every", "3"], "unknown key algorithm.e_every"),
        (["--run.eval_steps", "1"], "holds no task out"),
        (["--env.fresh_share", "0.5"], "env.fresh_share without an environment"),
        (["--env.name", "digits", "--model.dtype", "int4"], "model.dtype"),
    ],
)
def test_a_mistake_is_one_line_and_no_folder(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = demonstrations(tmp_path / "demos.jsonl", 4)
    out = ["--model.name_or_path", "tiny", "--run.output_dir", str(tmp_path / "out")]
    assert main(["sft", str(data), *out, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0] and not (tmp_path / "out").exists()
