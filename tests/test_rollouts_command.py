"""``vpd rollouts``: which rollouts are shown, what of them, and hostile text."""

import json
from pathlib import Path

import pytest
from report_runs import add_demonstration, write_run

from vpd.cli import main

HOSTILE = "\x1b]52;c;aGk=\x07 \u202egnp.exe [red]markup[/red]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", answer=f"wrong {HOSTILE}", feedback=f"Not so. {HOSTILE}")


def test_the_last_step_with_prompts_tokens_and_feedback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(folder), "--limit", "1"]) == 0
    text = capsys.readouterr().out
    assert "step 3, group 0, the student's attempt: failure, reward 0" in text
    assert "teacher read  <user>Spell a word." in text and "Feedback on an earlier, unsuccessful attempt:" in text
    assert "answer        wrong" in text and "nats in sum" in text and "grader wrote  Not so." in text
    assert "1 of 3 rollouts that pass, 3 in all, of step 3" in text
    assert "\x1b]52" not in text and "\u202e" not in text and "\\u202e" in text and "[red]markup[/red]" in text


def test_a_demonstration_has_no_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = add_demonstration(write_run(tmp_path / "run"), step=4)
    assert main(["rollouts", str(run)]) == 0
    text = capsys.readouterr().out
    assert "step 4, group 0, a demonstration: 6 tokens" in text and "failure" not in text and "reward" not in text
    assert main(["rollouts", str(run), "--outcome", "failure", "--json"]) == 0 and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "count"),
    [("--outcome failure", 2), ("--outcome success", 1), ("--role teacher", 0), ("--source none", 1), ("--recorded", 2),
     ("--task task/1", 0), ("--step 1 --task task/1", 3), ("--limit 0", 3)],
)  # fmt: skip
def test_only_what_is_wanted(options: str, count: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", str(folder), "--json", *options.split()]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == count
    assert all({"prompt", "teacher_prompt", "completion", "reward", "by_token"} <= set(line) for line in lines)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        ([str(folder), "--step", "9"], "step 9 has no rollouts; expected a step from 1 to 3"),
        ([str(folder), "--limit", "-1"], "--limit is negative"),
        ([str(tmp_path / "none")], "holds no run"),
    ):
        assert main(["rollouts", *words]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
