"""Tool use: the right calls, with the right arguments, in the form ``Action: ...`` / ``Action Input: {...}``.

    How warm is it in Oslo?  (tool getWeather, Parameters: {"city": "Required. string.", "unit": "string."})  <- task
    Action: getWeather
    Action Input: {"town": "Oslo", "unit": "kelvin"}                                                       <- attempt
    In action 1 ("getWeather"): the argument "city" is missing; "town" is no argument of this tool; the value of "unit"
    is not the wanted one.                                                                                 <- feedback

    env = ToolUse(path="train.jsonl", eval_path="test.jsonl")

A record has a ``prompt`` that documents the tools as ToolAlpaca does, and an ``answer``: JSON, a list of
``{"Action": name, "Action_Input": JSON of an object}``, in any order; verl's schema of the same is read too.  An action
whose name begins with ``[Optional]`` may be left out. Feedback never quotes a wanted value, nor the
name of a wanted tool that was not called.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vpd.envs import per_row, records
from vpd.envs.record_tasks import FileTasks, Part
from vpd.errors import DataError
from vpd.types import Grade, Task

OPTIONAL = "[Optional]"
LABEL = re.compile(r"^[ \t*]*(Action[ _]Input|Action)[ \t*]*:[ \t*]*", re.MULTILINE | re.IGNORECASE)
FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?", re.IGNORECASE)
TOOL = re.compile(r"^([^\s:]+): .*\nParameters: (?=\{)", re.MULTILINE)
FORM = 'each call is a line "Action: TOOL" and after it a line "Action Input: JSON OBJECT"'
KINDS: tuple[tuple[Any, str], ...] = (
    (bool, "a boolean"),
    (str, "a string"),
    ((int, float), "a number"),
    (dict, "an object"),
    (list, "a list"),
    (object, "null"),
)
MAX_COMPLAINTS = 6  # complaints in one feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a tool; ``arguments`` is a JSON object; an ``optional`` call may be left out."""

    tool: str
    arguments: Mapping[str, Any]
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question as read: ``tools`` has the documented parameters of each tool, ``calls`` are the wanted ones."""

    id: str
    prompt: str
    system: str | None
    tools: Mapping[str, Mapping[str, Any] | None]
    calls: tuple[Call, ...]


@dataclass(frozen=True, kw_only=True)
class ToolUse(FileTasks[Request]):
    """The environment; files are read when the first task is asked for.

    Raises DataError for data that cannot be used, ConfigError for settings.  Source of the data: ToolAlpaca
    (https://github.com/tangqiaoyu/ToolAlpaca), in the schema of the SDPO release.
    """

    name: Literal["tooluse"] = "tooluse"
    reward: Annotated[Literal["all", "share"], "1 if all calls are right else 0, or the share that is right"] = "all"
    hint: Annotated[Literal["none", "tool", "key"], "tool: feedback names missing tools; key: also all arguments"] = (
        "none"
    )
    ignore_empty: Annotated[bool, 'an argument of "" or null counts as left out'] = False
    system: Annotated[str | None, "a system message, in place of the record's"] = None

    @property
    def reveals_answer(self) -> bool:
        """Whether feedback holds the right calls, or the tools that they call."""
        return self.hint != "none"

    def solution(self, task: Task) -> str:
        return "\n".join(
            f"Action: {call.tool}\nAction Input: {json.dumps(call.arguments, ensure_ascii=False)}"
            for call in task.payload.calls
        )

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        request: Request = task.payload
        calls, faults = read_calls(text)
        share, complaints = compare(request, calls, name_missing=self.hint == "tool", ignore_empty=self.ignore_empty)
        share *= len(calls) / max(1, len(calls) + len(faults))  # a fault of form counts as a call that is wrong
        details = faults or complaints
        right = not details
        if len(details) > MAX_COMPLAINTS:
            details = [*details[:MAX_COMPLAINTS], f"And {len(details) - MAX_COMPLAINTS} more."]
        if not right and self.hint == "key":
            details = [*details, f"The right calls are:\n{self.solution(task)}"]
        return Grade(
            reward=share if self.reward == "share" else float(right),
            success=right,
            feedback="All calls are right." if right else " ".join(details),
            informative=not right,
            metrics={"calls_readable": float(not faults), "calls_share": share},
        )

    def split_key(self, item: Request) -> str:
        return item.prompt

    def make_task(self, part: Part, item: Request) -> Task:
        system = item.system if self.system is None else self.system
        messages = records.with_system(({"role": "user", "content": item.prompt},), system)
        return Task(id=f"{part}/{item.id}", messages=messages, payload=item)

    def read_items(self, path: str) -> list[Request]:
        return [
            _request(records.from_verl(record, where), where, number)
            for where, number, record in records.read(path, subset=self.subset, split=self.split)
        ]


def read_calls(text: str) -> tuple[list[Call], list[str]]:
    """(calls, faults of form) of an answer.  Thoughts, final answers and other lines are ignored."""
    calls: list[Call] = []
    faults: list[str] = []
    position, number, tool = 0, 0, None
    while label := LABEL.search(text, position):
        position = label.end()
        if label[1].lower() == "action":
            faults += [f"Action {number} has no Action Input."] if tool is not None else []
            number += 1
            start, position = position, _line_end(text, position)
            tool = text[start:position].strip(" \t\r`*\"'")
            if not tool:
                faults.append(f"Action {number} names no tool.")
            elif len(tool.split()) > 1:
                faults.append(f"Action {number} must hold the name of a tool and nothing else on its line.")
            continue
        found, position, fault = _read_object(text, FENCE.match(text, position).end())  # type: ignore[union-attr]
        if fault:
            faults.append(f"The Action Input of action {number} {fault}." if number else f"The Action Input {fault}.")
        if tool is None:
            after = f"action {number} has one already" if number else "no action stands before it"
            faults.append(f"There is an Action Input too many: {after}.")
        elif found is not None:
            calls.append(Call(tool=tool, arguments=found))
        tool = None
    if tool is not None:
        faults.append(f"Action {number} has no Action Input.")
    if not number and not faults:
        faults.append(f"Your answer {'has no action' if text.strip() else 'is empty'}; {FORM}.")
    return calls, faults


def _read_object(text: str, start: int) -> tuple[dict[str, Any] | None, int, str | None]:
    """The JSON object at ``start``, where it ends, and what is wrong with it."""
    try:
        found, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return None, start, f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except (ValueError, RecursionError):
        return None, start, "is no JSON that can be read: it holds NaN, too long a number, or is nested too deep"
    if not isinstance(found, dict):
        return None, end, f"is {_kind(found)}; it must be an object"
    if text[end : _line_end(text, end)].strip(" \t\r`*"):
        return None, end, "is followed by other text on its line"
    return found, end, None


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _refuse(constant: str) -> None:
    raise ValueError(constant)


DECODER = json.JSONDecoder(parse_constant=_refuse)


def compare(
    request: Request, calls: Sequence[Call], *, name_missing: bool = False, ignore_empty: bool = False
) -> tuple[float, list[str]]:
    """(share right, complaints) of an answer's calls, in any order.

    The share counts tools and arguments: twice the number that agree, divided by all wanted plus all given.
    """
    drop = _without_empty if ignore_empty else lambda call: call.arguments
    wanted, given = [drop(call) for call in request.calls], [drop(call) for call in calls]
    pairs = _pairs(request.calls, wanted, calls, given)
    agree = sum(1 + _agreeing(wanted[w], given[g]) for g, w in pairs.items())
    counted = [w for w, call in enumerate(request.calls) if not call.optional or w in pairs.values()]
    total = sum(1 + len(wanted[w]) for w in counted) + sum(1 + len(arguments) for arguments in given)
    complaints = []
    for g, call in enumerate(calls):
        where = f'action {g + 1} ("{records.excerpt(call.tool)}")'
        if g in pairs:
            wrong = _differences(wanted[pairs[g]], given[g], request.tools.get(call.tool))
            complaints += [f"In {where}: {'; '.join(wrong)}."] if wrong else []
        elif request.tools and call.tool not in request.tools:
            complaints.append(f"In {where}: there is no such tool.")
        elif any(other.tool == call.tool for other in request.calls):
            complaints.append(f"In {where}: the tool is called too often.")
        else:
            complaints.append(f"In {where}: the tool is not wanted.")
    called = {call.tool for call in calls}
    missing = [request.calls[w].tool for w in counted if w not in pairs.values()]
    for tool, count in Counter(tool for tool in missing if name_missing or tool in called).items():
        complaints.append(f'{_calls(count)} of "{tool}" {"is" if count == 1 else "are"} missing.')
    others = sum(not name_missing and tool not in called for tool in missing)
    if others:
        complaints.append(f"{_calls(others)} of another tool {'is' if others == 1 else 'are'} missing.")
    return (2 * agree / total if calls else 0.0), complaints


def _pairs(
    wanted: Sequence[Call], wanted_arguments: Sequence[Any], given: Sequence[Call], given_arguments: Sequence[Any]
) -> dict[int, int]:
    """The wanted call that each given one is compared with: the same tool, those that agree most first."""
    candidates = [
        (len({**w_args, **g_args}) - _agreeing(w_args, g_args), want.optional, g, w)
        for w, (want, w_args) in enumerate(zip(wanted, wanted_arguments, strict=True))
        for g, (call, g_args) in enumerate(zip(given, given_arguments, strict=True))
        if want.tool == call.tool
    ]
    pairs: dict[int, int] = {}
    for _, _, g, w in sorted(candidates):
        if g not in pairs and w not in pairs.values():
            pairs[g] = w
    return pairs


def _differences(wanted: Mapping[str, Any], given: Mapping[str, Any], documented: Any, path: str = "") -> list[str]:
    """What is wrong with the arguments of one call, inside objects too; no wanted value is quoted."""
    wrong = [f'the argument "{path}{key}" is missing' for key in wanted if key not in given]
    for key, value in given.items():
        name = f'"{path}{records.excerpt(key)}"'
        if key not in wanted:
            known = documented is None or path or key in documented
            wrong.append(f"{name} is not wanted" if known else f"{name} is no argument of this tool")
        elif not _equal(wanted[key], value):
            expected, found = _kind(wanted[key]), _kind(value)
            if expected != found:
                wrong.append(f"the value of {name} is {found}; it must be {expected}")
            elif isinstance(value, dict):
                wrong += _differences(wanted[key], value, None, f"{path}{key}.")
            else:
                wrong.append(f"the value of {name} is not the wanted one")
    return wrong


def _agreeing(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    return sum(key in given and _equal(value, given[key]) for key, value in wanted.items())


def _equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 and is not true."""
    if _kind(a) != _kind(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _kind(value: Any) -> str:
    return next(name for kind, name in KINDS if isinstance(value, kind))


def _without_empty(call: Call) -> Mapping[str, Any]:
    return {key: value for key, value in call.arguments.items() if value not in ("", None)}


def _calls(count: int) -> str:
    return "A call" if count == 1 else f"{count} calls"


def _request(record: Mapping[str, Any], where: str, number: int) -> Request:
    prompt = records.text(record, "prompt", where)
    answer = record.get("answer")
    entries = records.parsed(answer, f"{where}: 'answer'")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: 'answer' holds no calls", got=repr(answer)[:80], expected="a list with a call")
    calls = []
    for entry in entries:
        entry = records.mapping(entry, f"{where}: a call in 'answer'")
        tool = records.text(entry, "Action", where).strip()
        arguments = records.parsed(entry.get("Action_Input"), f"{where}: 'Action_Input' of {tool}")
        calls.append(
            Call(
                tool=tool.removeprefix(OPTIONAL).strip(),
                arguments=records.mapping(arguments, f"{where}: 'Action_Input' of {tool}"),
                optional=tool.startswith(OPTIONAL),
            )
        )
    return Request(
        id=records.name_of(record, number, "idx", "extra_info.index"),
        prompt=prompt,
        system=records.optional_text(record, "system", where),
        tools=read_tools(prompt),
        calls=tuple(calls),
    )


def read_tools(prompt: str) -> dict[str, Any]:
    """The documented tools with their parameters; None for parameters that are no JSON object."""
    tools: dict[str, Any] = {}
    for tool in TOOL.finditer(prompt):
        parameters, _, _ = _read_object(prompt, tool.end())
        tools[tool[1]] = parameters
    return tools
