"""Every metric that a run writes is in the table of metrics, every one of the table is written, and so is what an alarm
reads: a renamed metric must not silence an alarm."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fakes import chat_completion, endpoint
from helpers import vpd_train

from vpd.monitor import RULES
from vpd.report.console import COLUMNS
from vpd.report.html.charts import CHARTS, TIMES, TOKENS
from vpd.report.metric_table import Metric, find_metric, meaning_of, metrics

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
def picky(completions, **columns):
    return [None if "7" in text else float(len(set(text))) for text in completions]

def short(completions, **columns):
    return [float(len(text) < 6) for text in completions]
"""
ONE: dict[str, Any] = {"run__max_steps": 1}
ABLE: dict[str, Any] = ONE | {"model__name_or_path": "tiny-mid"}  # it succeeds and fails
SAMPLER = {"algorithm__importance_reference": "sampler"}
RUNS: dict[str, dict[str, Any]] = {
    "vpd": {
        "algorithm__name": "vpd", "run__eval_steps": 1, "rollout__retries": 1, **ONE,
        "feedback": "[environment, {name: self_critique, max_critique_length: 4}]",
    },
    "vpd_sampler": ABLE | SAMPLER | {"algorithm__name": "vpd"},
    "gated": ABLE | {"algorithm__name": "gated", "rollout__retries": 1, "rollout__prompts_per_step": 16},
    "hybrid": ABLE | {"algorithm__name": "hybrid", "feedback": "[environment, {name: critic, endpoint: 'ENDPOINT'}]"},
    "gkd": ONE | {"algorithm__name": "gkd", "algorithm__teacher_model": "tiny"},
    "plare": ABLE | {"algorithm__name": "plare", "feedback": "[{name: judge, judge: reward, use: both}]"},
    "sft": ABLE | {"algorithm__name": "sft"},
    "grpo": ABLE | {"algorithm__name": "grpo", "rollout__prompts_per_step": 16},
    "grpo_rewards": ONE | {
        "algorithm__name": "grpo", "env__max_failed": 1.0, "env__name": "dataset", "rollout__max_completion_length": 8,
    },
    "grpo_sampler": ONE | SAMPLER | {"algorithm__name": "grpo", "env__max_failed": 1.0, "env__name": "dataset"},
    "recorded": ONE | {"algorithm__name": "sdpo", "env__name": "recorded"},
    "ungraded": ONE | {"algorithm__name": "ldd", "env__name": "recorded"},
}  # fmt: skip
#: Metrics of the table that these runs do not write, and why.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("completions/mean_turns", "completions/env_token_share"), "replies: test_rollout_metrics.py"),
    **dict.fromkeys(("completions/reply_tokens_cut", "completions/reply_control_tokens_removed"), "long, odd replies"),
    **dict.fromkeys(("teacher/rows_without_room", "feedback/tokens_cut"), "texts that are too long"),
    **dict.fromkeys(("teacher/control_tokens_removed", "feedback/control_tokens_removed"), "hostile texts"),
    "teacher/unknown_tokens": "words that the vocabulary does not have",
    **dict.fromkeys(("rows/no_group", "rows/no_outcome", "rows/no_room", "rows/no_tokens"), "test_journal.py"),
    **dict.fromkeys(("rows/no_weight", "rows/unused"), "a method that drops rows: test_journal.py"),
    "e_step/skipped": "a step without contexts",
    **dict.fromkeys(("time/sync", "time/sync_write", "time/sync_send"), "a vLLM server: test_vllm_run.py"),
    **dict.fromkeys(("engine/canary_difference", "engine/canary_difference_mean"), "a vLLM server: test_vllm_run.py"),
    "time/teacher": "a teacher behind a server: test_vllm_teacher.py",
    "time/rollout_wait": "rollouts beside the update: test_overlap.py",
    "memory/peak_cuda_gib": "a GPU",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all metrics of all runs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rewards.py").write_text(REWARD)
    for name, rule in (("data", "A"), ("held_out", "B")):
        prompts = [json.dumps({"prompt": f"apply rule {rule} to {i} 2 3"}) for i in range(10)]
        (folder / f"{name}.jsonl").write_text("\n".join(prompts))
    for name, graded in (("recorded", {"reward": 0.0}), ("ungraded", {})):
        wrong = {"answer": "1 3 2", "feedback": "wrong : rule A means swap", **graded}
        answers = [{"prompt": f"apply rule A to {i} 2 3", **wrong} for i in range(7)]
        silent = {key: value for key, value in wrong.items() if key != "feedback"}
        answers.append({"prompt": "apply rule A to 9 2 3", **silent})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, answers)))
    for name, settings in RUNS.items():
        files: dict[str, Any] = {}
        if settings.get("env__name") == "dataset":
            both = f"[{folder}/rewards.py:picky, {folder}/rewards.py:short]"
            reward = both if name == "grpo_rewards" else f"{folder}/rewards.py:picky"
            files = {"env__path": folder / "data.jsonl", "env__eval_path": folder / "held_out.jsonl"}
            files["env__reward"] = reward
        elif settings.get("env__name") == "recorded":
            files = {"env__path": folder / f"{name}.jsonl", "rollout__prompts_per_step": 8}
        with endpoint(lambda body: (200, chat_completion("wrong"))) as (url, _):
            if "ENDPOINT" in settings.get("feedback", ""):
                files["feedback"] = settings["feedback"].replace("ENDPOINT", url)
            assert vpd_train(folder / name, **(settings | files)) == 0, name
    lines = [json.loads(line) for name in RUNS for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {name for line in lines for name in line}


def test_every_metric_that_is_written_is_described(written: set[str]) -> None:
    assert {name for name in written if find_metric(name) is None} == set()
    assert len(written) > 100


def test_every_metric_that_is_described_is_written(written: set[str]) -> None:
    found = {find_metric(name) for name in written}
    missing = {metric.name for metric in metrics() if metric not in found}
    assert missing == set(ELSEWHERE)
    source = "".join(p.read_text() for p in (ROOT / "src" / "vpd").rglob("*.py") if p.name != "metric_table.py")
    for name in ELSEWHERE:
        prefix, _, rest = name.partition("/")
        assert f'"{name}"' in source or (prefix in ("rows", "e_step") and f'"{rest}"' in source), name


@pytest.fixture
def metrics_page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that writes docs/metrics.md."""
    monkeypatch.syspath_prepend(str(ROOT / "website"))
    monkeypatch.delitem(sys.modules, "metrics_page", raising=False)
    return importlib.import_module("metrics_page")


def test_every_metric_that_an_alarm_reads_is_written(written: set[str], metrics_page: Any) -> None:
    read = {name for rule in RULES for name in metrics_page.names_read(rule)}
    assert {"reward", "success", "m_step/rows", "e_step/saturation", "policy/sampling_logp_difference"} <= read
    assert "eval_teacher/student_accuracy" in read and len(read) >= 18, sorted(read)
    assert read - written == set()


def test_what_is_shown_is_described() -> None:
    shown = [column.metric for column in COLUMNS] + [line.metric for chart in CHARTS for line in chart.lines]
    shown += [line.error for chart in CHARTS for line in chart.lines if line.error]
    shown += [name for name in (*TIMES, *TOKENS) if "/" in name]
    assert [name for name in shown if find_metric(name) is None] == []


def test_a_name_has_one_entry_and_an_exact_one_comes_first() -> None:
    names = [metric.name for metric in metrics()]
    assert len(names) == len(set(names)) and all(metric.meaning for metric in metrics())
    assert meaning_of("policy/loss") == "the policy gradient's loss" != meaning_of("m_step/loss")
    assert find_metric("m_step/distill_loss") == find_metric("m_step/retry_loss") != find_metric("m_step/loss")
    assert find_metric("eval_teacher/pass@16_se") == find_metric("eval/pass@2_se")
    assert find_metric("mine/loss") is None
    with pytest.raises(KeyError):
        meaning_of("mine/loss")


def test_the_page_is_made_from_the_table(metrics_page: Any) -> None:
    assert metrics_page.PAGE.read_text() == metrics_page.page(), "run python website/metrics_page.py"
    drift = find_metric("e_step/student_drift_kl")
    assert isinstance(drift, Metric) and metrics_page.alarms_of(drift) == ["student_drift"]
