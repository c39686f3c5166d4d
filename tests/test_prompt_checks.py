"""Templates that drop the feedback, prompts without room for it, and where answers end."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import LLAMA3, QWEN, bundled, byte_level, gemma, llama3, mistral, qwen
from helpers import keys, metrics_of, vpd_train
from transformers import AutoModelForCausalLM

from vpd.bundled import load_bundled
from vpd.engines import ScriptedEngine
from vpd.errors import ModelError
from vpd.feedback.critique import SelfCritique
from vpd.feedback.writers import ModelWriter
from vpd.lab import tiny
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.prompt_checks import answer_ends, check_prompts, require_room
from vpd.types import Completion, Grade, Group, Rollout, Section, Task

ENV = """
from vpd import Grade, Task, per_row

class Long:
    '''One prompt of a batch leaves the teacher no room.'''
    def task(self, index, *, seed):
        words = "1 " * (70 if index % 4 == 3 else 4)
        return Task(id=f"t{index}", messages=({"role": "user", "content": "apply rule A to " + words},))
    def eval_tasks(self, limit):
        return [self.task(0, seed=0)]
    @per_row
    def grade(self, task, text):
        return Grade(reward=0.0, feedback="wrong : rule A means swap " * 4)

class Finite(Long):
    def train_tasks(self):
        return [self.task(index, seed=0) for index in range(8)]
"""


def asking(text: str) -> Task:
    return Task(id="t1", messages=({"role": "user", "content": text},))


def prompter(tokenizer: Any, *, window: int | None = None, length: int = 8, **changes: Any) -> Prompter:
    return Prompter(tokenizer, PromptSettings(**changes), window=window, max_completion_length=length)


def checked(made: Prompter, *texts: str, feedback: Any = ()) -> None:
    check_prompts(
        made, [asking(text) for text in texts], vocabulary=10_000, replies=False, feedback=feedback, context=True
    )


def test_a_template_that_leaves_out_a_message_is_refused() -> None:
    """A system message above all: it is where environments say how an answer must look."""
    tokenizer = qwen(
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    told = Task(id="t1", messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}))
    arguments: dict[str, Any] = {"vocabulary": 10_000, "replies": False, "feedback": (), "context": False}
    message = r"leaves out message 0 of task 't1'; got the same prompt for any text of the role 'system'"
    with pytest.raises(ModelError, match=message):
        check_prompts(prompter(tokenizer), [asking("Why?"), told], **arguments)
    check_prompts(prompter(tokenizer), [asking("Why?")], **arguments)
    check_prompts(prompter(qwen()), [asking("Why?"), told], **arguments)


DROPPING = {
    "cut": "{% for m in messages %}<|im_start|>{{ m.content[:12] }}<|im_end|>{% endfor %}",
    "first message": "<|im_start|>{{ messages[0].content }}<|im_end|>",
    "constant": "<|im_start|>user",
}


@pytest.mark.parametrize("template", DROPPING)
def test_a_template_that_drops_the_feedback_is_known_beforehand(template: str) -> None:
    made = prompter(qwen(DROPPING[template]))
    task = Task(id="t1", messages=({"role": "system", "content": "s"}, {"role": "user", "content": "add one and two"}))
    with pytest.raises(ModelError, match=r"drops the end of the last user message of task 't1'.*\(grpo\)"):
        check_prompts(made, [task], vocabulary=10_000, replies=False, feedback=(SelfCritique(),), context=True)
    whole = contextlib.nullcontext() if template == "cut" else pytest.raises(ModelError, match="leaves out message")
    with whole:  # a method that reads no feedback can do with a message that is cut
        check_prompts(made, [task], vocabulary=10_000, replies=False, feedback=(), context=False)
    checked(prompter(qwen()), "add one and two", feedback=(SelfCritique(),))


def test_a_run_with_such_a_template_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(load_bundled()).save_pretrained(folder)
    tokenizer = tiny.make_tokenizer()
    for template, piece in (("<user> {{ messages[0].content[:20] }} <assistant>", "drops the end"), ("", "is empty")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(template)
        capsys.readouterr()
        assert vpd_train(tmp_path / "run", model__name_or_path=folder) == 2
        error = capsys.readouterr().err
        assert piece in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_row_without_room_has_no_teacher() -> None:
    headers: Any = {"demonstration_header": "", "feedback_header": "\n", "closing": ""}
    made = prompter(qwen(), window=120, length=20, **headers)
    long = Section(kind="feedback", source="environment", text="fox " * 40)
    short, tight = asking("add one"), asking("fox " * 67)
    assert made.build_teacher_prompt(short, [long]) is not None and made.has_room(short)
    assert made.build_teacher_prompt(tight, [long]) is None and not made.has_room(tight)
    assert len(made.build_student_prompt(tight)) <= 100
    for words in range(1, 100):  # where there is a prompt it fits, and says something
        task = asking("fox " * words)
        prompt = made.build_teacher_prompt(task, [long])
        if prompt is not None:
            assert len(prompt.tokens) + 20 <= 120 and qwen().decode(prompt.tokens).count("fox") > words


def test_tasks_without_room_are_named_before_and_counted_in_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.py").write_text(ENV)
    changes = {"rollout__max_completion_length": 14, "rollout__prompts_per_step": 4, "run__max_steps": 2}
    assert vpd_train(tmp_path / "run", env__name=f"{tmp_path}/env.py:Long", **changes) == 0
    assert "1 of 5 known tasks ('t3', ...) leave no room for the teacher's context" in capsys.readouterr().out
    metrics = metrics_of(tmp_path / "run")
    assert [line["teacher/rows_without_room"] for line in metrics] == [4, 4]
    assert [line["teacher/rows_with_context"] for line in metrics] == [12, 12]


def test_a_finite_data_set_with_such_tasks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "env.py").write_text(ENV)
    changes = {"env__name": f"{tmp_path}/env.py:Finite", "rollout__max_completion_length": 14, "run__max_steps": 1}
    assert vpd_train(tmp_path / "run", **changes) == 2
    error = capsys.readouterr().err
    assert "2 of 8 tasks leave no room for the teacher's context" in error and "task 't3' + 14 completion" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    assert vpd_train(tmp_path / "run", algorithm__name="grpo", **changes) == 0
    require_room(prompter(qwen(), window=None), [asking("fox " * 900)])


# critics


def critics_prompt(made: Prompter, source: SelfCritique, rollout: Rollout) -> tuple[list[Any], list[Group]]:
    engine = ScriptedEngine(made.tokenizer, lambda prompt, key: "mind the fox")
    groups = source([Group(rollouts=(rollout,))], ModelWriter(engine, made, seed=0))
    return [prompt for prompt, _ in engine.asked], groups


def attempt(text: str, task: str) -> Rollout:
    completion = Completion(tokens=(1,), sampled=(True,), logprobs=(0.0,), text=text, finish="stop")
    return Rollout(
        key=keys(1)[0],
        task=asking(task),
        prompt=(1,),
        completion=completion,
        grade=Grade(reward=0.0, success=False, feedback="fox " * 30),
    )


@pytest.mark.parametrize(("task", "answer"), [("fox " * 200, "dog"), ("add", "fox " * 200), ("fox " * 90, "dog " * 90)])
def test_what_a_critic_reads_is_cut_until_it_fits(task: str, answer: str) -> None:
    made = prompter(qwen(), window=120)
    source = SelfCritique(template="{task} / {attempt} / {verdict} / {feedback}", max_critique_length=16)
    prompts, groups = critics_prompt(made, source, attempt(answer, task))
    assert 90 < len(prompts[0]) + 16 <= 120
    [section] = groups[0].rollouts[0].context
    assert section.text == "mind the fox" and section.cut > 60


def test_a_critics_template_that_never_fits_is_known_beforehand() -> None:
    made = prompter(qwen(), window=60)
    source = SelfCritique(template="{attempt}" + " fox" * 50, max_critique_length=16)
    with pytest.raises(ModelError, match=r"critic's prompt does not fit.*at most 60 together"):
        checked(made, "add", feedback=(source,))
    prompts, groups = critics_prompt(made, source, attempt("dog", "add"))
    assert not prompts and not groups[0].rollouts[0].context  # and never ends a run
    checked(made, "add", feedback=(SelfCritique(template="{attempt} {verdict}", max_critique_length=16),))


# the end of an answer


def ending(template: str, eos: str) -> Any:
    return byte_level(template, special="<|endoftext|> <|im_start|> <|im_end|> <|eot_id|> <end_of_turn>", eos_token=eos)


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [(llama3, "<|eot_id|>"), (qwen, "<|im_end|>"), (gemma, "<end_of_turn>"), (mistral, "</s>"), (bundled, "")],
)  # fmt: skip
def test_what_ends_an_answer_in_a_template(tokenizer: Callable[[], Any], end: str) -> None:
    made = prompter(tokenizer(), enable_thinking=True)
    assert made.tokenizer.decode(made.answer_end()[:1]) == end


def test_an_answer_ends_where_the_template_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    base = ending(QWEN, "<|endoftext|>")  # a base model that was given a chat template
    names = [base.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    with caplog.at_level(logging.WARNING):
        assert answer_ends(prompter(base), names[:1]) == tuple(sorted(names))
        assert "an answer ends with '<|im_end|>' in the chat template" in caplog.text
        caplog.clear()
        assert answer_ends(prompter(base), tuple(names)) == tuple(names)
        eot = ending(LLAMA3, "<|eot_id|>").eos_token_id
        assert answer_ends(prompter(ending("{{ messages[-1].content }}", "<|eot_id|>")), (eot,)) == (eot,)
        assert answer_ends(prompter(ending("{{ raise_exception('no') }}", "<|eot_id|>")), (eot,)) == (eot,)
        assert not caplog.text
        assert answer_ends(prompter(ending("{{ messages[0].content }}", "<|eot_id|>")), ()) == ()
        assert "names an end-of-sequence token" in caplog.text
