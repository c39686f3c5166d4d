"""The table of all methods: its cells by hand, and what is run for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vpd.cli import main
from vpd.lab.reproduce.method_table import column, jobs_of, markdown
from vpd.lab.reproduce.methods import COMPARED, METHODS, RATES
from vpd.lab.reproduce.run import Job
from vpd.lab.reproduce.settings_table import TINY


def run_of(method: str, rewards: list[float]) -> dict[str, Any]:
    curves = {"reward": list(enumerate(rewards)), "eval/accuracy": [(0, 0.0), (20, rewards[-1])]}
    return {"job": {"method": method}, "curves": curves}


def test_a_column_by_hand_marks_the_best_and_those_as_good() -> None:
    cells = {
        ("cold", "grpo"): [0.5, 0.7],  # .60 ± .10
        ("cold", "sdpo"): [0.4, 0.5],  # .45 ± .05: .15 below, within 2 * .112
        ("cold", "vpd"): [0.1, 0.1],
    }
    found = column(cells, "cold", ["grpo", "sdpo", "vpd", "gkd"])
    assert found == {"grpo": "**0.60 ± 0.10**", "sdpo": "**0.45 ± 0.05**", "vpd": "0.10 ± 0.00", "gkd": ""}
    assert column({("cold", "grpo"): [0.5], ("cold", "vpd"): [0.4]}, "cold", ["grpo", "vpd"]) == {
        "grpo": "**0.50**",
        "vpd": "0.40",
    }


def test_the_table_has_a_row_for_each_method_and_a_column_for_each_setting() -> None:
    low, high = [0.1] * 10, [0.1] * 10 + [0.3] * 10
    runs: Any = {
        ("cold", "grpo"): {0: run_of("grpo", low), 1: run_of("grpo", high)},
        ("rigid", "sdpo"): {0: run_of("sdpo", high), 1: run_of("sdpo", high)},
    }
    text = markdown(runs)
    final = text.partition("## Final")[2].partition("## Mean")[0]
    assert "| method | rigid | cold |" in final
    assert "| GRPO |  | **0.20 ± 0.10** |" in final
    assert "| SDPO (EMA teacher) | **0.30 ± 0.00** |  |" in final
    assert "2 seeds a cell" in text and "## Held out" in text


def test_answers_of_a_data_set_say_nothing_of_the_student() -> None:
    text = markdown(
        {("cold", "gkd_data"): {0: run_of("gkd_data", [1.0] * 10)}, ("cold", "gkd"): {0: run_of("gkd", [0.5] * 10)}}
    )
    final, held_out = text.partition("## Mean")[0], text.partition("## Held out")[2]
    assert "| GKD, right answers of the data |  |" in final and "| GKD (external expert) | **0.50** |" in final
    assert "| GKD, right answers of the data | " in held_out and "of the data |  |" not in held_out


def test_every_compared_method_is_planned_in_every_setting_where_it_has_a_rate() -> None:
    jobs, untuned = jobs_of((), (), range(3), RATES)
    assert len(jobs) == 3 * (len(COMPARED) * len(TINY) - len(untuned))
    assert set(COMPARED) <= set(METHODS) and len(set(COMPARED)) == len(COMPARED)


def test_a_cell_without_a_learning_rate_stays_empty_and_is_named(tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    rates.write_text(yaml.safe_dump({"rates": {"cold": {"grpo": {"learning_rate": 1e-3}}}}))
    jobs, untuned = jobs_of(("cold",), ("grpo", "plare"), range(1), rates)
    assert [(job.method, job.learning_rate) for job in jobs] == [("grpo", 1e-3)]
    assert untuned == ["plare in cold"]


def test_plare_learns_from_the_rewards_preferences_alone() -> None:
    data = Job(setting="sparse", method="plare", seed=0, learning_rate=1e-3).config_data()
    assert [source["name"] for source in data["feedback"]] == ["judge"] and data["feedback"][0]["judge"] == "reward"
    noisy = Job(setting="noisy", method="plare", seed=0, learning_rate=1e-3).config_data()
    assert noisy == data  # what the feedback says makes no difference to it
    given = Job(setting="sparse", method="gkd_data", seed=0, learning_rate=1e-3)
    assert given.config_data()["algorithm"]["other_answers"] == "data" and len(given.bases()) == 2


def test_the_command_refuses_an_unknown_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--methods", "grp", "--output_dir", str(tmp_path / "out")]) == 2
    assert "unknown method 'grp'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
