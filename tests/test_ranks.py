"""Two processes over gloo train to the weights of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(240)
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    found = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": found}
    script = str(HERE / "two_ranks.py")
    subprocess.run([sys.executable, script, str(tmp_path / "one")], env=environment, check=True, timeout=100)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    subprocess.run([*launch, str(tmp_path / "two")], env=environment, check=True, timeout=100)
    one = torch.load(tmp_path / "one-0.pt")
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two-{rank}.pt")
        assert (one["world"], two["world"]) == (1, 2)
        assert (one["weights"] - two["weights"]).abs().max() < 1e-12
        for ours, theirs in zip(two["scores"], one["scores"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-12)
        for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-10)
