"""Tool use: JSON read as JSON, calls compared as multisets, feedback that names what is wrong and no wanted value."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vpd.envs import grade_texts
from vpd.envs.tooluse import FORM, Call, Request, ToolUse, read_calls, read_tools
from vpd.errors import ConfigError, DataError
from vpd.types import Grade, Task

PROMPT = """Your task is to answer the user's question using available tools.
You have access to the following tools:
Name: Weather
Documentation:
getWeather: The weather in a city: now, or later.
Parameters: {"city": "Required. string. The city.", "days": "integer. How far ahead.", "where": "Object{lat, lon}."}
Output: The weather.
 - Structure: Object{celsius}
listCities: All cities.
Parameters: {}
Output: Names.

Use the following format:
Thought: you should always think about what to do
Action: the action to take, should be one of the tool names.
Action Input: the input to the action, must be in JSON format.

Begin!
Question: """
OSLO = {"city": "Oslo", "days": 2}


def call(tool: str, arguments: Any) -> dict[str, str]:
    return {"Action": tool, "Action_Input": json.dumps(arguments)}


def said(*calls: tuple[str, Any]) -> str:
    return "\n".join(f"Thought: hm\nAction: {tool}\nAction Input: {json.dumps(found)}" for tool, found in calls)


def record(number: int, *calls: dict[str, str], **changes: Any) -> dict[str, Any]:
    answer = json.dumps(list(calls or [call("getWeather", {"city": f"City {number}"})]))
    plain = {"prompt": f"{PROMPT}How is city {number}?", "idx": number, "system": None, "answer": answer}
    return plain | {"dataset": "tooluse", "kind": "tooluse", "tests": None} | changes


def written(folder: Path, given: list[Any]) -> str:
    (folder / "tools.jsonl").write_text("\n".join(map(json.dumps, given)))
    return str(folder / "tools.jsonl")


def graded(text: str, *wanted: tuple[str, Any], **settings: Any) -> Grade:
    calls = tuple(
        Call(tool=t.removeprefix("?"), arguments=a, optional=t.startswith("?"))
        for t, a in wanted or (("getWeather", OSLO),)
    )
    request = Request(id="1", prompt=PROMPT, system=None, tools=read_tools(PROMPT), calls=calls)
    task = Task(id="1", messages=({"role": "user", "content": PROMPT},), payload=request)
    [grade] = grade_texts(ToolUse(path="unread.jsonl", **settings), [task], [text])
    return grade


def test_documented_tools_are_read_from_the_prompt() -> None:
    tools = read_tools(PROMPT)
    assert list(tools) == ["getWeather", "listCities"] and list(tools["getWeather"]) == ["city", "days", "where"]


def test_data_in_the_schema_of_the_release(tmp_path: Path) -> None:
    optional = record(30, call("listCities", {}), call("[Optional]getWeather", {"city": "Oslo"}))
    env = ToolUse(path=written(tmp_path, [*map(record, range(30)), optional]), eval_share=0.3)
    train, held_out = env.train_tasks(), env.eval_tasks(None)
    assert len(train) + len(held_out) == 31 and train and held_out
    assert not {task.payload.prompt for task in train} & {task.payload.prompt for task in held_out}
    tasks = [*train, *held_out]
    grades = env.grade(tasks, [env.solution(task) for task in tasks])
    assert all(grade.success and not grade.informative and grade.reward == 1 for grade in grades)
    [kept] = [task for task in tasks if task.payload.id == "30"]
    assert [c.optional for c in kept.payload.calls] == [False, True]
    assert env.task(3, seed=1) == env.task(3, seed=1) and env.task(3, seed=1).messages[0]["role"] == "user"


RIGHT = {
    "plain": said(("getWeather", OSLO)),
    "another order of arguments": 'Action: getWeather\nAction Input: {"days": 2.0, "city": "Oslo"}',
    "pretty-printed": "Action: getWeather\nAction Input:\n" + json.dumps(OSLO, indent=4),
    "in a fence": f"Action: `getWeather`\nAction Input: ```json\n{json.dumps(OSLO)}\n```",
    "in bold": f"**Action:** getWeather\n**Action Input:** {json.dumps(OSLO)}",
    "with an underscore": f"Action: getWeather\nAction_Input: {json.dumps(OSLO)}",
    "followed by a final answer": said(("getWeather", OSLO)) + "\nObservation: 3\nFinal Answer: 3 degrees. Action!",
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_call_in_many_hands(kind: str) -> None:
    grade = graded(RIGHT[kind])
    assert (grade.reward, grade.success, grade.informative) == (1.0, True, False), grade.feedback


FAULTS = {
    "": f"Your answer is empty; {FORM}.",
    "I call getWeather with Oslo.": f"Your answer has no action; {FORM}.",
    "Action: getWeather": "Action 1 has no Action Input.",
    'Action:\nAction Input: {"city": "Oslo"}': "Action 1 names no tool.",
    'Action: getWeather {"city": "Oslo"}\nAction Input: {}': (
        "Action 1 must hold the name of a tool and nothing else on its line."
    ),
    'Action Input: {"city": "Oslo"}': "There is an Action Input too many: no action stands before it.",
    "Action: getWeather\nAction Input: {}\nAction Input: {}": (
        "There is an Action Input too many: action 1 has one already."
    ),
    "Action: getWeather\nAction: listCities\nAction Input: {}": "Action 1 has no Action Input.",
    "Action: getWeather\nAction Input: Oslo": (
        "The Action Input of action 1 is not valid JSON: Expecting value (line 2, column 15)."
    ),
    "Action: getWeather\nAction Input: {'city': 'Oslo'}": (
        "The Action Input of action 1 is not valid JSON: "
        "Expecting property name enclosed in double quotes (line 2, column 16)."
    ),
    'Action: getWeather\nAction Input: ["Oslo"]': "The Action Input of action 1 is a list; it must be an object.",
    'Action: getWeather\nAction Input: {"days": NaN}': (
        "The Action Input of action 1 is no JSON that can be read: "
        "it holds NaN, too long a number, or is nested too deep."
    ),
    'Action: getWeather\nAction Input: {"city": "Oslo"} so it is': (
        "The Action Input of action 1 is followed by other text on its line."
    ),
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_of_form_is_informative(text: str) -> None:
    grade = graded(text)
    assert (grade.reward, grade.feedback, grade.informative) == (0.0, FAULTS[text], True)
    assert grade.metrics["calls_readable"] == 0


WRONG: list[tuple[Any, list[Any], str]] = [
    (
        said(("getWether", OSLO)),
        [],
        'In action 1 ("getWether"): there is no such tool. A call of another tool is missing.',
    ),
    (
        said(("listCities", {})),
        [],
        'In action 1 ("listCities"): the tool is not wanted. A call of another tool is missing.',
    ),
    (
        said(("getWeather", {"town": "Oslo", "days": "2"})),
        [],
        'In action 1 ("getWeather"): the argument "city" is missing; "town" is no argument of this tool; '
        'the value of "days" is a string; it must be a number.',
    ),
    (
        said(("getWeather", {**OSLO, "city": "Bergen", "where": {}})),
        [],
        'In action 1 ("getWeather"): the value of "city" is not the wanted one; "where" is not wanted.',
    ),
    (said(("getWeather", OSLO), ("getWeather", OSLO)), [], 'In action 2 ("getWeather"): the tool is called too often.'),
    (
        said(("getWeather", OSLO)),
        [("getWeather", OSLO), ("getWeather", {"city": "Bergen"})],
        'A call of "getWeather" is missing.',
    ),
    (
        said(("getWeather", {"where": {"lat": 60, "lon": True}})),
        [("getWeather", {"where": {"lat": 59.9, "lon": 10, "alt": 3}})],
        'In action 1 ("getWeather"): the argument "where.alt" is missing; the value of "where.lat" is not the wanted '
        'one; the value of "where.lon" is a boolean; it must be a number.',
    ),
]


@pytest.mark.parametrize(("text", "wanted", "message"), WRONG, ids=range(len(WRONG)))
def test_feedback_names_what_is_wrong(text: str, wanted: list[Any], message: str) -> None:
    grade = graded(text, *wanted)
    assert (grade.reward, grade.success, grade.feedback, grade.informative) == (0.0, False, message, True)


def test_calls_are_a_multiset() -> None:
    cities = [("getWeather", {"city": name}) for name in ("Oslo", "Bergen", "Oslo")]
    assert graded(said(*cities[::-1]), *cities).success
    grade = graded(said(cities[1], cities[1], cities[0]), *cities)
    assert grade.feedback == 'In action 2 ("getWeather"): the value of "city" is not the wanted one.'
    assert graded(said(*cities, ("listCities", {})), *cities).success is False


def test_an_optional_call_may_be_left_out_or_made_but_not_made_wrongly() -> None:
    wanted = [("listCities", {}), ("?getWeather", OSLO)]
    assert graded(said(("listCities", {})), *wanted).success
    assert graded(said(("getWeather", OSLO), ("listCities", {})), *wanted).success
    assert not graded(said(("listCities", {}), ("getWeather", {"city": "Rome"})), *wanted).success
    assert not graded(said(("getWeather", OSLO)), *wanted).success


def test_the_share_counts_tools_and_arguments_that_agree() -> None:
    half = graded(said(("getWeather", {"city": "Oslo", "days": 3})), reward="share")
    assert half.reward == pytest.approx(2 * 2 / (3 + 3)) and half.success is False
    missing = graded(said(("getWeather", OSLO)), ("getWeather", OSLO), ("listCities", {}), reward="share")
    assert missing.reward == pytest.approx(2 * 3 / (4 + 3))
    broken = graded(said(("getWeather", OSLO)) + "\nAction: listCities", reward="share")
    assert broken.reward == pytest.approx(1 / 2)
    assert graded("", reward="share").reward == 0 and graded(said(("getWeather", OSLO)), reward="share").reward == 1


def test_hints_and_empty_arguments() -> None:
    message = graded(said(("listCities", {})), hint="tool").feedback
    assert message is not None and message.endswith('A call of "getWeather" is missing.')
    message = graded("", hint="key").feedback
    assert message is not None and message.endswith(
        f"The right calls are:\nAction: getWeather\nAction Input: {json.dumps(OSLO)}"
    )
    assert [ToolUse(path="x", hint=hint).reveals_answer for hint in ("none", "tool", "key")] == [False, True, True]
    blank = ("getWeather", {"city": "Oslo", "where": ""})
    short = said(("getWeather", {"city": "Oslo"}))
    assert not graded(short, blank).success and graded(short, blank, ignore_empty=True).success
    assert graded(said(blank), ("getWeather", {"city": "Oslo"}), ignore_empty=True).success


def test_no_wanted_value_and_no_uncalled_tool_is_ever_named() -> None:
    wanted = [("getWeather", {"city": "Oslo", "days": 77}), ("listCities", {})]
    attempts = [said(("getWeather", given)) for given in ({}, {"city": "x"}, {"days": "x"}, {"city": 1, "days": 1})]
    for text in [*attempts, "", "Action: x\nAction Input: {}", "Action: getWeather\nAction Input: {"]:
        feedback = graded(text, *wanted).feedback or ""
        assert not re.search("Oslo|77|listCities", feedback), feedback


HOSTILE = [
    "Action: x\nAction Input: " + '{"a": ' * 50_000,
    "Action: x\nAction Input: " + "[" * 100_000,
    'Action: getWeather\nAction Input: {"days": ' + "9" * 5000 + "}",
    said(*[("getWeather", {"city": str(i)}) for i in range(2000)]),
    "\ud800 \x00 Action: \ud800\nAction: \ud800\nAction Input: {}",
    "Action:" * 100_000,
    " " * 200_000 + "Action",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.timeout(20)
def test_hostile_answers_get_a_short_feedback_in_time(text: str) -> None:
    grade = graded(text)
    assert grade.reward == 0 and grade.feedback is not None
    assert len(grade.feedback) < 1500 and grade.feedback.encode()


def test_thoughts_between_actions_are_passed_over() -> None:
    calls, faults = read_calls(said(("a", {}), ("b", {"x": "Action: c"})) + "\nThought: done\nAction plan: none")
    assert [c.tool for c in calls] == ["a", "b"] and not faults


BAD = {
    "has no text 'prompt'": {"prompt": ""},
    "'answer' holds no calls": {"answer": "[]"},
    "'answer' is not JSON": {"answer": "getWeather"},
    "a call in 'answer' is not an object": {"answer": "[1]"},
    "has no text 'Action'": {"answer": "[{}]"},
    "'Action_Input' of getWeather is not JSON": {"answer": '[{"Action": "getWeather", "Action_Input": "{"}]'},
    "'Action_Input' of getWeather is not an object": {"answer": '[{"Action": "getWeather", "Action_Input": "[]"}]'},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_is_named_by_its_line(message: str, tmp_path: Path) -> None:
    env = ToolUse(path=written(tmp_path, [record(1), record(2) | BAD[message]]))
    with pytest.raises(DataError, match="line 2") as error:
        env.train_tasks()
    assert message in str(error.value)


def test_settings_out_of_range() -> None:
    for settings in ({"reward": "some"}, {"hint": "all"}, {"eval_share": 1.0}):
        with pytest.raises(ConfigError, match=f"env.{next(iter(settings))}"):
            ToolUse(path="unread.jsonl", **settings)  # type: ignore[arg-type]


def test_an_id_that_is_null_is_none(tmp_path: Path) -> None:
    env = ToolUse(path=written(tmp_path, [record(number, idx=None) for number in range(3)]), eval_share=0.0)
    assert sorted(task.id for task in env.train_tasks()) == ["train/1", "train/2", "train/3"]
