"""Checkpoints: whole or passed over, and only their own folders."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_learner, tiny_model

from vpd.api.arguments import read_arguments
from vpd.bundled import sha256
from vpd.config import load
from vpd.errors import StorageError
from vpd.recipes.resume import settings_of
from vpd.run_folder import checkpoint
from vpd.run_folder import state as run_state
from vpd.run_folder.files import FileSystem


def save(folder: Path, step: int, *, keep: int | None = None, tokenizer: str | None = None) -> Path:
    def save_tokenizer(folder: Path) -> None:
        if tokenizer is not None:
            (folder / tokenizer).write_text("{}")

    return checkpoint.save(
        folder,
        step,
        tiny_learner(tiny_model(step)),
        {"algorithm": {}, "observers": {}},
        save_rest=save_tokenizer,
        keep=keep,
        files=FileSystem(),
    )


def test_a_learner_comes_back_with_its_progress(tmp_path: Path) -> None:
    saved = save(tmp_path, 3)
    learner = tiny_learner(tiny_model(0))
    progress = checkpoint.load(saved, learner)
    assert (progress["step"], progress["algorithm"]) == (3, {})
    expected = tiny_model(3).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in learner.model.state_dict().items())


def test_only_its_own_folders_are_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in ("checkpoint-2-best", "checkpoint-40-lr1e-4", "checkpoint-²", "checkpoint-"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    save(tmp_path, 10, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-10"]
    assert (tmp_path / "checkpoint-2-best" / "state.pt").exists()


def test_the_limit_leaves_alone_what_vpd_has_not_written(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "disk", 2)
    (tmp_path / "checkpoint-2").symlink_to(elsewhere)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4").write_text("a note")
    shutil.copytree(elsewhere, tmp_path / "checkpoint-002")
    for step in (5, 6):
        save(tmp_path, step, keep=1)
    names = ["checkpoint-002", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6", "disk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert checkpoint.newest_good(tmp_path)[0] == tmp_path / "checkpoint-2"  # a link is read


@pytest.mark.parametrize("keep", [None, 0, -1])
def test_no_limit_keeps_all(keep: int | None, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=keep)
    assert len(checkpoint.checkpoints(tmp_path)) == 3


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / "state.pt").write_bytes(b"")
    save(tmp_path, 3, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert checkpoint.newest_good(tmp_path)[0] == tmp_path / "checkpoint-3"


def test_a_fifo_is_passed_over_and_does_not_hang(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    for name in ("trainer.json", "state.pt"):
        (bad / name).unlink()
        os.mkfifo(bad / name)
        assert checkpoint.newest_good(tmp_path)[0] == good
        shutil.copy(good / name, tmp_path / "copy")
        (bad / name).unlink()
        shutil.move(tmp_path / "copy", bad / name)


def test_any_changed_byte_of_trainer_json_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 4) / "trainer.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if json.loads(whole) != readable(path):
            assert checkpoint.newest_good(tmp_path)[0] is None, path.read_bytes()[place - 20 : place + 20]
    path.write_bytes(whole)
    assert checkpoint.newest_good(tmp_path)[0] == path.parent


def readable(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


class Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_is_passed_over_though_its_hash_fits(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    (bad / "state.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    data = json.loads((bad / "trainer.json").read_text())
    data["files"]["state.pt"] = [(bad / "state.pt").stat().st_size, sha256(bad / "state.pt")]
    del data["sha256"]
    (bad / "trainer.json").write_text(json.dumps(data | {"sha256": checkpoint._digest(data)}))
    found, faults = checkpoint.newest_good(tmp_path)
    assert found == good and faults[0].startswith("checkpoint-4: state.pt is no file of tensors (")
    assert "\n" not in faults[0] and not (tmp_path / "mark").exists()


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    saved = save(tmp_path, 2)
    other = tiny_learner(tiny_model(0), optimizer="adamw")
    torch.save({"something": torch.zeros(1)}, saved / "state.pt")
    with pytest.raises(StorageError, match="checkpoint-2 does not fit this run; got KeyError") as caught:
        checkpoint.load(saved, other)
    assert "\n" not in str(caught.value)


DAMAGE: dict[str, Any] = {
    "null": "null",
    "list": "[]",
    "number": "5",
    "no files": '{"step": 4, "files": null}',
    "empty files": '{"step": 4, "files": {}}',
    "file without a hash": '{"step": 4, "files": {"state.pt": null}}',
    "another step": '{"step": 5, "files": {"state.pt": [1, ""]}}',
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_trainer_json_is_passed_over(damage: str, tmp_path: Path) -> None:
    good = save(tmp_path, 2)
    text = DAMAGE[damage]
    (save(tmp_path, 4) / "trainer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    found, faults = checkpoint.newest_good(tmp_path)
    assert found == good and len(faults) == 1 and faults[0].startswith("checkpoint-4: ")


def test_swapped_and_missing_files_are_passed_over(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    (bad / "state.pt").unlink()
    (tmp_path / "checkpoint-6").write_text("a file")
    shutil.copytree(good, tmp_path / "checkpoint-8")
    found, faults = checkpoint.newest_good(tmp_path)
    assert found == good and [fault.split(":")[0][11:] for fault in faults] == ["8", "6", "4"]
    assert checkpoint.newest_good(tmp_path / "nowhere") == (None, [])


class Stop(BaseException):
    """The process is gone."""


class StopsAt(FileSystem):
    def __init__(self, at: int):
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop

    def write(self, path: Path, content: Any) -> None:
        self._count()
        super().write(path, content)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def delete(self, path: Path) -> None:
        if path.exists():
            self._count()
        super().delete(path)


def test_there_is_a_whole_folder_at_every_moment_of_replacing_one(tmp_path: Path) -> None:
    def fill(text: str) -> Any:
        return lambda folder: [(folder / name).write_text(text) for name in ("a", "b")]

    for at in range(5):
        target = tmp_path / str(at) / "model"
        FileSystem().write_folder(target, fill("old"))
        if at < 4:
            with pytest.raises(Stop):
                StopsAt(at).write_folder(target, fill("new"))
        else:
            StopsAt(at).write_folder(target, fill("new"))
        FileSystem().repair(target.parent)
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        texts = {path.read_text() for path in target.iterdir()}
        assert texts == {"old" if at < 3 else "new"} and len(list(target.iterdir())) == 2, at


def test_a_run_goes_on_with_its_own_method_whatever_the_default_is(tmp_path: Path) -> None:
    settings = settings_of(load(None, ["--algorithm.name", "vpd"]))
    run_state.Recorder(folder=tmp_path, files=FileSystem(), settings=settings).record("training", 1)
    run = {"output_dir": str(tmp_path), "resume": True}
    changes = ["--run.resume", "true", "--run.output_dir", run["output_dir"], "--algorithm.e_every", "3"]
    from_a_terminal = load(None, [str(word) for word in changes])
    more = {"run": run}
    options: dict[str, Any] = {"tokenizer": None, "algorithm": {"e_every": 3}, "feedback": None, "more": more}
    from_python = read_arguments(None, None, None, **options).config
    for config in (from_a_terminal, from_python):
        assert config.as_dict()["algorithm"]["name"] == "vpd" != load().method
        assert config.as_dict()["algorithm"]["e_every"] == 3


def of_step(folder: Path, step: int) -> None:
    listed = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(listed | {"step": step}))


def without_checksum(folder: Path) -> None:
    listed = json.loads((folder / "trainer.json").read_text())
    del listed["sha256"]
    (folder / "trainer.json").write_text(json.dumps(listed))


def unlisted(folder: Path, name: str) -> None:
    listed = json.loads((folder / "trainer.json").read_text())
    del listed["files"][name]
    (folder / "trainer.json").write_text(json.dumps(listed))


FAULTS: dict[str, Callable[[Path], Any]] = {
    "incomplete (no trainer.json)": lambda folder: (folder / "trainer.json").unlink(),
    "incomplete (KeyError: 'step')": lambda folder: (folder / "trainer.json").write_text("{}"),
    "trainer.json is of step 5": lambda folder: of_step(folder, 5),
    "trainer.json has changed": without_checksum,
    "trainer.json lists no state.pt": lambda folder: unlisted(folder, "state.pt"),
    "state.pt is missing": lambda folder: (folder / "state.pt").unlink(),
    "config.json has the wrong size": lambda folder: (folder / "config.json").write_text("{}"),
    "config.json has changed": lambda folder: (folder / "config.json").write_bytes(
        (folder / "config.json").read_bytes().swapcase()
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_why_a_checkpoint_is_passed_over_is_said(fault: str, tmp_path: Path) -> None:
    FAULTS[fault](save(tmp_path, 4))
    assert checkpoint.newest_good(tmp_path) == (None, [f"checkpoint-4: {fault}"])


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_the_tokenizer_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    saved = save(tmp_path, 4, tokenizer="tokenizer.json")
    assert checkpoint.newest_good(tmp_path) == (saved, [])
    (saved / "tokenizer.json").unlink()
    assert checkpoint.newest_good(tmp_path) == (None, ["checkpoint-4: tokenizer.json is missing"])


def test_a_model_that_cannot_be_written_is_an_error_that_names_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "file" / "model"
    folder.parent.write_text("not a folder")
    with pytest.raises(StorageError, match=f"^cannot write {re.escape(str(folder))}; got "):
        checkpoint.save_model(tiny_model(0), None, folder)
