"""Messages with tools: nothing is dropped on the way to the chat template, nor by it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import QWEN, qwen

from vpd.envs import records
from vpd.envs.dataset import Dataset
from vpd.errors import DataError, ModelError
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.types import Section, Task

TOOLS = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_TOOL_ROLE = QWEN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
SCHEMA = {"type": "function", "function": {"name": "thermometer", "parameters": {"city": {"type": "string"}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "thermometer", "arguments": {"city": "Oslo"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": ""},
    {"role": "user", "content": [{"type": "text", "text": "How warm "}, {"type": "text", "text": "is it?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "I measure.", "tool_calls": [CALL]},
    {"role": "tool", "name": "thermometer", "tool_call_id": "c1", "content": ""},
    {"role": "user", "content": "And tomorrow?"},
]


def reward(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def plain(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def task_of(folder: Path, rows: list[dict[str, Any]], form: str = "jsonl") -> Task:
    path = folder / f"train.{form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:  # all contents of one type, as parquet wants it
        rows = [
            {**row, "prompt": [{**m, "content": m["content"] and plain(m["content"])} for m in row["prompt"]]}
            for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)
    return Dataset(path=str(path), reward=reward, eval_share=0.0).train_tasks()[0]


def prompter(template: str) -> Prompter:
    return Prompter(qwen(template), PromptSettings(), window=None, max_completion_length=8)


def read(task: Task, template: str = TOOLS) -> str:
    made = prompter(template)
    return str(made.tokenizer.decode(made.build_student_prompt(task)))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_calls_reasoning_names_and_tools_reach_the_model(form: str, tmp_path: Path) -> None:
    told = read(task_of(tmp_path, [{"prompt": CHAT, "tools": [SCHEMA]}], form))
    assert '{"city": "Oslo"}' in told and "I measure." in told and "How warm is it?" in told
    assert "tool thermometer" in told and '"parameters": {"city": {"type": "string"}}' in told and "None" not in told


def test_the_teacher_reads_them_too(tmp_path: Path) -> None:
    task = task_of(tmp_path, [{"prompt": CHAT, "tools": [SCHEMA]}])
    made = prompter(TOOLS)
    section = Section(kind="feedback", source="environment", text="Say a number.")
    teacher = made.build_teacher_prompt(task, [section])
    assert teacher is not None
    told = made.tokenizer.decode(teacher.tokens)
    assert '{"city": "Oslo"}' in told and "Say a number." in told and "<tools>" in told


def test_json_text_stands_for_tools_messages_and_arguments(tmp_path: Path) -> None:
    call = {**CALL, "function": {"name": "thermometer", "arguments": '{"city": "Oslo"}'}}
    chat = [{**message, "tool_calls": [call]} if "tool_calls" in message else message for message in CHAT]
    plain = read(task_of(tmp_path, [{"prompt": CHAT, "tools": [SCHEMA]}]))
    assert read(task_of(tmp_path, [{"prompt": chat, "tools": json.dumps([SCHEMA])}])) == plain
    task = task_of(tmp_path, [{"prompt": json.dumps(chat), "tools": [json.dumps(SCHEMA)]}])
    assert read(task) == plain and isinstance(task.payload.prompt, list)


def test_what_parquet_fills_up_is_no_part_of_a_call_or_a_tool(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "rain", "parameters": {"day": {"type": "number"}}}}
    second = {"id": "c2", "type": "function", "function": {"name": "rain", "arguments": {"day": 3}}}
    chat = [{**message, "tool_calls": [CALL, second]} if "tool_calls" in message else message for message in CHAT]
    row = {"prompt": chat, "tools": [SCHEMA, other]}
    from_parquet, plain = task_of(tmp_path, [row], "parquet"), task_of(tmp_path, [row])
    assert (from_parquet.messages, from_parquet.tools) == (plain.messages, plain.tools)  # in any order of keys


@pytest.mark.parametrize(
    ("row", "template", "told"),
    [
        ({"prompt": "?", "tools": [SCHEMA]}, QWEN, "leaves out the tools of task 'train/1'"),
        ({"prompt": CHAT[:3] + CHAT[4:]}, QWEN, r"leaves out a call in 'tool_calls' of task 'train/1' \(message 2\)"),
        (
            {"prompt": [*CHAT[:2], *CHAT[3:]]},
            NO_TOOL_ROLE,
            r"leaves out the message of the role 'tool' .*\(message 2\)",
        ),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(row: Any, template: str, told: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, [row])
    assert read(task)
    with pytest.raises(ModelError, match=told) as caught:
        read(task, template)
    assert "\n" not in str(caught.value)


def test_a_conversation_may_end_with_a_tools_answer(tmp_path: Path) -> None:
    assert task_of(tmp_path, [{"prompt": CHAT[:4]}]).messages[-1]["role"] == "tool"
    with pytest.raises(DataError, match="does not end with the user's message"):
        records.messages(CHAT[:4], "prompt", "line 1")
    with pytest.raises(DataError, match="does not end with the assistant's message"):
        records.messages(CHAT[:4], "completion", "line 1", ends=("assistant",))


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
BAD: dict[str, tuple[Any, str]] = {
    "no content": ({"role": "assistant", "content": None}, "has no text 'content'"),
    "an image": ({"role": "user", "content": IMAGE}, "a part that is no text; got 'image_url'"),
    "an object": ({"role": "tool", "content": {"warm": 3}}, "has no text 'content'"),
    "calls as text": ({"role": "assistant", "tool_calls": "run"}, "'tool_calls' is not JSON"),
    "one call": ({"role": "assistant", "tool_calls": CALL}, "'tool_calls' is no list"),
    "no name": ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "names no function"),
    "arguments": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
        "'arguments' of 'f' is not JSON",
    ),
    "a list of arguments": (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]},
        "'arguments' of 'f' is not an object; got list",
    ),
    "another schema": ({"from": "human", "value": "?"}, "has no text 'role'; got only from, value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_cannot_be_read_is_one_line(name: str) -> None:
    message, told = BAD[name]
    with pytest.raises(DataError, match=f"line 3: a message of 'prompt'.*{told}") as caught:
        records.messages([message, {"role": "user", "content": "?"}], "prompt", "line 3")
    assert "\n" not in str(caught.value)


def test_messages_as_python_writes_them_are_not_taken_for_a_question() -> None:
    with pytest.raises(DataError, match="line 3 looks like messages, and is not JSON"):
        records.listed(str(CHAT), "line 3")
    assert records.listed("[{'a': 1}] is what?", "line 3") == "[{'a': 1}] is what?"
