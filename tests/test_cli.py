"""The command line: what its help says, what it does without arguments, and where its lines go."""

import dataclasses
import json
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import metrics_of
from report_runs import write_run

import vpd
from vpd.cli import COMMANDS, main
from vpd.commands import SECTIONS
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
    monkeypatch.setattr("vpd.commands.demo.run", lambda options, rest: sys.exit(0))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "vpd: error: something in the run called exit(0); it is not done\n"


def test_help_spells_values_as_a_configuration_does_and_no_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("train", capsys)
    assert "[false]" in shown and "[true]" in shown
    assert "kinds of convention that clients have, in turn ['word'] " in shown
    assert "where metrics go besides output_dir [] " in shown
    assert not any(word in shown for word in ("[False]", "[True]", "[()]", "',)", "Raises", "ConfigError"))


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
        "algorithm.name: one of vpd, gated, sdpo, gkd, grpo, hybrid, plare, sft, ldd (default gated).",
        "engine.name: one of embedded, vllm (default embedded).",
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
    done, following = capsys.readouterr().out.strip().splitlines()[-2:]
    assert done.startswith("Done: out/") and following == "To look at it: vpd report out"
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
        assert shown.out.count("dropped, as grpo has no such setting: e_every") == 1 and shown.err.count("\n") == 1
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


def run_python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


MISTYPED = [
    "train --help",
    "check --help",
    "train --optim.learning_rat 1",
    "train --algorithm.name gated --algorithm.e_evry 3",
    "train --algorithm.name spdo",
    "train --learning_rate 1",
    "train run.yaml",
    "eval --num_samples 0",
    "eval --nope",
    "eval --output .",
    "check nothing",
    "export nothing there",
    "replay nothing",
    "train --run.output_dir RUN",
    "--version",
]
WITHOUT_TORCH = """
import sys
from vpd.cli import main
for line in sys.argv[1:]:
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    assert code in (0, 2), line
    assert "torch" not in sys.modules, line
"""


def test_help_and_mistakes_are_shown_before_torch_is_loaded(tmp_path: Path) -> None:
    """Settings of a method, of the optimiser and of an engine load without it; else each takes seconds."""
    write_run(tmp_path / "run")
    done = run_python(WITHOUT_TORCH, *(line.replace("RUN", str(tmp_path / "run")) for line in MISTYPED))
    assert done.returncode == 0, done.stderr[-500:]


def test_the_version_is_told_and_the_package_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "vpd", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"vpd {vpd.__version__}\n" and done.returncode == 0


WITHOUT_READER = """
import sys
from vpd import cli
from vpd.commands import train
def work(options, rest):
    for number in range(100_000):
        print(number)
    open(rest[0], "w").write("done")
train.run = work
sys.exit(cli.main(["train", sys.argv[1]]))
"""


def test_the_work_goes_on_when_nobody_reads_the_output(tmp_path: Path) -> None:
    code, done = f"{shlex.quote(sys.executable)} -c {shlex.quote(WITHOUT_READER)}", tmp_path / "done"
    shell = subprocess.run(
        ["bash", "-c", f"{code} {done} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert (shell.returncode, shell.stdout, done.read_text()) == (0, "0\n", "done")
    assert shell.stderr == "vpd: the output reaches nobody any more (Broken pipe); the work goes on (Ctrl-C ends it)\n"


CLOSED = """
import sys
from vpd import cli
from vpd.commands import train
def work(options, rest):
    sys.stdout.close()
    sys.stderr.close()
    print("told")
    print("warned", file=sys.stderr)
train.run = work
sys.exit(cli.main(["train"]))
"""


def test_a_users_code_cannot_close_the_standard_streams() -> None:
    done = run_python(CLOSED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "warned\n")


def test_a_file_may_stand_behind_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text('{"prompt": "apply rule A to 1", "completion": "1"}\n' * 3)
    line = f"sft --run.max_steps 1 --run.output_dir {tmp_path}/out --rollout.num_generations=1 {tmp_path}/log.jsonl"
    assert main(line.split()) == 0 and (tmp_path / "out" / "model").is_dir()
    with pytest.raises(SystemExit):
        main(["collect", "--env.name", "digits"])
    assert "the following arguments are required: FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian --config x.yaml", "unknown command 'trian'. Did you mean 'train'?"),
        ("train --config no_such.yaml", "No such file or directory. Write one with vpd init"),
        ("train run.yaml", "Write --config run.yaml."),
        ("train optim.learning_rate=3", "Write --optim.learning_rate=3."),
        ("train --run.resume --run.seed 3", "--run.resume has no value"),
        ("train --conf x.yaml", "unexpected argument '--conf'"),
        ("collect log.jsonl --limit 4", "or an option that the command's --help names"),
        ("init --config x.yaml", "unexpected argument 'x.yaml'. Write --output x.yaml."),
        ("eval --output ${NO_SUCH}/x", "the environment has no variable NO_SUCH"),
    ],
)
def test_a_mistaken_line_is_answered_with_the_right_one(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_config_is_in_the_help_of_those_that_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = {command.NAME for command in COMMANDS if "--config" in help_of(command.NAME, capsys)}
    assert found == {"train", "sft", "collect", "eval", "solve", "serve", "check"}


def test_where_numbers_go_is_checked_first_and_they_are_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        assert main(["eval", "--output", str(path)]) == 2
        assert f"--output {path} cannot be written" in capsys.readouterr().err
    running = Path(shutil.copy(shutil.which("sleep") or "", tmp_path))
    process = subprocess.Popen([running, "60"])  # a file that permissions allow to write and the system does not
    try:
        assert main(["eval", "--output", str(running)]) == 2
        assert f"--output {running} cannot be written; got Text file busy" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    output = tmp_path / "new" / "folder" / "x.json"
    words = ["--limit", "1", "--num_samples", "1", "--teacher", "--output", str(output)]
    assert main(["eval", *words]) == 0
    numbers = json.loads(output.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert numbers["student"]["tasks"] == 1 and numbers["student"]["avg@1_se"] is None
    assert "nan" not in capsys.readouterr().out


def test_json_is_all_that_stdout_has(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for line, key in (
        ("eval --limit 1 --num_samples 1 --json", "student"),
        ("check digits --tasks 2 --json", "checks"),
    ):
        command = [sys.executable, "-m", "vpd", *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert key in json.loads(done.stdout)


def test_a_full_disk_under_the_log_does_not_end_the_work(tmp_path: Path) -> None:
    code, done = f"{shlex.quote(sys.executable)} -c {shlex.quote(WITHOUT_READER)}", tmp_path / "done"
    shell = subprocess.run(["bash", "-c", f"{code} {done} > /dev/full"], capture_output=True, text=True, check=False)
    assert (shell.returncode, done.read_text()) == (0, "done") and "(No space left on device)" in shell.stderr
