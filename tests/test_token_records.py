"""Rows that are kept token by token: which, in which states of the weights, and that nothing else changes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fakes import RecordingObserver
from helpers import ALGORITHMS, SMALL, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train

from vpd.algorithms.e_step import EStep
from vpd.algorithms.examples import student_logprobs, teacher_logprobs, to_examples
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.bundled import load_bundled
from vpd.config import load
from vpd.learners.journal import Journal
from vpd.learners.token_records import Recording, TokenRecord, TokenRecorder, choose
from vpd.recipes.assemble import assemble
from vpd.recipes.loops import make_loop
from vpd.run_folder.reading import read_rollouts, read_tokens
from vpd.run_folder.token_tables import token_table, token_texts
from vpd.types import Group, attempts_and_retries


class Keeping(RecordingObserver):
    """Also keeps the records and the signals of every step."""

    def on_token_records(self, step: int, records: Sequence[TokenRecord]) -> None:
        self.records = list(records)

    def on_token_signals(self, step: int, signals: Any, groups: Sequence[Group]) -> None:
        self.signals = signals


def parts_of(**settings: Any) -> Any:
    words = [word for key, value in (SMALL | settings).items() for word in (f"--{key}", str(value))]
    return assemble(load(None, words))


STEP = {"run.max_steps": 1, "algorithm.name": "vpd", "algorithm.e_every": 1}


def one_step(recording: Recording | None, **settings: Any) -> tuple[Keeping, Any]:
    parts, keeping = parts_of(**STEP, **settings), Keeping([])
    loop = make_loop(parts, [keeping], output=None)
    loop.recording = recording
    loop.run()
    return keeping, parts


def test_the_log_probs_are_those_that_the_update_sees() -> None:
    keeping, _ = one_step(Recording(rows=5, top_k=3), **{"algorithm.teacher": "ema"})
    gaps = keeping.signals["m_step/teacher_minus_student"]
    rollouts = [rollout for group in keeping.seen[0][2] for rollout in group.rollouts]
    scored = [record for record in keeping.records if record.teacher]
    assert len(keeping.records) == 5 and len(scored) == 5
    for record in scored:
        gap = torch.tensor(record.teacher) - torch.tensor(record.student)
        assert torch.allclose(gap, gaps[record.row].float(), atol=1e-5)
        assert record.rollout is rollouts[record.row]
        tokens = record.rollout.completion.tokens
        for token, teacher, student, ids, top, at in zip(
            tokens, record.teacher, record.student, record.top_ids, record.top_teacher, record.top_student, strict=True
        ):
            assert len(set(ids)) == 3 and list(top) == sorted(top, reverse=True)
            if token in ids:
                assert top[ids.index(token)] == pytest.approx(teacher) and at[ids.index(token)] == pytest.approx(
                    student
                )
            else:
                assert teacher <= min(top) + 1e-6


def test_before_and_after_are_of_the_weights_that_the_e_step_trains() -> None:
    groups = random_groups(1)
    learner, algorithm = tiny_learner(tiny_model()), ALGORITHMS["vpd"][0]()
    recorder = TokenRecorder(groups, Recording(rows=4, top_k=0))
    rows = [e for e in to_examples(groups) if e.teacher is not None]
    before = {e.key: score for e, score in zip(rows, learner.score(rows, teacher_logprobs), strict=True)}
    student = {e.key: score for e, score in zip(rows, learner.score(rows, student_logprobs), strict=True)}
    assert isinstance(algorithm.e_step, EStep)
    algorithm.step(groups, Journal(learner, groups, recorder))
    moved = 0
    for record in recorder.records():
        if record.teacher_before and record.rollout.success is False:
            assert record.teacher_before == pytest.approx(before[record.rollout.key], abs=1e-5)
            assert record.student_before == pytest.approx(student[record.rollout.key], abs=1e-5)
            moved += record.teacher_after != record.teacher_before
    assert moved >= 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_recording_changes_nothing(name: str) -> None:
    make, teacher = ALGORITHMS[name]
    weights, metrics = [], []
    for recording in (None, Recording(rows=3, top_k=2)):
        external = {"external": tiny_model(1)} if teacher.kind == "external" else {}
        learner, algorithm = tiny_learner(tiny_model(), teacher=teacher, **external), make()
        for seed in range(2):
            groups = random_groups(seed)
            recorder = None if recording is None else TokenRecorder(groups, recording)
            journal = Journal(learner, groups, recorder)
            update = algorithm.step(groups, journal)
            learner.end_iteration()
            metrics.append({key: value for key, value in update.metrics.items() if not key.startswith("time/")})
        weights.append([parameter.clone() for parameter in learner.model.parameters()])
    assert metrics[:2] == metrics[2:]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_without_a_teacher_nothing_is_scored() -> None:
    groups = [
        Group(rollouts=tuple(dataclasses.replace(r, teacher_prompt=None) for r in group.rollouts))
        for group in random_groups(0)
    ]
    learner, recorder = tiny_learner(tiny_model()), TokenRecorder(groups, Recording(rows=4, top_k=2))
    scored: list[Any] = []
    learner.score = lambda *arguments, **options: scored.append(arguments)  # type: ignore[assignment,method-assign]
    GRPO(GRPOSettings()).step(groups, Journal(learner, groups, recorder))
    assert not scored and [record.student for record in recorder.records()] == [()] * 4


def test_rows_with_a_teacher_come_first_and_kinds_take_turns() -> None:
    groups = random_groups(2)
    places = {row: rollout for row, (_, _, rollout) in enumerate(attempts_and_retries(groups))}
    for count in (0, 1, 2, 4, 100):
        chosen = choose(groups, count)
        assert len(chosen) == min(count, len(places)) and list(chosen) == sorted(chosen)
        assert all(places[row] is rollout for row, rollout in chosen.items())
    pair = choose(groups, 2).values()
    assert {rollout.success for rollout in pair} == {True, False}
    assert all(rollout.teacher_prompt is not None for rollout in pair)
    assert choose(groups, 4) == choose(list(groups), 4)


def test_a_run_keeps_four_rows_a_step_and_as_many_as_asked(tmp_path: Path) -> None:
    usual, more, none = (tmp_path / name for name in ("usual", "more", "none"))
    vpd_train(usual, **{"run.max_steps": 2, "rollout.retries": 1})
    vpd_train(more, **{"run.max_steps": 2, "rollout.retries": 1, "run.record_rows": 6, "run.record_top_k": 0})
    vpd_train(none, **{"run.max_steps": 2, "rollout.retries": 1, "run.record_rows": 0})
    assert metrics_of(usual) == metrics_of(more) == metrics_of(none)
    assert not (none / "tokens").exists()
    assert [read_tokens(folder, [2]).num_rows for folder in (usual, more)] == [4, 6]
    rollouts = read_rollouts(usual, [2]).to_pylist()
    roles = set()
    for row in read_tokens(usual, [2]).to_pylist():
        rollout = rollouts[row["row"]]
        roles.add(rollout["role"])
        assert "".join(row["texts"]).split() == rollout["completion"].split()
        assert row["top_k"] == 5 and len(row["top_ids"]) == 5 * len(row["ids"]) == len(row["top_texts"])
        assert len(row["ids"]) == rollout["tokens"] == len(row["teacher"]) and row["teacher_before"] is None
    assert roles == {"student", "teacher"}
    assert set(read_tokens(more, [2])["top_k"].to_pylist()) == {0}
    assert pq.read_schema(usual / "tokens" / "step-000001.parquet") == pq.read_schema(
        more / "tokens" / "step-000001.parquet"
    )


def test_a_character_of_several_tokens_stands_at_its_last(tmp_path: Path) -> None:
    class Bytes:
        def decode(self, tokens: Sequence[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    text = "a\N{SNOWMAN}b\N{GRINNING FACE}"
    assert token_texts(Bytes(), list(text.encode())) == [
        "a",
        "",
        "",
        "\N{SNOWMAN}",
        "b",
        "",
        "",
        "",
        "\N{GRINNING FACE}",
    ]
    broken = [97, 0xFF, 0xFE, 98, 0xF0]
    assert "".join(token_texts(Bytes(), broken)) == bytes(broken).decode(errors="replace")
    assert len(token_texts(Bytes(), broken)) == 5 and token_texts(Bytes(), []) == []


def test_a_half_surrogate_in_a_token_does_not_stop_the_run() -> None:
    class Odd:
        def decode(self, tokens: Sequence[int]) -> str:
            return "\ud83d" * len(tokens)

    groups = random_groups(0)
    record = TokenRecord(row=0, rollout=groups[0].rollouts[0], top_ids=((1,),), top_teacher=((0.0,),))
    table = token_table(1, [record], Odd())
    assert "\\ud83d" in table["texts"][0].as_py()[0] and load_bundled("tiny").is_dir()


def test_one_success_without_a_context_is_chosen_beside_failures_with_one() -> None:
    """The E-step may lend it the context of a failure, and its implicit reward is what the failures' compare with."""
    groups = [
        Group(
            rollouts=tuple(
                dataclasses.replace(r, context=(), teacher_prompt=None) if r.success else r for r in group.rollouts
            )
        )
        for group in random_groups(2)
    ]
    chosen = list(choose(groups, 4).values())
    assert [rollout.success for rollout in chosen].count(True) == 1
    assert len(choose(groups, 100)) == 12
