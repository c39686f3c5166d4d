"""GKD's teacher, a model of its own: what it reads, on which tokens it is compared, who answers for the student."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, serving
from helpers import metrics_of, vpd_train
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd import losses
from vpd.algorithms.examples import to_examples
from vpd.bundled import load_bundled
from vpd.config import parse
from vpd.engines.data_engine import DataEngine
from vpd.engines.vllm_client import VLLMClient
from vpd.engines.vllm_teacher import VLLMTeacher
from vpd.envs.digits import Digits
from vpd.errors import ConfigError, DataError, EngineError, ModelError
from vpd.recipes.assemble import Parts, assemble
from vpd.report.rollout_metrics import rollout_metrics
from vpd.types import Message, SampleKey, Task

OTHER_TEMPLATE = "{% for m in messages %}<user> rule {{ m.content }} {% endfor %}<assistant>"


def made(teacher: object, *, env: Any = None, **algorithm: object) -> Parts:
    section = {"name": "gkd", "teacher_model": str(teacher), **algorithm}
    data = {"model": {"name_or_path": "tiny-cold"}, "algorithm": section, "feedback": []}
    sizes = {"max_completion_length": 6, "prompts_per_step": 8, "num_generations": 2}
    return assemble(parse(data | {"rollout": sizes}), env=env)


def saved(folder: Path, *, rows: int = 0, template: str | None = None, base: str = "tiny-mid") -> Path:
    """A shipped base with a head of more ``rows``, which are likelier than any token, and another chat template."""
    model = AutoModelForCausalLM.from_pretrained(load_bundled(base))
    tokenizer = AutoTokenizer.from_pretrained(load_bundled(base))
    if rows:
        known = len(model.lm_head.weight)
        model.resize_token_embeddings(known + rows, mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[known:] = 3 * model.lm_head.weight[:known].abs().max()
    tokenizer.chat_template = template or tokenizer.chat_template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- the supervised share --------------------------------------------------------------------------------------------


def test_the_data_answers_the_rest_of_the_prompts() -> None:
    parts = made(load_bundled("tiny-mid"), student_fraction=0.5, other_answers="data")
    groups, _ = parts.source.take(0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    given = [rollout for rollout in rollouts if rollout.completion.by_data]
    assert 0 < len(given) < len(rollouts)
    assert all(r.success and r.completion.text == Digits().solution(r.task) for r in given)
    assert all(r.completion.tokens == tuple(parts.tokenizer.encode(r.completion.text)) for r in given)
    assert all(len({r.completion.by_data for r in group.rollouts}) == 1 for group in groups)
    metrics = parts.algorithm.step(groups, parts.learner).metrics
    assert metrics["m_step/rows"] == len(rollouts)
    assert metrics["m_step/sampling_logp_difference"] < 1e-4  # nobody sampled these: no sampler to compare with


def test_every_prompt_can_be_the_datas_and_evaluation_is_the_students() -> None:
    parts = made(load_bundled("tiny-mid"), student_fraction=0.0, other_answers="data")
    assert all(r.completion.by_data for group in parts.source.take(0)[0] for r in group.rollouts)
    key = SampleKey(phase="eval", step=0, task=0, sample=0)
    (group,) = parts.source.generate_groups([key], Digits().eval_tasks(1), parts.config.rollout.sampling, 2)
    assert not any(r.completion.by_data for r in group.rollouts)


def test_an_answer_ends_with_the_end_of_a_turn_and_is_cut_to_what_may_be_sampled() -> None:
    engine = DataEngine(lambda key: "a b c", lambda text: (1, 2, 3, 9))
    keys = [SampleKey(phase="train", step=0, task=0, sample=n) for n in range(2)]
    whole, cut = engine.generate([(5,), (5,)], keys=keys, seed=0, max_tokens=[4, 3], temperature=1.0)
    assert (whole.tokens, whole.finish) == ((1, 2, 3, 9), "stop")
    assert (cut.tokens, cut.finish, cut.logprobs) == ((1, 2, 3), "length", (0.0, 0.0, 0.0))


class Unsolved(Digits):
    def solution(self, task: Task) -> Any:
        return None


class Unsolvable:
    def __init__(self) -> None:
        self.inner = Digits()

    def task(self, index: int, *, seed: int) -> Task:
        return self.inner.task(index, seed=seed)

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self.inner.eval_tasks(limit)

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> Any:
        return self.inner.grade(tasks, texts)


@pytest.mark.parametrize("env", [Unsolved(), Unsolvable()])
def test_data_without_answers_is_refused_before_anything_is_trained(env: Any) -> None:
    with pytest.raises(DataError, match=r"the data has no answer to task .*env.solution_column"):
        made(load_bundled("tiny-mid"), env=env, student_fraction=0.5, other_answers="data")
    made(load_bundled("tiny-mid"), env=env, student_fraction=0.5)  # the teacher answers: no need of any


def test_rows_of_a_data_set_give_the_answers_from_the_command_line(tmp_path: Path) -> None:
    rows = [{"prompt": f"apply rule A to {n} 2 3 4 5 6", "answer": "1 2 3 4 5 6"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "env.name": "dataset",
        "env.path": tmp_path / "rows.jsonl",
        "env.reward": "vpd.envs.dataset:no_reward",
        "env.eval_share": 0,
        "algorithm.name": "gkd",
        "algorithm.teacher_model": "tiny",
        "algorithm.student_fraction": 0.0,
        "algorithm.other_answers": "data",
        "feedback": "[]",
        "run.max_steps": 1,
    }
    assert vpd_train(tmp_path / "none", **settings) == 2
    assert not (tmp_path / "none").exists()
    assert vpd_train(tmp_path / "out", **settings, env__solution_column="answer") == 0
    assert metrics_of(tmp_path / "out")[-1]["m_step/rows"] == 16


def test_the_sampled_estimate_is_of_the_students_answers() -> None:
    with pytest.raises(ConfigError, match="is an estimate on the student's own answers"):
        made(
            "tiny-mid",
            student_fraction=0.5,
            other_answers="data",
            distillation_estimator="sampled",
            distillation_alpha=1.0,
        )


# --- what the teacher reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["own", "student"])
def test_the_teacher_reads_the_task_as_its_own_chat_template_writes_it(choice: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", template=OTHER_TEMPLATE)
    parts = made(folder, teacher_chat_template=choice)
    groups, _ = parts.source.take(0)
    teacher = AutoTokenizer.from_pretrained(folder)
    for rollout in (r for group in groups for r in group.rollouts):
        own = tuple(teacher.apply_chat_template(list(rollout.task.messages), return_dict=False))
        assert own != rollout.prompt
        assert rollout.external_prompt == (own if choice == "own" else rollout.prompt)
    update = parts.algorithm.step(groups, parts.learner)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    first = groups[0].rollouts[0]
    tokens = torch.tensor([[*first.external_prompt, *first.completion.tokens]])
    logits_TV = model(tokens).logits[0, len(first.external_prompt) - 1 : -1]
    expected_T = losses.token_logprobs(logits_TV, torch.tensor(first.completion.tokens))
    student_T = torch.tensor(first.completion.logprobs)
    found = update.tokens["m_step/teacher_minus_student"][0]
    assert found is not None
    torch.testing.assert_close(found.float(), expected_T - student_T, atol=2e-4, rtol=0)


def test_feedback_is_not_what_an_external_teacher_reads(tmp_path: Path) -> None:
    for folder in (load_bundled("tiny-mid"), saved(tmp_path / "teacher", template=OTHER_TEMPLATE)):
        section = {"name": "gkd", "teacher_model": str(folder)}
        parts = assemble(parse({"model": {"name_or_path": "tiny-cold"}, "algorithm": section}))
        groups, _ = parts.source.take(0)
        assert any(r.context for group in groups for r in group.rollouts)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for rollout in (r for group in groups for r in group.rollouts):
            alone = tokenizer.apply_chat_template(
                list(rollout.task.messages), add_generation_prompt=True, return_dict=False
            )
            assert rollout.external_prompt == tuple(alone)


@pytest.mark.parametrize("template", ["own", "student"])
@pytest.mark.parametrize("teacher", ["the same template", "another"])
def test_no_context_is_counted_that_an_external_teacher_does_not_read(
    template: str, teacher: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "teacher", template=OTHER_TEMPLATE) if teacher == "another" else load_bundled("tiny-mid")
    section = {"name": "gkd", "teacher_model": str(folder), "teacher_chat_template": template}
    parts = assemble(parse({"model": {"name_or_path": "tiny-cold"}, "algorithm": section}))
    groups, _ = parts.source.take(0)
    assert any(r.context for group in groups for r in group.rollouts)
    metrics = rollout_metrics(groups)
    assert metrics["teacher/rows_with_context"] == metrics["teacher/tokens_cut"] == 0
    assert {name for name in metrics if name.startswith("teacher/")} == {
        "teacher/rows_with_context",
        "teacher/tokens_cut",
    }


class Replying(Digits):
    def respond(self, tasks: Sequence[Task], conversations: Sequence[Sequence[Message]]) -> list[Any]:
        return [None for _ in tasks]


def test_replies_in_the_students_template_and_a_teacher_of_another_do_not_go_together(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", template=OTHER_TEMPLATE)
    with pytest.raises(ConfigError, match=r"replies are written in the student's chat template.*Set it to student"):
        made(folder, env=Replying())
    made(folder, env=Replying(), teacher_chat_template="student")
    made(load_bundled("tiny-mid"), env=Replying())


# --- which tokens they are compared on -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_padding_of_the_teachers_head_is_cut_to_the_tokenizers_tokens(alpha: float, tmp_path: Path) -> None:
    def step(folder: Path) -> dict[str, float]:
        parts = made(folder, distillation_alpha=alpha)
        return parts.algorithm.step(parts.source.take(0)[0], parts.learner).metrics

    plain, padded = step(load_bundled("tiny-mid")), step(saved(tmp_path / "padded", rows=5))
    assert padded["m_step/loss"] == pytest.approx(plain["m_step/loss"], abs=1e-6)
    assert plain["m_step/loss"] > 1e-3


def test_heads_of_different_padding_are_compared_on_the_tokenizers_tokens(tmp_path: Path) -> None:
    student, teacher = saved(tmp_path / "student", rows=3, base="tiny-cold"), saved(tmp_path / "teacher", rows=5)
    section = {"name": "gkd", "teacher_model": str(teacher)}
    data = {"model": {"name_or_path": str(student)}, "algorithm": section, "feedback": []}
    parts = assemble(parse(data | {"rollout": {"max_completion_length": 6}}))
    ((external, _),) = parts.learner.teacher.mixture("teacher")
    assert len(external.get_output_embeddings().weight) == len(parts.tokenizer)


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"teacher and student need one tokenizer; got .*same family"):
        made(folder)


# --- behind a server -------------------------------------------------------------------------------------------------


def test_a_server_writes_the_prompt_with_its_own_template_and_scores_after_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "teacher", template=OTHER_TEMPLATE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    fake = FakeVLLM(
        model,
        window=512,
        development=False,
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        template=lambda messages: list(tokenizer.apply_chat_template(messages, return_dict=False)),
    )
    with serving(fake) as url:
        far = made("policy", teacher_url=url, distillation_topk=len(tokenizer))
        groups, _ = far.source.take(0)
        scored = [tuple(b["prompt"]) for b in fake.bodies("prompt_logprobs") if len(b["prompt"]) > 2]  # not the check
        fake.faults["/tokenize"] = [None, (400, "no chat template")]  # the check of the tokenizer, then
        with pytest.raises(EngineError, match=r"writes no prompt of messages.*teacher_chat_template to student"):
            made("policy", teacher_url=url, distillation_topk=4)
        fake.template = lambda messages: []
        with pytest.raises(EngineError, match=r"writes no prompt of messages.*got no tokens"):
            made("policy", teacher_url=url, distillation_topk=4)
    near = made(folder)
    rollouts = [r for group in groups for r in group.rollouts]
    assert sorted(scored) == sorted(r.external_prompt + r.completion.tokens for r in rollouts)
    assert all(r.external_prompt != r.prompt for r in rollouts)
    assert [e.teacher for e in to_examples(groups)] == [r.teacher_logprobs for r in rollouts]
    ours, theirs = (
        parts.algorithm.step(taken, parts.learner).metrics["m_step/loss"]
        for parts, taken in ((far, groups), (near, near.source.take(0)[0]))
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_what_a_server_says_of_its_padding_is_left_out() -> None:
    def teacher(k: int) -> VLLMTeacher:
        return VLLMTeacher(VLLMClient("http://127.0.0.1:1"), "policy", k, 1, vocabulary=4)

    place = {"9": {"logprob": -0.1}, "2": {"logprob": -3.0}, "1": {"logprob": -2.0}}
    answer = {"choices": [{"prompt_logprobs": [None, place]}]}
    assert teacher(2)._read(answer, 1, 2).ids == ((1, 2),)
