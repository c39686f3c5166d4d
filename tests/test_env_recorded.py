"""Recorded answers as an environment: how records are read, what is refused, and the mixture with fresh tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from vpd.cli import main
from vpd.config.sections import make_env, named
from vpd.envs import Conversational, draw_tasks, grade_texts, recorded_answers, records, replies_of
from vpd.envs.answer_records import read_answer
from vpd.envs.digits import Digits
from vpd.envs.recorded import GivenAnswers, RecordedAndFresh, RecordedAnswers, beside
from vpd.errors import ConfigError, DataError
from vpd.lab import tiny
from vpd.prompts import Prompter
from vpd.prompts.recorded import recorded_group
from vpd.types import SampleKey

ASKED = [{"role": "user", "content": "The capital of Peru?"}]
LIMA = {"role": "assistant", "content": "Lima"}


def tasks_of(*rows: dict[str, Any], **settings: Any) -> Any:
    return GivenAnswers(entries=rows, **settings).train_tasks()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED, "completion": "Lima"},
        {"messages": [*ASKED, LIMA]},
        {"prompt": "The capital of Peru?", "completion": "Lima"},
        {"prompt": ASKED, "completion": [LIMA]},
        {"messages": json.dumps(ASKED), "answer": "Lima"},
    ],
)
def test_every_form_of_a_record_is_one_question_and_one_answer(row: dict[str, Any]) -> None:
    (task,) = tasks_of(row)
    assert list(task.messages) == ASKED
    (answer,) = task.payload.answers
    assert answer.text == "Lima" and not answer.grade.graded and answer.tokens is None


def test_what_was_said_about_an_answer_is_its_grade() -> None:
    rows = [{"prompt": "p", "completion": "c"} | more for more in (
        {"feedback": "Wrong city."}, {"reward": 0.5}, {"reward": 0.4, "feedback": "Nearly."}, {"success": True},
        {"reward": 0.1, "success": True}, {"feedback": "wrong", "informative": False, "success": False},
    )]  # fmt: skip
    (task,) = tasks_of(*rows)
    grades = [answer.grade for answer in task.payload.answers]
    assert [g.graded for g in grades] == [False, True, True, True, True, True]
    assert [g.success for g in grades] == [False, True, False, True, True, False]
    assert [g.reward for g in grades] == [0.0, 0.5, 0.4, 1.0, 0.1, 0.0]
    assert [g.feedback for g in grades] == ["Wrong city.", None, "Nearly.", None, None, "wrong"]
    assert [g.informative for g in grades] == [True] * 5 + [False]


def test_answers_to_one_question_are_one_group_up_to_its_size() -> None:
    rows = [{"prompt": f"q{number % 2}", "completion": str(number)} for number in range(10)]
    found = {
        (t.messages[0]["content"], tuple(a.text for a in t.payload.answers)) for t in tasks_of(*rows, group_size=3)
    }
    assert found == {("q0", ("0", "2", "4")), ("q0", ("6", "8")), ("q1", ("1", "3", "5")), ("q1", ("7", "9"))}


def test_a_table_of_texts_holds_outcomes_too(tmp_path: Path) -> None:
    """CSV has no types, and pandas fills gaps with NaN."""
    (tmp_path / "log.csv").write_text(
        "prompt,completion,reward,success,feedback\n1 + 1?,2,1.0,true,\n1 + 1?,3,0,False,No.\n1 + 1?,4,,,\n"
    )
    answers = [
        read_answer(record, n, where, 0.5)[1].grade
        for where, n, record in records.read(str(tmp_path / "log.csv"), split="train")
    ]
    assert [(g.reward, g.success, g.feedback, g.graded) for g in answers] == [
        (1.0, True, None, True), (0.0, False, "No.", True), (0.0, False, None, False),
    ]  # fmt: skip
    table = {"prompt": "1 + 1?", "completion": "2", "reward": 1.0, "success": float("nan"), "feedback": float("nan")}
    grade = read_answer(table, 0, "row 0", 0.5)[1].grade
    assert (grade.reward, grade.success, grade.feedback) == (1.0, True, None)
    for column, value, message in (
        ("reward", "good", "'reward' is no number; got 'good'"),
        ("success", "yes", "no truth"),
    ):
        with pytest.raises(DataError, match=message):
            read_answer({"prompt": "1?", "completion": "2", column: value}, 0, "row 0", 0.5)
    with pytest.raises(DataError, match=r"'reward' is no number; got '1\.0'"):  # in JSON a text is no number
        read_answer({"prompt": "1?", "completion": "2", "reward": "1.0", "turns": 1}, 0, "row 0", 0.5)


def test_successes_alone_are_kept_and_what_nobody_graded(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "p", "completion": text} | more for text, more in {
        "right": {"reward": 1}, "wrong": {"reward": 0}, "shown": {}, "quoting": {"success": True, "quoted": 9},
        "long": {"success": True, "turns": 2},
    }.items()]  # fmt: skip
    with caplog.at_level("INFO", "vpd"):
        (task,) = tasks_of(*rows, only="success")
    assert [answer.text for answer in task.payload.answers] == ["right", "shown"]
    assert "left out 1 failures, 1 of several turns, 1 that quote their feedback of 5" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "Lima"}, "has no task"),
        ({"prompt": "p"}, "has no answer"),
        ({"messages": ASKED}, "has no answer"),
        ({"messages": [LIMA]}, "has no answer"),
        ({"prompt": "p", "completion": 3}, "has no text 'completion'"),
        ({"prompt": "p", "completion": "c", "reward": "high"}, "'reward' is no number"),
        ({"prompt": "p", "completion": "c", "reward": True}, "'reward' is no number"),
        ({"prompt": "p", "completion": "c", "success": 1}, "'success' is no truth value"),
        ({"prompt": "p", "completion": "c", "feedback": 3}, "has no text 'feedback'"),
        ({"prompt": "p", "completion": "c", "logprobs": [-0.1]}, "'logprobs' are of no tokens"),
        ({"prompt": "p", "completion": "c", "tokens": [1], "logprobs": [-0.1, -0.2]}, "'logprobs' are of no tokens"),
        ({"prompt": "p", "completion": "c", "tokens": [1], "logprobs": [0.5]}, "no natural logarithms"),
        ({"prompt": "p", "completion": "c", "tokens": [-1]}, "'tokens' are no token ids"),
        ("text", "is not an object"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"data\[1\]") as error:
        tasks_of({"prompt": "p", "completion": "c"}, row)
    assert message in str(error.value)


def prompter(limit: int = 6) -> Prompter:
    return Prompter(tiny.make_tokenizer(), tiny.TEMPLATE, window=96, max_completion_length=limit)


def group_of(row: dict[str, Any], limit: int = 6) -> Any:
    (task,) = tasks_of({"prompt": "apply rule A to 1 2 3"} | row)
    key = SampleKey(phase="train", step=2, task=5, sample=0)
    return recorded_group(prompter(limit), key, task, task.payload.answers).rollouts[0]


def test_a_recorded_answer_is_a_rollout_with_its_tokens_or_its_text() -> None:
    digits = prompter().answer("3 0 2")
    one = group_of({"completion": "3 0 2", "reward": 1.0})
    assert one.completion.tokens == digits and one.completion.logprobs == () and one.completion.recorded
    assert one.success and one.completion.finish == "stop" and one.key.task == 5
    cut = group_of({"completion": "3 0 2"}, limit=2)
    assert cut.completion.tokens == digits[:2] and cut.completion.finish == "length"
    known = group_of({"completion": "3 0 2", "tokens": list(digits), "logprobs": [-1.0, -2.0, -3.0]})
    assert known.completion.logprobs == (-1.0, -2.0, -3.0)
    for wrong in ([0, 1, 2], [9999]):
        with pytest.raises(DataError, match="another tokenizer"):
            group_of({"completion": "3 0 2", "tokens": wrong})


def test_an_answer_ends_as_the_chat_template_ends_it() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = tiny.CHAT.replace("{{ m.content }} {% else %}", "{{ m.content }} <eos> {% else %}")
    made = Prompter(tokenizer, tiny.TEMPLATE, window=96, max_completion_length=9)
    assert made.answer("3 0") == (*prompter().answer("3 0"), tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in made.answer("3 <eos> 0")[:-1]


def log(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "c"}) + "\n" for n in range(count)))
    return str(path)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
def test_of_any_tasks_in_a_row_the_share_is_fresh_and_every_record_comes_once_an_epoch(
    share: float, tmp_path: Path
) -> None:
    env = make_env(
        named(
            "env",
            {"name": "recorded", "path": log(tmp_path / "a", 30), "fresh": {"name": "digits"}, "fresh_share": share},
            "env",
        )
    )
    assert isinstance(env, RecordedAndFresh) and env.fixed_length
    tasks = draw_tasks(env, range(100), seed=3)
    fresh = [not recorded_answers(env, task) for task in tasks]
    for start in range(0, 90, 10):
        assert abs(sum(fresh[start : start + 10]) - 10 * share) <= 1
    kept = [task.id for task in tasks if recorded_answers(env, task)]
    assert len(set(kept[:30])) == min(len(kept), 30)
    drawn = [task.id for task, is_fresh in zip(tasks, fresh, strict=True) if is_fresh]
    assert drawn == [task.id for task in draw_tasks(Digits(), range(len(drawn)), seed=3)]
    assert [task.id for task in env.eval_tasks(3)] == [task.id for task in Digits().eval_tasks(3)]
    assert grade_texts(env, env.eval_tasks(1), [Digits().solution(env.eval_tasks(1)[0])])[0].reward == 1.0


def test_no_other_answer_to_a_recorded_task_can_be_graded(tmp_path: Path) -> None:
    env = RecordedAnswers(path=log(tmp_path / "a", 2))
    (grade,) = grade_texts(env, env.train_tasks()[:1], ["anything"])
    assert not grade.graded and not env.eval_tasks(None)


def test_fresh_tasks_may_have_several_turns_where_their_environment_replies(tmp_path: Path) -> None:
    data = tmp_path / "code.jsonl"
    data.write_text((Path(__file__).parent.parent / "examples" / "code.jsonl").read_text())
    spec = {"name": "recorded", "path": log(tmp_path / "a", 2), "fresh": {"name": "code", "path": str(data)}}
    assert isinstance(make_env(named("env", spec, "env")), Conversational)
    assert not isinstance(beside(GivenAnswers(entries=()), Digits()), Conversational)
    with pytest.raises(ConfigError, match="unknown environment 'nothing'"):
        make_env(named("env", spec | {"fresh": {"name": "nothing"}}, "env"))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_beside_a_fresh_environment_a_recorded_task_is_not_graded_and_gets_no_reply(
    share: float, tmp_path: Path
) -> None:
    class Replying(Digits):
        def respond(self, tasks: Any, conversations: Any) -> list[Any]:
            return [f"Again, by {task.payload.rule}." for task in tasks]

    log_path = log(tmp_path / "a", 4)
    env = beside(RecordedAnswers(path=log_path), Replying(), share)
    recorded, fresh = env.train_tasks()[0], env.eval_tasks(1)[0]
    right = Digits().solution(fresh)
    grades = grade_texts(env, [recorded, fresh, recorded, fresh], ["x", right, right, "x"])
    assert [(grade.reward, grade.graded) for grade in grades] == [(0.0, False), (1.0, True), (0.0, False), (0.0, True)]
    assert isinstance(env, Conversational)
    said = replies_of(env, [fresh, recorded], [[{"role": "assistant", "content": "x"}]] * 2)
    assert said[0] is not None and said[0]["content"].startswith("Again, by") and said[1] is None


def test_a_dry_run_of_recorded_answers_beside_fresh_tasks(tmp_path: Path) -> None:
    words = ["--env.name", "recorded", "--env.path", log(tmp_path / "a", 4), "--env.fresh", "{name: digits}"]
    assert main(["train", "--dry_run", *words, "--run.output_dir", str(tmp_path / "out")]) == 0
