"""The benchmarks run, on the tiny model and small sizes; what they measure is not asserted.  ``make slow``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TRL_PYTHON = os.environ.get("TRL_PYTHON", "")


def bench(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, FOLDER / words[0], *words[1:]], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_floor_is_below_what_is_measured() -> None:
    lines = bench("floor.py", "--model", "tiny", "--shape", "smoke").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    ratios = {row[1]: float(row[4]) for row in cells if row[1] and "-" not in row[4]}
    assert set(ratios) == {"rollout", "scoring", "M-step", "E-step", "iteration, average"}
    assert all(ratio > 1 for ratio in ratios.values())


def test_memory_draws_its_pictures(tmp_path: Path) -> None:
    said = bench("memory.py", "--output", tmp_path, "--small", "--repeats", "1")
    assert "| 2,048 |" in said
    assert {path.name for path in tmp_path.iterdir()} == {"memory.png", "cost.png"}


def test_engine_and_generate_make_the_same_number_of_tokens() -> None:
    said = bench("sampling.py", "--model", "tiny", "--max_tokens", "20", "--repeats", "1")
    largest = float(said.strip().splitlines()[-1].split()[-1])
    assert "engine / generate" in said and largest < 1e-4


def test_overlap_is_compared_with_none_at_two_latencies() -> None:
    said = bench(
        "overlap.py", "--base", "tiny", "--steps", "4", "--prompts", "2", "--generations", "2", "--latency", "0.3"
    )
    rows = [line.split("|") for line in said.splitlines() if line.startswith("| 0.")]
    assert [row[1].strip() for row in rows] == ["0.00", "0.30"] and all(float(row[4]) > 0 for row in rows)


def test_every_layout_is_compared_on_the_same_failed_attempts() -> None:
    said = bench(
        "layouts.py",
        "--model",
        "tiny",
        "--env",
        "digits",
        "{name: digits, hint: empty}",
        "--tasks",
        "4",
        "--drift",
        "2",
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    header, *rows = rows
    assert [row[1] for row in rows] == 2 * ["block", "request", "system", "turn", "turn+"]
    assert len({row[2] for row in rows[:5]}) == len({row[-1] for row in rows[:5]}) == 1  # student, control
    assert all(float(row[header.index("style")].split()[0]) > 0 for row in rows)


@pytest.mark.skipif(not TRL_PYTHON, reason="set TRL_PYTHON to an interpreter that has trl")
@pytest.mark.parametrize("micro_batch_size", ["2", "4"])
def test_both_sides_of_the_comparison_do_the_same_work(tmp_path: Path, micro_batch_size: str) -> None:
    words = ["--model", "tiny", "--shape", "smoke", "--repeats", "1", "--trl_python", TRL_PYTHON]
    said = bench("vs_trl.py", *words, "--micro_batch_size", micro_batch_size, "--output", tmp_path)
    assert "VPD, average / TRL SDPO" in said
    assert bench("vs_trl.py", "--table", tmp_path / "vs_trl-smoke.json") == said
