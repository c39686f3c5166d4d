"""Recorded answers under methods that learn from samples: log-probs, effective sizes, and which rows join what."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALGORITHMS, TokenPrompter, flat, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train

from vpd import losses
from vpd.algorithms.contexts import e_step_contexts
from vpd.algorithms.distill import Distill, SDPOSettings
from vpd.algorithms.e_step import EStep
from vpd.algorithms.examples import choose_rows, student_logprobs, to_examples
from vpd.algorithms.grpo import group_advantages
from vpd.algorithms.off_policy import OffPolicy, staleness
from vpd.algorithms.vpd import VPDSettings
from vpd.config import parse
from vpd.envs.digits import Digits
from vpd.monitor import Monitor
from vpd.types import Example, Group, Rollout


def test_the_effective_share_by_hand() -> None:
    assert losses.effective_share(torch.zeros(5)).item() == pytest.approx(1.0)
    # weights 1, 1, 2: (1 + 1 + 2)^2 / (3 (1 + 1 + 4)) = 16 / 18
    assert losses.effective_share(torch.tensor([0.0, 0.0, math.log(2)])).item() == pytest.approx(16 / 18)
    assert losses.effective_share(torch.tensor([900.0, 0.0])).item() == pytest.approx(0.5)


def test_staleness_by_hand() -> None:
    rows = [
        Example(prompt=(1,), completion=(2, 3), mask=(True, True), behaviour=()),
        Example(prompt=(1,), completion=(2, 3), mask=(True, False), behaviour=()),
    ]
    before, now = [(-1.0, -1.0), (-1.0, -9.0)], [[-1.0, -1.0 + math.log(2)], [-1.0, 0.0]]
    found = staleness(rows, before, now)
    assert found["recorded/staleness"] == pytest.approx(math.log(2) / 3)
    assert found["recorded/effective_tokens"] == pytest.approx(16 / 18)
    assert found["recorded/effective_answers"] == pytest.approx(9 / 10)  # weights 2 and 1: 9 / (2 * 5)


def recorded(groups: list[Group], *, graded: bool = True, logprobs: bool = False) -> list[Group]:
    def one(r: Rollout) -> Rollout:
        completion = dataclasses.replace(
            r.completion, recorded=True, logprobs=r.completion.logprobs if logprobs else ()
        )
        grade = r.grade if graded else dataclasses.replace(r.grade, reward=0.0, success=False, graded=False)
        return dataclasses.replace(r, completion=completion, grade=grade)

    return [Group(rollouts=tuple(map(one, g.rollouts))) for g in groups]


def sdpo() -> Distill:
    return Distill(SDPOSettings(importance_reference="sampler", teacher="live"))


def learner_of(**changes: Any) -> Any:
    settings = SDPOSettings(teacher="live")
    return tiny_learner(tiny_model(), teacher=settings.teacher_settings(), keep_initial=True, **changes)


def test_the_m_step_is_weighted_by_the_truncated_ratio_to_the_initial_weights_as_in_plain_torch() -> None:
    ours, method = learner_of(micro_batch_size=2), OffPolicy(sdpo())
    theirs, initial = tiny_model(), tiny_model()
    for seed in range(3):
        groups = random_groups(seed)
        method.step(recorded(groups), ours)
        losses_of_rows = []
        for r in (r for g in groups for r in g.rollouts if r.teacher_prompt):

            def logits(model: Any, prompt: Any, tokens: Any = r.completion.tokens) -> torch.Tensor:
                whole = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
                return torch.log_softmax(whole[len(prompt) - 1 : -1], -1)

            tokens = torch.tensor(r.completion.tokens)[:, None]
            student, teacher = logits(theirs, r.prompt), logits(theirs, r.teacher_prompt.tokens).detach()
            then = logits(initial, r.prompt).detach().gather(1, tokens)[:, 0]
            ratio = (student.gather(1, tokens)[:, 0] - then).exp().detach().clamp(max=2.0)
            mixture = torch.log(0.5 * student.exp() + 0.5 * teacher.exp())
            divergence = 0.5 * (student.exp() * (student - mixture)).sum(-1)
            divergence = divergence + 0.5 * (teacher.exp() * (teacher - mixture)).sum(-1)
            losses_of_rows.append((ratio * divergence).mean())
        gradients = torch.autograd.grad(torch.stack(losses_of_rows).mean(), list(theirs.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
                parameter -= 0.3 * gradient
    moved = (flat(theirs) - flat(tiny_model())).norm()
    assert moved > 1e-3 and (flat(ours.model) - flat(theirs)).norm() / moved < 1e-9


def test_recorded_log_probs_win_over_the_initial_weights() -> None:
    groups = random_groups(0)
    own = learner_of().score(to_examples(groups), student_logprobs)
    kept = OffPolicy(sdpo()).step(recorded(groups, logprobs=True), learner_of()).metrics
    scored = OffPolicy(sdpo()).step(recorded(groups), learner_of()).metrics
    assert scored["recorded/staleness"] == pytest.approx(0.0, abs=1e-12)
    tokens = [value for row in own for value in row]
    assert kept["recorded/staleness"] == pytest.approx(sum(abs(v + 1.0) for v in tokens) / len(tokens))
    assert "recorded/staleness" not in OffPolicy(sdpo()).step(groups, learner_of()).metrics


@pytest.mark.parametrize("name", ["vpd", "gated", "sdpo", "grpo", "reshape"])
def test_any_micro_batch_gives_the_same(name: str) -> None:
    def run(size: int) -> torch.Tensor:
        learner = tiny_learner(tiny_model(), teacher=ALGORITHMS[name][1], keep_initial=True, micro_batch_size=size)
        method = OffPolicy(ALGORITHMS[name][0]())
        for seed in range(2):
            method.step(recorded(random_groups(seed, groups=2)) + random_groups(seed + 9, groups=1), learner)
            learner.end_iteration()
        return flat(learner.model)

    whole = run(100)
    assert (run(2) - whole).norm() / (whole - flat(tiny_model())).norm() < 1e-10


def test_rows_without_an_outcome_join_the_m_step_alone() -> None:
    groups = random_groups(3)
    nobody = recorded(groups, graded=False, logprobs=True)
    assert not any(r.context for g in e_step_contexts(nobody, "matched") for r in g.rollouts)
    assert set(group_advantages(nobody)) == {0.0}
    assert {e.left_out for e in choose_rows(to_examples(nobody), advantage=True)} == {"no_outcome"}
    settings = VPDSettings(teacher="live")
    e_step = EStep(settings, TokenPrompter())  # type: ignore[arg-type]
    learner = learner_of()
    _, update = e_step.run(nobody, to_examples(nobody), learner)
    assert update.metrics["e_step/rows"] == 0.0
    assert OffPolicy(sdpo()).step(nobody, learner).metrics["m_step/rows"] > 0

    mixed = [Group(rollouts=(*g.rollouts, *n.rollouts[1:])) for g, n in zip(groups, nobody, strict=True)]
    for plain, more in zip(groups, mixed, strict=True):
        count = len(plain.rollouts)
        assert group_advantages([more])[:count] == pytest.approx(group_advantages([plain]))
        ours, theirs = (e_step_contexts([g], "matched")[0].rollouts[:count] for g in (more, plain))
        assert [r.context for r in ours] == [r.context for r in theirs]


def test_an_alarm_says_when_the_log_is_too_old() -> None:
    def raised(**metrics: float) -> list[str]:
        monitor = Monitor(lambda alarm: None)
        monitor.on_step(1, {f"recorded/{name}": value for name, value in metrics.items()}, [])
        return [alarm.rule for alarm in monitor.alarms]

    assert raised(staleness=0.3, effective_tokens=0.9) == []
    assert raised(staleness=0.3, effective_tokens=0.4) == ["recorded_too_old"]
    assert raised(staleness=1.5, effective_tokens=0.9) == ["recorded_too_old"]


def test_the_sampler_is_the_reference_of_recorded_answers_unless_set() -> None:
    env = {"name": "recorded", "path": "log.jsonl"}
    assert parse({"env": env}).algorithm.importance_reference == "sampler"  # type: ignore[attr-defined]
    chosen = parse({"env": env, "algorithm": {"name": "vpd", "importance_reference": "own"}})
    assert chosen.algorithm.importance_reference == "own" and chosen.needs.initial_copy  # type: ignore[attr-defined]


def test_a_run_on_a_log_and_fresh_attempts_goes_on_where_it_was(tmp_path: Path) -> None:
    env, log = Digits(), tmp_path / "log.jsonl"
    tasks = [env.task(index, seed=5) for index in range(12)]
    rows = [
        {"messages": list(t.messages), "completion": "1 2 3 4 5 6", "feedback": env.grade([t], ["1"])[0].feedback}
        for t in tasks
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "env__name": "recorded", "env__path": log, "env__fresh": "{name: digits}", "env__fresh_share": 0.5,
        "run__eval_steps": 2, "run__save_steps": 2,
    }  # fmt: skip
    assert vpd_train(tmp_path / "whole", **settings) == 0
    whole = metrics_of(tmp_path / "whole")
    assert [line["recorded/rows"] for line in whole[1:]] == [2.0] * 4
    assert [line["recorded/rows_ungraded"] for line in whole[1:]] == [2.0] * 4
    assert [line["rows/drawn"] for line in whole[1:]] == [2 + 2 * 4] * 4 and "eval/accuracy" in whole[-1]
    assert whole[-1]["recorded/staleness"] > 0 and 0 < whole[-1]["recorded/effective_tokens"] <= 1
    assert vpd_train(tmp_path / "parts", **settings | {"run__max_steps": 2}) == 0
    assert vpd_train(tmp_path / "parts", **settings, run__resume="true") == 0
    assert metrics_of(tmp_path / "parts")[3:] == whole[3:]
