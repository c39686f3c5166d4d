"""The teacher's own attempts: who is asked again, with what, and what is learned from the answers."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import LetterTokenizer, RecordingEngine, ScriptedEnv, asking, in_turn, scripted_source
from helpers import TokenPrompter, flat, random_groups, tiny_learner, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.e_step import EStep
from vpd.algorithms.examples import student_logprobs, to_examples
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.retries import Imitation, to_retry_examples
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.config import parse
from vpd.errors import ConfigError
from vpd.feedback import GraderFeedback
from vpd.learners.teachers import TeacherSettings
from vpd.quoting import quoted_run
from vpd.report.rollout_metrics import rollout_metrics
from vpd.rollout import RolloutSettings, RolloutSource
from vpd.types import Completion, Grade, Group, Rollout, Section, Task

VOCABULARY = tiny_model().config.vocab_size


def with_retries(groups: Sequence[Group], seed: int = 0, count: int = 2) -> list[Group]:
    """The groups with random retries, some right and some wrong, of each failure that has a teacher's prompt."""
    draw = random.Random(seed)

    def retry(attempt: Rollout) -> Rollout:
        assert attempt.teacher_prompt is not None
        tokens = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 5)))
        completion = Completion(
            tokens=tokens,
            sampled=(True,) * len(tokens),
            logprobs=tuple(-1.0 - draw.random() for _ in tokens),
            text="",
            finish="stop",
        )
        success = draw.random() < 0.6
        return Rollout(
            key=dataclasses.replace(attempt.key, phase="retry"),
            task=attempt.task,
            prompt=attempt.teacher_prompt.tokens,
            completion=completion,
            grade=Grade(reward=float(success), success=success),
        )

    def extended(attempt: Rollout) -> Rollout:
        if attempt.success or attempt.teacher_prompt is None:
            return attempt
        return dataclasses.replace(attempt, retries=tuple(retry(attempt) for _ in range(count)))

    return [Group(rollouts=tuple(map(extended, group.rollouts))) for group in groups]


def graded(task: Task, text: str) -> Grade:
    right = text.startswith("right")
    return Grade(reward=float(right), feedback=None if right else f"not {text}")


class Questions(ScriptedEnv):
    """Two training tasks, ``a`` and ``b``, in turn."""

    def task(self, index: int, *, seed: int) -> Task:
        return dataclasses.replace(asking("ab"[index % 2]), id=f"{index}")


def source_with(engine: RecordingEngine, **settings: Any) -> RolloutSource:
    settings = {"prompts_per_step": 2, "num_generations": 2, "retries": 1} | settings
    return scripted_source(Questions(graded), engine, feedback=[GraderFeedback()], **settings)


SCRIPT = {
    "a": ["x", "right"],
    "b": ["y", "z"],
    "a<not x>": ["right a", "x2"],
    "b<not y>": ["y1", "right y"],
    "b<not z>": ["right z", "z2"],
}


def test_failures_are_attempted_again_from_the_teachers_prompt_and_successes_are_not() -> None:
    engine = RecordingEngine(in_turn(SCRIPT))
    groups, seconds = source_with(engine).take(0)
    a, b = groups
    assert [[r.completion.text for r in attempt.retries] for attempt in a.rollouts] == [["right a"], []]
    assert [[r.completion.text for r in attempt.retries] for attempt in b.rollouts] == [["y1"], ["right z"]]
    [retry] = a.rollouts[0].retries
    assert LetterTokenizer().decode(retry.prompt) == "[user]a<not x>[assistant]"
    assert retry.success and retry.key.phase == "retry" and retry.task.id == a.rollouts[0].task.id
    assert seconds["time/retries"] >= 0


def test_every_retry_has_a_key_of_its_own_and_the_same_one_again() -> None:
    def keys_of(**settings: Any) -> list[Any]:
        engine = RecordingEngine(in_turn(SCRIPT))
        source_with(engine, retries=2, **settings).take(3)
        return [sample.key for sample in engine.samples if sample.key.phase == "retry"]

    keys = keys_of()
    assert len(set(keys)) == len(keys) == 6 and keys == keys_of()
    assert {key.step for key in keys} == {3}
    assert len(keys_of(max_retries_per_task=1)) == 2


def test_without_the_setting_nothing_is_asked_again() -> None:
    engine = RecordingEngine(in_turn(SCRIPT))
    groups, seconds = source_with(engine, retries=0).take(0)
    assert all(not attempt.retries for group in groups for attempt in group.rollouts)
    assert {sample.key.phase for sample in engine.samples} == {"train"} and "time/retries" not in seconds


def test_a_retry_that_succeeds_becomes_its_groups_demonstration() -> None:
    engine = RecordingEngine(in_turn(SCRIPT))
    a, b = source_with(engine, retry_demonstrations=True).take(0)[0]

    def read(group: Group) -> list[str | None]:
        prompts = [attempt.teacher_prompt for attempt in group.rollouts]
        return [None if prompt is None else LetterTokenizer().decode(prompt.tokens) for prompt in prompts]

    assert read(a) == ["[user]a{right a>[assistant]", None]  # its own retry; a success needs none
    assert read(b) == ["[user]b{right z>[assistant]"] * 2  # the other attempt's retry, where its own failed
    assert [attempt.teacher_prompt.sources for attempt in b.rollouts if attempt.teacher_prompt] == [("retry",)] * 2
    # a retry keeps the prompt that it was sampled from
    [retry] = b.rollouts[1].retries
    assert LetterTokenizer().decode(retry.prompt) == "[user]b<not z>[assistant]"


def test_retries_are_shown_only_where_there_are_any() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.retry_demonstrations needs retries to show"):
        RolloutSettings(retry_demonstrations=True)


def test_a_retry_is_learned_from_under_the_students_prompt() -> None:
    [group] = with_retries(random_groups(0, groups=1))
    pairs = [(attempt, retry) for attempt in group.rollouts for retry in attempt.retries]
    for example, (attempt, retry) in zip(to_retry_examples([group]), pairs, strict=True):
        assert example.prompt == attempt.prompt and example.teacher == retry.prompt
        assert example.behaviour == retry.completion.logprobs and example.success == retry.success


def trained(settings: Any, groups: Sequence[Group], **changes: Any) -> torch.Tensor:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind="live"), **changes)
    Distill(settings, imitation=Imitation(settings, settings.importance_clip)).step(groups, learner)
    return flat(learner.model) - flat(tiny_model())


def sdpo(**changes: Any) -> SDPOSettings:
    return SDPOSettings(**{"teacher": "live", "distillation_weight": 0.0} | changes)


def scores(examples: Sequence[Any], measure: Any) -> list[list[float]]:
    return tiny_learner(tiny_model()).score(examples, measure)


def gradient_step(loss: Any) -> torch.Tensor:
    """What one step of SGD at 0.3 does for a loss of a plain model."""
    model = tiny_model()
    loss(model).backward()
    return torch.cat([
        -0.3 * (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in model.parameters()
    ])  # fmt: skip


def sequence_logits(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    tokens = torch.tensor([[*prompt, *completion]])
    logits: torch.Tensor = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)


def close(moved: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(expected.norm() > 1e-4 and (moved - expected).norm() < 1e-8 * expected.norm())


def test_cross_entropy_is_maximum_likelihood_of_what_succeeded() -> None:
    groups = with_retries(random_groups(0))
    retried = [group for group in groups if any(attempt.retries for attempt in group.rollouts)]
    rows = [(a.prompt, r.completion.tokens) for g in groups for a in g.rollouts for r in a.retries if r.success]
    own = [(a.prompt, a.completion.tokens) for g in retried for a in g.rollouts if a.success]
    assert rows and own

    def loss_of(chosen: Sequence[Any]) -> Any:
        def loss(model: Any) -> torch.Tensor:
            means = [-sequence_logits(model, p, c).gather(-1, torch.tensor(c)[:, None]).mean() for p, c in chosen]
            return torch.stack(means).mean()

        return loss

    assert close(trained(sdpo(retry_attempts=False), groups), gradient_step(loss_of(rows)))
    assert close(trained(sdpo(retry_attempts=True), groups), gradient_step(loss_of(rows + own)))
    assert close(trained(sdpo(retry_attempts=False, retry_weight=2.0), groups), 2 * gradient_step(loss_of(rows)))


def test_forward_kl_is_towards_the_teacher_who_reads_its_own_prompt() -> None:
    groups = with_retries(random_groups(0))
    rows = [
        (a.prompt, r.prompt, r.completion.tokens)
        for g in groups for a in g.rollouts for r in a.retries if r.success
    ]  # fmt: skip

    def loss(model: Any) -> torch.Tensor:
        values = []
        for prompt, told, tokens in rows:
            q = sequence_logits(tiny_model(), told, tokens).detach()
            values.append((q.exp() * (q - sequence_logits(model, prompt, tokens))).sum(-1).mean())
        return torch.stack(values).mean()

    assert close(trained(sdpo(retry_loss="forward_kl"), groups), gradient_step(loss))


def test_policy_gradient_has_the_advantage_of_the_group_with_its_retries_and_the_ratio_to_the_teacher() -> None:
    """Rewards 1, 0 and, of retries, 1, 1, 0: by hand, mean .6, standard deviation sqrt(.3)."""
    [group] = random_groups(0, groups=1, size=2)
    right, wrong = (
        dataclasses.replace(r, grade=Grade(reward=reward, success=bool(reward)))
        for r, reward in zip(group.rollouts, (1.0, 0.0), strict=True)
    )
    section = Section(kind="feedback", source="environment", text="1 2")
    [group] = TokenPrompter().attach([Group(rollouts=(right, dataclasses.replace(wrong, context=(section,))))])
    [group] = with_retries([group], count=3)
    failed = group.rollouts[1]
    retries = tuple(
        dataclasses.replace(r, grade=Grade(reward=reward, success=bool(reward)))
        for r, reward in zip(failed.retries, (1.0, 1.0, 0.0), strict=True)
    )
    group = Group(rollouts=(group.rollouts[0], dataclasses.replace(failed, retries=retries)))
    scale = 0.3**0.5 + 1e-4
    rows = [(right, 0.4 / scale, None), (wrong, -0.6 / scale, None)]
    rows += [(r, (r.grade.reward - 0.6) / scale, r.completion.logprobs) for r in retries]

    def loss(model: Any) -> torch.Tensor:
        values = []
        for row, advantage, log_q in rows:
            tokens = row.completion.tokens
            log_pi = sequence_logits(model, failed.prompt, tokens).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            ratio = (
                torch.ones_like(log_pi)
                if log_q is None
                else (log_pi.detach() - torch.tensor(log_q, dtype=torch.float64)).exp()
            )
            values.append((-ratio.clamp(max=2.0) * advantage * log_pi).mean())
        return torch.stack(values).mean()

    assert close(trained(sdpo(retry_loss="policy_gradient"), [group]), gradient_step(loss))


@pytest.mark.parametrize(("reference", "known"), [("own", False), ("sampler", True)])
def test_the_ratio_of_the_attempts_beside_retries_is_against_the_named_reference(reference: Any, known: bool) -> None:
    groups = with_retries(random_groups(0))
    rows = Imitation(sdpo(retry_loss="policy_gradient"), 2.0).examples(groups, to_examples(groups, reference))
    attempts = [row for row in rows if row.key is not None and row.key.phase == "train"]
    retries = [row for row in rows if row not in attempts]
    assert attempts and retries and all(row.reference == row.behaviour for row in retries)
    assert all(row.reference == (row.behaviour if known else None) for row in attempts)


@dataclasses.dataclass
class Watching:
    """A learner that keeps the rows of every update."""

    learner: Any
    updates: list[tuple[str, list[Any]]] = dataclasses.field(default_factory=list)

    def update(self, name: str, examples: Sequence[Any], objectives: Any, **options: Any) -> Any:
        self.updates.append((name, list(examples)))
        return self.learner.update(name, examples, objectives, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)


AFTER_A_STEP = {
    "vpd": lambda: VPD(VPDSettings(e_every=1, retry_loss="policy_gradient", e_step_rows="student"), TokenPrompter()),  # type: ignore[arg-type]
    "gated": lambda: GatedVPD(GatedSettings(e_every=1, retry_loss="policy_gradient"), TokenPrompter()),  # type: ignore[arg-type]
    "sdpo": lambda: sdpo(updates_per_batch=3, retry_loss="policy_gradient").build(TokenPrompter()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", AFTER_A_STEP)
def test_the_ratio_of_the_attempts_beside_retries_is_against_the_student_before_the_first_step(name: str) -> None:
    groups, learner = with_retries(random_groups(0)), Watching(tiny_learner(tiny_model(), teacher=TeacherSettings()))
    before = {
        e.key: tuple(row)
        for e, row in zip(to_examples(groups), scores(to_examples(groups), student_logprobs), strict=True)
    }
    AFTER_A_STEP[name]().step(groups, learner)
    rows = [
        row for update, rows in learner.updates if update == "m_step" for row in rows if "retry" in row.loss_weights
    ]
    attempts = [row for row in rows if row.key.phase == "train"]
    assert len(attempts) == sum(len(g.rollouts) for g in groups if any(r.retries for r in g.rollouts)) < len(rows)
    assert any(row.success for row in attempts)  # without a context, so that no other term needs its reference
    assert all(row.reference == pytest.approx(before[row.key], abs=1e-12) for row in attempts)
    assert all(row.reference == row.behaviour for row in rows if row.key.phase == "retry")


def test_both_terms_stand_in_one_update_and_none_without_retries() -> None:
    bare, groups = random_groups(0), with_retries(random_groups(0))
    both = trained(sdpo(distillation_weight=1.0), groups)
    alone = trained(sdpo(distillation_weight=1.0, retry_loss="none"), groups)
    assert close(both, alone + trained(sdpo(), groups))
    assert torch.equal(alone, trained(sdpo(distillation_weight=1.0), bare))
    assert not trained(sdpo(), bare).any()


def test_a_retry_that_quotes_its_feedback_is_left_out_and_counted() -> None:
    [group] = with_retries(random_groups(0, groups=1))
    failed = next(a for a in group.rollouts if a.retries)
    context = (Section(kind="feedback", source="environment", text="Bruna wants the word garden in every sentence."),)

    def saying(text: str) -> Rollout:
        completion = dataclasses.replace(failed.retries[0].completion, text=text)
        return dataclasses.replace(failed.retries[0], completion=completion, grade=Grade(reward=1.0, success=True))

    retries = (saying("Cats in the garden."), saying("Bruna wants the word garden in every sentence"))
    alone = dataclasses.replace(failed, context=context, retries=retries, comparisons=())
    group = Group(rollouts=(alone,))
    imitation = Imitation(sdpo(retry_max_quote=6), 2.0)
    assert len(imitation.examples([group], to_examples([group]))) == 1
    assert imitation.metrics([group]) == {"retries/left_out": 1.0}
    quoting = Imitation(sdpo(retry_max_quote=None), 2.0)
    assert len(quoting.examples([group], to_examples([group]))) == 2
    assert rollout_metrics([group])["retries/quoted_run"] == (1 + 8) / 2


def test_the_e_step_learns_from_the_teachers_samples_against_the_students_log_probs() -> None:
    groups = with_retries(random_groups(0))
    seen: list[list[Any]] = []

    class Watched(EStep):
        def _train(self, examples: Sequence[Any], learner: Any) -> Any:
            seen.append(list(examples))
            return super()._train(examples, learner)

    for rows in ("student", "teacher", "both"):
        learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind="live"))
        step = Watched(VPDSettings(teacher="live", e_step_rows=rows), TokenPrompter())  # type: ignore[arg-type]
        step.run(groups, to_examples(groups), learner)
    student, teacher, both = seen
    assert both == student + teacher and len(teacher) == len(to_retry_examples(groups))
    log_pi = scores([dataclasses.replace(e, reference=None) for e in teacher], student_logprobs)
    assert [list(e.reference) for e in teacher] == log_pi
    assert {e.success for e in teacher} == {True, False}
    bare = random_groups(0)
    for rows in ("teacher", "both"):  # without retries the student's attempts are all there is
        learner = tiny_learner(tiny_model(), teacher=TeacherSettings(kind="live"))
        step = Watched(VPDSettings(teacher="live", e_step_rows=rows), TokenPrompter())  # type: ignore[arg-type]
        step.run(bare, to_examples(bare), learner)
        assert len(seen.pop()) == len(to_examples(bare))


MAKE = {
    "vpd": lambda loss: VPD(VPDSettings(e_every=1, retry_loss=loss), TokenPrompter()),  # type: ignore[arg-type]
    "gated": lambda loss: GatedVPD(GatedSettings(e_every=1, retry_loss=loss), TokenPrompter()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "policy_gradient"])
def test_micro_batches_change_nothing_and_signals_are_those_of_the_attempts(name: str, loss: str) -> None:
    batches = [with_retries(random_groups(seed, groups=4), seed) for seed in range(2)]

    def run(size: int) -> torch.Tensor:
        learner, algorithm = tiny_learner(tiny_model(), micro_batch_size=size), MAKE[name](loss)
        for groups in batches:
            update = algorithm.step(groups, learner)
            learner.end_iteration()
            attempts = sum(len(group.rollouts) for group in groups)
            assert len(update.tokens["m_step/divergence"]) == attempts
            assert update.metrics["m_step/retry_loss"] != 0
        return flat(learner.model)

    whole, start = run(100), flat(tiny_model())
    assert all((run(size) - whole).norm() < 1e-10 * (whole - start).norm() for size in (1, 3))


words = st.lists(st.sampled_from("abcde"), max_size=8)


@given(words, words, words)
def test_a_quoted_run_is_the_longest_shared_run_that_the_task_does_not_hold(
    source: list[str], text: list[str], known: list[str]
) -> None:
    def runs(of: list[str]) -> set[tuple[str, ...]]:
        return {tuple(of[i:j]) for i in range(len(of)) for j in range(i + 1, len(of) + 1)}

    shared = (runs(source) & runs(text)) - runs(known)
    assert quoted_run(" ".join(source), ", ".join(text), known=" ".join(known)) == max(map(len, shared), default=0)


def test_a_method_that_does_not_learn_from_retries_refuses_them() -> None:
    data = {"rollout": {"retries": 1}, "feedback": ["environment"]}
    for name in ("sdpo", "vpd", "gated"):
        parse(data | {"algorithm": {"name": name}})
    for name in ("grpo", "hybrid"):
        with pytest.raises(ConfigError, match=r"does not learn from retries; got rollout.retries 1"):
            parse(data | {"algorithm": {"name": name}})
