"""Two processes over gloo train to the weights of one, with every algorithm."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALGORITHMS, tiny_model

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process and each of two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    found = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": found}
    script = str(HERE / "two_ranks.py")
    subprocess.run([sys.executable, script, str(folder / "one")], env=environment, check=True, timeout=200)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    subprocess.run([*launch, str(folder / "two")], env=environment, check=True, timeout=200)
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in ("one-0", "two-0", "two-1")]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_ranks_equal_one(name: str, runs: list[dict[str, Any]]) -> None:
    one, *ranks = (run[name] for run in runs)
    assert [run["world"] for run in runs] == [1, 2, 2]
    for two in ranks:
        assert (one["weights"] - two["weights"]).abs().max() < 1e-12
        for ours, theirs in zip(two["scores"], one["scores"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-12)
        for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-10)
        for ours, theirs in zip(two["tokens"], one["tokens"], strict=True):
            assert ours.keys() == theirs.keys() and ours
            for signal in ours:
                for mine, other in zip(ours[signal], theirs[signal], strict=True):
                    assert (mine is None) == (other is None)
                    assert mine is None or torch.allclose(mine, other, atol=1e-10, rtol=0)


@pytest.mark.timeout(400)
def test_gradients_of_bfloat16_weights_are_summed_over_ranks_in_fp32(runs: list[dict[str, Any]]) -> None:
    one, *ranks = (run["masters"] for run in runs)
    assert {value.dtype for value in one.values()} == {torch.float32}
    start = tiny_model(dtype=torch.bfloat16).state_dict()
    for two in ranks:
        for name, value in one.items():
            moved = (value - start[name].float()).norm()
            assert moved > 0 and (two[name] - value).norm() < 1e-3 * moved, name
