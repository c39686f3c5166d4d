"""The dry run: its memory model against what the real learner holds, its operations by hand, and what it shows."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, Olmo3Config, Qwen3Config

from vpd.algorithms.distill import SDPOSettings
from vpd.algorithms.gated import GatedSettings
from vpd.algorithms.grpo import GRPOSettings
from vpd.algorithms.vpd import VPDSettings
from vpd.cli import main
from vpd.config import load, parse
from vpd.config.dry_run import load_dry_run
from vpd.config.reading import read_sections
from vpd.config.starter import starter
from vpd.errors import ConfigError, ModelError
from vpd.estimate import memory
from vpd.estimate.architecture import Architecture, find_architecture, layer_sizes
from vpd.estimate.known_models import KNOWN_MODELS
from vpd.estimate.memory import Trained, Weights, update_peak
from vpd.estimate.rehearsal import Call, Rehearsal
from vpd.estimate.settings import DryRunSettings
from vpd.estimate.stand_in_tokenizer import StandInTokenizer
from vpd.estimate.tracing import LiveBytes
from vpd.estimate.work import Decoding, Sizes, decoding_work, work_of
from vpd.learners.accelerate_learner import AccelerateLearner
from vpd.learners.settings import OptimSettings, TeacherSettings
from vpd.model import attention, head, lora, packing
from vpd.model.settings import LoraSettings, ModelSettings
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.recipes.dry_run import dry_run
from vpd.types import Completion, Grade, Group, Rollout, SampleKey, Section, Task, TeacherPrompt

PUBLISHED = {  # parameters, in 1e9, as the models' own pages say
    "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8, "qwen3-32b": 32.8,
    "olmo-3-7b-instruct": 7.3, "llama-3.1-8b-instruct": 8.0, "llama-3.3-70b-instruct": 70.6,
    "smollm2-135m-instruct": 0.135,
}  # fmt: skip


class Kept:
    """A prompter that leaves the teacher's prompts as they are."""

    def attach(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)


def small_config(**changes: Any) -> Any:
    options = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Qwen3Config(**(options | changes))


def groups_of(*, prompts: int = 2, answers: int = 4, prompt: int = 48, completion: int = 40) -> list[Group]:
    """Groups of half right answers; every row has a teacher's prompt with a context of its own."""
    made = []
    for number in range(prompts):
        start = tuple((number * 97 + place * 13) % 500 for place in range(prompt))
        rollouts = [
            Rollout(
                key=SampleKey(phase="train", step=0, task=number, sample=index),
                task=Task(id=str(number), messages=({"role": "user", "content": "?"},)),
                prompt=start,
                completion=Completion(
                    tokens=tuple((index + place) % 500 for place in range(completion)),
                    sampled=(True,) * completion, logprobs=(-6.2,) * completion, text="", finish="stop",
                ),
                grade=Grade(reward=float(index % 2), success=bool(index % 2)),
                context=(Section(kind="feedback", source="environment", text="x"),),
                teacher_prompt=TeacherPrompt(tokens=start + (index,) * 16, sources=("environment",)),
            )
            for index in range(answers)
        ]  # fmt: skip
        made.append(Group(rollouts=tuple(rollouts)))
    return made


def rehearsed(settings: Any, groups: Sequence[Group]) -> list[Call]:
    learner = Rehearsal()
    settings.build(Kept()).step(groups, learner)
    return learner.calls


def held_by_the_learner(trained: Trained, settings: Any, groups: Sequence[Group]) -> dict[str, int]:
    """The most bytes of new tensors in each update of the real learner's second iteration, gradients included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        trained.architecture.config, dtype=getattr(torch, trained.model.dtype)
    ).eval()
    if trained.model.lora is not None:
        lora.attach(model, trained.model.lora, seed=0)
    learner = AccelerateLearner(model, trained.optim, teacher=trained.teacher)
    method = settings.build(Kept())
    method.step(groups, learner)
    learner.end_iteration()
    there = torch.nn.Module()
    there.kept = torch.nn.ParameterList(learner._masters.parameters)
    for number, moments in enumerate(learner._optimizer.optimizer.state.values()):
        for name, value in moments.items():
            there.register_buffer(f"{name}_{number}", value)
    watched = Watched(learner, (model, there, *learner.teacher.modules().values()))
    method.step(groups, watched)
    return watched.most


class Watched:
    """The learner, with the peak of each update's tensors."""

    def __init__(self, learner: AccelerateLearner, modules: Sequence[torch.nn.Module]):
        self.most: dict[str, int] = {}
        self.logprob_tolerance = learner.logprob_tolerance
        self.score, self.version = learner.score, learner.version
        self._learner, self._modules = learner, modules

    def update(self, name: str, *args: Any, **options: Any) -> Any:
        live = LiveBytes(*self._modules)
        with live:
            done = self._learner.update(name, *args, **options)
        self.most[name] = max(live.peaks)
        return done


EVERY_STEP = VPDSettings(e_every=1)
LORA = LoraSettings(r=4, target_modules="all-linear")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "none": ({}, {}, EVERY_STEP),
    "selective": ({}, {"gradient_checkpointing": "selective"}, EVERY_STEP),
    "full": ({}, {"gradient_checkpointing": "full"}, EVERY_STEP),
    "live": ({}, {}, VPDSettings(e_every=1, teacher="live")),
    "bf16": ({"dtype": "bfloat16"}, {}, EVERY_STEP),
    "bf16, selective": ({"dtype": "bfloat16"}, {"gradient_checkpointing": "selective"}, EVERY_STEP),
    "bf16, micro-batches": ({"dtype": "bfloat16"}, {"max_tokens_per_microbatch": 200}, EVERY_STEP),
    "micro-batches": ({}, {"max_tokens_per_microbatch": 200}, EVERY_STEP),
    "autocast": ({}, {"mixed_precision": "bf16"}, EVERY_STEP),
    "rows alone": ({}, {"share_prefixes": False}, EVERY_STEP),
    "lora": ({"lora": LORA}, {}, EVERY_STEP),
    "lora, bf16, full": ({"lora": LORA, "dtype": "bfloat16"}, {"gradient_checkpointing": "full"}, EVERY_STEP),
    "grpo": ({}, {}, GRPOSettings()),
    "top-k": ({}, {}, SDPOSettings(distillation_topk=20)),
    "sampled": ({}, {}, SDPOSettings(distillation_estimator="sampled", distillation_alpha=1.0)),
}


def trained_as(case: str, **config: Any) -> tuple[Trained, Any]:
    model, optim, settings = CASES[case]
    architecture = Architecture(config=small_config(**config), origin="this test")
    teacher = settings.needs.teacher or TeacherSettings(kind="live")
    return Trained(
        architecture=architecture, model=ModelSettings(**model), optim=OptimSettings(**optim), teacher=teacher
    ), settings


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [{}, {"vocab_size": 4096, "tie_word_embeddings": False}], ids=["tied", "untied"])
def test_the_model_of_memory_is_what_the_learner_holds(case: str, config: dict[str, Any]) -> None:
    assert_the_learner_holds_what_is_computed(case, on_gpu=False, **config)


def test_the_model_of_memory_counts_groups_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them it would be 1.6 % less here."""
    monkeypatch.setattr(packing, "packed_segments", attention.GroupedSegments.of)
    assert_the_learner_holds_what_is_computed("none", on_gpu=True, within=0.01)


def assert_the_learner_holds_what_is_computed(case: str, *, on_gpu: bool, within: float = 0.15, **config: Any) -> None:
    trained, settings = trained_as(case, **config)
    trained = dataclasses.replace(trained, on_gpu=on_gpu)
    AcceleratorState._reset_state(reset_partial_state=True)  # one test has another precision
    groups = groups_of()
    held = held_by_the_learner(trained, settings, groups)
    gradients = Weights(trained).gradients_bytes
    updates = {call.name: call for call in rehearsed(settings, groups) if call.kind == "update"}
    assert set(updates) == set(held)
    for name, call in updates.items():
        assert gradients + update_peak(trained, call).bytes == pytest.approx(held[name], rel=within), name


def test_a_deep_model_is_extrapolated_exactly() -> None:
    trained, settings = trained_as("bf16, selective", num_hidden_layers=8)
    assert trained.architecture.with_periods(1) is not None
    m_step = rehearsed(settings, groups_of())[-1]
    whole = memory._peak_of([memory._trace(Weights(trained), m_step, 1)], m_step)
    assert update_peak(trained, m_step).bytes == pytest.approx(whole.bytes, rel=0.01)


@pytest.mark.parametrize("case", ["bf16", "grpo"])
def test_pieces_of_the_head_that_a_dry_run_leaves_out_would_hold_no_more(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "BLOCK", 10 * 4096)
    trained, settings = trained_as(case, vocab_size=4096)
    trained = dataclasses.replace(trained, optim=dataclasses.replace(trained.optim, chunk_tokens=40))
    calls = [call for call in rehearsed(settings, groups_of()) if call.kind == "update"]
    few = [update_peak(trained, call).bytes for call in calls]
    tried: list[int] = []  # numbers of chunks, and of blocks of a chunk

    def all_starts(rows: torch.Tensor, step: int) -> range:
        tried.append(-(-len(rows) // step))
        return range(0, len(rows), step)

    monkeypatch.setattr(head, "_starts", all_starts)
    assert [update_peak(trained, call).bytes for call in calls] == few
    assert {4, max(tried)} <= set(tried) and max(tried) > 3


def test_a_window_of_attention_takes_padded_rows() -> None:
    config = Olmo3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, sliding_window=16, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    trained, settings = trained_as("full")
    trained = dataclasses.replace(trained, architecture=Architecture(config=config, origin="this test"))
    calls = [call for call in rehearsed(settings, groups_of()) if call.kind == "update"]
    assert {update_peak(trained, call).path for call in calls} == {"padded"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    model = find_architecture(f"owner/{name}").build("bfloat16")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], rel=0.02)
    assert set(PUBLISHED) <= set(KNOWN_MODELS)


def test_an_unknown_shape_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not know the shape of 'nobody/nothing'; expected a folder with a"):
        find_architecture("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read"):
        find_architecture(str(tmp_path))


def test_what_vpd_asks_of_the_learner() -> None:
    calls = rehearsed(EVERY_STEP, groups_of())
    assert [(call.kind, call.name, call.train) for call in calls] == [
        ("score", "score", None), ("update", "e_step", "teacher"), ("update", "m_step", "student"),
    ]  # fmt: skip
    assert calls[1].use.measured and calls[1].use.read == {"teacher"}
    assert calls[2].use.divergence == {"alpha": 0.5, "top_k": None, "tail": True}


def test_the_gated_method_is_rehearsed_with_a_teacher_that_it_trusts() -> None:
    """What its E-step needs counts in memory and time, though a run's gate may skip it."""
    calls = rehearsed(GatedSettings(e_every=1), groups_of())
    assert [(call.kind, call.name, sorted(call.use.read)) for call in calls] == [
        ("score", "score", ["student"]), ("score", "score", ["teacher"]), ("score", "score", ["student"]),
        ("update", "e_step", ["teacher"]), ("update", "m_step", ["student", "teacher"]),
    ]  # fmt: skip
    recommended = read_sections(starter(["--env.length", "4"]).encode(), "the file of vpd init")
    phases = dry_run(parse(recommended), DryRunSettings()).estimate.phases
    assert {phase.work.name: phase.times for phase in phases if phase.part == "update"}["e_step"] == 1 / 5
    names = [phase.work.name for phase in phases]
    assert len(set(names)) == len(names) and {"score the student", "score the teacher"} <= set(names)


def test_operations_by_hand() -> None:
    """One row alone, 8 prompt and 4 completion tokens: GRPO takes 3 passes of the layers and 4 of the head."""
    trained, _ = trained_as("rows alone")
    groups = [Group(rollouts=groups_of(prompts=1, answers=2, prompt=8, completion=4)[0].rollouts)]
    [call] = rehearsed(GRPOSettings(), groups)
    sizes = dataclasses.replace(Sizes.of(trained, packed=False), layers=1000, head=500, attended=10)
    machine = DryRunSettings(tflops_fp32=1.0, utilisation=0.5)
    found = work_of(call, trained, sizes, machine)
    operations = 3 * (2 * 1000 * 2 * 12 + 10 * 2 * 12 * 12 / 2) + 4 * 2 * 500 * 2 * 4
    assert (found.tokens, found.operations) == (24, operations)
    assert found.seconds == pytest.approx(operations / 0.5e12)


def test_decoding_by_hand() -> None:
    """6 rows, 4 at once: two batches wait for the longest, 20 tokens, at 1000 bytes of 1 GB/s each."""
    trained, _ = trained_as("none")
    sizes = dataclasses.replace(Sizes.of(trained, packed=True), layers=0, head=0, kv_bytes=0, weights_bytes=1000)
    machine = DryRunSettings(gb_per_s=1.0, bandwidth_used=1.0, step_ms=0.0)
    asked = Decoding(rows=6, prompt=5, answer=10, longest=20, at_once=4)
    assert decoding_work("rollout", asked, sizes, machine).seconds == pytest.approx(2 * 20 * 1e-6)


def test_the_stand_in_gives_its_text_back() -> None:
    tokenizer = StandInTokenizer()
    text = "The answer (42) is here:\n  def f(x_1): return x\u00e4<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompter = Prompter(tokenizer, PromptSettings(max_feedback_length=8), window=None, max_completion_length=4)
    task = Task(id="a", messages=({"role": "user", "content": "What is it?"},))
    section = Section(kind="feedback", source="environment", text="word " * 100)
    made = prompter.build_teacher_prompt(task, [section])
    assert made is not None and made.cut > 80


def small_folder(folder: Path) -> Path:
    folder.mkdir()
    small_config(vocab_size=2048).save_pretrained(folder)
    return folder


def science(folder: Path, count: int = 12) -> Path:
    words = ["energy", "mass", "charge", "field", "force", "light", "wave", "atom", "ion", "bond", "acid", "base"]
    records = [
        {"prompt": f"Which is the {word}?\n\nA: one\nB: two\nC: three\nD: four", "answer": "ABCD"[n % 4], "kind": "mcq"}
        for n, word in enumerate(words[:count])
    ]
    path = folder / "science.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_a_folder_without_weights_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = small_folder(tmp_path / "model"), science(tmp_path)
    words = ["--model.name_or_path", str(model), "--env.name", "science", "--env.path", str(data), "--dry_run"]
    words += ["--feedback", "[environment, sibling]"]
    words += ["--rollout.prompts_per_step", "4", "--run.output_dir", str(tmp_path / "out")]
    assert main(["train", *words]) == 0
    said = capsys.readouterr().out
    assert "a stand-in" in said and "e_step" in said and "fits" in said and "Computed, not measured" in said
    assert "Assumed hardware, not this machine's: 1 GPU to train, each with 80 GiB" in said
    assert "--dry_run.price" in said
    assert not (tmp_path / "out").exists()


def test_what_is_not_counted_is_named(tmp_path: Path) -> None:
    model = {"model": {"name_or_path": str(small_folder(tmp_path / "model"))}}
    settings = model | {"rollout": {"retries": 1}, "optim": {"sharding": "fsdp2", "cpu_offload": True}}
    notes = {note.partition(":")[0] for note in dry_run(parse(settings), DryRunSettings()).notes if "left out" in note}
    assert notes == {"rollout.retries", "optim.cpu_offload"}
    assert not [note for note in dry_run(parse(model), DryRunSettings()).notes if "left out" in note]


def test_contexts_that_are_cut_are_counted(tmp_path: Path) -> None:
    model, data = small_folder(tmp_path / "model"), science(tmp_path)
    settings = {
        "model": {"name_or_path": str(model)}, "env": {"name": "science", "path": str(data)}, "feedback": ["sibling"],
        "rollout": {"prompts_per_step": 4, "num_generations": 4},
    }  # fmt: skip
    whole = dry_run(parse(settings), DryRunSettings()).budgets
    cut = dry_run(parse({**settings, "prompts": {"max_demonstration_length": 5}}), DryRunSettings()).budgets
    assert (whole.cut, cut.cut) == (0.0, 1.0)
    assert cut.with_context == whole.with_context > 0.5


def test_assumptions_without_a_dry_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry_run.gpus", "8"]) == 2
    assert (
        "--dry_run.gpus says what a dry run assumes, and none is asked for. Add --dry_run." in capsys.readouterr().err
    )
    assert main(["train", "--dry_run", "--dry_run.gpu", "8"]) == 2
    assert "unknown key dry_run.gpu; did you mean" in capsys.readouterr().err.replace(". Did", "; did")


def test_the_section_of_a_file_is_no_part_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text("dry_run: {gpus: 2}\nrollout: {max_rows: 3}\n")
    machine, rest = load_dry_run([str(path)], ["--dry_run.price=1", "--run.seed", "4"], wanted=True)
    assert (machine.gpus, machine.price, rest) == (2, 1.0, ["--run.seed", "4"])
    assert load([str(path)]).rollout.max_rows == 3


def test_a_later_file_wins_key_by_key(tmp_path: Path) -> None:
    for name, text in {
        "a": "algorithm: {name: vpd, e_every: 3, distillation_topk: 7}\nrun: {seed: 1, max_steps: 9}",
        "b": "algorithm: {name: sdpo}\nrun: {seed: 2}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    config = load([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert (config.method, config.run.seed, config.run.max_steps) == ("sdpo", 2, 9)
    assert config.as_dict()["algorithm"]["distillation_topk"] == 7


def test_shards_are_divided_and_computed_with_in_16_bits(tmp_path: Path) -> None:
    """fp32 weights, gradients, two moments and the average lie in shards; the replica that samples is of 16 bits."""
    settings: dict[str, Any] = {
        "model": {"name_or_path": str(small_folder(tmp_path / "model"))},
        "optim": {"sharding": "fsdp2", "mixed_precision": "bf16"}, "algorithm": {"name": "vpd"},
    }  # fmt: skip
    plain = settings | {"optim": {"mixed_precision": "bf16"}}
    shards, whole = (dry_run(parse(made), DryRunSettings(gpus=4)).estimate for made in (settings, plain))
    numbers = shards.parameters
    found = {item.name: item.bytes for item in shards.fixed}
    assert found == {"weights": numbers, "gradients": numbers, "optimiser": 2 * numbers, "teacher's copies": numbers}
    assert {item.name: item.bytes // 4 for item in whole.fixed} == found
    (replica, *_), (plain_sampling, *_) = shards.stages, whole.stages
    assert replica.added - plain_sampling.added == 2 * numbers
    trained, vpd = trained_as("autocast")
    sharded = dataclasses.replace(trained, optim=dataclasses.replace(trained.optim, sharding="fsdp2"))
    narrow = dataclasses.replace(trained_as("bf16")[0], optim=OptimSettings(sharding="fsdp2"))
    for call in (call for call in rehearsed(vpd, groups_of()) if call.kind == "update"):
        assert update_peak(sharded, call).bytes == update_peak(narrow, call).bytes


def test_adapters_in_shards_have_a_base_of_16_bits_and_no_gradients_of_it(tmp_path: Path) -> None:
    folder = str(small_folder(tmp_path / "model"))

    def found(**changes: Any) -> Any:
        optim = {"sharding": "fsdp2", "gradient_checkpointing": "full"}
        model = {"name_or_path": folder, "dtype": "bfloat16", "lora": {"r": 2}}
        return dry_run(parse({"model": model, "optim": optim} | changes), DryRunSettings(gpus=4)).estimate

    ours, plain = found(), found(optim={"gradient_checkpointing": "full"})
    items, whole = ({item.name: item.bytes for item in made.fixed} for made in (ours, plain))
    assert items == {name: size // 4 for name, size in whole.items()}
    base = ours.parameters - whole["adapters"] // 4
    assert items["weights"] == 2 * base // 4 and "teacher's copies" not in items
    assert items["gradients"] == items["adapters"] // 2  # of the trained one alone, not of the average
    (_, *ours_stages), (_, *plain_stages) = ours.stages, plain.stages
    gathered = [a.added - b.added for a, b in zip(ours_stages, plain_stages, strict=True) if a.name == "m_step"]
    layer, outside = layer_sizes(find_architecture(folder).build("bfloat16"))
    assert 2 * (2 * layer + outside) <= gathered[0] <= 2 * (2.2 * layer + outside)


def test_assumptions_must_fit_the_settings(tmp_path: Path) -> None:
    config = parse({"model": {"name_or_path": str(small_folder(tmp_path / "model"))}})
    with pytest.raises(ConfigError, match=r"dry_run.completion_tokens is above rollout.max_completion_length; got 999"):
        dry_run(config, DryRunSettings(completion_tokens=999))
    vllm = parse({"model": {"name_or_path": str(tmp_path / "model")}, "engine": {"name": "vllm"}})
    with pytest.raises(ConfigError, match=r"samples on a server; got dry_run.server_gpus 0"):
        dry_run(vllm, DryRunSettings())


@pytest.mark.parametrize(("steps", "every", "times"), [(30, 20, 3), (3, 2, 3), (4, 2, 3), (1, 2, 2), (3, 0, 0)])
def test_evaluations_are_counted_as_the_loop_makes_them(steps: int, every: int, times: int, tmp_path: Path) -> None:
    model = {"name_or_path": str(small_folder(tmp_path / "model"))}
    found = dry_run(parse({"model": model, "run": {"max_steps": steps, "eval_steps": every}}), DryRunSettings())
    assert found.estimate.evaluations == times
