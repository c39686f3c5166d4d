"""A chat template that writes earlier answers otherwise than they were sampled is told of at the start."""

import logging
from typing import Any

import pytest
from chat_tokenizers import FAMILIES, QWEN, THINKING, qwen

from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.round_trip import check_round_trip, keeps_answers, missing_header, warn_of_missing_header
from vpd.types import Message, Task

ASKED: tuple[Message, ...] = ({"role": "user", "content": "one and one?"},)
TASK = Task(id="t", messages=ASKED)
HEEDLESS = QWEN.partition("{% if add_generation_prompt %}")[0]
REFUSES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no assistant') }}{% endif %}{% endfor %}"
)
HIDES = "{% for m in messages %}{{ m.role }} {% if m.role == 'user' %}{{ m.content }}{% else %}9{% endif %}{% endfor %}"
DROPS_THINKING = QWEN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


def prompter(tokenizer: Any, **settings: Any) -> Prompter:
    return Prompter(tokenizer, PromptSettings(**settings), window=None, max_completion_length=8)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen", "full-width"}))
def test_templates_that_add_text_to_what_was_said(name: str) -> None:
    assert keeps_answers(prompter(FAMILIES[name]()), ASKED)


@pytest.mark.parametrize(
    ("template", "thinking", "kept"),
    [(QWEN, True, True), (QWEN, False, False), (DROPS_THINKING, True, False), (THINKING, True, False)],
)
def test_templates_that_change_it_are_told_of(
    template: str, thinking: bool, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vpd"):
        check_round_trip(prompter(qwen(template), enable_thinking=thinking), [Task(id="t", messages=ASKED)])
    assert (not caplog.text) == kept


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_templates_that_heed_add_generation_prompt_or_need_no_header(name: str) -> None:
    assert missing_header(prompter(FAMILIES[name]()), TASK) == ""


def test_a_template_that_leaves_the_answers_header_out_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    heedless = prompter(qwen(HEEDLESS))
    with caplog.at_level(logging.WARNING, "vpd"):
        warn_of_missing_header(heedless, [TASK])
    assert "'<|im_start|>assistant' before an answer" in caplog.text and "ignores add_generation_prompt" in caplog.text
    assert missing_header(prompter(qwen(THINKING)), TASK) == ""


@pytest.mark.parametrize("template", [REFUSES + HEEDLESS, HIDES])
def test_a_template_that_takes_or_shows_no_answer_is_not_told_of(template: str) -> None:
    assert missing_header(prompter(qwen(template)), TASK) == ""
