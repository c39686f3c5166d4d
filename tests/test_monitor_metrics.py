"""Every metric that an alarm reads is written by a real run: a renamed metric must not silence an alarm."""

import json
from pathlib import Path
from typing import Any

from helpers import metrics_of, vpd_train

from vpd.monitor import RULES

REWARD = """
def picky(completions, **columns):
    return [None if "7" in text else float(len(set(text))) for text in completions]
"""
VPD = {"algorithm__name": "vpd"}


class Asked(dict[str, float]):
    """Metrics that hold ``value`` under any name and keep the names that were asked for."""

    def __init__(self, value: float, names: set[str]):
        super().__init__()
        self.value, self.names = value, names

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return True

    def __getitem__(self, name: str) -> float:
        self.names.add(name)
        return self.value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


def names_that_rules_read() -> set[str]:
    names: set[str] = set()
    for value in (0.0, 0.01, 0.5, 1.0, 5.0):  # a rule that fires at once may not look at all
        for rule in RULES:
            rule.look([Asked(value, names) for _ in range(30)])
    return names


def test_a_rule_cannot_hide_the_names_that_it_reads() -> None:
    names = names_that_rules_read()
    assert {"reward", "success", "m_step/rows", "e_step/saturation", "policy/sampling_logp_difference"} <= names
    assert "eval_teacher/student_accuracy" in names and len(names) >= 18, sorted(names)


def test_every_metric_that_a_rule_reads_is_written_by_a_real_run(tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "vpd", **VPD, run__eval_steps=1, run__max_steps=1, rollout__retries=1) == 0
    (tmp_path / "rewards.py").write_text(REWARD)
    for name, rule in (("data", "A"), ("held_out", "B")):
        prompts = [json.dumps({"prompt": f"apply rule {rule} to {i} 2 3"}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(prompts))
    picky = {
        "env__name": "dataset", "env__path": tmp_path / "data.jsonl", "env__reward": f"{tmp_path}/rewards.py:picky",
        "env__max_failed": 1.0, "env__eval_path": tmp_path / "held_out.jsonl",
    }  # fmt: skip
    assert vpd_train(tmp_path / "grpo", algorithm__name="grpo", run__max_steps=1, **picky) == 0
    on_the_sampler: dict[str, Any] = {"algorithm__importance_reference": "sampler", "run__max_steps": 1}
    assert vpd_train(tmp_path / "vpd_sampler", **VPD, **on_the_sampler) == 0
    assert vpd_train(tmp_path / "grpo_sampler", algorithm__name="grpo", **(picky | on_the_sampler)) == 0
    answers = [
        {
            "prompt": f"apply rule A to {i} 2 3",
            "answer": "1 3 2",
            "feedback": "wrong : rule A means swap",
            "reward": 0.0,
        }
        for i in range(8)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, answers)))
    recorded = {"env__name": "recorded", "env__path": tmp_path / "log.jsonl", "algorithm__name": "sdpo"}
    assert vpd_train(tmp_path / "recorded", run__max_steps=1, **recorded) == 0
    runs = ("vpd", "grpo", "vpd_sampler", "grpo_sampler", "recorded")
    written = {name for run in runs for line in metrics_of(tmp_path / run) for name in line}
    assert names_that_rules_read() - written == set()
