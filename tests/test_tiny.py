"""The tiny bases: the layout of prompts is part of a base's folder and goes with every copy of it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import metrics_of, vpd_train

from vpd.bundled import check_hashes, load_bundled
from vpd.cli import main
from vpd.lab import tiny
from vpd.prompts.settings import SETTINGS_FILE, saved_settings


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The shipped base under another name."""
    return Path(shutil.copytree(load_bundled("tiny"), tmp_path / "other-name"))


def prompts_of(run: Path) -> list[str]:
    rows = pq.read_table(run / "rollouts").to_pylist()
    return [row[name] for row in rows for name in ("prompt", "teacher_prompt") if row[name]]


def evaluated(model: str, folder: Path) -> dict[str, Any]:
    words = ["eval", "--model.name_or_path", model, "--env.name", "digits", "--rollout.max_completion_length", "6"]
    words += ["--num_samples", "2", "--limit", "64", "--teacher", "--output", str(folder / "eval.json")]
    assert main(words) == 0
    numbers: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return numbers


def test_training_from_a_copied_base_reads_the_same_prompts(copied: Path, tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "copied", model__name_or_path=copied, run__max_steps=2) == 0
    assert vpd_train(tmp_path / "shipped", run__max_steps=2) == 0
    prompts = prompts_of(tmp_path / "copied")
    assert any(" . feedback : " in prompt for prompt in prompts) and not any("<unk>" in prompt for prompt in prompts)
    assert prompts == prompts_of(tmp_path / "shipped")
    assert metrics_of(tmp_path / "copied") == metrics_of(tmp_path / "shipped")


def test_evaluating_a_copied_base_reads_the_same_prompts(copied: Path, tmp_path: Path) -> None:
    numbers = evaluated(str(copied), tmp_path)
    assert numbers == evaluated("tiny", tmp_path) and numbers["teacher"]["avg@2"] > numbers["student"]["avg@2"] + 0.05


def test_a_base_is_built_with_its_prompt_settings_and_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.BASES, "tiny", dataclasses.replace(tiny.BASES["tiny"], steps=(1, 1)))
    folder = tiny.build(tmp_path)
    assert saved_settings(folder) == tiny.TEMPLATE and SETTINGS_FILE in (folder / "SHA256").read_text()
    check_hashes(folder, "the base", "")


def test_a_folder_that_names_no_layout_was_trained_with_the_block() -> None:
    folder = load_bundled("tiny")
    assert "layout" not in json.loads((folder / SETTINGS_FILE).read_text())  # written before there was a choice
    assert saved_settings(folder) == tiny.TEMPLATE and tiny.TEMPLATE.layout == "block"
