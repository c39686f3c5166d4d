"""Programming data in the forms of training sets: SDPO's files, APPS, TACO, verl's (PRIME), DeepCoder, open-r1."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpd.envs import grade_texts
from vpd.envs.check import check_env
from vpd.envs.code import Code
from vpd.envs.code.in_out import read_tests
from vpd.envs.code.problems import problem
from vpd.errors import DataError
from vpd.types import Grade

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the local sandbox needs Linux")
ASK = "You are a coding expert. Enclose the complete code in a code block with ``` ```.\n\n{}"
SUM = "a, b = map(int, input().split())\nprint(a + b)"
PAIRS = [(1, 2), (10, 20), (-1, 1), (7, 7)]


def sdpo(number: int, count: int = 4) -> dict[str, Any]:
    """A record as SDPO's scripts write it, with the first ``count`` tests (its train.json has half of them)."""
    tests = {
        "inputs": [f"{a} {b}\n" for a, b in PAIRS[:count]],
        "outputs": [f"{a + b}\n" for a, b in PAIRS[:count]],
        "testtype": "stdin",
        "fn_name": "",
        "time_limit": 6,
    }
    return {
        "idx": number,
        "kind": "code",
        "dataset": "livecodebench",
        "answer": "-",
        "elo": "-",
        "prompt": ASK.format(f"Problem {number}: print the sum."),
        "description": "Sum.",
        "tests": json.dumps(tests),
        "embedding": [],
    }


def verl(record: dict[str, Any], split: str) -> dict[str, Any]:
    """The same record after SDPO's preprocess.py."""
    return {
        "data_source": record["dataset"],
        "prompt": [{"role": "user", "content": record["prompt"]}],
        "ability": "code",
        "reward_model": {"style": "code", "ground_truth": record["tests"]},
        "extra_info": {"split": split, "index": str(record["idx"]), "problem": record["prompt"]},
    }


def files(folder: Path, form: str, *, train: int = 2) -> dict[str, str]:
    parts = {"train": [sdpo(n, train) for n in range(3)], "test": [sdpo(n) for n in range(3)]}
    paths = {}
    for part, records in parts.items():
        paths[part] = str(folder / f"{part}.{form}")
        if form == "json":
            Path(paths[part]).write_text("\n".join(map(json.dumps, records)))
        else:
            pq.write_table(pa.Table.from_pylist([verl(record, part) for record in records]), paths[part])
    return {"path": paths["train"], "eval_path": paths["test"]}


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_livecodebench_as_sdpo_prepares_it(form: str, tmp_path: Path) -> None:
    env = Code(**files(tmp_path, form), workers=2)
    train, held_out = env.train_tasks()[0], env.eval_tasks(None)[0]
    assert "3 problems are in both files" in env.announce()[1] and env.shares_questions
    assert train.messages[0]["content"].startswith("You are a coding expert") and len(train.messages) == 1
    assert train.messages[0]["content"].endswith("print the sum.") and train.id in ("train/0", "train/1", "train/2")
    assert [case.input for case in train.payload.cases] == ["1 2\n", "10 20\n"] and train.payload.shown == (True, True)
    shown = {case.input: see for case, see in zip(held_out.payload.cases, held_out.payload.shown, strict=True)}
    assert shown == {"1 2\n": True, "10 20\n": True, "-1 1\n": False, "7 7\n": False}
    special = "a, b = map(int, input().split())\nprint({1: 3, 10: 30}.get(a, 5))"
    grades = grade_texts(env, [train, held_out, held_out], [f"```\n{code}\n```" for code in (special, special, SUM)])
    assert [grade.success for grade in grades] == [True, False, True]
    assert "Expected" not in str(grades[1].feedback) and not grades[1].informative
    [told] = [check for check in check_env(env, tasks=3).checks if check.name == "held-out tasks are not trained on"]
    assert told.status == "warning" and "shares_questions" in told.detail


def test_the_same_questions_with_the_same_tests_are_still_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="share 3 questions"):
        Code(**files(tmp_path, "json", train=4)).train_tasks()


def row(text: str, **fields: Any) -> dict[str, Any]:
    return {"question": text, "starter_code": "", "difficulty": "interview"} | fields


ADDED = {"inputs": [[a, b] for a, b in PAIRS], "outputs": [[a + b] for a, b in PAIRS], "fn_name": "add"}
LINES = {"inputs": [[f"{a} {b}", ""] for a, b in PAIRS], "outputs": [[str(a + b)] for a, b in PAIRS]}
TYPED = {"inputs": [f"{a}\n{b}" for a, b in PAIRS], "outputs": [f"[{a + b}]" for a, b in PAIRS], "fn_name": "add"}
STDIN = [{"type": "stdin_stdout", "input": f"{a} {b}\n", "output": f"{a + b}\n", "fn_name": None} for a, b in PAIRS]
CALLS = [
    {"input": f"{a}\n{b}", "output": str(a + b), "testtype": "functional", "metadata": {"func_name": "add"}}
    for a, b in PAIRS
]
CHECKED = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n\ncheck(add)"
FUNCTION = "def add(a, b):\n    return a + b"
LISTED = "def add(a, b):\n    return [a + b]"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
WRONG = "def add(a, b):\n    return a - b"
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "APPS, a call": (row("Add.", input_output=json.dumps(ADDED)), [FUNCTION, METHOD, LISTED], [WRONG]),
    "TACO, lines": (row("Add.", input_output=json.dumps(LINES)), [SUM], [FUNCTION]),
    "verl, PRIME": (
        {
            "data_source": "taco",
            "ability": "code",
            "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "Add. ```python\n```"}],
            "reward_model": {"style": "rule", "ground_truth": json.dumps(TYPED)},
            "extra_info": {"index": 7},
        },
        [FUNCTION, LISTED],
        [WRONG],
    ),
    "DeepCoder": ({"problem": "Add.", "tests": json.dumps(STDIN)}, [SUM], [FUNCTION]),
    "DeepCoder, LiveCodeBench": ({"problem": "Add.", "tests": json.dumps(CALLS)}, [FUNCTION, METHOD], [WRONG, LISTED]),
    "open-r1": (
        {"problem_id": "p1", "prompt": "Add.", "verification_info": {"language": "python", "test_cases": STDIN}},
        [SUM],
        [WRONG],
    ),
    "SDPO, HumanEval+": (
        {
            "kind": "code",
            "prompt": ASK.format("Add."),
            "system": None,
            "tests": json.dumps({"inputs": [CHECKED], "outputs": [""], "testtype": "code", "fn_name": ""}),
        },
        [FUNCTION],
        [WRONG, LISTED],
    ),
    "assertions": (
        {"question": "Add.", "tests": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]},
        [FUNCTION],
        [WRONG],
    ),
}


def graded(record: dict[str, Any], codes: list[str]) -> list[Grade]:
    env = Code(path="unread.jsonl", workers=2)
    task = env.make_task("eval", problem(record, "line 1", 1))
    return grade_texts(env, [task] * len(codes), [f"```python\n{code}\n```" for code in codes])


@pytest.mark.parametrize("name", CASES)
def test_right_and_wrong_programs_of_every_form(name: str) -> None:
    record, right, wrong = CASES[name]
    grades = graded(record, right + wrong)
    assert [bool(grade.success) for grade in grades] == [True] * len(right) + [False] * len(wrong)


def test_what_a_prompt_says_of_its_form_is_not_said_again() -> None:
    env = Code(path="unread.jsonl")
    messages = {name: env.make_task("train", problem(case[0], "line 1", 1)).messages for name, case in CASES.items()}
    assert messages["verl, PRIME"] == tuple(CASES["verl, PRIME"][0]["prompt"])
    assert messages["open-r1"][0]["content"].startswith("Add.\n\nRead from standard input")
    assert messages["APPS, a call"][0]["content"].startswith("Add.\n\nPut the whole code in one ```python block")
    assert messages["SDPO, HumanEval+"][0]["content"] == ASK.format("Add.")


def test_the_first_solution_is_graded_by_the_check(tmp_path: Path) -> None:
    solutions = json.dumps([f"```python\n{FUNCTION}\n```", WRONG])
    rows = [row(f"Add {n}.", input_output=json.dumps(ADDED), solutions=solutions) for n in range(4)]
    (tmp_path / "apps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    env = Code(path=str(tmp_path / "apps.jsonl"), eval_share=0.4, workers=2)
    assert env.solution(env.train_tasks()[0]) == f"```python\n{FUNCTION}\n```"
    assert not [check for check in check_env(env, tasks=2).checks if check.status == "fault"]


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ("", "has no tests"),
    "no JSON": ("-", "is not JSON"),
    "empty": ({"inputs": [], "outputs": []}, "has no tests"),
    "uneven": ({"inputs": ["1"], "outputs": []}, "has not as many outputs as inputs; got 1 and 0"),
    "no outputs": ({"inputs": ["1"]}, "has not as many outputs as inputs; got 1 and None"),
    "a number": ({"inputs": [1], "outputs": ["1"]}, "test 0, its input is no text; got 1"),
    "a name": ({"inputs": ["1"], "outputs": ["1"], "fn_name": "a.b"}, "'fn_name' names no function"),
    "keywords": ({"inputs": [{"a": 1}], "outputs": ["1"], "fn_name": "f"}, "has no list of arguments"),
    "two functions": ([{**STDIN[0], "fn_name": "f"}, {**STDIN[0], "fn_name": "g"}], "tests of several functions"),
    "half a test": ([{"input": "1"}], "test 0 lacks 'input' and 'output'"),
    "no Python": ({"inputs": ["assert f("], "outputs": [""], "testtype": "code"}, "is no Python"),
    "whose": (["assert f(1) == g(1)"], "must be about one function; got f, g"),
}


@pytest.mark.parametrize("name", BAD)
def test_tests_that_cannot_be_read_are_named(name: str) -> None:
    value, told = BAD[name]
    with pytest.raises(DataError, match=f"line 3: 'tests'.*{told}") as caught:
        read_tests(value, "line 3: 'tests'")
    assert "\n" not in str(caught.value)


def test_a_record_whose_tests_are_empty_is_named() -> None:
    for empty in ("", None, "{}", []):
        with pytest.raises(DataError, match="line 4: 'input_output' has no tests"):
            problem(row("Add.", input_output=empty), "line 4", 4)


def test_another_kind_of_record_is_no_programming_problem() -> None:
    mixed = {"ability": "math", "prompt": "1 + 1", "reward_model": {"style": "rule", "ground_truth": "2"}}
    for record in (mixed, {"kind": "mcq", "prompt": "A or B?", "tests": "-", "answer": "A"}):
        with pytest.raises(DataError, match="line 4 is no programming problem"):
            problem(record, "line 4", 4)
