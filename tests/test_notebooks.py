"""The notebooks run from front to end, without a warning, and end with what they promise."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import vpd

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def executed(name: str, folder: Path) -> list[Any]:
    """The outputs of the code cells of a notebook that ran in ``folder``."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "commit notebooks without outputs"
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(Path(vpd.__file__).parent.parent)})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    warned = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not [text for text in warned if "TqdmWarning" not in text]  # without ipywidgets
    return outputs


def texts(outputs: list[Any]) -> str:
    return "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


def html(outputs: list[Any]) -> list[str]:
    return [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def test_every_notebook_has_a_test() -> None:
    tested = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in tested for path in FOLDER.glob("*.ipynb"))


@pytest.mark.timeout(240)
def test_first_run(tmp_path: Path) -> None:
    outputs = executed("first_run", tmp_path)
    assert "\x1b[2K" not in texts(outputs)  # no cursor moves
    assert "rule A means swap" in texts(outputs) and "apply rule A to" in texts(outputs)
    assert any("<svg" in page and "student" in page for page in html(outputs))
    assert (tmp_path / "first" / "model" / "README.md").is_file()


@pytest.mark.timeout(240)
def test_own_grader_and_feedback(tmp_path: Path) -> None:
    outputs = executed("own_grader_and_feedback", tmp_path)
    gains = [
        float(found) for found in re.findall(r"^the (?:count|rule) +gain ([+-][0-9.]+)", texts(outputs), re.MULTILINE)
    ]
    assert len(gains) == 2 and gains[1] > gains[0] + 0.05
    assert any("env/wrong_digits" in page for page in html(outputs))


@pytest.mark.timeout(240)
def test_comparing_methods(tmp_path: Path) -> None:
    outputs = executed("comparing_methods", tmp_path)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {"grpo", "sdpo", "vpd", "gated"} <= {path.name for path in tmp_path.iterdir()}
    assert any("time/update" in page for page in html(outputs))
