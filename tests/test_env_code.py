"""Programming: every schema, every feedback text, and programs that try to pass without the right answer."""

import base64
import datetime
import json
import logging
import pickle
import re
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd.cli import main
from vpd.config import parse
from vpd.envs import grade_texts, replies_of
from vpd.envs.check import check_env
from vpd.envs.code import FAULTS, CaseSuite, Code
from vpd.envs.code.asserts import NotData, assertions, equal
from vpd.envs.code.cases import Case, Problem
from vpd.envs.code.driver import decode, encode
from vpd.envs.code.feedback import LONGEST, read_code
from vpd.envs.code.problems import problem, unpacked
from vpd.envs.code.run import same_output
from vpd.errors import ConfigError, DataError, SandboxError
from vpd.sandbox import Outcome, Program, Sandbox, ScriptedSandbox
from vpd.types import Grade, Message, Task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the local sandbox needs Linux")
SECRET = "needle-5f2c9a71"  # an expected output that cannot be worked out from any input
SUMS = [("1 2\n", "3\n"), ("10 20\n", "30\n"), ("-1 1\n", "0\n"), ("100 200\n", "300\n"), ("7 7\n", "14\n")]
ADD = "a, b = map(int, input().split())\n"


def livecodebench(number: int, tests: Sequence[tuple[str, str]] = SUMS, **changes: Any) -> dict[str, Any]:
    name = changes.pop("func_name", None)
    kind = "stdin" if name is None else "functional"
    made = [{"input": given, "output": wanted, "testtype": kind} for given, wanted in tests]
    record = {
        "question_title": "Sum",
        "question_content": f"Problem {number}: print the sum of two numbers.",
        "platform": "atcoder",
        "question_id": f"q{number}",
        "contest_id": "1",
        "contest_date": f"2025-0{1 + number % 6}-15T00:00:00",
        "starter_code": ""
        if name is None
        else f"class Solution:\n    def {name}(self, a: int, b: int) -> int:\n        ",
        "difficulty": "easy",
        "public_test_cases": json.dumps(made[:1]),
        "private_test_cases": packed(json.dumps(made[1:])),
        "metadata": json.dumps({} if name is None else {"func_name": name}),
    }
    return record | changes


def packed(content: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def humaneval(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'from typing import List\n\ndef shift(xs: List[int]) -> List[int]:\n    """Add {number}."""\n',
        "entry_point": "shift",
        "canonical_solution": f"    return [x + {number} for x in xs]\n",
        "test": "METADATA = {}\n\ndef check(candidate):\n"
        f"    assert candidate([1, 2]) == [{1 + number}, {2 + number}]\n"
        f"    for k in range(2):\n        assert candidate([k] * 2) == [k + {number}] * 2, 'twice'\n"
        f"    assert abs(candidate([0])[0] - {number}.0) < 1e-6\n    assert True\n    print('done')\n",
    } | changes


def mbpp(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Multiply each of a tuple by {number}.",
        "code": f"def scale(t):\n    return tuple(x * {number} for x in t)",
        "test_list": [
            f"assert scale((1, 2)) == ({number}, {2 * number})",
            f"assert set(scale((1, 3))) == set(({number}, {3 * number}))",
            "assert not scale(())",
        ],
        "test_setup_code": "",
        "challenge_test_list": [],
    } | changes


def evalplus(number: int) -> dict[str, Any]:
    helper = "def assertion(out, exp, atol):\n    assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
    loop = "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n"
    lists = f"    inputs = [[3], [{number}]]\n    results = [{1.5 + number}, {number * 1.5 + 1e-9}]\n"
    test = f"import numpy as np\n{helper}\ndef check(candidate):\n{lists}{loop}"
    body = f"    return x / 2 + {number}\n"
    prompt = f"def half(x):\n    '''Half of x, plus {number}.'''\n"
    return humaneval(number, prompt=prompt, entry_point="half", canonical_solution=body, test=test)


def written(folder: Path, given: Sequence[Any], name: str = "code.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, given)))
    return str(folder / name)


def block(code: str) -> str:
    return f"Here it is.\n```python\n{code}\n```\n"


def exercise(record: dict[str, Any], part: str = "train", **settings: Any) -> tuple[Code, Task]:
    env = Code(path="unread.jsonl", **{"seconds": 5.0, "memory_mb": 256, "workers": 2} | settings)
    return env, env.make_task(part, problem(record, "line 1", 1))


def graded(code: str, record: dict[str, Any] | None = None, *, raw: bool = False, **settings: Any) -> Grade:
    env, task = exercise(record or livecodebench(1), **settings)
    [grade] = grade_texts(env, [task], [code if raw else block(code)])
    return grade


CALLS = [("1\n2", "3"), ("10\n20", "30"), ("-1\n1", "0"), ("100\n200", "300"), ("7\n7", "14")]
FUNCTION = livecodebench(2, CALLS, func_name="add")


# --- feedback on a program --------------------------------------------------------------------------------------------

TOLD = {
    "I would rather not.": ("no_code", "has no code block"),
    "": ("no_code", "is empty"),
    "```python\n\n```": ("no_code", "code block is empty"),
    "```python\nprint(1": ("cut", "cut off"),
}


@pytest.mark.parametrize("text", TOLD)
def test_answers_without_a_whole_program(text: str) -> None:
    kind, message = TOLD[text]
    grade = graded(text, raw=True)
    assert message in str(grade.feedback) and "```python" in str(grade.feedback) and grade.informative
    assert grade.reward == 0 and [name for name, value in grade.metrics.items() if value] == [f"code_{kind}"]


PROGRAMS = {
    "print(1": ("syntax", "not valid Python. SyntaxError: '(' was never closed\nline 1: print(1"),
    ADD + "def f(n):\n    return n / 0\nprint(f(a))": (
        "error",
        "ZeroDivisionError: division by zero\nline 4: print(f(a))\nline 3, in f: return n / 0\nInput:\n7 7",
    ),
    "raise ValueError('x' * 9999)": ("error", "ValueError: xxx"),
    "def f(n): return g(n)\ndef g(n): return f(n)\nf(1)": ("error", "RecursionError"),
    "while True: pass": ("timeout", "reached the time limit (0.5 seconds, 256 MB)"),
    "x = bytearray(10**9)": ("memory", "reached the memory limit"),
    "import os\nos.abort()": ("killed", "crashed (SIGABRT)"),
    "while True: print('x' * 1000)": ("output", "too much output"),
    "import sys\nsys.exit(3)": ("ended", "exit code 3"),
    ADD + "print(a * b)": (
        "wrong",
        "wrong answer.\nTest 1\nInput:\n1 2\nYour output:\n2\nExpected:\n3\nTest 2\nInput:\n10 20\nYour output:\n200\n"
        "Expected:\n30",
    ),
    "pass": ("wrong", "Your output:\n(nothing)\nExpected:\n3"),
}


@pytest.mark.parametrize("code", PROGRAMS)
def test_feedback_on_a_program(code: str) -> None:
    kind, message = PROGRAMS[code]
    tests = [("7 7\n", "14\n"), ("10 20\n", "30\n"), ("1 2\n", "3\n")] if kind != "wrong" else SUMS
    seconds = 0.5 if kind == "timeout" else 5.0
    env, task = exercise(livecodebench(1, tests), seconds=seconds)
    [grade] = grade_texts(env, [task], [block(code)])
    assert message in str(grade.feedback), grade.feedback
    assert len(str(grade.feedback)) <= LONGEST and grade.informative and not grade.success and grade.reward == 0
    assert [name for name, value in grade.metrics.items() if value] == [f"code_{kind}"]
    assert "main.py" not in str(grade.feedback) and len(grade.metrics) == len(FAULTS)


FUNCTIONS = {
    "def add(a, b): return a / 0": ("error", "line 1, in add: def add(a, b): return a / 0\nInput:\n"),
    "1 / 0": ("error", "while it was loaded. ZeroDivisionError"),
    "def ad(a, b): return a + b": ("missing", "defines no function add"),
    "class Solution:\n    def sub(self): pass": ("missing", "defines no function add"),
    "def add(a, b): return lambda: a": ("odd", "returned function"),
    "def add(a, b):\n    while True: pass": ("timeout", "time limit"),
    "def add(a, b): return [0] * 10**10": ("memory", "memory limit"),
    "def add(a, b): return a * b": ("wrong", "Input:\n1\n2\nYour output:\n2\nExpected:\n3\nTest 2"),
    "def add(a, b: int) return a": ("syntax", "line 1: def add(a, b: int) return a"),
}


@pytest.mark.parametrize("code", FUNCTIONS)
def test_feedback_on_a_function(code: str) -> None:
    kind, message = FUNCTIONS[code]
    grade = graded(code, FUNCTION, seconds=0.5 if kind == "timeout" else 5.0)
    assert message in str(grade.feedback) and not grade.success, grade.feedback
    assert [name for name, value in grade.metrics.items() if value] == [f"code_{kind}"]


@pytest.mark.parametrize(
    ("code", "record"),
    [
        (ADD + "print(a + b)", livecodebench(1)),
        ("print(sum(map(int, open(0).read().split())))", livecodebench(1)),
        (
            "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin)))",
            livecodebench(1, [("1\n2", "3")]),
        ),
        ("class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return a + b", FUNCTION),
        ("def encode(x): return x\ndef add(a, b):\n    print('a' * 10**6)\n    return encode(a) + b\n", FUNCTION),
        ("def add(a, b): return a + b\nif __name__ == '__main__':\n    print(add(*input()))", FUNCTION),
        ("def add(a, b): return (a, b)", livecodebench(1, [("1\n2", "[1, 2]")] * 3, func_name="add")),
    ],
)
def test_right_programs_pass(code: str, record: dict[str, Any]) -> None:
    grade = graded(code, record)
    assert grade.success and grade.reward == 1 and not grade.informative and "tests pass" in str(grade.feedback)


def test_a_share_of_the_tests() -> None:
    grade = graded(ADD + "print(a + b if a < 50 else 0)", livecodebench(1, SUMS[:4] * 2), reward="share")
    assert grade.reward == pytest.approx(3 / 5) and grade.success is False  # one public, every second of seven
    assert graded(
        "def add(a, b):\n    assert a < 50\n    return a + b", FUNCTION, reward="share"
    ).reward == pytest.approx(2 / 3)
    late = "def add(a, b):\n    while a == 7: pass\n    return a + b"
    grade = graded(
        late, livecodebench(1, [*CALLS[:2], CALLS[4], CALLS[0]], func_name="add"), reward="share", seconds=0.5
    )
    assert grade.reward == pytest.approx(1.0)  # the slow one is in the other half
    tests = [CALLS[4], *CALLS[:4]]
    grade = graded(late, livecodebench(1, tests, func_name="add"), reward="share", seconds=0.5)
    assert grade.reward == pytest.approx(2 / 3) and grade.metrics["code_timeout"] == 1


def test_a_call_has_all_its_time_even_after_slow_ones() -> None:
    wait = "    while time.process_time() - start < 0.6: pass\n"
    slow = f"import time\ndef add(a, b):\n    start = time.process_time()\n{wait}    return a + b"
    assert graded(slow, FUNCTION, seconds=1.0).success  # 1.8 in all


def test_hidden_tests_are_not_quoted() -> None:
    tests = [SUMS[0], SUMS[1], ("5 6\n", "11\n")]
    code = ADD + "print(0 if a == 5 else a + b)"
    env, training = exercise(livecodebench(1, tests))
    _, evaluation = exercise(livecodebench(1, tests), "eval")
    grades = grade_texts(env, [training, evaluation], [block(code)] * 2)
    assert grades[0].success and not grades[1].success  # the half that training does not see
    assert "not shown" in str(grades[1].feedback) and "11" not in str(grades[1].feedback)
    assert not grades[1].informative  # a bare verdict is not a C
    _, task = exercise(livecodebench(1, SUMS), quote="public")
    [grade] = grade_texts(env, [task], [block(ADD + "print(3)")])
    assert "not shown" in str(grade.feedback) and not grade.informative


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ('raise ValueError("INPUT " + line)', r"raised an error\. ValueError\nline 3"),
        ("assert False, line", r"raised an error\. AssertionError\nline 3"),
        ("raise SystemExit(a + b)", r"ended itself before it gave an answer\.$"),
    ],
)
def test_what_a_program_says_of_a_hidden_input_is_not_quoted(fails: str, said: str) -> None:
    """An error's message may hold the input, which ``quote: public`` and evaluation keep; so may an exit code."""
    code = f"line = input()\na, b = map(int, line.split())\nif a != 1: {fails}\nprint(a + b)"
    private = livecodebench(0, SUMS)
    (hidden,), (told,) = (
        grade_texts(env, [task], [block(code)]) for env, task in (exercise(private, quote="public"), exercise(private))
    )
    assert re.search(said, str(hidden.feedback)), hidden.feedback
    assert not any(word.strip() in str(hidden.feedback) for case in SUMS[1:] for word in case if len(word) > 2)
    assert "Input:" in str(told.feedback)


def test_halves_and_order() -> None:
    tests = [(f"{'9' * size} 1\n", "x") for size in (5, 4, 3, 2, 1)]
    _, training = exercise(livecodebench(1, tests))
    _, evaluation = exercise(livecodebench(1, tests), "eval")
    sizes = [[len(case.input) - 3 for case in task.payload.cases] for task in (training, evaluation)]
    assert sizes == [[2, 4, 5], [1, 2, 3, 4, 5]]  # the shortest first
    assert evaluation.payload.shown == (False, True, False, True, True) and all(training.payload.shown)


def test_feedback_is_cut_and_can_be_written() -> None:
    tests = [(f"{n} " * 5000, "y" * 5000) for n in range(3)]
    grade = graded("print('\\x1b[31m' + 'z' * 9000)", livecodebench(1, tests))
    assert len(str(grade.feedback)) <= LONGEST and "[...]" in str(grade.feedback) and "\x1b" not in str(grade.feedback)
    odd = graded("raise ValueError('\\ud800', object())")
    assert "0x..." in str(odd.feedback) and str(odd.feedback).encode()


# --- programs that try to pass without the right answer ---------------------------------------------------------------

GRAB = """
import gc, os, re, sys
def grab():
    found = []
    for folder, _, names in os.walk("."):
        for name in names:
            found.append(open(os.path.join(folder, name), errors="replace").read())
    frame = sys._getframe()
    while frame:
        found += [repr(dict(frame.f_locals)), repr(dict(frame.f_globals))]
        frame = frame.f_back
    found += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple))]
    found += [repr(dict(os.environ)), repr(sys.argv)]
    for name in ("/proc/self/environ", "/proc/self/cmdline", "/proc/1/cmdline", "/proc/self/mem"):
        try:
            found.append(open(name, errors="replace").read())
        except OSError:
            pass
    return (re.findall("needle-[0-9a-f]{8}", "".join(found)) or ["nothing"])[0]
"""
READS = {
    "leave": "import sys\nsys.exit(0)",
    "leave at once": "import os\nos._exit(0)",
    "look for it": GRAB + "print(grab())",
    "patch": "import builtins\nbuiltins.__eq__ = lambda *a: True\nprint('ok')",
    "say so on the other stream": "import sys\nprint('All tests pass', file=sys.stderr)",
}
ALWAYS = "class Same(%s):\n    def __eq__(self, other): return True\n    def __repr__(self): return '7'\n"
CHANGES = {
    "leave": "def add(a, b):\n    import sys; sys.exit(0)",
    "leave at once": "def add(a, b):\n    import os; os._exit(0)",
    "leave while loaded": "import os\nos._exit(0)",
    "look for it": GRAB + "def add(a, b): return grab()",
    "equal to all": ALWAYS % "object" + "def add(a, b): return Same()",
    "a text equal to all": ALWAYS % "str" + "def add(a, b): return Same('x')",
    "a number equal to all": ALWAYS % "int" + "def add(a, b): return Same(7)",
    "a dictionary equal to all": ALWAYS % "dict" + "def add(a, b): return Same()",
    "patch the driver": (
        "import sys, json\ndriver = sys._getframe(1).f_globals\n"
        "driver['encode'] = driver['answer'] = lambda *a: {'value': True}\njson.dumps = lambda *a: 'true'\n"
    ),
    "forge the results": (
        "import json, os\norder = json.load(open('order.json'))\n"
        "lines = [f\"{order['nonce']} ready\"] + [f\"{order['nonce']} {n} {json.dumps({'value': v})}\"\n"
        "         for n in range(len(order['calls'])) for v in (True,)]\n"
        "for stream in range(1, 8):\n"
        "    try: os.write(stream, ('\\n'.join(lines) + '\\n').encode())\n"
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
}


@pytest.mark.parametrize("attack", READS)
def test_a_program_cannot_fake_a_pass(attack: str) -> None:
    tests = [(f"{n}\n", SECRET) for n in range(4)]
    grade = graded(READS[attack], livecodebench(1, tests), seconds=4.0)
    assert not grade.success and grade.reward == 0


@pytest.mark.parametrize("attack", CHANGES)
@pytest.mark.parametrize("reward", ["all", "share"])
def test_a_function_cannot_fake_a_pass(attack: str, reward: str) -> None:
    tests = [(f"{n}\n{n}", json.dumps(SECRET)) for n in range(4)]
    grade = graded(CHANGES[attack], livecodebench(1, tests, func_name="add"), reward=reward, seconds=4.0)
    assert not grade.success and grade.reward == 0


def test_a_known_public_output_is_not_enough() -> None:
    assert not graded("print({'1 2': 3}.get(input().strip(), 0))").success
    assert not graded("print(*range(-9, 400), sep='\\n')").success


def test_the_search_would_find_what_is_there() -> None:
    there = [(f"{json.dumps(SECRET)}\n{n}", json.dumps(SECRET)) for n in range(4)]
    assert graded(CHANGES["look for it"], livecodebench(1, there, func_name="add")).success


def test_no_expected_value_is_ever_sent_to_the_sandbox() -> None:
    def answer(program: Program) -> Outcome:
        return Outcome(status="ok", exit_code=0, stdout="", stderr="", seconds=0.0)

    check = (
        f"def check(candidate):\n    assert candidate(1) == '{SECRET}'\n    assert len(candidate(2)) + 0 == 987654321"
    )
    for record in (
        livecodebench(1, [("1\n", SECRET)] * 4),
        livecodebench(1, [("1\n2", json.dumps(SECRET))] * 4, func_name="add"),
        humaneval(1, prompt="def f(x):\n    '''x'''\n", entry_point="f", test=check),
    ):
        sandbox = ScriptedSandbox(answer)
        env, task = exercise(record, "eval", reward="share")
        env.__dict__["sandbox"] = sandbox
        assert not env.grade([task], [block("def f(x): pass")])[0].success
        sent = "".join(p.source + p.stdin + "".join(p.files.values()) for p in sandbox.asked)
        assert sandbox.asked and SECRET not in sent and "987654321" not in sent


def test_tests_that_run_inside_resist_an_early_end_but_not_a_program_that_knows_of_them() -> None:
    test = f"import random\ndef check(candidate):\n    x = random.random()\n    assert candidate(x) == '{SECRET}'\n"
    record = humaneval(1, prompt="def f(x):\n    '''x'''\n", entry_point="f", test=test)
    for attack in ("def f(x): return x", "import sys\nsys.exit(0)", "import os\nos._exit(0)", "def f(x):\n    exit()"):
        assert not graded(attack, record).success
    message = graded("def f(x): return x", record)
    assert "assert candidate(x)" in str(message.feedback) and message.metrics["code_wrong"] == 1
    assert graded(f"def f(x): return '{SECRET}'", record).success
    peek = "import json\ntest = json.load(open('order.json'))['test']\ndef f(x): return test.split(\"'\")[1]"
    assert graded(peek, record).success  # the weakness that env.asserts is about


# --- schemas ----------------------------------------------------------------------------------------------------------


def test_every_schema(tmp_path: Path) -> None:
    makers = (humaneval, mbpp, evalplus)
    given = [maker(number) for number in range(2, 8) for maker in makers]
    env = Code(path=written(tmp_path, given), eval_share=0.3, workers=2)
    tasks = [*env.train_tasks(), *env.eval_tasks(None)]
    assert len(tasks) == len(given) and env.eval_tasks(None)
    answers = [env.solution(task) for task in tasks]
    grades = grade_texts(env, tasks, [str(answer) for answer in answers])
    assert all(grade.success for grade in grades), [grade.feedback for grade in grades if not grade.success]
    others = grade_texts(env, tasks, [block(f"def {task.payload.problem.function}(x): return 3") for task in tasks])
    assert not any(grade.success for grade in others)


@pytest.mark.parametrize(
    "line", ["set(scale((1, 2))) == set(OTHER)", "round(scale(5), DIGITS) == 1", "isinstance(scale(1), Half)"]
)
def test_the_function_of_an_assertion_is_called_and_not_an_argument(line: str) -> None:
    assert problem(mbpp(2, test_list=[f"assert {line}"]), "a record", 0).function == "scale"


def test_the_fields_of_livecodebench() -> None:
    found = problem(livecodebench(3), "line 1", 1)
    assert found.date == datetime.date(2025, 4, 15) and found.function is None and found.solution is None
    assert [case.input for case in found.public + found.private] == [given for given, _ in SUMS]
    plain = problem(livecodebench(3, private_test_cases="[]", contest_date=datetime.datetime(2025, 1, 2)), "", 1)
    assert plain.private == () and plain.date == datetime.date(2025, 1, 2)
    called = problem(FUNCTION, "line 1", 1)
    assert called.function == "add" and called.public[0].assertion is not None
    assert called.public[0].assertion.arguments == (1, 2)
    _, task = exercise(FUNCTION)
    content = task.messages[0]["content"]
    assert "class Solution:" in content and "standard input" not in content
    assert "standard input" in exercise(livecodebench(1))[1].messages[0]["content"]


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    "content", [Evil(), ["[]"], b"[]", 7, {"a": "[]"}, ("[]", "[]")], ids=lambda content: type(content).__name__
)
def test_a_pickle_that_holds_more_than_a_text_is_refused(content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpacked(packed(content), "line 3")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickled_text_is_read_in_every_protocol(protocol: int) -> None:
    if protocol:  # protocol 0 is text in another encoding
        text = "[é漢]" * 300
        raw = base64.b64encode(zlib.compress(pickle.dumps(text, protocol=protocol))).decode()
        assert unpacked(raw, "x") == text


def test_damaged_tests_are_refused() -> None:
    whole = packed("[]" * 500)
    for damaged in ("%%%", base64.b64encode(b"no zlib").decode(), whole[: len(whole) // 8 * 4]):
        with pytest.raises(DataError, match="line 3 cannot be unpacked"):
            unpacked(damaged, "line 3")


BAD = {
    "no programming problem": {"question": "?"},
    "has no tests": livecodebench(1, public_test_cases="[]", private_test_cases=""),
    "lacks 'input' and 'output'": livecodebench(1, public_test_cases='[{"input": "1"}]'),
    "'metadata' is not JSON": livecodebench(1, metadata="{"),
    "'func_name' names no function": livecodebench(1, metadata='{"func_name": "a b"}'),
    "wrong type": livecodebench(1, metadata='{"func_name": "add"}'),
    "its input is not JSON": livecodebench(1, [("x", "1")] * 2, func_name="add"),
    "'contest_date' is no date": livecodebench(1, contest_date="soon"),
    "has no text 'question_id'": livecodebench(1, question_id=None),
    "cannot be unpacked": livecodebench(1, private_test_cases="????"),
    "is not a list": livecodebench(1, public_test_cases={"a": 1}),
    "has no text 'test'": humaneval(1, test=""),
    "is no Python": humaneval(1, test="def check(candidate:"),
    "'test_list' holds no tests": mbpp(1, test_list=[]),
    "'test_list' is no Python": mbpp(1, test_list=["assert f("]),
    "'test_list' calls no function": mbpp(1, test_list=["assert len([]) == 0"]),
    "must run in the program": mbpp(1, test_setup_code="class Node: pass"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_is_named_by_its_line(message: str, tmp_path: Path) -> None:
    path = written(tmp_path, [*(livecodebench(number) for number in range(10)), BAD[message]])
    with pytest.raises(DataError) as caught:
        Code(path=path).train_tasks()
    assert "code.jsonl line 11" in str(caught.value) and message in str(caught.value)


def test_the_release_window(tmp_path: Path) -> None:
    path = written(tmp_path, [livecodebench(number) for number in range(60)])
    env = Code(path=path, start_date="2025-02-15", end_date=datetime.date(2025, 4, 14))
    dates = {task.payload.problem.date for task in [*env.train_tasks(), *env.eval_tasks(None)]}
    assert dates == {datetime.date(2025, 2, 15), datetime.date(2025, 3, 15)}
    undated = written(tmp_path, [livecodebench(1, contest_date=None)], "undated.jsonl")
    with pytest.raises(DataError, match="line 1 has no 'contest_date'"):
        Code(path=undated, start_date="2025-01-01").train_tasks()
    for wrong in ({"start_date": "spring"}, {"start_date": "2025-02-01", "end_date": "2025-01-01"}):
        with pytest.raises(ConfigError, match=r"env\.start_date"):
            Code(path=path, **wrong)
    config = parse({"env": {"name": "code", "path": path, "start_date": datetime.date(2025, 2, 1)}})
    assert parse(config.as_dict()).env == config.env and "2025-02-01" in config.to_yaml()


def test_records_whose_tests_are_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = humaneval(99, test="def check(candidate):\n    assert candidate([9]) == candidate([9])")
    path = written(tmp_path, [*(humaneval(number) for number in range(20)), odd])
    with pytest.raises(DataError, match=r"2 calls in candidate.*env\.asserts"):
        Code(path=path).train_tasks()
    counts = {}
    for choice in ("skip", "inside"):
        env = Code(path=path, asserts=choice)  # type: ignore[arg-type]
        with caplog.at_level(logging.INFO, "vpd"):
            counts[choice] = len([*env.train_tasks(), *env.eval_tasks(None)])
        (sandbox,) = env.announce()
        assert sandbox.startswith("sandbox: ") and "1 problems whose tests must run" in caplog.messages[-1]
        assert ("left out" if choice == "skip" else "fake a pass") in caplog.messages[-1]
    assert counts == {"skip": 20, "inside": 21}


@pytest.mark.parametrize(
    "wrong",
    [
        {"reward": "some"},
        {"quote": "all"},
        {"asserts": "maybe"},
        {"max_repairs": -1},
        {"seconds": 0},
        {"memory_mb": 1},
        {"workers": 0},
        {"sandbox_url": "http://127.0.0.1:1", "insist": True},
        {"eval_share": 1.0},
    ],
    ids=str,
)
def test_wrong_settings(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"env\."):
        Code(path="code.jsonl", **wrong)


# --- the parts --------------------------------------------------------------------------------------------------------

PROSE = st.text(st.characters(blacklist_characters="`~", blacklist_categories=["Cs"]))


@given(PROSE, PROSE, st.sampled_from(["python", "py", "Python", "", "python title=x"]))
def test_the_last_block_is_read_whole(prose: str, code: str, language: str) -> None:
    read, kind, _ = read_code(f"{prose}\n```python\nold\n```\n{prose}\n```{language or 'python'}\n{code}\n```\n{prose}")
    assert (read == f"{code}\n") if code.strip() else (kind == "no_code" and read is None)


@given(st.text(st.sampled_from("`~ py\nabc"), max_size=60))
def test_reading_never_fails(text: str) -> None:
    code, kind, words = read_code(text)
    assert (code is None) == (kind in ("no_code", "cut")) == bool(words)


def test_which_block_counts() -> None:
    assert read_code("```\na\n```\n```python\nb\n```\n```\n3\n```")[0] == "b\n"
    assert read_code("```text\na\n```\n~~~\nb\n~~~")[0] == "b\n"
    assert read_code("````python\n```\nx\n```\n````")[0] == "```\nx\n```\n"
    assert read_code("  ```py\nx\n  ```")[0] == "x\n"
    listed = "1. So:\n   ```python\n   if n:\n       print('\\\n     a\\\n  b')\n   ```\n"
    assert read_code(listed)[0] == "if n:\n    print('\\\n  a\\\nb')\n"
    assert read_code("\t```py\n\tif x:\n\t\ty\n\t```")[0] == "if x:\n\ty\n"
    assert read_code("```python\r\nx\r\n```\r\n")[0] == "x\r\n"
    assert read_code("```python\n\ufeffx\n```")[0] == "x\n"
    assert read_code("~~~~python\n~~~\nx\n~~~~")[0] == "~~~\nx\n"
    assert read_code("```\nx\n```\nIt prints:\n```text\n3\n```")[0] == "x\n"
    assert read_code("```python\nold\n```\nBetter:\n```python\nnew")[1] == "cut"
    assert read_code("```python\nold\n```python\nnew\n```")[0] == "new\n"
    assert read_code("```" + "a" * 10**6 + "`")[1] == "no_code"  # in linear time


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("3\n", " 3 \n\n", True),
        ("1 2\n3", "1 2 \n3", True),
        ("1 2", "1\n2", False),
        ("1.50", "1.5", True),
        ("1e3 2", "1000 2.0", True),
        ("0.1", "0.10000000001", False),
        ("a", "A", False),
        ("nan", "nan", True),
        ("1", "sNaN", False),
        ("1", "1e999999999999", False),
        ("", "0", False),
    ],
)
def test_outputs_agree_line_by_line(expected: str, printed: str, same: bool) -> None:
    assert same_output(expected, printed) is same


def test_a_line_that_is_almost_a_number_takes_no_time() -> None:
    began = time.process_time()
    assert not same_output("3", "1" * 20_000 + "x")
    assert time.process_time() - began < 5  # with backtracking about a minute


def test_keys_that_share_one_hash_are_not_gathered() -> None:
    same = [index * sys.hash_info.modulus for index in range(65)]
    assert len({hash(key) for key in same}) == 1
    for form in (encode(set(same)), encode(dict.fromkeys(same))):
        with pytest.raises(ValueError, match="share one hash"):
            decode(form)
    assert decode(encode(set(same[:64]))) == set(same[:64])
    assert decode(encode(set(range(1000)))) == set(range(1000))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda part: (
        st.lists(part)
        | st.lists(part).map(tuple)
        | st.dictionaries(st.integers() | st.text(), part)
        | st.sets(st.integers(), max_size=1)
    ),
    max_leaves=10,
)


@settings(max_examples=50)
@given(PLAIN)
def test_values_travel_unchanged(value: Any) -> None:
    assert repr(decode(json.loads(json.dumps(encode(value))))) == repr(value)


def test_equality_of_values() -> None:
    assert equal((1, [2]), (1, [2])) and not equal((1, 2), [1, 2]) and equal((1, 2), [1, 2], loose=True)
    assert equal([1.0], [1 + 1e-9], 1e-6) and not equal([1.0], [1 + 1e-9]) and not equal(1.0, "1", 1e-6)
    assert equal({"a": 1.0}, {"a": 1.0 + 1e-9}, 1e-6) and not equal({"a": 1}, {"b": 1}) and not equal(1.0, 10**400, 0.1)
    assert not equal(float("nan"), float("nan")) and equal(float("nan"), float("nan"), 1e-6)


UNDERSTOOD = {
    "assert f(1) == 2": [((1,), 2, 3)],
    "assert [2] == f(*[1, 2])": [((1, 2), [2], (2,))],
    "assert f('a') is None": [(("a",), None, 0)],
    "assert not f(-1)": [((-1,), [], 1)],
    "assert f(1) in (1, 2) and f is not None if 0 else f(1)": None,
    "assert f(1)": [((1,), True, 0)],
    "assert math.isclose(f(2), 1.5, rel_tol=0.01)": [((2,), 1.501, "1.5")],
    "assert isinstance(f(2), int)": [((2,), 3, 3.0)],
    "assert f(f(2)) == 1": None,
    "assert f(2) == g(2)": None,
    "assert f(x=2) == 1": None,
    "assert f(2) == open('x')": None,
    "assert f(2)[0] < unknown": None,
    "assert [0] * 10**9 == f(2)": None,
    "assert f(2) == (lambda: 1)()": None,
    "import os\nos.remove('x')\nassert f(1) == 1": None,
    "x = 1": None,
}


@pytest.mark.parametrize("source", UNDERSTOOD)
def test_assertions_as_data(source: str) -> None:
    wanted = UNDERSTOOD[source]
    if wanted is None:
        with pytest.raises(NotData):
            assertions(source, "f")
        return
    for assertion, (arguments, right, wrong) in zip(assertions(source, "f"), wanted, strict=True):
        assert assertion.arguments == arguments and assertion.holds(right) and not assertion.holds(wrong)


def test_conditions_fail_on_values_that_they_cannot_take() -> None:
    [assertion] = assertions("assert abs(f(1) - 0.5) < 1e-6", "f")
    assert assertion.holds(0.5) and not any(assertion.holds(value) for value in (None, "x", [], 10**400, {}))


# --- as an environment ------------------------------------------------------------------------------------------------


def test_check_env_passes(tmp_path: Path) -> None:
    given = [maker(number) for number in range(2, 8) for maker in (humaneval, mbpp)]
    solved = [livecodebench(n, canonical_solution=ADD + f"print(a + b)  # {n}") for n in range(8)]
    env = Code(path=written(tmp_path, given + solved), eval_share=0.3, workers=2)
    report = check_env(env, tasks=3)
    assert not report.of("fault") + report.of("warning"), report.checks
    bare = Code(path=written(tmp_path, [livecodebench(n) for n in range(12)], "bare.jsonl"), eval_share=0.3)
    report = check_env(bare, tasks=2)
    assert not report.of("fault") and all("not known" in check.detail for check in report.of("warning"))


def test_equal_rows_run_once_and_every_row_is_graded() -> None:
    env, task = exercise(livecodebench(1))
    counted: list[Program] = []
    inner: Sandbox = env.sandbox

    class Counting:
        def run(self, programs: Sequence[Program]) -> list[Outcome]:
            counted.extend(programs)
            return inner.run(programs)

        def describe(self) -> str:
            return "sandbox: counting"

    env.__dict__["sandbox"] = Counting()
    right, wrong = block(ADD + "print(a + b)"), block("print(0)")
    grades = grade_texts(env, [task] * 5, [right, wrong, right, "no code", wrong])
    assert [grade.reward for grade in grades] == [1, 0, 1, 0, 0]
    assert len(counted) == len(task.payload.cases) + 3  # the wrong one: one test, then two more in its second wave


def test_a_remote_sandbox_and_its_failure() -> None:
    env, task = exercise(livecodebench(1), sandbox_url="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in env.sandbox.describe()
    with pytest.raises(SandboxError, match="127"):
        grade_texts(env, [task], [block("print(1)")])


def test_the_machine_failing_is_no_grade() -> None:
    def fails(program: Program) -> Outcome:
        raise SandboxError("no process can be started")

    env, task = exercise(livecodebench(1))
    env.__dict__["sandbox"] = ScriptedSandbox(fails)
    with pytest.raises(SandboxError):
        grade_texts(env, [task], [block("print(1)")])


def says(task: Task, *texts: str) -> list[Message]:
    turns: list[Message] = []
    for text in texts:
        turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "mend it"}]
    return [*task.messages, *turns[:-1]]


def test_repairs_are_offered_on_public_tests_alone() -> None:
    env, task = exercise(livecodebench(1), max_repairs=1)
    wrong, right, special = block(ADD + "print(a * b)"), block(ADD + "print(a + b)"), block("print(3)")
    conversations = [
        says(task, wrong),
        says(task, right),
        says(task, special),
        says(task, "hm"),
        says(task, wrong, wrong),
    ]
    replies = replies_of(env, [task] * 5, conversations)
    contents = [None if reply is None else reply["content"] for reply in replies]
    assert "Input:\n1 2\nYour output:\n2\nExpected:\n3" in str(contents[0]) and "10 20" not in str(contents[0])
    assert str(contents[0]).endswith("in one ```python block.")
    assert contents[1] is None and contents[2] is None  # the public test passes; the others are not spoken of
    assert "no code block" in str(contents[3]) and contents[4] is None
    none = Code(path="unread.jsonl")
    assert replies_of(none, [task], [says(task, wrong)]) == [None]


def test_a_repair_without_public_tests_speaks_of_loading_alone() -> None:
    env, task = exercise(humaneval(1), max_repairs=2)
    texts = ["def shift(xs): return 3", "def shift(xs) return", "1 / 0"]
    replies = replies_of(env, [task] * 3, [says(task, block(text)) for text in texts])
    assert replies[0] is None
    assert all(
        message in str(reply) for message, reply in zip(("not valid Python", "ZeroDivision"), replies[1:], strict=True)
    )


def test_the_console_says_which_sandbox(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [mbpp(number) for number in range(2, 14)])
    assert main(["check", "code", "--env.path", path, "--env.eval_share", "0.3", "--tasks", "2"]) == 0
    assert capsys.readouterr().out.startswith("sandbox: ")


def test_a_payload_shows_what_it_holds() -> None:
    case = Case(kind="stdin", input="1", expected="2")
    held = Problem(id="x", text="t", starter="", function=None, public=(case,), private=())
    suite = CaseSuite(problem=held, cases=(case,), shown=(True,))
    assert case.size == 2 and suite.problem.solution is None


def test_an_id_that_is_null_is_none(tmp_path: Path) -> None:
    rows = [mbpp(1, task_id=None), humaneval(2, task_id=None)]
    env = Code(path=written(tmp_path, rows), eval_share=0.0)
    assert sorted(task.id for task in env.train_tasks()) == ["train/1", "train/2"]
