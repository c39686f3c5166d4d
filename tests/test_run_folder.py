"""The run folder: what resume compares, phases, and a kill or a full disk at every write."""

import dataclasses
import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet as pq
import pytest
import yaml
from helpers import metrics_of, vpd_train
from transformers import AutoModelForCausalLM

from vpd.cli import main
from vpd.config import Config, parse
from vpd.envs.digits import Digits
from vpd.errors import StorageError
from vpd.prompts.settings import PromptSettings
from vpd.recipes.assemble import assemble
from vpd.recipes.train import run as run_parts
from vpd.recipes.train import train
from vpd.run_folder import state as run_state
from vpd.run_folder.contents import WHOLE, content_hash
from vpd.run_folder.files import FileSystem
from vpd.run_folder.lock import is_locked, locked
from vpd.run_folder.reading import read_run
from vpd.run_folder.tables import RunFolder
from vpd.types import Grade, Task

BASE = Path(__file__).parent / "fixtures" / "base"


def small(folder: Path, *, lora: bool = False, **run: object) -> Config:
    """Four steps of VPD on the smallest base, with evaluation, checkpoints and an alarm."""
    settings: dict[str, Any] = {
        "model": {"name_or_path": str(BASE), "lora": {"r": 2, "target_modules": "all-linear"} if lora else None},
        "rollout": {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6},
        "algorithm": {"name": "vpd", "e_every": 2, "teacher_beta": 1000.0},
        "optim": {"learning_rate": 0.05},
        "run": {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_limit": 16, "eval_samples": 1}
        | {"save_total_limit": 1, "output_dir": str(folder)}
        | run,
    }
    return parse(settings)


@dataclass(frozen=True)
class Left:
    """What a run has left behind, without times."""

    metrics: list[dict[str, float]]
    alarms: list[Any]
    rollouts: dict[str, Any]
    tokens: dict[str, Any]
    weights: dict[str, list[Any]]
    names: list[str]
    phase: tuple[str, int]


def left_by(folder: Path) -> Left:
    state = run_state.read(folder)
    assert state is not None
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    return Left(
        metrics=metrics_of(folder),
        alarms=[json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()],
        rollouts={p.name: pq.read_table(p).to_pylist() for p in sorted((folder / "rollouts").iterdir())},
        tokens={p.name: pq.read_table(p).to_pylist() for p in sorted((folder / "tokens").iterdir())},
        weights={name: tensor.tolist() for name, tensor in weights.items()},
        names=sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        phase=(state.phase, state.step),
    )


class Killed(BaseException):
    """The process is gone: nothing catches it."""


When: TypeAlias = Callable[[int, str, Path], bool]


@dataclass
class Interrupted(FileSystem):
    """The first operation for which ``when`` (number, operation, path) holds is done by half, and ``fail`` is raised.

    After a kill nothing works any more.
    """

    when: When
    fail: Callable[[], BaseException] = Killed
    dead: bool = False
    done: list[str] = field(default_factory=list)

    def _now(self, operation: str, path: Path) -> bool:
        if self.dead:
            raise Killed
        self.done.append(f"{operation} {path.name}")
        now = self.when(len(self.done), operation, path)
        self.dead = now and self.fail is Killed
        return now

    def write(self, path: Path, content: Any) -> None:
        if not self._now("write", path):
            return super().write(path, content)
        super().write(path, content)
        for number, file in enumerate(sorted(path.iterdir()) if path.is_dir() else [path]):
            if file.is_dir():
                continue
            if number % 2:
                file.unlink()
            else:
                os.truncate(file, file.stat().st_size // 2)
        raise self.fail()

    def append(self, path: Path, data: bytes) -> None:
        if self._now("append", path):
            if self.fail is Killed:
                super().append(path, data[: len(data) // 2])
            raise self.fail()
        super().append(path, data)

    def rename(self, source: Path, target: Path) -> None:
        if self._now("rename", target):
            raise self.fail()
        super().rename(source, target)

    def delete(self, path: Path) -> None:
        if path.exists() and self._now("delete", path):
            for file in sorted(path.iterdir())[::2] if path.is_dir() else []:
                super().delete(file)
            raise self.fail()
        super().delete(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The uninterrupted run."""
    return left_by(train(small(tmp_path_factory.mktemp("whole") / "run")))


def operations(folder: Path) -> list[str]:
    """Everything that the uninterrupted run does to the disk, in order."""
    files = Interrupted(number(0))
    run_parts(assemble(small(folder)), files=files)
    return files.done


COUNT = 44  # operations of the run of ``small``, checked below


def test_the_uninterrupted_run_is_as_expected(whole: Left, tmp_path: Path) -> None:
    assert [line["step"] for line in whole.metrics] == [0, 1, 2, 3, 4] and whole.phase == ("done", 4)
    assert [alarm["rule"] for alarm in whole.alarms] == ["teacher_no_better", "e_step_saturated"]
    assert "checkpoint-2" not in whole.names and "checkpoint-4/trainer.json" in whole.names
    assert not [name for name in whole.names if "vpd-" in name]
    done = operations(tmp_path / "run")
    assert len(done) == COUNT, "\n".join(f"{n} {operation}" for n, operation in enumerate(done, 1))


def killed_and_continued(folder: Path, at: int) -> list[str]:
    """The operations until the kill; the folder is then that of the continued run."""
    files = Interrupted(number(at))
    with pytest.raises(Killed):
        run_parts(assemble(small(folder)), files=files)
    train(small(folder, resume=True))
    return files.done


SOME = [3, 5, 9, 14, 17, 20, 24, 26, 33, 35, 39, 41, 43]


@pytest.mark.parametrize(
    "at", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in range(1, COUNT + 1)]
)
def test_a_kill_at_any_write_and_resume_is_the_uninterrupted_run(at: int, whole: Left, tmp_path: Path) -> None:
    done = killed_and_continued(tmp_path / "run", at)
    assert left_by(tmp_path / "run") == whole, done[-1]


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_kills_of_the_continued_run_too(seed: int, whole: Left, tmp_path: Path) -> None:
    draw, kills = random.Random(seed), 0
    for _ in range(8):
        resume = (tmp_path / "run").exists()
        try:
            run_parts(assemble(small(tmp_path / "run", resume=resume)), files=Interrupted(number(draw.randint(1, 20))))
        except Killed:
            kills += 1
    train(small(tmp_path / "run", resume=True))
    assert left_by(tmp_path / "run") == whole and kills


def number(at: int) -> When:
    return lambda number, operation, path: number == at


def renaming(name: str) -> When:
    return lambda number, operation, path: operation == "rename" and path.name == name


def full_disk() -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", [1, 3, 6, 8, 13, 24, 32])  # of the operations, writes and appends
def test_a_full_disk_is_one_line_and_costs_nothing(at: int, whole: Left, tmp_path: Path) -> None:
    files = Interrupted(number(at), fail=full_disk)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device\. Free space") as caught:
        run_parts(assemble(small(tmp_path / "run")), files=files)
    assert "\n" not in str(caught.value)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes() if (tmp_path / "run" / "metrics.jsonl").exists() else b""
    assert all("step" in json.loads(line) for line in lines.splitlines())
    train(small(tmp_path / "run", resume=True))
    assert left_by(tmp_path / "run") == whole


def test_rewind_keeps_whole_lines_up_to_a_step_and_nothing_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, good = tmp_path / "metrics.jsonl", b'{"step": 1}\n{"step": 2}\n'
    bad = b'null\n5\n{"a": 1}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
    path.write_bytes(bad + good + b'{"step": 3}\n{"step": 4')
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "tokens").mkdir()
    names = ["step-000002.parquet", "step-000003.parquet", "step-latest.parquet", "step-000003-mine.parquet"]
    for name in names:
        (tmp_path / "rollouts" / name).touch()
        (tmp_path / "tokens" / name).touch()
    RunFolder(tmp_path, None).rewind(2)
    assert path.read_bytes() == good and "dropped 5 lines" in caplog.text
    names.remove("step-000003.parquet")
    for folder in ("rollouts", "tokens"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == sorted(names)
    RunFolder(tmp_path, None).rewind(2)
    assert path.read_bytes() == good


@pytest.mark.parametrize("fail", [Killed, full_disk])
def test_an_interrupted_rewind_loses_nothing(fail: Callable[[], BaseException], tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"step": step}).encode() + b"\n" for step in range(100))
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    for at in (1, 2):
        with pytest.raises((Killed, StorageError)):
            RunFolder(tmp_path, None, files=Interrupted(number(at), fail=fail)).rewind(50)
        assert (tmp_path / "metrics.jsonl").read_bytes() == lines


SETTINGS = {"run__save_steps": 2, "run__max_steps": 2, "algorithm__name": "sdpo"}


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("vpd: error: ") and error.count("\n") == 1, error
    return error


def test_resume_names_every_changed_setting_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert vpd_train(run, **SETTINGS) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = SETTINGS | {"run__resume": "true", "run__max_steps": 4}
    assert vpd_train(run, **(more | {"algorithm__name": "vpd", "algorithm__e_every": 2})) == 2
    assert 'algorithm.name "sdpo" -> "vpd"' in refusal(capsys)
    changed = {"run__seed": 7, "optim__learning_rate": 0.5, "rollout__prompts_per_step": 3, "env__hint": "verdict"}
    assert vpd_train(run, **(more | changed), model__name_or_path="tiny-cold", feedback="[sibling]") == 2
    error = refusal(capsys)
    for told in ("run.seed 0 -> 7", "optim.learning_rate 0.001 -> 0.5", "rollout.prompts_per_step 4 -> 3"):
        assert told in error
    for told in ('env.hint "operation" -> "verdict"', 'model.name_or_path "tiny" -> "tiny-cold"', "feedback [", "link"):
        assert told in error
    assert "max_steps" not in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_may_change_is_told_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "old-place", **SETTINGS) == 0
    run = (tmp_path / "old-place").rename(tmp_path / "run")
    harmless = {"run__max_steps": 3, "run__save_steps": 1, "run__save_total_limit": 1, "run__eval_steps": 3}
    harmless |= {"optim__micro_batch_size": 2, "rollout__max_rows": 8, "optim__share_prefixes": "false"}
    capsys.readouterr()
    assert vpd_train(run, **(SETTINGS | harmless | {"run__resume": "true"})) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("changed for this run: "))
    for told in ("run.max_steps 2 -> 3", "run.save_steps 2 -> 1", "optim.micro_batch_size 128 -> 2", "run.output_dir"):
        assert told in line
    assert "run.resume" not in line and "seed" not in line and "continuing from" in out
    state = run_state.read(run)
    assert state is not None and (state.phase, state.step) == ("done", 3)
    assert state.settings["optim"]["micro_batch_size"] == 2


def test_a_damaged_run_json_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "run", **SETTINGS) == 0
    path = tmp_path / "run" / "run.json"
    for text in ("", "null", path.read_text().replace('"seed": 0', '"seed": 1')):
        path.write_text(text)
        assert vpd_train(tmp_path / "run", **SETTINGS, run__resume="true") == 2
        assert "run.json is damaged" in refusal(capsys)


def test_without_its_damaged_run_json_a_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command of the error."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert vpd_train(whole, **(SETTINGS | {"run__max_steps": 4})) == 0
    assert vpd_train(run, **SETTINGS) == 0
    (run / "run.json").write_text("{")
    assert vpd_train(run, **SETTINGS, run__resume="true") == 2
    command = refusal(capsys).split("remove it and run: vpd ")[1].strip()
    (run / "run.json").unlink()
    assert main([*command.split(), "--run.max_steps", "4"]) == 0
    assert f"{run} has no run.json: its settings are not compared with these" in capsys.readouterr().out
    assert metrics_of(run) == metrics_of(whole)
    assert read_run(run).phase == "done"


def test_a_finished_run_that_has_lost_run_json_and_has_no_checkpoint_is_not_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, settings = tmp_path / "run", SETTINGS | {"run__save_steps": 0}
    assert vpd_train(run, **settings) == 0
    (run / "run.json").unlink()
    before = content_of(run)
    capsys.readouterr()
    assert vpd_train(run, **settings, run__resume="true") == 2
    assert "is finished and has no checkpoint to continue from" in refusal(capsys)
    assert content_of(run) == before


def test_a_new_setting_of_a_later_version_is_at_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "run", **SETTINGS) == 0
    state = run_state.read(tmp_path / "run")
    assert state is not None
    for section, name in (("optim", "max_grad_norm"), ("env", "length"), ("algorithm", "importance_clip")):
        del state.settings[section][name]
    state.settings["run"]["no_longer_known"] = 3
    run_state.Recorder(folder=tmp_path / "run", files=FileSystem(), settings=state.settings).record("done", 2)
    more = SETTINGS | {"run__resume": "true", "run__max_steps": 3}
    assert vpd_train(tmp_path / "run", **more, optim__max_grad_norm=0.5) == 2
    assert "optim.max_grad_norm 1.0 -> 0.5" in refusal(capsys)
    assert vpd_train(tmp_path / "run", **more) == 0


def test_a_schedule_that_more_steps_stretch_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SETTINGS | {"optim__lr_scheduler_type": "linear", "run__max_steps": 2}
    assert vpd_train(tmp_path / "run", **settings) == 0 and "spreads over" not in capsys.readouterr().out
    assert vpd_train(tmp_path / "run", **(settings | {"run__max_steps": 4}), run__resume="true") == 0
    assert "linear spreads over all of run.max_steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("idle", "message"),
    [
        ({"optim__warmup_steps": 100}, "optim.warmup_steps 100 is beyond run.max_steps 1"),
        ({"optim__lr_scheduler_type": "constant", "optim__warmup_steps": 1}, "warmup_steps is idle"),
        ({"algorithm__name": "sdpo", "algorithm__updates_per_batch": 5}, "updates_per_batch 5 splits a batch by whole"),
    ],
)
def test_settings_without_their_effect_are_said(
    idle: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vpd_train(tmp_path / "run", **(SETTINGS | {"run__max_steps": 1} | idle)) == 0
    assert message in capsys.readouterr().out


def test_killed_before_the_model_was_written_resume_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D2."""
    run = tmp_path / "run"
    with pytest.raises(Killed):
        run_parts(assemble(small(run)), files=Interrupted(renaming("model")))
    state = run_state.read(run)
    assert state is not None and (state.phase, state.step) == ("exporting", 4) and not (run / "model").exists()
    train(small(run, resume=True))
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert "nothing to do" not in capsys.readouterr().out


def test_with_an_adapter_both_folders_are_written_again(tmp_path: Path) -> None:
    for name in ("adapter", "model"):
        run = tmp_path / name
        with pytest.raises(Killed):
            run_parts(assemble(small(run, lora=True)), files=Interrupted(renaming(name)))
        train(small(run, lora=True, resume=True))
        assert {"adapter", "model"} <= {path.name for path in run.iterdir()} and not list(run.rglob("*vpd-*"))
        assert (run / "model" / "vpd_prompts.json").exists()


def test_killed_before_the_first_checkpoint_step_0_is_there_once(tmp_path: Path) -> None:
    """D4."""
    run = tmp_path / "run"
    with pytest.raises(Killed):
        run_parts(assemble(small(run)), files=Interrupted(number(13)))
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()[:2]] == [0, 1]
    train(small(run, resume=True))
    assert [line["step"] for line in metrics_of(run)] == [0, 1, 2, 3, 4]


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, settings = tmp_path / "run", {"run__max_steps": 2, "run__save_steps": 0}
    assert vpd_train(run, **settings) == 0
    before = metrics_of(run), (run / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert vpd_train(run, **settings, run__resume="true") == 0
    assert "has trained 2 steps, run.max_steps is 2: nothing to do" in capsys.readouterr().out
    assert vpd_train(run, **(settings | {"run__max_steps": 4}), run__resume="true") == 2
    assert "is finished and has no checkpoint to continue from" in refusal(capsys)
    assert before == (metrics_of(run), (run / "model" / "model.safetensors").read_bytes())


def test_without_a_good_checkpoint_nothing_is_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert vpd_train(run, **SETTINGS) == 0
    (run / "checkpoint-2" / "state.pt").write_bytes(b"")
    before = content_of(run)
    assert vpd_train(run, **(SETTINGS | {"run__max_steps": 4}), run__resume="true") == 2
    assert "can be read; got checkpoint-2: state.pt has the wrong size. Restore one" in refusal(capsys)
    assert content_of(run) == before


def content_of(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def test_a_run_with_the_defaults_can_be_continued(tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "run") == 0
    first = metrics_of(tmp_path / "run")
    assert vpd_train(tmp_path / "run", run__resume="true", run__max_steps=5) == 0
    assert metrics_of(tmp_path / "run")[:4] == first and len(metrics_of(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    "name", ["config.yaml", "model", "adapter", "rollouts", "tokens", "metrics.jsonl", "alarms.jsonl"]
)
@pytest.mark.parametrize("resume", ["false", "true"])
def test_a_new_run_does_not_replace_what_a_user_put_there(
    name: str, resume: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    (run / name / "mine").write_text("mine")
    assert vpd_train(run, run__resume=resume) == 2
    assert f"holds what no run wrote and this one would replace; got {name}" in refusal(capsys)
    assert [path.name for path in run.rglob("*")] == [name, "mine"]
    (run / name).rename(run / "mine")
    (run / "notes.txt").write_text("mine")
    assert vpd_train(run, run__max_steps=1) == 0
    assert (run / "mine" / "mine").read_text() == "mine" == (run / "notes.txt").read_text()


def test_what_is_in_the_way_of_a_later_checkpoint_is_known_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert vpd_train(run, **SETTINGS) == 0
    (run / "checkpoint-4").write_text("mine")
    before = content_of(run)
    assert vpd_train(run, **(SETTINGS | {"run__max_steps": 4}), run__resume="true") == 2
    assert "checkpoint-4 is no checkpoint of vpd" in refusal(capsys)
    assert content_of(run) == before
    assert vpd_train(run, **(SETTINGS | {"run__max_steps": 3}), run__resume="true") == 0


def test_a_repair_does_not_reach_into_the_folders_of_others(tmp_path: Path) -> None:
    other = tmp_path / "other" / ".model.vpd-partial"
    other.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "previous").symlink_to(tmp_path / "other")
    train(small(tmp_path / "run", max_steps=1))
    assert other.is_dir()


def test_a_resume_starts_from_the_settings_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the file nor the flags of the first call are repeated."""
    run = tmp_path / "run"
    first = SETTINGS | {"optim__learning_rate": 0.01, "run__eval_steps": 1, "feedback": "[environment, sibling]"}
    assert vpd_train(run, **first) == 0
    state = run_state.read(run)
    assert main(["train", "--run.resume", "true", "--run.output_dir", str(run), "--run.max_steps", "3"]) == 0
    again = run_state.read(run)
    assert state is not None and again is not None and again.step == 3
    expected = {**state.settings["run"], "max_steps": 3, "resume": True}
    assert again.settings == {**state.settings, "run": expected}
    assert metrics_of(run)[-1]["learning_rate"] == 0.01 and "eval/accuracy" in metrics_of(run)[-1]
    capsys.readouterr()
    assert main(["train", "--run.resume=true", f"--run.output_dir={run}", "--optim.learning_rate", "0.5"]) == 2
    assert "got optim.learning_rate 0.01 -> 0.5. Set" in refusal(capsys)
    (tmp_path / "run.yaml").write_text("algorithm: {name: grpo}\n")
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--run.resume", "true", "--run.output_dir", str(run)]
    assert main(words) == 2
    assert 'got algorithm.name "sdpo" -> "grpo". Set' in refusal(capsys)


def test_a_run_is_not_continued_on_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    lines = [json.dumps({"prompt": f"apply rule A to 1 2 {n}"}) for n in range(10)]
    data.write_text("\n".join(lines))
    (tmp_path / "reward.py").write_text(
        "def length(completions, **columns):\n    return [len(c) for c in completions]\n"
    )
    dataset = {"env__name": "dataset", "env__path": data, "env__reward": f"{tmp_path}/reward.py:length"}
    assert vpd_train(run, **(SETTINGS | dataset | {"algorithm__name": "grpo", "env__eval_share": 0.3})) == 0
    more = ["train", "--run.resume", "true", "--run.max_steps", "3", "--run.output_dir", str(run)]
    data.write_text("\n".join(reversed(lines)))
    capsys.readouterr()
    assert main(more) == 2
    error = refusal(capsys)
    assert "content of env.path" in error and "delete its entry in 'contents' of run.json" in error
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"contents": {}}))
    assert main(more) == 0
    assert json.loads((run / "run.json").read_text())["contents"].keys() == {"env.path"}


def test_a_run_is_not_continued_on_another_base_of_the_same_name(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    config = small(tmp_path / "run", max_steps=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name_or_path=str(tmp_path / "base")))
    train(config)
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, max_steps=2, resume=True))
    with pytest.raises(StorageError, match=r"content of model.name_or_path"):
        train(more)


def test_of_a_large_file_pieces_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(WHOLE + 1)
    before = content_hash(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert content_hash(path) != before


def test_a_folder_is_held_once_even_within_a_process(tmp_path: Path) -> None:
    refused = pytest.raises(StorageError, match=rf"another process is training.*got process {os.getpid()} on")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_look_at_a_lock_does_not_keep_a_run_out(tmp_path: Path) -> None:
    """``vpd runs`` looks by taking the lock, shared, for a moment."""
    (tmp_path / ".lock").touch()
    descriptor = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    end = threading.Timer(0.08, os.close, [descriptor])
    end.start()
    with locked(tmp_path):
        end.join()
        assert is_locked(tmp_path)


@pytest.mark.timeout(30)
def test_a_line_is_not_appended_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl"):
        FileSystem().append_line(tmp_path / "metrics.jsonl", "{}")


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """The lock ends with its process, even where a child that was forked off lives on."""
    holder = """if True:
        import os, pathlib, sys
        from vpd.run_folder.lock import locked
        with locked(pathlib.Path(sys.argv[1])):
            if os.fork() == 0:
                print("held", flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="another process is training"):
            train(small(tmp_path))
        process.kill()
        process.wait()
        train(small(tmp_path, max_steps=1))


class Mine:
    """An environment that a user gives in Python."""

    def __init__(self, reward: float = 1.0):
        self.reward = reward

    def task(self, index: int, *, seed: int) -> Task:
        return Task(id=str(index), messages=({"role": "user", "content": "apply rule A to 1 2 3"},))

    def eval_tasks(self, limit: int | None) -> list[Task]:
        return [self.task(0, seed=0)]

    def grade(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Grade]:
        return [Grade(reward=self.reward, feedback="wrong", informative=True) for _ in texts]


def test_an_environment_given_in_python_is_what_config_yaml_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D20."""
    run = train(small(tmp_path / "run", max_steps=2), env=Mine(reward=0.0))
    assert yaml.safe_load((run / "config.yaml").read_text())["env"] == {"object": "test_run_folder.Mine"}
    with pytest.raises(StorageError, match=r"env.*test_run_folder\.Mine.*digits"):
        train(small(run, resume=True))
    train(small(run, resume=True), env=Mine(reward=0.0))
    assert [line["step"] for line in metrics_of(run)][-1] == 4
    other = train(small(tmp_path / "other", max_steps=2))
    with pytest.raises(StorageError, match=r"env.*digits.*test_run_folder\.Mine"):
        train(small(other, resume=True), env=Mine())
    shipped = train(small(tmp_path / "shipped", max_steps=1), env=Digits(length=4))
    assert yaml.safe_load((shipped / "config.yaml").read_text())["env"]["length"] == 4


def test_the_model_and_config_say_how_it_is_prompted(tmp_path: Path) -> None:
    """D10: evaluated by its folder alone, a trained model gives the numbers of the run's last evaluation."""
    assert vpd_train(tmp_path / "run", run__max_steps=1, run__save_steps=1, run__eval_steps=1) == 0
    prompts = json.loads((tmp_path / "run" / "model" / "vpd_prompts.json").read_text())
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["prompts"] == prompts
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "vpd_prompts.json").read_text()) == prompts
    assert prompts["feedback_header"] != PromptSettings().feedback_header
    numbers, model = tmp_path / "eval.json", str(tmp_path / "run" / "model")
    words = ["eval", "--model.name_or_path", model, "--num_samples", "2", "--limit", "8", "--output", str(numbers)]
    assert main([*words, "--teacher", "--rollout.max_completion_length", "6"]) == 0
    found, last = json.loads(numbers.read_text()), metrics_of(tmp_path / "run")[-1]
    assert found["student"]["avg@2"] == last["eval/avg@2"] and found["teacher"]["avg@2"] == last["eval_teacher/avg@2"]


def test_library_calls_print_nothing_but_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small(tmp_path / "run", max_steps=1))
    assert "Done" not in capsys.readouterr().out


def test_a_metric_that_is_no_number_is_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, None)
    folder.on_step(1, {"reward": 0.5, "a": float("nan"), "b": float("inf"), "c": float("-inf")}, [])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "reward": 0.5, "a": None, "b": None, "c": None}
    assert not {"NaN", "Infinity"} & set(line.replace(",", " ").replace(":", " ").split())
