"""Maths: the form of the box, equality of values, the verifier's process, and where the right value is read from."""

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vpd.envs import grade_texts, records
from vpd.envs.check import check_env
from vpd.envs.math import Math, Problem, read_box
from vpd.envs.math_values import compare, normalised, other_forms, same
from vpd.envs.record_tasks import fraction
from vpd.envs.worker import Worker, WorkerFault
from vpd.errors import ConfigError, DataError, EnvError
from vpd.types import Grade, Task

needs_verifier = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"question": "3/4 of 96?", "answer": "A quarter is <<96/4=24>>24.\n#### 72"}, "72"),
    ({"problem": "x^2 = 2, x > 0?", "solution": r"So $\boxed{1}$, no, $\boxed{\sqrt{2}}$."}, r"\sqrt{2}"),
    ({"problem": "Half?", "solution": r"Long, $\boxed{0}$", "answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
    ({"prompt": "17 + 17?", "solution": "34"}, "34"),
    ({"question": "2 * 3?", "answer": 6}, "6"),
    (
        {
            "prompt": [
                {
                    "role": "user",
                    "content": "Solve the following math problem step by step. The last line of your response "
                    "should be of the form Answer: $Answer (without quotes).\n\n18 + 18?\n\n"
                    'Remember to put your answer on its own line after "Answer:".',
                }
            ],
            "reward_model": {"ground_truth": "36"},
            "extra_info": {"index": "9a-1"},
        },
        "36",
    ),
]


def written(folder: Path, given: list[Any], name: str = "math.jsonl") -> str:
    (folder / name).write_text("\n".join(json.dumps(record) for record in given))
    return str(folder / name)


def questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(count)]


def graded(text: str, value: str = "72", **settings: Any) -> Grade:
    env = Math(path="unread.jsonl", **{"verify": "exact", **settings})
    problem = Problem(id="1", text="?", value=value, messages=({"role": "user", "content": "?"},))
    [grade] = grade_texts(env, [Task(id="1", messages=problem.messages, payload=problem)], [text])
    return grade


@pytest.mark.parametrize(("record", "value"), RECORDS, ids=range(len(RECORDS)))
def test_the_right_value_is_found_wherever_a_data_set_keeps_it(record: Any, value: str, tmp_path: Path) -> None:
    [problem] = Math(path=written(tmp_path, [record]), verify="exact").read_items(str(tmp_path / "math.jsonl"))
    assert problem.value == value
    assert problem.text.endswith("?") and "Solve the following" not in problem.text


def test_tasks_come_in_epochs_and_evaluation_is_disjoint(tmp_path: Path) -> None:
    env = Math(path=written(tmp_path, questions(40)), verify="exact", eval_share=0.25)
    train, held_out = env.train_tasks(), env.eval_tasks(None)
    assert len(train) + len(held_out) == 40 and {t.id[:5] for t in held_out} == {"eval/"}
    assert not {t.payload.text for t in train} & {t.payload.text for t in held_out}
    epoch = [env.task(index, seed=1).id for index in range(len(train))]
    assert sorted(epoch) == sorted(t.id for t in train) and epoch != [t.id for t in train]
    assert [env.task(index, seed=1).id for index in range(len(train), 2 * len(train))] != epoch
    assert train[0].messages[-1]["content"].endswith(r"Put your final answer in \boxed{}.")
    assert list(env.eval_tasks(3)) == list(held_out[:3])
    assert all(g.success for g in env.grade(held_out, [env.solution(task) for task in held_out]))


FAULTS = {
    "": r"Your answer is empty; it must end with \boxed{VALUE}.",
    "It is 72.": r"Your answer has no \boxed{}; it must end with \boxed{VALUE}.",
    r"\boxed{7": r"Your last \boxed is not closed; it must end with \boxed{VALUE}.",
    r"\boxed{72}, no, \boxed{\frac{7}{2}": r"Your last \boxed is not closed; it must end with \boxed{VALUE}.",
    r"\boxed 72": r"Your last \boxed has no braces; it must end with \boxed{VALUE}.",
    r"\boxed{ }": r"Your last \boxed{} is empty; it must end with \boxed{VALUE}.",
    r"\boxed{" + "7" * 500 + "}": r"Your last \boxed{} holds 500 characters; only the final value belongs there.",
    r"\boxedx{72}": r"Your answer has no \boxed{}; it must end with \boxed{VALUE}.",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_of_form_is_informative_and_a_wrong_value_is_a_bare_verdict(text: str) -> None:
    grade = graded(text)
    assert (grade.reward, grade.feedback, grade.informative) == (0.0, FAULTS[text], True)
    assert grade.metrics["answer_readable"] == 0
    wrong = graded(r"\boxed{71}")
    assert (wrong.feedback, wrong.informative) == ("The value in your box is not right.", False)


def test_what_else_feedback_says() -> None:
    assert graded(r"\boxed{72} or \boxed{71}").feedback == (
        "The value in your box is not right. Your answer has 2 boxes; only the last one counts."
    )
    assert graded(r"\boxed{71} or \boxed{72}").reward == 1.0
    words = graded(r"\boxed{seventy two}")
    assert words.informative and words.feedback is not None
    assert words.feedback.endswith('Your box holds "seventy two"; the answer is a number.')
    assert graded(r"\boxed{east}", "west").informative is False
    told = graded(r"\boxed{71}", hint="key")
    assert told.informative and told.feedback == "The value in your box is not right. The right value is 72."
    right = graded(r"\boxed{72}", hint="key")
    assert (right.success, right.informative) == (True, False)


def test_the_last_box_is_read_through_nested_braces() -> None:
    assert read_box(r"\boxed{1} so \boxed{\frac{1}{\text{\{x\}}}} ok")[0] == r"\frac{1}{\text{\{x\}}}"
    assert read_box(r"\boxed {5}") == ("5", None) and read_box(r"\fbox{5}") == ("5", None)


def test_values_that_agree_as_written() -> None:
    agree = [
        ("72", "72.0"),
        ("1000", r"1{,}000"),
        ("1072", r"\$1,072."),
        (r"\frac{3}{4}", r"\dfrac34"),
        ("3/4", "0.75"),
    ]
    agree += [
        (r"\left( 3, x \right)", "(3,x)"),
        ("50", r"50\%"),
        ("90", r"90^\circ"),
        (r"\text{east}", "east"),
        ("-.5", "-1/2"),
    ]
    for gold, value in agree:
        assert same(gold, value) and same(value, gold), (gold, value)
    differ = [("72", "7.2"), ("1,2", "12"), ("(1,200)", "1200"), ("x", "X"), ("1/0", "0"), ("72", "072x")]
    for gold, value in differ:
        assert not same(gold, value), (gold, value)
    assert normalised(r"\text{ east } ") == "east"
    assert not same("1", "9" * 100_000)


EQUAL = [
    ("0.00005", r"5 \times 10^{-5}"), ("1e20", "10^{20}"), ("1.5e3", "1500"), ("1/2^{99}", r"\frac{1}{2^{99}}"),
    ("90", "90°"), ("1/2", "½"), ("3.5", "3½"), ("42", "４２"), ("42", "٤٢"), ("5", "5,"), ("5", "5\\"),
    ("5 km", "5000 m"), (r"5\text{ km}", "5"), ("50", r"50\%"), ("0.5", r"50\%"), ("1/3", "0.333333"),
    ("0.30000000000000004", "0.3"), ("31/30", r"1.0\overline{3}"), ("10:30 am", "10:30 a.m."), (r"\sqrt{2}", "√2"),
]  # fmt: skip
UNEQUAL = [
    ("10^{-20}", "10^{-21}"), (r"\frac{1}{2^{99}}", "1/2^{98}"), ("5 km", "5 m"), (r"5\text{ cm}^2", r"5\text{ cm}"),
    ("7 years", "7 days"), (r"\$5", "5 cents"), ("10:30 am", "10:30 pm"), ("1/3", "0.33333"), ("2", "2.0000001"),
    ("100000000000000000000", "100000000000000000001"), ("1234567.5", "1234568"),
]  # fmt: skip


def test_numbers_are_compared_exactly_whatever_their_form() -> None:
    for gold, value in EQUAL:
        assert compare(gold, value) is compare(value, gold) is True, (gold, value)
    for gold, value in UNEQUAL:
        assert compare(gold, value) is compare(value, gold) is False, (gold, value)
    for gold, value in [("0.00005", "5e - 5"), ("x", "X"), ("5m", "5"), ("1/0", "0"), ("9^{9^{9}}", "1")]:
        assert compare(gold, value) is None, (gold, value)


@pytest.mark.parametrize("text", ["(", "{", "-", "9^", r"\frac", "1/", "sqrt(", "½", "⁵", "1."])
def test_a_hostile_value_is_no_number_and_no_fault(text: str) -> None:
    value = text * (400 // len(text))
    started = time.monotonic()
    assert compare("5", value) is not True and not other_forms(value)
    assert time.monotonic() - started < 2


def test_a_number_of_the_data_is_written_as_a_decimal(tmp_path: Path) -> None:
    given = [0.00005, 1e20, 2.5, 10**390, 0.10000000149011612, -3, "1.5e3"]
    records = [{"question": f"{place}?", "answer": value} for place, value in enumerate(given)]
    path = written(tmp_path, records)
    values = [problem.value for problem in Math(path=path, verify="exact").read_items(path)]
    assert values == ["0.00005", "100000000000000000000", "2.5", str(10**390), "0.1", "-3", "1.5e3"]
    with pytest.raises(DataError, match="line 1 is not JSON; got Infinity is no number"):
        Math(path=written(tmp_path, [{"question": "?", "answer": float("inf")}]), verify="exact").train_tasks()


class Misread(Math):
    """As the values were once read: e-notation as a product with e."""

    def solution(self, task: Task) -> str:
        return r"\boxed{5 e - 05}"

    def grade(self, tasks: Any, texts: Any) -> list[Grade]:  # type: ignore[override]
        return [Grade(reward=float(text == r"\boxed{5 e - 05}"), feedback=text[:3]) for text in texts]


def test_the_check_compares_the_value_and_not_its_own_text(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": f"{i}?", "answer": (i + 1) / 20000} for i in range(8)])
    report = check_env(Math(path=path, verify="exact", eval_share=0.3), tasks=5)
    assert not report.of("fault")
    assert {"right, in another form", "another value's"} < {attempt.kind for attempt in report.attempts}
    names = [check.name for check in check_env(Misread(path=path, verify="exact", eval_share=0.3), tasks=5).of("fault")]
    assert "its solution's value is a success in other forms" in names


@needs_verifier
def test_math_verify_takes_no_small_value_for_another() -> None:
    env = Math(path="unread.jsonl", verify_seconds=60)
    pairs = {
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"): 0.0,
        ("(10^{-20},1)", "(10^{-21},1)"): 0.0,
        ("x=10^{-20}", "x=10^{-21}"): 0.0,
        (r"10^{-20}\pi", r"10^{-21}\pi"): 0.0,
        ("0.00005", "5e - 5"): 0.0,
        (r"\frac{\pi}{2}", "pi/2"): 1.0,
        ("x^2", "x²"): 1.0,
        (r"\sqrt{2}", "1.41421"): 1.0,
    }
    problems = [Problem(id="1", text="?", value=gold, messages=()) for gold, _ in pairs]
    tasks = [Task(id="1", messages=(), payload=problem) for problem in problems]
    grades = grade_texts(env, tasks, [rf"\boxed{{{value}}}" for _, value in pairs])
    assert [grade.reward for grade in grades] == list(pairs.values())
    env._worker.close()


@needs_verifier
def test_math_verify_decides_what_is_written_otherwise() -> None:
    env = Math(path="unread.jsonl", verify_seconds=60)
    values = {r"2^{1/2}": 1.0, r"\frac{2}{\sqrt{2}}": 1.0, r"1.5": 0.0, r"x=\sqrt{2}": 1.0, "(((": 0.0}
    problem = Problem(id="1", text="?", value=r"\sqrt{2}", messages=())
    task = Task(id="1", messages=(), payload=problem)
    grades = grade_texts(env, [task] * len(values), [rf"\boxed{{{value}}}" for value in values])
    assert [grade.reward for grade in grades] == list(values.values())
    assert all(grade.metrics["unverified"] == 0 for grade in grades)
    env._worker.close()


@needs_verifier
def test_a_value_that_takes_too_long_is_a_failure_with_its_own_text_and_the_next_is_graded() -> None:
    env = Math(path="unread.jsonl", verify_seconds=3)
    task = Task(id="1", messages=(), payload=Problem(id="1", text="?", value=r"\sqrt{2}", messages=()))
    started = time.monotonic()
    [slow, fine] = grade_texts(env, [task] * 2, [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{2}{\sqrt{2}}}"])
    assert time.monotonic() - started < 60
    assert slow.feedback == (
        "Your value could not be compared with the right one: it took more than 3 seconds. Write it in simplest form."
    )
    assert slow.informative and slow.metrics["unverified"] == 1 and fine.reward == 1.0
    env._worker.close()


def test_math_verify_missing_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"math-verify.*vpd-rl\[math\].*exact"):
        Math(path="unread.jsonl")
    assert Math(path="unread.jsonl", verify="exact").verify == "exact"


BAD: dict[str, Any] = {
    "has no text 'question'": {"text": "2 + 2?"},
    "has no text 'answer'": {"question": "2 + 2?"},
    "no value in its last box": {"problem": "2 + 2?", "solution": r"\boxed{4"},
    "expected a value on one line": {"problem": "2 + 2?", "solution": "It is\nfour."},
    "holds no value": {"question": "2 + 2?", "answer": "It is 4. ####"},
    "the user's message": {"prompt": [{"role": "assistant", "content": "4"}], "answer": "4"},
    "'reward_model' is not an object": {"prompt": "2 + 2?", "reward_model": "4"},
    "is not an object": [1],
}


@pytest.mark.parametrize("told", BAD)
def test_a_bad_record_is_named_by_its_line(told: str, tmp_path: Path) -> None:
    env = Math(path=written(tmp_path, [*questions(3), BAD[told]]), verify="exact")
    with pytest.raises(DataError, match="line 4") as error:
        env.train_tasks()
    assert told in str(error.value)


def test_a_question_in_both_files_and_settings_out_of_range(tmp_path: Path) -> None:
    both = written(tmp_path, questions(3)), written(tmp_path, questions(1), "eval.jsonl")
    with pytest.raises(DataError, match="share 1 questions"):
        Math(path=both[0], eval_path=both[1], verify="exact").train_tasks()
    for settings in ({"eval_share": -0.1}, {"verify": "sympy"}, {"hint": "all"}, {"verify_seconds": 0}):
        with pytest.raises(ConfigError, match=f"env.{next(iter(settings))}"):
            Math(path="unread.jsonl", **{"verify": "exact", **settings})  # type: ignore[arg-type]


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker whose verifier does as it is told."""
    (tmp_path / "obedient.py").write_text(
        """
import os, pathlib, time
def serve(greeting):
    print("not an answer")
    def obey(order):
        print("not an answer either")
        if order == "sleep": time.sleep(60)
        if order == "die": os.abort()
        if order == "raise": raise ValueError("the right answer is 72")
        if order == "hoard": bytearray(8 << 30)
        if order == "write": pathlib.Path("made").write_text("x")
        if order == "environment": return sorted(os.environ)
        if order == "pid": return os.getpid()
        return greeting + order
    return obey
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "x")
    worker = Worker("obedient", "hello ", seconds=1.0)
    yield worker
    worker.close()


def test_a_worker_answers_and_is_replaced_when_it_fails(verifier: Worker) -> None:
    assert verifier.ask("you") == "hello you"
    first = verifier.ask("pid")
    assert verifier.ask("pid") == first != os.getpid()
    with pytest.raises(WorkerFault, match=r"^it took more than 1 seconds$"):
        verifier.ask("sleep")
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert verifier.ask("you") == "hello you"
    with pytest.raises(WorkerFault, match=r"^it ended by SIGABRT$"):
        verifier.ask("die")
    kept = verifier.ask("pid")
    with pytest.raises(WorkerFault, match=r"^it raised ValueError$"):
        verifier.ask("raise")
    with pytest.raises(WorkerFault, match=r"^it raised MemoryError$"):
        verifier.ask("hoard")
    assert verifier.ask("pid") == kept


def test_a_worker_has_no_secrets_and_writes_no_file(verifier: Worker, tmp_path: Path) -> None:
    assert "SECRET_TOKEN" not in verifier.ask("environment")
    with pytest.raises(WorkerFault, match="OSError"):
        verifier.ask("write")
    assert (tmp_path / "made").read_text() == ""


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(EnvError, match=r"nowhere_to_be_found does not start.*ModuleNotFoundError"):
        Worker("nowhere_to_be_found", seconds=1.0).ask("x")


def test_a_record_is_split_by_its_text_alone() -> None:
    assert fraction("a") == fraction("a") != fraction("b")
    assert records.excerpt("a\n\ud800" + "b" * 60) == "a " + "b" * 38 + "..."


@pytest.mark.parametrize(
    ("text", "reward", "feedback"),
    [
        ("5 and 3 make 8.\n#### 8", 1.0, "The value after your #### is right."),
        ("#### 9\nNo:\n####  $8.\n", 1.0, "The value after your #### is right."),
        ("#### 1,008", 0.0, "The value after your #### is not right."),
        (r"\boxed{8}", 0.0, "Your answer has no ####; it must end with #### VALUE."),
        ("8 ####", 0.0, "Nothing follows your last ####; your answer must end with #### VALUE."),
        ("#### eight", 0.0, 'Your #### is followed by "eight"; the answer is a number.'),
        ("", 0.0, "Your answer is empty; it must end with #### VALUE."),
    ],
)
def test_a_value_after_hashes_is_read_where_that_is_the_form(
    text: str, reward: float, feedback: str, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "5 + 3?", "answer": "#### 8"}) + "\n")
    env = Math(path=str(tmp_path / "d.jsonl"), answer_form="hashes", ask="", eval_share=0.0, verify="exact")
    [task] = env.train_tasks()
    [grade] = env.grade([task], [text])
    assert grade.reward == reward and feedback in str(grade.feedback)
    assert env.solution(task) == "#### 8" and env.grade([task], [env.solution(task)])[0].success
    assert not any(grade.success for grade in env.grade([task] * len(env.altered(task)), env.altered(task)))


def test_messages_may_be_text_and_what_is_null_is_missing(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    null = {"question": None, "prompt": json.dumps(chat), "answer": None, "solution": "4", "idx": None}
    model = {"problem": "3 + 3?", "answer": None, "reward_model": {"ground_truth": "6"}, "id": None}
    env = Math(path=written(tmp_path, [null, model]), verify="exact", eval_share=0.0, ask="")
    tasks = {task.id: task for task in env.train_tasks()}
    assert list(tasks["train/1"].messages) == chat and env.solution(tasks["train/1"]) == r"\boxed{4}"
    assert env.solution(tasks["train/2"]) == r"\boxed{6}"
