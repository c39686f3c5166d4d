"""Which keys of a record are read, what an outcome may be, and answers that are blank, cut, or of another tokenizer."""

import csv
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import metrics_of, tiny_learner, tiny_model, vpd_train

from vpd.algorithms.examples import cross_entropy, student_logprobs
from vpd.cli import main
from vpd.envs.answer_records import check_keys, read_answer
from vpd.envs.recorded import GivenAnswers, RecordedAnswers
from vpd.errors import DataError
from vpd.lab import tiny
from vpd.prompts import Prompter
from vpd.prompts.recorded import check_answers
from vpd.recipes.collect import as_record
from vpd.types import Completion, Example, Grade, RecordedAnswer, Rollout, SampleKey, Task

ROW = {"prompt": "The capital of Peru?", "completion": "Lima"}
ASKED = [{"role": "user", "content": "The capital of Peru?"}]
TINY = ["--model.name_or_path", "tiny", "--rollout.prompts_per_step", "2", "--run.max_steps", "1"]


def grade_of(**more: Any) -> Grade:
    return read_answer(ROW | more, 0, "row 0", 0.5)[1].grade


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_score_is_a_reward() -> None:
    failed, solved = grade_of(score=0.0, feedback="f"), grade_of(score=np.float32(0.75))
    assert (failed.reward, failed.success, failed.graded) == (0.0, False, True)
    assert (solved.reward, solved.success, type(solved.reward)) == (0.75, True, float)
    assert grade_of(reward=1.0, score=87).reward == 1.0
    with pytest.raises(DataError, match=r"row 0: 'score' is no number; got '5/5'"):
        grade_of(score="5/5", turns=1)


def test_a_failure_with_a_score_is_no_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "f.jsonl", ROW | {"feedback": "f", "score": 0.0})
    assert main(["sft", str(data), *TINY, "--run.output_dir", str(tmp_path / "out")]) == 2
    assert "has no answer to learn from; got 1 failures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rewards", "reward"), ("sucess", "success"), ("feedbacks", "feedback"), ("Reward", "reward"),
        ("feed_back", "feedback"), ("scores", "score"), ("informativ", "informative"), ("logprob", "logprobs"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_an_error_with_file_and_line(key: str, meant: str, tmp_path: Path) -> None:
    data = written(tmp_path / "log.jsonl", ROW, ROW | {key: 1.0})
    with pytest.raises(DataError, match=rf"log\.jsonl line 2 has a key .*'{key}'\. Did you mean '{meant}'\?"):
        RecordedAnswers(path=str(data)).train_tasks()


def test_other_columns_are_named_once_and_refused_never(caplog: pytest.LogCaptureFixture) -> None:
    words = "source prompt_id reward_model score_chosen success_rate id idx uid title step critique answers"
    names = f"{words} completion_tokens feedback_id reward2 message tool_calls n_tokens".split()
    with caplog.at_level("INFO", "vpd"):
        GivenAnswers(
            entries=(ROW | dict.fromkeys(names, 1), ROW | {"critique": "Wrong.", "rewards": None})
        ).train_tasks()
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("data: columns that are not read (in how many records): critique (2), source (1), ")
    assert "id (1)" in line and " id (1)" not in line  # it is read
    assert check_keys(ROW | {"reward": 1.0, "rewards": [1.0]}, "row 0") == ["rewards"]  # the outcome is there


def test_what_vpd_writes_has_no_column_that_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert vpd_train(tmp_path / "run", run__max_steps=1) == 0
    attempt = Rollout(
        key=SampleKey(phase="train", step=0, task=0, sample=0),
        task=Task(id="x", messages=({"role": "user", "content": "?"},), tools=({"name": "f"},)),
        prompt=(1,),
        completion=Completion(tokens=(5,), sampled=(True,), logprobs=(-0.1,), text=" ", finish="stop", turns=2),
        grade=Grade(reward=0.0, success=False, feedback="no"),
    )
    with caplog.at_level("INFO", "vpd"):
        assert RecordedAnswers(path=str(tmp_path / "run")).train_tasks()
        assert not check_keys(as_record(attempt), "row 0") and read_answer(as_record(attempt), 0, "row 0", 0.5)
    assert "not read" not in caplog.text + capsys.readouterr().out


def test_of_two_columns_the_first_is_read_unless_they_are_two_tasks() -> None:
    both = {"messages": [*ASKED, {"role": "assistant", "content": "Lima"}], "prompt": "[user]The capital of Peru?"}
    task, answer = read_answer(both, 0, "row 0", 0.5)
    assert list(task.messages) == ASKED and answer.text == "Lima" and check_keys(both, "row 0") == ["prompt"]
    reference = ROW | {"completion": "Cusco", "answer": "Lima"}
    assert read_answer(reference, 0, "row 0", 0.5)[1].text == "Cusco" and check_keys(reference, "row 0") == ["answer"]
    with pytest.raises(DataError, match="row 0: 'messages' and 'prompt' are different tasks"):
        read_answer({"messages": ASKED, "prompt": "2 + 2?", "completion": "4"}, 0, "row 0", 0.5)


@pytest.mark.parametrize("value", ["false", "no", 0, 1, "true"])
def test_informative_is_a_truth_value(value: Any) -> None:
    with pytest.raises(DataError, match="row 0: 'informative' is no truth value; got "):
        grade_of(feedback="wrong", informative=value, turns=1)
    assert [grade_of(informative=given).informative for given in (True, False, None, np.bool_(False))] == [
        True, False, True, False,
    ]  # fmt: skip


def test_a_table_has_words_and_numbers_for_truth_values(tmp_path: Path) -> None:
    rows = [("true", "0"), ("0", "False"), ("1", "1"), ("", "")]
    with (tmp_path / "log.csv").open("w") as file:
        csv.writer(file).writerows(
            [("prompt", "completion", "success", "informative"), *(("p", "c", *r) for r in rows)]
        )
    (task,) = RecordedAnswers(path=str(tmp_path / "log.csv")).train_tasks()
    grades = [answer.grade for answer in task.payload.answers]
    assert [(g.success, g.informative, g.graded) for g in grades] == [
        (True, False, True), (False, False, True), (True, True, True), (False, True, False),
    ]  # fmt: skip


@pytest.mark.parametrize("said", ["", "   ", "\n"])
def test_an_answer_may_be_blank_in_every_form(said: str) -> None:
    message = {"role": "assistant", "content": said}
    for row in ({"completion": said}, {"completion": [message]}, {"answer": said}, {"messages": [*ASKED, message]}):
        more = row if "messages" in row else {"messages": ASKED, **row}
        assert read_answer(more, 0, "row 0", 0.5)[1].text == said
    with pytest.raises(DataError, match="has no text 'content'"):  # a question may not
        read_answer({"messages": [{"role": "user", "content": said}, message]}, 0, "row 0", 0.5)


EMPTY: dict[str, Any] = {"prompt": "apply rule A to 1 2 3", "completion": "", "feedback": "wrong : rule A means 1"}


@pytest.mark.parametrize(("name", "trained"), [("sdpo", 1.0), ("vpd", 1.0), ("grpo", 0.0)])
def test_a_row_without_tokens_is_left_out_whatever_the_rows_beside_it(
    name: str, trained: float, tmp_path: Path
) -> None:
    """The tiny model's template has no token that ends an answer."""
    rows = [EMPTY, EMPTY | {"completion": "  "}, EMPTY | {"prompt": "apply rule B to 1 2 3", "completion": "1 2 3"}]
    data = written(tmp_path / "log.jsonl", *rows)
    words = ["--env.name", "recorded", "--env.path", str(data), "--optim.micro_batch_size", "1"]
    assert main(["train", *TINY, *words, "--algorithm.name", name, "--run.output_dir", str(tmp_path / "out")]) == 0
    (step,) = metrics_of(tmp_path / "out")
    assert (step["rows/drawn"], step["rows/no_tokens"], step["rows/trained"]) == (3.0, 2.0, trained)


def test_a_learner_scores_and_updates_rows_without_tokens() -> None:
    learner = tiny_learner(tiny_model())
    empty = Example(prompt=(1, 2), completion=(), mask=(), behaviour=(), loss_weights={"nll": 1.0})
    full = dataclasses.replace(empty, completion=(3, 4), mask=(True, True), behaviour=(0.0, 0.0))
    masked = dataclasses.replace(full, mask=(False, False))
    assert learner.score([empty], student_logprobs) == [[]]
    scores = learner.score([empty, full, empty, masked], student_logprobs)
    assert [len(row) for row in scores] == [0, 2, 0, 2] and scores[1] == learner.score([full], student_logprobs)[0]
    for row in (empty, masked):
        metrics = learner.update("sft", [row], {"nll": cross_entropy}).metrics
        assert metrics["sft/loss"] == metrics["sft/grad_norm"] == 0.0


@pytest.mark.parametrize("command", [["sft"], ["train", "--algorithm.name", "sdpo", "--env.name", "recorded"]])
def test_a_log_of_empty_answers_alone_is_one_error(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, (name, *words) = str(written(tmp_path / "log.jsonl", EMPTY, EMPTY)), command
    words = [data] if name == "sft" else [*words, "--env.path", data]
    assert main([name, *words, *TINY, "--run.output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no recorded answer has a token to learn from; got 2 empty answers" in error


def test_what_the_environment_says_about_empty_answers_can_be_learned(tmp_path: Path) -> None:
    data = written(tmp_path / "log.jsonl", EMPTY)
    words = ["--env.name", "recorded", "--env.path", str(data), "--algorithm.name", "ldd"]
    assert main(["train", *TINY, *words, "--run.output_dir", str(tmp_path / "out")]) == 0
    assert metrics_of(tmp_path / "out")[0]["rows/trained"] == 2.0  # the one question, twice


def answers_of(*answers: RecordedAnswer) -> list[tuple[Task, RecordedAnswer]]:
    task = Task(id="x", messages=({"role": "user", "content": "apply rule A to 1 2 3"},))
    return [(task, answer) for answer in answers]


def recorded(text: str, **more: Any) -> RecordedAnswer:
    return RecordedAnswer(text=text, grade=Grade(reward=0.0), **more)


def test_answers_that_are_cut_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    prompter = Prompter(tiny.make_tokenizer(), tiny.TEMPLATE, window=96, max_completion_length=3)
    answers = answers_of(recorded("1 2 3"), recorded("1 2 3 4"), recorded("1 2 3 4 5"), recorded(""))
    with caplog.at_level("INFO", "vpd"):
        check_answers(prompter, answers[:1], learned=True)
        assert not caplog.records
        check_answers(prompter, answers, learned=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of 4 recorded answers are cut to 3 tokens (rollout.max_completion_length)" in record.getMessage()
    assert "the longest has 5" in record.getMessage()


def test_tokens_of_another_tokenizer_are_named_by_file_and_line_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [EMPTY | {"completion": "1 2"}, EMPTY | {"completion": "1 2", "tokens": [0, 1]}]
    data = written(tmp_path / "log.jsonl", *rows)
    assert main(["sft", str(data), *TINY, "--run.output_dir", str(tmp_path / "out")]) == 2
    assert "log.jsonl line 2: 'tokens' are another tokenizer's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
