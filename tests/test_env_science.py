"""Science questions: what is read, what is refused (and where), and which feedback the teacher may see."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vpd.envs.check import check_env
from vpd.envs.science import Science
from vpd.errors import ConfigError, DataError

SYSTEM = "\nGiven a question and four options, please select the right answer, A, B, C, or D.\n"


def prepared(number: int, *, options: int = 4, key: str = "B", **changes: Any) -> dict[str, Any]:
    lines = "\n".join(f"{letter}: {number + place} J" for place, letter in enumerate("ABCDEF"[:options]))
    prompt = f"Question: what is the energy of state {number}?\n\n{lines}\nPlease reason step by step."
    return {"idx": number, "prompt": prompt, "answer": key, "system": SYSTEM} | changes


def hub(number: int, *, key: str = "A", options: int = 4, **changes: Any) -> dict[str, Any]:
    labels = list("ABCD"[:options])
    return {
        "question": f"Which gas has number {number}?",
        "choices": {"label": labels, "text": [f"gas {number}-{label}" for label in labels]},
        "answerKey": key,
        "type": f"mcq-{options}-choices",
        "domain": "Chemistry",
        "details": {"level": "L3"},
    } | changes


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


@pytest.fixture
def env(tmp_path: Path) -> Science:
    train = write(tmp_path / "train.jsonl", [prepared(n, key="ABCD"[n % 4]) for n in range(12)])
    return Science(path=train, eval_path=write(tmp_path / "test.jsonl", [prepared(100 + n) for n in range(5)]))


def test_the_check_finds_no_fault(env: Science, tmp_path: Path) -> None:
    for kind in (env, Science(path=env.path, eval_path=env.eval_path, brief=True)):
        report = check_env(kind, tasks=12)
        assert report.of("fault") == [], report.of("fault")
        assert {check.name for check in report.of("warning")} <= {"every kind of answer is graded"}


def test_an_epoch_asks_everything_once_in_another_order_each_time(env: Science) -> None:
    epochs = [[env.task(12 * epoch + place, seed=1).id for place in range(12)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(t.id for t in env.train_tasks())
    assert epochs[0] != epochs[1] and epochs[0] != [env.task(place, seed=2).id for place in range(12)]
    assert [t.id for t in env.eval_tasks(3)] == [t.id for t in env.eval_tasks(None)][:3]


@pytest.mark.parametrize(
    ("text", "reward", "informative", "message"),
    [
        ("<answer>B</answer>", 1.0, False, "Option B is right."),
        ("x <answer>A</answer> no: <answer>\nB\n</answer>", 1.0, False, "Option B is right."),
        ("<answer>A</answer>", 0.0, False, "Option A is not right."),
        ("", 0.0, True, "Your answer is empty"),
        ("B", 0.0, True, "no answer tag"),
        ("<answer>B", 0.0, True, "not closed"),
        ("<answer></answer>", 0.0, True, "tag is empty"),
        ("<answer>B, 2 J</answer>", 0.0, True, 'holds "B, 2 J"'),
        ("<answer>E</answer>", 0.0, True, "the options are A, B, C or D"),
        ("<answer>A</answer> and so on", 0.0, True, "Text follows"),
        ("<answer>B</answer> and so on", 1.0, False, "Option B is right."),
        ("\ud800\x00 <answer>\ud800</answer>", 0.0, True, "answer tag holds"),
        ("x" * 1_000_000, 0.0, True, "no answer tag"),
    ],
)
def test_grades(tmp_path: Path, text: str, reward: float, informative: bool, message: str) -> None:
    path = write(tmp_path / "d.jsonl", [prepared(1), prepared(2)])
    env = Science(path=path, eval_path=write(tmp_path / "e.jsonl", [prepared(3)]))
    [grade] = env.grade([env.eval_tasks(1)[0]], [text])
    assert (grade.reward, grade.informative) == (reward, informative) and message in (grade.feedback or "")
    assert len(grade.feedback or "") < 300 and "right option is" not in (grade.feedback or "")


@pytest.mark.parametrize(
    ("text", "reward", "message"),
    [("B", 1.0, "right"), ("(B)", 1.0, "right"), ("B.", 1.0, "right"), ("A", 0.0, "not right"),
     ("", 0.0, "empty"), ("I think B", 0.0, "3 words"), ("E", 0.0, "1 word;")],
)  # fmt: skip
def test_brief_answers(env: Science, text: str, reward: float, message: str) -> None:
    brief = Science(path=env.path, eval_path=env.eval_path, brief=True)
    task = brief.eval_tasks(1)[0]
    [grade] = brief.grade([task], [text])
    assert grade.reward == reward and message in (grade.feedback or "")
    assert "answer tag" not in str(task.messages) and "one letter" in task.messages[-1]["content"]


def test_the_key_is_in_feedback_only_if_declared(env: Science) -> None:
    gold = Science(path=env.path, eval_path=env.eval_path, hint="key")
    task = gold.eval_tasks(1)[0]
    [grade] = gold.grade([task], ["<answer>A</answer>"])
    assert gold.reveals_answer and grade.informative and "The right option is B." in (grade.feedback or "")
    assert not env.reveals_answer
    [plain] = env.grade([task], ["<answer>A</answer>"])
    assert "B" not in (plain.feedback or "").replace("Option A", "")


def test_two_options_are_said_to_be_two(tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", [prepared(n, options=2, key="A") for n in range(4)])
    env = Science(path=path, eval_path=write(tmp_path / "e.jsonl", [prepared(9, options=2)]))
    system = env.task(0, seed=0).messages[0]["content"]
    assert "two options" in system and "A or B" in system and "C" not in system.replace("Choose", "")


BAD: list[tuple[list[Any], str]] = [
    ([prepared(1), "{not json"], "line 2 is not JSON"),
    ([prepared(1), "[1]"], "line 2 is not an object"),
    ([prepared(1), prepared(2, key="E")], "line 2: 'answer' is not among the options"),
    ([prepared(1), "", prepared(2, answer="")], "line 3 has no text 'answer'"),
    ([prepared(1, prompt="What now?")], "line 1 has options that cannot be read"),
    ([{"idx": 1, "answer": "A"}], "line 1 has no text 'prompt'"),
    ([hub(1, key="D", options=2)], "line 1: 'answerKey' is not among"),
    ([hub(1) | {"choices": 3}], "choices"),
    ([], "is empty"),
]


@pytest.mark.parametrize(("records", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_data_is_refused_with_its_line(tmp_path: Path, records: list[Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(DataError) as error:
        Science(path=path).train_tasks()
    assert message in str(error.value) and "\n" not in str(error.value) and "bad.jsonl" in str(error.value)


def test_missing_and_unreadable_files_and_shared_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        Science(path=str(tmp_path / "none.jsonl")).train_tasks()
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(prepared(1)).encode() + b"\n\xff\n")
    with pytest.raises(DataError, match=r"not UTF-8.*line 2"):
        Science(path=str(tmp_path / "latin.jsonl")).train_tasks()
    one, other = (write(tmp_path / name, [prepared(1), prepared(n)]) for name, n in (("a.jsonl", 2), ("b.jsonl", 3)))
    with pytest.raises(DataError, match="share 1 questions"):
        Science(path=one, eval_path=other).eval_tasks(None)
    with pytest.raises(ConfigError, match="eval_share"):
        Science(path=one, eval_share=1.5)


def test_a_share_is_held_out_by_a_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [prepared(n) for n in range(200)])
    env = Science(path=path, eval_share=0.2)
    train, held_out = ({t.messages[-1]["content"] for t in part} for part in (env.train_tasks(), env.eval_tasks(None)))
    assert not train & held_out and len(train | held_out) == 200 and 20 < len(held_out) < 60
    more = Science(path=write(tmp_path / "more.jsonl", [prepared(n) for n in range(300)]), eval_share=0.2)
    assert held_out <= {t.messages[-1]["content"] for t in more.eval_tasks(None)}  # more data moves no old question


def test_hub_records_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading itself is the package's affair; what it is asked and what is made of the rows is ours."""
    rows = [hub(n) for n in range(30)] + [hub(99, domain="Physics"), hub(98) | {"type": "filling"}]
    rows += [hub(97, details={"level": "L1"}), hub(96, options=2, key="B")]
    asked: list[Any] = []

    def load_dataset(path: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, subset, split))
        if path == "no/such":
            raise fake.exceptions.DatasetsError("no such data set\nat all")  # type: ignore[attr-defined]
        return rows

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.exceptions = types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    env = Science(path="owner/name", domain="Chemistry", split="train")
    tasks = [*env.train_tasks(), *env.eval_tasks(None)]
    assert asked == [("owner/name", None, "train")]
    assert len(tasks) == 31 and {len(t.payload.options) for t in tasks} == {2, 4}
    with pytest.raises(DataError, match=r"no multiple-choice question.*Did you mean 'Chemistry'"):
        Science(path="owner/name", domain="Chemstry").train_tasks()
    with pytest.raises(DataError, match=r"cannot load no/such from the Hub; got no such data set at all"):
        Science(path="no/such").train_tasks()


def test_what_is_null_is_missing(tmp_path: Path) -> None:
    rows = [prepared(number, idx=None, system=None) for number in range(3)]
    env = Science(path=write(tmp_path / "d.jsonl", rows), eval_share=0.0)
    assert sorted(task.id for task in env.train_tasks()) == ["train/1", "train/2", "train/3"]
    assert all("Choose the right one" in task.messages[0]["content"] for task in env.train_tasks())
