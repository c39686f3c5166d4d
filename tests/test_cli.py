"""The command line: what its help says, what it does without arguments, and where its lines go."""

import dataclasses
import logging
import sys
from pathlib import Path

import pytest
import yaml
from helpers import metrics_of

from vpd.cli import SECTIONS, main
from vpd.config import SECTIONS as KNOWN
from vpd.config.sections import CHOICES, PLAIN, settings_class


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_an_exit_from_within_a_command_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vpd.cli._demo", lambda options, rest: sys.exit(0))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "vpd: error: something in the run called exit(0); it is not done\n"


def test_help_shows_every_setting_of_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("train", capsys)
    titled = {**PLAIN, "model.lora": "vpd.model.settings:LoraSettings"}
    for section, choice in CHOICES.items():
        assert f"--{choice.example}" in shown
        titled |= {f"{section} {name}": place for name, place in choice.table.items()}
    places = [shown.index(f" {title}: ") for title in titled]
    for (title, place), start in zip(titled.items(), places, strict=True):
        end = min([other for other in places if other > start], default=len(shown))
        for field in dataclasses.fields(settings_class(place)):
            assert field.name == "name" or f" {field.name} " in shown[start:end], f"{title}.{field.name}"


@pytest.mark.parametrize(
    "line",
    [
        "num_generations G: answers per task (at least 1) [8]",
        "shift_momentum share of the old reward shift delta that each E-step keeps (from 0.0 to below 1.0) [0.9]",
        "r rank (at least 1) [16]",
        "preset paper: 1 unless set (from 0.0 to 1.0) [0.5]",
        "algorithm.name: one of vpd, gated, sdpo, gkd, grpo, hybrid (default vpd).",
        "engine.name: one of embedded (default embedded).",
        "(where model.name_or_path is a shipped base such as tiny, the defaults are: learning_rate 0.0002",
        "half of what the longest known prompt leaves of the model's window",
    ],
)
def test_help_gives_meaning_range_and_default(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in help_of("train", capsys)


def test_help_of_check_is_about_environments_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("check", capsys)
    assert "env digits" in shown and "env.name my_env.py:MyEnv" in shown and "learning_rate" not in shown


@pytest.mark.parametrize("command", ["", "train", "eval", "check", "demo", "reproduce", "model"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: vpd" in help_of(command, capsys)


def test_the_command_line_knows_the_sections_of_the_file() -> None:
    assert SECTIONS == KNOWN


def test_train_without_arguments_trains_and_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--run.max_steps", "2"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Done: out/")
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["rollout"]["max_completion_length"] == 6 and config["optim"]["learning_rate"] == 2e-4
    assert config["prompts"]["feedback_header"] == " . feedback : "  # what the base was trained with


@pytest.mark.slow
def test_train_without_arguments_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    success = [step["success"] for step in metrics_of(tmp_path / "out")]
    assert max(success[:3]) < 0.1 and sum(success[-20:]) / 20 > 0.4


def test_what_the_library_logs_is_shown_once_and_the_logger_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("algorithm: {name: vpd, e_every: 2}\nmodel: {name_or_path: /nowhere}\n")
    logger = logging.getLogger("vpd")
    before = (logger.level, list(logger.handlers), logger.propagate)
    for _ in range(2):
        assert main(["train", "--config", str(tmp_path / "run.yaml"), "--algorithm.name", "grpo"]) == 2
        shown = capsys.readouterr()
        assert shown.out.count("grpo has no e_every, left out") == 1 and shown.err.count("\n") == 1
    assert (logger.level, list(logger.handlers), logger.propagate) == before


def test_eval_refuses_what_is_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--num_samples", "0"], "num_samples"),
        (["--top_p", "0"], "top_p"),
        (["--limit", "0"], "limit"),
    ):
        assert main(["eval", *words]) == 2
        assert f"{said} is out of range" in capsys.readouterr().err


def test_check_reads_no_other_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "digits", "--optim.learning_rate", "1"]) == 2
    assert "--optim.learning_rate is of no use here" in capsys.readouterr().err
