"""Records of TRL's and verl's data sets as the records that ``env.name: dataset``, ``math`` and the others read.

| form | columns | becomes |
|---|---|---|
| verl's | ``prompt`` (messages), ``data_source``, ``reward_model``, ``extra_info`` | as it is, with ``id`` |
| TRL's prompts | ``prompt`` (a text or messages) and others | as it is |
| TRL's prompts and completions | ``prompt``, ``completion`` | ``prompt``, ``answer`` (the completion's text) |
| TRL's conversations | ``messages`` | ``prompt`` up to the last question, ``answer`` the last reply |
| TRL's unpaired preferences | ``prompt``, ``completion``, ``label`` | ``success`` in the place of ``label``: recorded |
| TRL's preferences | ``chosen``, ``rejected``, and ``prompt`` or not | ``prompt``, ``answer`` (what was chosen) |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vpd.envs import records
from vpd.errors import DataError

Form: TypeAlias = Literal["verl", "prompts", "completions", "conversations", "preferences", "labelled"]
Record: TypeAlias = Mapping[str, Any]

#: words in verl's ``data_source``, and the environment that grades such records
SOURCES: Mapping[str, str] = {
    "gsm8k": "math",
    "math": "math",
    "dapo": "math",
    "aime": "math",
    "numina": "math",
    "sciknoweval": "science",
    "tooluse": "tooluse",
    "code": "code",
    "lcb": "code",
}
EXPECTED = "a column prompt, messages, or chosen and rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What becomes of one column."""

    name: str
    becomes: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedData:
    """Records in our form, what became of each column, and the section ``env`` that reads them (without its path)."""

    form: Form
    records: Sequence[Record]
    columns: Sequence[Column]
    env: Mapping[str, Any]


def convert_data(path: str) -> ConvertedData:
    """All records of a file, a folder that ``datasets`` saved, or ``owner/name`` on the Hub.  Raises DataError."""
    entries = list(records.read(path, split="train"))
    where, _, first = entries[0]
    form = form_of(first, where)
    for here, _, record in entries:
        if (other := form_of(record, here)) != form:
            raise DataError(
                f"{here} is of another form than {where}",
                got=f"{other}: the columns {', '.join(map(str, record))}"[:200],
                expected=f"{form}, as the first",
                do="Convert records of each form in a file of their own.",
            )
    converted = [_converted(form, record, where) for where, _, record in entries]
    return ConvertedData(form=form, records=converted, columns=_columns(form, first), env=_env(form, first))


def form_of(record: Record, where: str) -> Form:
    """Which of the forms a record has.  Raises DataError."""
    if isinstance(record.get("reward_model"), Mapping):
        return "verl"
    if "chosen" in record:
        return "preferences"
    if "completion" in record and "prompt" in record:
        return "labelled" if isinstance(record.get("label"), int) and record["label"] in (0, 1) else "completions"
    if "prompt" in record:
        return "prompts"
    if "messages" in record or "conversations" in record:
        return "conversations"
    got = f"the columns {', '.join(map(str, record))}"[:200]
    raise DataError(f"{where} is in no form of TRL's or verl's data", got=got, expected=EXPECTED)


def _converted(form: Form, record: Record, where: str) -> Record:
    rest = {key: value for key, value in record.items() if key not in ("prompt", "completion", *CONVERSATIONS)}
    if form in MAKE_ANSWERS and rest.get("answer") is None:
        rest.pop("answer", None)
    elif form in MAKE_ANSWERS:
        made = MAKE_ANSWERS[form]
        raise DataError(
            f"{where} has an answer, and {made} that would become one",
            got=f"the columns {', '.join(map(str, record))}"[:200],
            expected="one of them",
            do=f"Rename the column answer, or leave {made} out.",
        )
    match form:
        case "verl":
            extra = record.get("extra_info")
            index = extra.get("index") if isinstance(extra, Mapping) else None
            return {**({} if index is None else {"id": str(index)}), **record}
        case "prompts":
            return record
        case "completions":
            return {"prompt": record["prompt"], "answer": _last(record, "completion", where), **rest}
        case "labelled":
            answer, label = _last(record, "completion", where), bool(rest.pop("label"))
            return {"prompt": record["prompt"], "completion": answer, **rest, "success": label}
        case "conversations":
            turns = _messages(record.get("messages", record.get("conversations")), where)
            return {"prompt": turns[:-1], "answer": turns[-1]["content"], **rest}
        case "preferences":
            if "prompt" in record:
                return {"prompt": record["prompt"], "answer": _last(record, "chosen", where), **rest}
            turns = _messages(record["chosen"], where)
            return {"prompt": turns[:-1], "answer": turns[-1]["content"], **rest}


#: forms of which a part becomes the column answer
MAKE_ANSWERS: Mapping[Form, str] = {
    "completions": "a completion",
    "conversations": "messages",
    "preferences": "chosen",
}
CONVERSATIONS = ("messages", "conversations", "chosen", "rejected")


def _messages(value: Any, where: str) -> list[Any]:
    """A conversation that ends with an assistant's message."""
    listed = records.listed(value, where)
    if not isinstance(listed, (list, tuple)) or len(listed) < 2:
        raise DataError(f"{where} holds no conversation", got=repr(value)[:80], expected="a question and a reply")
    return list(records.messages(listed, "messages", where, ends=("assistant",)))


def _last(record: Record, field: str, where: str) -> str:
    """A completion as a text: itself, or the content of its last message."""
    found = records.listed(record[field], f"{where}: {field!r}")
    if isinstance(found, str):
        return found
    return str(records.messages(found, field, where, ends=("assistant",))[-1]["content"])


def _columns(form: Form, record: Record) -> list[Column]:
    found = []
    for name in record:
        becomes, why = str(name), "reaches a reward function by its name"
        if name == "prompt":
            raw = isinstance(record[name], str) and form != "verl"
            why = "the task; a text becomes a user's message in the chat template" if raw else "the task"
        elif form == "labelled" and name in ("completion", "label"):
            becomes = "completion" if name == "completion" else "success"
            why = "an answer that was given" if name == "completion" else "whether it was a good one"
        elif name in ("completion", "chosen"):
            becomes, why = "answer", "its last message is a right answer"
        elif name in ("messages", "conversations"):
            becomes, why = "prompt, answer", "the last reply is the answer, what stands before it the task"
        elif name == "rejected":
            becomes, why = "", "left out: what a model writes itself is compared"
        elif name == "privileged_context":
            why = "TRL's feedback of a task; return it from the reward function: (reward, privileged_context)"
        elif form == "verl" and name in ("reward_model", "data_source", "extra_info"):
            why = "verl's compute_score and the environments read it"
        found.append(Column(name=str(name), becomes=becomes, why=why))
    return found


def _env(form: Form, record: Record) -> Mapping[str, Any]:
    source = " ".join(str(record.get(key, "")) for key in ("data_source", "dataset", "kind")).lower()
    name = next((env for word, env in SOURCES.items() if word in source), None)
    if form == "labelled":
        return {"name": "recorded"}
    if name is None and form == "prompts" and "solution" in record:
        name = "math"
    if name == "math":
        return {"name": name, **_math(source, str(record.get("prompt", record.get("question", ""))))}
    if name is not None:
        return {"name": name}
    return {"name": "dataset", "reward": "my_rewards.py:reward"}


def _math(source: str, prompt: str) -> Mapping[str, Any]:
    """A prompt that asks for a form of answer is not asked again; of DAPO's the environment takes the frame away."""
    if "####" in prompt and "dapo" not in source:
        return {"ask": "", "answer_form": "hashes"}
    return {"ask": ""} if r"\boxed" in prompt and "dapo" not in source else {}
