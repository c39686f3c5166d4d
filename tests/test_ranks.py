"""Two processes over gloo train to the weights of one, with every algorithm, whole weights on each or in shards.

All small runs are made by three launches of tests/two_ranks.py, and judged by the files that these leave.
"""

import json
import random
import re
import signal
import time
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, serving
from helpers import norm_in_its_own_precision, tiny_model
from launching import Launch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vpd.config.sections import ALGORITHMS
from vpd.lab import tiny
from vpd.model.settings import ModelSettings
from vpd.recipes.assemble import load_model

HERE = Path(__file__).resolve().parent
SCRIPT = str(HERE / "two_ranks.py")
SHARDINGS = ("none", "fsdp2")
CASES = (
    "vpd", "vpd, epochs", "vpd, retries", "vpd, critique", "vpd, uneven", "vpd, lora", "vpd, server", "gated",
    "gated, uneven", "sdpo", "sdpo, lora", "sdpo, lora, server", "sdpo, trust region", "grpo", "grpo, uneven", "gkd",
    "gkd, data", "plare", "hybrid", "hybrid, reweight", "sft", "ldd", "vpd, tied",
    "vpd, recorded", "sdpo, recorded",
)  # fmt: skip
OWN = ("time/", "memory/", "e_step/padding", "m_step/padding", "policy/padding")  # of each rank's own micro-batches
pytestmark = pytest.mark.timeout(600)


class Runs:
    """What one process and each of two wrote, and the folders that they trained in."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.one, *self.two = (
            torch.load(folder / f"{name}.pt", weights_only=False) for name in ("one-0", "two-0", "two-1")
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    write_material(folder)
    launches = (("one", 1, "all", 250), ("two", 2, "all", 300), ("again", 1, "resume", 150))
    with serving(exact_server()) as whole, serving(exact_server()) as adapters:
        for name, world, part, deadline in launches:
            program = [SCRIPT, str(folder), name, part, *SHARDINGS]
            Launch(program, world, folder, VLLM_URL=whole, VLLM_LORA_URL=adapters).end(deadline)
    found = Runs(folder)
    assert [made.get("error") for made in (found.one, *found.two)] == [None, None, None]
    assert [made["world"] for made in (found.one, *found.two)] == [1, 2, 2]
    return found


def write_material(folder: Path) -> None:
    """Another teacher and a log of answers, which some of the cases read."""
    model, tokenizer = load_model(ModelSettings(name_or_path="tiny", dtype="float64"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    write_log(folder / "log.jsonl")


def write_log(path: Path) -> None:
    """Recorded answers to 5 questions, 1 to 4 of each: with and without outcomes, text, tokens and log-probs."""
    draw, tokenizer = random.Random(0), tiny.make_tokenizer()
    with path.open("w") as file:
        for number, question in enumerate([0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4]):
            digits = " ".join(str((question + place) % 10) for place in range(4))
            answer = " ".join(draw.choices("0123456789", k=4))
            row: dict[str, Any] = {"prompt": f"apply rule A to {digits}", "completion": answer}
            if number % 4:
                row |= {"feedback": "wrong : rule A means swap"}
            if number % 3:
                row |= {"reward": number % 2, "success": bool(number % 2)}
            if number % 5 == 0:
                tokens = tokenizer.encode(answer, add_special_tokens=False)
                row |= {"tokens": tokens, "logprobs": [-draw.random() - 0.5 for _ in tokens]}
            file.write(json.dumps(row) + "\n")


def exact_server() -> FakeVLLM:
    """A server that computes as the runs do."""
    model, _ = load_model(ModelSettings(name_or_path="tiny", dtype="float64"))
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(norm_in_its_own_precision, module)
    return FakeVLLM(model, window=512)


def test_there_is_a_case_for_every_algorithm() -> None:
    assert {name.split(",")[0] for name in CASES} == set(ALGORITHMS)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_to_the_weights_of_one(name: str, sharding: str, runs: Runs) -> None:
    one = runs.one["none"][name]
    moved = (one["weights"] - one["start"]).norm()
    assert moved > 1e-3
    for two in (made[sharding][name] for made in runs.two):
        assert (two["weights"] - one["weights"]).norm() / moved < 1e-12
        assert (two["average"] - one["average"]).norm() / moved < 1e-12
        assert two["policy"].keys() == one["policy"].keys()
        for key, value in one["policy"].items():
            assert torch.allclose(two["policy"][key], value, rtol=0, atol=1e-11), key
    assert runs.two[0][sharding][name]["rollouts"] == one["rollouts"]
    for ours, theirs in zip(runs.two[0][sharding][name]["metrics"], one["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if not key.startswith(OWN):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-10, nan_ok=True), key


@pytest.mark.parametrize("name", CASES)
def test_one_process_in_shards_is_one_process(name: str, runs: Runs) -> None:
    plain, shards = runs.one["none"][name], runs.one["fsdp2"][name]
    assert (shards["weights"] - plain["weights"]).norm() / (plain["weights"] - plain["start"]).norm() < 1e-12


def test_both_ranks_hold_the_same_weights_and_only_the_first_has_observers(runs: Runs) -> None:
    for sharding in SHARDINGS:
        for name in CASES:
            first, second = (made[sharding][name] for made in runs.two)
            assert torch.equal(first["weights"], second["weights"])
            assert first["metrics"] and not second["metrics"]


def test_gradients_of_bfloat16_weights_are_summed_over_ranks_in_fp32(runs: Runs) -> None:
    one, *ranks = (made["none"]["masters"] for made in (runs.one, *runs.two))
    assert {value.dtype for value in one.values()} == {torch.float32}
    start = tiny_model(dtype=torch.bfloat16).state_dict()
    for two in ranks:
        for name, value in one.items():
            moved = (value - start[name].float()).norm()
            assert moved > 0 and (two[name] - value).norm() < 1e-3 * moved, name


def test_shards_that_are_computed_in_bfloat16_and_lie_in_the_cpus_memory_train_alike(runs: Runs) -> None:
    one, *others = (made["fsdp2"]["bfloat16"] for made in (runs.one, *runs.two))
    plain = runs.one["none"]["bfloat16"]
    moved = (one["weights"] - one["start"]).norm()
    assert moved > 0 and one["weights"].dtype == torch.float64
    for other in (*others, plain):
        assert (other["weights"] - one["weights"]).norm() < 0.2 * moved
        assert (other["after"] - one["after"]).norm() < 0.5 * (one["after"] - one["before"]).norm()


def test_an_fp32_adapter_trains_on_a_base_of_16_bits_in_shards(runs: Runs) -> None:
    plain = runs.one["none"]["adapter"]
    assert max(float(value.norm()) for value in plain["moved"].values()) > 1e-3
    one, *two = (made["fsdp2"]["adapter"] for made in (runs.one, *runs.two))
    for other, most in ((one, 1e-3), *((other, 0.2) for other in two)):
        assert other["types"] == {"torch.bfloat16", "torch.float32"} and other["sampled"] == torch.bfloat16
        for name, value in plain["moved"].items():
            assert (other["moved"][name] - value).norm() <= most * value.norm(), name


def test_what_is_written_to_the_weights_after_a_score_is_seen_by_the_next(runs: Runs) -> None:
    """Torch keeps the root's own shards whole after a pass without gradients; what is then written would be lost."""
    for made in (runs.one, *runs.two):
        found = made["fsdp2"]["written"]
        assert (
            max(
                abs(a - b)
                for x, y in zip(found["before"], found["after"], strict=True)
                for a, b in zip(x, y, strict=True)
            )
            > 0.1
        )
        for name in ("after", "later"):
            for ours, theirs in zip(found[name], found["expected"], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_rows_that_differ_between_ranks_are_an_error_before_any_pass(sharding: str, runs: Runs) -> None:
    first, second = (made[sharding]["disagreeing"] for made in runs.two)
    for name, part in (("numbers", "the numbers of"), ("tokens", "the tokens of"), ("count", "4 parts on rank 0")):
        kind, text = first[name]
        assert kind == "TrainingError" and "rank 1 differs from rank 0" in text and part in text and "hash()" in text
        assert second[name][0] == "RankError"


def test_shards_that_cannot_be_read_are_one_line(runs: Runs) -> None:
    for made in (runs.one, *runs.two):
        kind, text = made["fsdp2"]["damaged"]
        assert kind == "StorageError" and text.startswith("cannot read the shards in")


@pytest.mark.parametrize("which", ["begun-by-one", "begun-by-two"])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("kind", ["plain", "adapter", "server"])
def test_a_run_goes_on_with_another_number_of_processes(kind: str, which: str, sharding: str, runs: Runs) -> None:
    """To the same weights, and back to those of the best step, which is the third."""
    whole, other = (runs.folder / f"{name}-{kind}" for name in ("whole-none", f"{which}-{sharding}"))
    wanted, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, other))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-11), name
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (whole, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for wanted_line, line in zip(*lines, strict=True):
        for key in wanted_line.keys() - {key for key in wanted_line if key.startswith(OWN)}:
            assert line[key] == pytest.approx(wanted_line[key], rel=1e-6, abs=1e-9), key
    assert (other / "checkpoint-4" / "shards").is_dir() == (sharding == "fsdp2")
    if kind == "adapter":
        ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (other, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-11) for name in ours)
        return
    third, last = (load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4))
    assert all(torch.equal(wanted[name], third[name]) for name in third)
    assert not any(torch.equal(last[name], third[name]) for name in third)
    model, _ = load_model(ModelSettings(name_or_path=str(other / "model"), dtype="float64"))
    assert model.config.vocab_size == len(tiny.make_tokenizer())


SMALL = """
model: {name_or_path: tiny}
env: {name: ENV}
rollout: {prompts_per_step: 4, num_generations: 4}
run: {max_steps: 500, save_steps: 0, eval_steps: 0, rank_timeout: LIMIT}
"""


def vpd_train(folder: Path, env: str, *, limit: int = 60, **variables: str) -> Launch:
    """``vpd train`` in two processes."""
    (folder / "run.yaml").write_text(SMALL.replace("ENV", env).replace("LIMIT", str(limit)))
    return Launch(["-m", "vpd", "train", "--config", "run.yaml"], 2, folder, **variables)


def lines_of(launched: Launch) -> list[list[str]]:
    """The lines ``vpd: ...`` of each process."""
    return [re.findall("^vpd: .*", text, re.MULTILINE) for text in launched.outputs]


@pytest.mark.parametrize(
    ("fault", "codes", "lines"),
    [
        ("raise", [2, 2], ["", "vpd: error: the grader on a batch of 8 rows raised KeyError"]),
        ("kill", [2, -signal.SIGKILL], ["vpd: error: the connection to another process of this run is lost", ""]),
        ("sleep", [2, None], ["vpd: error: the other processes of this run did not come within 10 seconds", None]),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_line(
    fault: str, codes: list[int | None], lines: list[str | None], tmp_path: Path
) -> None:
    run = vpd_train(tmp_path, f"{HERE}/faulty_env.py:Faulty", limit=10 if fault == "sleep" else 60, FAULT=fault)
    ended = run.end(90)
    assert ended[0] == codes[0] and codes[1] in (ended[1], None), run.outputs
    for found, wanted in zip(lines_of(run), lines, strict=True):
        assert wanted is None or (len(found) == bool(wanted) and "".join(found).startswith(wanted)), run.outputs
    if fault == "raise":
        assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_environment_that_draws_by_hash_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    run = vpd_train(tmp_path, f"{HERE}/faulty_env.py:Hashed")
    assert run.end(90) == [2, 2]
    first, second = lines_of(run)
    assert len(first) == 1 and not second and not (tmp_path / "out").exists()
    for part in ("rank 1 differs from rank 0 in settings and tasks", "the task 0", "hash() of a text"):
        assert part in first[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(number: int, tmp_path: Path) -> None:
    run = vpd_train(tmp_path, "digits")
    metrics = tmp_path / "out" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < until:
        time.sleep(0.1)
    run.send(number, only=1 if number == signal.SIGTERM else None)
    assert run.end(60) == [75, 75], run.outputs
    first, second = lines_of(run)
    assert re.search(r"stopped by SIG\w+ after step \d+ of 500; checkpoint-\d+ is saved", first[-1]) and not second
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{steps[-1]}"]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_under_a_launcher_the_message_comes_last_and_other_commands_are_refused(launcher: str, tmp_path: Path) -> None:
    wrong = Launch(["-m", *LAUNCHERS[launcher], "-m", "vpd", "demo"], 1, tmp_path)
    assert wrong.end(90) == [1]
    *_, last, rule = wrong.outputs[0].strip().splitlines()
    assert "vpd: error: vpd demo runs in one process; got 2 processes" in last and set(rule) == {"="}
