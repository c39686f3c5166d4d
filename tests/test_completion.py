"""``vpd completion``: every command and setting is in the script, and the shells that are here complete with it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpd import cli
from vpd.cli import main
from vpd.commands import completion
from vpd.config import SECTIONS, parse

ASKED = [
    (["tr"], "train"),
    (["train", "--run.max_st"], "--run.max_steps"),
    (["train", "--algorithm.name", "sd"], "sdpo"),
    (["train", "--run.resume", "t"], "true"),
    (["model", "smol"], "smollm2-135m"),
    (["doctor", "--no_r"], "--no_run"),
    (["convert", "--from", "ve"], "verl"),
]
BASH = """
source {script}
COMP_WORDS=(vpd "$@"); COMP_CWORD=$#; _vpd; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
compdef() {{ }}
_files() {{ }}
compadd() {{ shift; for one in "$@"; do [[ "$one" == "${{words[CURRENT]}}"* ]] && print -r -- "$one"; done }}
source {script}
words=(vpd "$@"); CURRENT=$#words; _vpd
"""
FISH = """
source {script}
complete -C "vpd "(string join -- ' ' $argv) | string replace -r '\\t.*' ''
"""
PROGRAMS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def test_the_script_knows_the_commands_of_the_command_line() -> None:
    assert {command.NAME for command in completion.all_commands()} == {command.NAME for command in cli.COMMANDS}


def test_it_knows_every_setting() -> None:
    train = next(command for command in completion.all_commands() if command.NAME == "train")
    words = completion.words_of(train)
    settings = parse({}).as_dict()
    assert any(option.startswith("--dry_run.") for option in words.options)
    for section in set(SECTIONS) - {"feedback"}:
        for key in settings.get(section, {}):
            assert f"--{section}.{key}" in words.options
    assert {"grpo", "gated"} <= set(words.values["--algorithm.name"])
    assert set(words.values["--algorithm.teacher"]) == {"live", "ema", "frozen", "trust_region"}
    assert {"key", "operation"} <= set(words.values["--env.hint"])  # of all environments
    assert words.options["--run.max_steps"] == "iterations"


@pytest.mark.parametrize("shell", PROGRAMS)
def test_a_shell_completes(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "ask").write_text(PROGRAMS[shell].format(script=script))
    for words, wanted in ASKED:
        done = subprocess.run(
            [shell, str(tmp_path / "ask"), *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert wanted in done.stdout.split(), (words, done.stdout[:200], done.stderr)


def test_no_torch_is_loaded_for_it() -> None:
    code = "import sys; from vpd.cli import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
