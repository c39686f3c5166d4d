"""Every alarm: a history that raises it and one, as close as may be, that does not; and real runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import vpd_train

from vpd.monitor import REARM, RULES, START, Alarm, Monitor

CALM = {
    "reward": 0.4, "success": 0.4, "frac_reward_zero_std": 0.2, "completions/mean_length": 60.0,
    "teacher/rows_with_context": 8.0, "m_step/rows": 8.0, "m_step/loss": 0.02, "m_step/grad_norm": 0.5,
    "m_step/teacher_entropy": 1.0, "m_step/sampling_logp_difference": 1e-6, "m_step/sampler_mismatch": 0.002,
    "e_step/student_drift_kl": 0.01,
    "e_step/saturation": 0.0, "e_step/kind_predicts_success": 0.5, "e_step/grad_norm": 1.0, "e_step/loss": 1.3,
    "completions/quoted_run": 1.0, "m_step/entropy": 1.2, "completions/repetition": 0.1,
}  # fmt: skip
RETRIES = {
    "eval_teacher/accuracy": 0.3, "eval_teacher/student_accuracy": 0.3, "eval_teacher/gain_se": 0.1,
    "eval_teacher/tasks": 16.0,
}  # fmt: skip
TROUBLE: dict[str, tuple[int, dict[str, float], dict[str, float]]] = {
    # rule: after so many calm steps, this raises it, and this does not
    "teacher_no_better": (
        1,
        RETRIES | {"eval_teacher/gain": 0.0},
        RETRIES | {"eval_teacher/gain": 0.001},
    ),
    "teacher_entropy": (6, {"m_step/teacher_entropy": 1.7}, {"m_step/teacher_entropy": 1.5}),
    "student_drift": (1, {"e_step/student_drift_kl": 0.11}, {"e_step/student_drift_kl": 0.09}),
    "length_collapse": (6, {"completions/mean_length": 9.0}, {"completions/mean_length": 25.0}),
    "entropy_collapse": (6, {"m_step/entropy": 0.3}, {"m_step/entropy": 0.3, "success": 0.51}),
    "repetition": (6, {"completions/repetition": 0.41}, {"completions/repetition": 0.39}),
    "flat_reward": (0, {"frac_reward_zero_std": 1.0}, {"frac_reward_zero_std": 0.99}),
    "no_context": (0, {"teacher/rows_with_context": 0.0}, {"teacher/rows_with_context": 0.0, "success": 1.0}),
    "silent_critic": (0, {"feedback/self_critique_empty": 1.0}, {"feedback/critic_empty": 0.9}),
    "nothing_learned": (
        0,
        {"rows/trained": 0.0, "rows/drawn": 4.0, "rows/no_preference": 4.0, "preference/rows": 0.0},
        {"rows/trained": 2.0, "rows/drawn": 4.0, "rows/no_preference": 2.0, "preference/rows": 2.0},
    ),
    "e_step_saturated": (1, {"e_step/saturation": 0.6}, {"e_step/saturation": 0.4}),
    "kind_predicts_success": (1, {"e_step/kind_predicts_success": 0.7}, {"e_step/kind_predicts_success": 0.6}),
    "grader_failed": (1, {"env/grader_failed": 0.1}, {"env/grader_failed": 0.0}),
    "quotes_feedback": (6, {"completions/quoted_run": 3.1}, {"completions/quoted_run": 2.9}),
    "recorded_too_old": (
        0,
        {"recorded/staleness": 1.1, "recorded/effective_tokens": 1.0},
        {"recorded/staleness": 0.9, "recorded/effective_tokens": 0.6},
    ),
    "dead_gradient": (1, {"m_step/grad_norm": 1e-9}, {"m_step/grad_norm": 1e-9, "m_step/loss": 1e-6}),
    "stale_rollouts": (
        1,
        {"rollout/staleness": 1.0, "m_step/sampling_logp_difference": 0.05},
        {"rollout/staleness": 1.0, "m_step/sampling_logp_difference": 0.0},
    ),
    "sampler_drifts": (6, {"m_step/sampler_mismatch": 0.011}, {"m_step/sampler_mismatch": 0.009}),
    "sampler_differs": (1, {"m_step/sampling_logp_difference": 0.2}, {"m_step/sampling_logp_difference": 0.05}),
}


def raised(calm: int, then: dict[str, float], repeat: int = 20) -> list[Alarm]:
    told: list[Alarm] = []
    monitor = Monitor(told.append)
    for step, metrics in enumerate([CALM] * calm + [CALM | then] * repeat):
        monitor.on_step(step, metrics, [])
    assert told == monitor.alarms
    return told


def test_there_is_trouble_for_every_rule() -> None:
    assert set(TROUBLE) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", sorted(TROUBLE))
def test_an_alarm_is_raised_when_it_should_and_not_when_not(name: str) -> None:
    calm, trouble, nearly = TROUBLE[name]
    fired = raised(calm, trouble)
    assert [alarm.rule for alarm in fired] == [name]  # once, and no other
    assert fired[0].saw and fired[0].do.endswith(".")
    assert raised(calm, nearly) == []


@pytest.mark.parametrize(
    ("gain", "error", "tasks", "fires"),
    [
        (0.0, 0.0, 16, True), (0.0, 0.0, 15, False),  # never right, with feedback or without
        (-0.1, 0.1, 64, True), (-0.1, 0.11, 64, False),  # at .11 a gain of .2 would often not show
        (0.005, 0.004, 900, True), (0.005, 0.008, 900, False), (0.009, 0.004, 900, False),
    ],
)  # fmt: skip
def test_the_teacher_is_doubted_on_evidence_alone(gain: float, error: float, tasks: float, fires: bool) -> None:
    seen = {"eval_teacher/gain": gain, "eval_teacher/gain_se": error, "eval_teacher/tasks": tasks}
    assert [alarm.rule for alarm in raised(1, RETRIES | seen)] == ["teacher_no_better"] * fires
    assert raised(1, {name: value for name, value in (RETRIES | seen).items() if not name.endswith("gain")}) == []


#: ``m_step/entropy`` of SmolLM2-135M on `conventions`, no answer right: its answers end as "write itself itself itself"
COLLAPSED = [
    1.17, 1.37, 1.31, 1.12, 1.08, 1.12, 1.05, 1.04, 1.16, 1.17, 1.13, 1.02, 1.01, 0.86, 0.93, 0.91, 0.86, 0.95, 0.88,
    0.81, 0.84, 0.89, 0.93, 0.94, 0.64, 0.59, 0.5, 0.62, 0.49, 0.39, 0.59, 0.51, 0.49, 0.44, 0.25, 0.02,
]  # fmt: skip


@pytest.mark.parametrize(("success", "fires"), [(0.0, [35]), (0.6, [])])
def test_a_student_that_collapsed_is_noticed(success: float, fires: list[int]) -> None:
    monitor = Monitor(lambda alarm: None)
    for step, entropy in enumerate(COLLAPSED, 1):
        monitor.on_step(step, CALM | {"m_step/entropy": entropy, "success": success if step > START else 0.0}, [])
    assert [alarm.step for alarm in monitor.alarms if alarm.rule == "entropy_collapse"] == fires


def test_certain_answers_that_are_more_often_right_are_no_collapse() -> None:
    monitor = Monitor(lambda alarm: None)
    for step in range(20):
        learned = {"policy/entropy": 1.0 - 0.05 * step, "success": 0.02 + 0.02 * step}
        monitor.on_step(step, {k: v for k, v in CALM.items() if k != "m_step/entropy"} | learned, [])
    assert monitor.alarms == []


def test_a_sampler_with_older_weights_is_not_taken_for_a_wrong_one() -> None:
    apart = {"m_step/sampler_mismatch": 0.5, "m_step/sampling_logp_difference": 0.0}
    assert [alarm.rule for alarm in raised(6, apart)] == ["sampler_differs", "sampler_drifts"]
    assert raised(6, apart | {"rollout/staleness": 1.0}) == []


def test_a_method_that_has_no_teacher_is_not_told_about_it() -> None:
    told: list[Alarm] = []
    metrics = {k: v for k, v in CALM.items() if not k.startswith(("m_step", "e_step"))}
    Monitor(told.append).on_step(1, metrics | TROUBLE["teacher_no_better"][1], [])
    assert told == []


def test_a_teacher_that_was_overtaken_is_normal_in_gated_and_the_advice_fits_the_method() -> None:
    def said(first_gain: float, **now: float) -> list[str]:
        monitor = Monitor(lambda alarm: None)
        monitor.on_step(0, RETRIES | {"eval_teacher/gain": first_gain}, [])
        monitor.on_step(1, CALM | RETRIES | {"eval_teacher/gain": -0.1} | now, [])
        return [alarm.do for alarm in monitor.alarms]

    gated = {name: {"gate/trust": trust} for name, trust in (("full", 1.0), ("none", 0.0))}
    assert said(0.3, **gated["none"]) == []
    [overtaken] = said(0.3)
    assert "overtaken" in overtaken and "use algorithm.name gated" in overtaken
    for [advice] in (said(0.3, **gated["full"]), said(0.0, **gated["none"])):
        assert "use algorithm.name" not in advice
    [never] = said(0.0)
    assert "feedback" in never and "gated or grpo" in never and "overtaken" not in never


def test_what_is_measured_now_and_then_is_not_quiet_in_between() -> None:
    """A teacher that is no better in one evaluation after the other: one alarm, and after ten good ones another."""
    bad, good = RETRIES | {"eval_teacher/gain": 0.0}, RETRIES | {"eval_teacher/gain": 0.5}
    monitor = Monitor(lambda alarm: None)
    evaluations = [bad] * 3 + [good] * 10 + [bad] * 2
    for step in range(20 * len(evaluations)):
        measured = evaluations[step // 20] if step % 20 == 0 else {}
        monitor.on_step(step, CALM | measured, [])
    assert [(alarm.rule, alarm.step) for alarm in monitor.alarms] == [
        ("teacher_no_better", 0), ("teacher_no_better", 20 * 13)
    ]  # fmt: skip


def test_a_rule_fires_again_after_a_quiet_while(tmp_path: Path) -> None:
    monitor = Monitor(lambda alarm: None, folder=tmp_path)
    bad = CALM | {"e_step/saturation": 0.9}
    for step, metrics in enumerate([bad, bad, *[CALM] * 12, bad, CALM, bad]):
        monitor.on_step(step, metrics, [])
    assert [alarm.step for alarm in monitor.alarms] == [0, 14]
    kept = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rule"]) for line in kept] == [(0, "e_step_saturated"), (14, "e_step_saturated")]


@pytest.mark.parametrize(("quiet", "fires"), [(9, [0]), (10, [0, 11])])
def test_a_rule_fires_again_after_ten_looks_without_anything(quiet: int, fires: list[int]) -> None:
    monitor = Monitor(lambda alarm: None)
    bad = CALM | {"e_step/saturation": 0.9}
    for step, metrics in enumerate([bad, *[CALM] * quiet, bad]):
        monitor.on_step(step, metrics, [])
    assert REARM == 10 and [alarm.step for alarm in monitor.alarms] == fires


def test_a_teacher_that_needs_no_context_is_not_told_that_nothing_is_trained() -> None:
    """GKD's reads the task alone."""
    assert raised(0, {"teacher/rows_with_context": 0.0, "m_step/divergence": 0.3}) == []


def test_a_value_that_is_not_finite_is_no_part_of_the_beginning() -> None:
    monitor = Monitor(lambda alarm: None)
    lengths = [math.inf, *[60.0] * 6, 9.0, 9.0, 9.0]
    for step, length in enumerate(lengths):
        monitor.on_step(step, CALM | {"completions/mean_length": length}, [])
    assert [(alarm.rule, alarm.step) for alarm in monitor.alarms] == [("length_collapse", 9)]
    assert monitor.alarms[0].saw == "answers shrank from 60.0 to 9.0 tokens"


def test_a_continued_monitor_says_what_the_uninterrupted_one_says(tmp_path: Path) -> None:
    """D5: for every step at which the run may have been saved, killed later, and continued."""
    small, large = {"m_step/teacher_entropy": 1.0}, {"m_step/teacher_entropy": 2.0, "e_step/saturation": 0.9}
    metrics = [
        CALM | change for change in (small, small, large, small, small, small, *[large] * 4, *[small] * 12, large)
    ]
    whole = Monitor(lambda alarm: None, folder=tmp_path)
    for step, values in enumerate(metrics):
        whole.on_step(step, values, [])
    rules = [(alarm.step, alarm.rule) for alarm in whole.alarms]
    assert rules == [
        (2, "e_step_saturated"), (6, "teacher_entropy"), (22, "teacher_entropy"), (22, "e_step_saturated")
    ]  # fmt: skip
    for saved in range(0, len(metrics), 3):
        folder = tmp_path / str(saved)
        folder.mkdir()
        first, told = Monitor(lambda alarm: None, folder=folder), []
        for step, values in enumerate(metrics):
            first.on_step(step, values, [])
            if step == saved:
                state = json.loads(json.dumps(first.state()))
        (folder / "alarms.jsonl").write_text((folder / "alarms.jsonl").read_text()[:-20])  # killed while writing
        second = Monitor(told.append, folder=folder)
        second.restore(state)
        second.rewind(saved)
        for step, values in list(enumerate(metrics))[saved + 1 :]:
            second.on_step(step, values, [])
        assert second.alarms == whole.alarms and told == [alarm for alarm in whole.alarms if alarm.step > saved]
        assert (folder / "alarms.jsonl").read_text() == (tmp_path / "alarms.jsonl").read_text()


def test_a_monitor_that_is_set_back_forgets_what_came_after() -> None:
    monitor = Monitor(lambda alarm: None)
    for step, metrics in enumerate([CALM, CALM | {"e_step/saturation": 0.9}, CALM]):
        monitor.on_step(step, metrics, [])
    monitor.rewind(0)
    assert monitor.alarms == []
    monitor.on_step(1, CALM | {"e_step/saturation": 0.9}, [])
    assert [alarm.step for alarm in monitor.alarms] == [1]
    monitor.rewind(-1)
    assert monitor.state() == {"steps": [], "history": [], "fired": {"e_step_saturated": []}, "alarms": []}


def alarms_of(folder: Path) -> set[str]:
    path = folder / "alarms.jsonl"
    return {json.loads(line)["rule"] for line in path.read_text().splitlines()} if path.exists() else set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"env__hint": "verdict", "run__max_steps": 6}, {"no_context"}),
        ({"algorithm__name": "sft", "env__length": 12, "run__max_steps": 5}, {"nothing_learned"}),
        ({"optim__learning_rate": 0.05, "algorithm__e_every": 1}, {"student_drift"}),
        ({"algorithm__teacher_beta": 50.0, "run__max_steps": 1}, {"e_step_saturated"}),
        ({"algorithm__success_context": "own", "feedback": "[environment, sibling]", "run__max_steps": 1}, set()),
    ],
)
def test_real_runs(
    changes: dict[str, Any], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vpd_train(tmp_path / "run", **changes) == 0
    assert expected <= alarms_of(tmp_path / "run") and (expected or not alarms_of(tmp_path / "run"))
    assert all(rule in RULE_NAMES for rule in alarms_of(tmp_path / "run"))
    assert ("[alarm at step" in capsys.readouterr().out) == bool(expected)


RULE_NAMES = {rule.name for rule in RULES}
