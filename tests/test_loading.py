"""Models as people have them: each loads right, or is one line before anything is made."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import vpd_train
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

import vpd
from vpd.bundled import load_bundled
from vpd.cli import main
from vpd.errors import ModelError
from vpd.model import loading
from vpd.model.settings import LoraSettings, ModelSettings
from vpd.recipes.assemble import load_model

WEIGHTS = "model.safetensors"
Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped base."""
    return Path(shutil.copytree(load_bundled(), tmp_path / "model"))


def load(path: object, **settings: Any) -> tuple[Any, Any]:
    return load_model(ModelSettings(name_or_path=str(path), **settings))


def edit(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def write(name: str, text: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def remove(*patterns: str) -> Change:
    def change(folder: Path) -> None:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink()

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """The weights after ``change``, which may return others in their place."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan


def infinite_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = torch.inf


def without_up_proj(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight"]


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def shards(folder: Path, *, missing: bool) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = {name: f"model-0000{1 + (place > 5)}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in sorted(set(names.values()))[: 1 if missing else 2]:
        save_file({name: tensors[name] for name in names if names[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / WEIGHTS).unlink()


def in_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


class Order:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def with_code_in_a_pickle(folder: Path) -> None:
    torch.save({"weight": Order(folder / "executed")}, folder / "pytorch_model.bin", pickle_module=pickle)
    (folder / WEIGHTS).unlink()


def new_tokens(*tokens: str, special: bool) -> Change:
    def change(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(tokens), special_tokens=special)
        tokenizer.save_pretrained(folder)

    return change


def only_gguf(folder: Path) -> None:
    remove("config.json", WEIGHTS)(folder)
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(os.environ["VPD_TEST_RAN"]).mkdir(exist_ok=True)
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def own_code(folder: Path) -> None:
    parts = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit("config.json", model_type="own", architectures=["Model"], auto_map=parts)(folder)
    (folder / "own.py").write_text(CODE)


def own_tokenizer(folder: Path) -> None:
    edit("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(folder)


REFUSED: dict[str, tuple[Change, list[str]]] = {
    "NaN": (weights(not_a_number), ["NaN or infinity in model.layers.1.self_attn.q_proj.weight"]),
    "infinity in a norm": (
        weights(infinite_norm),
        ["NaN or infinity in model.norm.weight"],
    ),
    "truncated": (cut, ["cannot load", "damaged or not whole"]),
    "empty": (write(WEIGHTS, ""), ["cannot load", "damaged or not whole"]),
    "LFS pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS, "git lfs pull"]),
    "a tensor is missing": (
        weights(without_up_proj),
        ["are not in its files", "1 of them", "layers.0.mlp.up_proj"],
    ),
    "no head, not tied": (edit("config.json", tie_word_embeddings=False), ["are not in its files", "lm_head.weight"]),
    "more layers than config.json": (edit("config.json", num_hidden_layers=1), ["config.json does not have", "9 of"]),
    "another size": (edit("config.json", hidden_size=32), ["another shape", "(36, 96) instead of (36, 32)"]),
    "another architecture": (edit("config.json", model_type="gpt2"), ["are not in its files", "29 of them"]),
    "saved by DDP": (
        weights(lambda tensors: {f"module.{name}": value for name, value in tensors.items()}),
        ["are not in its files", "21 of them"],
    ),
    "a missing shard": (lambda folder: shards(folder, missing=True), ["model-00002-of-00002.safetensors"]),
    "no weights": (remove(WEIGHTS), ["cannot load", "no file named model.safetensors"]),
    "no config": (remove("config.json"), ["no config.json"]),
    "config cut": (write("config.json", '{"model_type": "lla'), ["config.json is damaged", "JSON"]),
    "config a list": (write("config.json", "[]"), ["config.json is damaged", "list"]),
    "unknown type": (edit("config.json", model_type="llama99"), ["model type `llama99`"]),
    "window null": (edit("config.json", max_position_embeddings=None), ["max_position_embeddings", "int"]),
    "generation config cut": (write("generation_config.json", "{"), ["generation_config.json is damaged"]),
    "no tokenizer": (remove("tokenizer*"), ["has no tokenizer"]),
    "no template": (remove("chat_template.jinja"), ["no chat template"]),
    "tokenizer of another kind": (write("tokenizer.json", '{"added_tokens": [], "model": {"type": "?"}}'), ["token"]),
    "larger tokenizer": (new_tokens("zebra", special=False), ["37 entries, 36 rows", "'zebra'", "resize_token_embed"]),
    "GGUF in a folder": (only_gguf, ["no config.json", "llama.cpp"]),
    "GPTQ": (edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), ["weights (gptq)"]),
    "FP8": (edit("config.json", quantization_config={"quant_method": "fp8"}), ["quantised weights (fp8)"]),
    "encoder and decoder": (edit("config.json", model_type="bart", is_encoder_decoder=True), ["no causal language"]),
    "vision": (edit("config.json", model_type="qwen2_5_vl"), ["no causal language model", "qwen2_5_vl"]),
    "code in a pickle": (with_code_in_a_pickle, ["a pickle that", "safetensors"]),
    "its own code": (own_code, ["brings its own code", "model.trust_remote_code true"]),
    "its own tokenizer": (own_tokenizer, ["brings its own code", "model.trust_remote_code true"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_that_cannot_be_trained_is_one_line(what: str, folder: Path) -> None:
    change, pieces = REFUSED[what]
    change(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert all(piece in message for piece in pieces) and "\n" not in message, message
    assert not (folder / "executed").exists()


SERVES: dict[str, Change] = {
    "as it ships": lambda folder: None,
    "sharded": lambda folder: shards(folder, missing=False),
    "weights in a pickle": in_a_pickle,
    "without the prefix": weights(lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()}),
    "no generation config": remove("generation_config.json"),
    "no pad token": edit("tokenizer_config.json", pad_token=None),
    "special tokens beyond the embedding": new_tokens("<image_soft_token>", special=True),
    "template in the tokenizer's config": lambda folder: (
        edit("tokenizer_config.json", chat_template=(folder / "chat_template.jinja").read_text())(folder),
        remove("chat_template.jinja")(folder),
    )[-1],
}


@pytest.mark.parametrize("what", SERVES)
def test_a_folder_in_another_form_is_the_same_model(what: str, folder: Path) -> None:
    SERVES[what](folder)
    model, tokenizer = load(folder)
    expected = AutoModelForCausalLM.from_pretrained(load_bundled())
    ids = torch.arange(4, 20)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert "<user>" in tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)


def test_weights_without_a_place_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    LlamaForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    load(folder)
    assert "1 weights of its files have no place in a LlamaForCausalLM and are left out, such as score.weight" in (
        caplog.text
    )


def test_a_special_token_beyond_the_embedding_is_refused_where_a_prompt_has_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_tokens("<turn>", special=True)(folder)
    template = folder / "chat_template.jinja"
    template.write_text("<turn>" + template.read_text())
    assert vpd_train(tmp_path / "run", model__name_or_path=folder) == 2
    error = capsys.readouterr().err
    assert "'<turn>', number 36 of 37; expected numbers below 36" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_code_that_a_model_brings_runs_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setenv("VPD_TEST_RAN", str(ran))
    own_code(folder)
    assert vpd_train(tmp_path / "run", model__name_or_path=folder) == 2 and not ran.exists()
    trusted = {"model__trust_remote_code": True, "run__max_steps": 2, "run__save_steps": 1}
    assert vpd_train(tmp_path / "run", model__name_or_path=folder, **trusted) == 0 and ran.exists()
    again = {**trusted, "run__max_steps": 3, "run__resume": True}
    assert vpd_train(tmp_path / "run", model__name_or_path=folder, **again) == 0  # its checkpoints load too
    assert type(load(tmp_path / "run" / "model", trust_remote_code=True)[0]).__name__ == "Model"


# adapters


def adapter(folder: Path, base: object, **config: Any) -> Path:
    """A LoRA adapter with every B away from 0."""
    model = AutoModelForCausalLM.from_pretrained(load_bundled())
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **config)
    adapted = get_peft_model(model, lora)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(folder)
    edit("adapter_config.json", base_model_name_or_path=base)(folder)
    return folder


def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    first = adapter(tmp_path / "adapter", str(load_bundled()))
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(load_bundled()), str(first))
    model, tokenizer = load(first)
    ids = torch.arange(4, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(load_bundled())(ids).logits
    assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-4)
    assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
    assert tokenizer.chat_template and all(value.requires_grad for value in model.parameters())
    twice, _ = load(adapter(tmp_path / "second", str(first)))
    assert not torch.allclose(twice(ids).logits, model(ids).logits, atol=1e-2)


def test_a_run_goes_on_from_the_adapter_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vpd_train(tmp_path / "first", model__lora="{r: 2}", run__max_steps=1, optim__learning_rate=0.01) == 0
    name = {"model__name_or_path": tmp_path / "first" / "adapter", "run__max_steps": 1}
    capsys.readouterr()
    assert vpd_train(tmp_path / "second", model__lora="{r: 2}", **name) == 2
    assert "model.lora would train a second one" in capsys.readouterr().err and not (tmp_path / "second").exists()
    assert vpd_train(tmp_path / "second", optim__learning_rate=0, **name) == 0
    merged, unchanged = (load_file(tmp_path / run / "model" / WEIGHTS) for run in ("first", "second"))
    for weight, value in merged.items():
        assert torch.allclose(value, unchanged[weight], atol=1e-6), weight


def lacking_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")


BAD_ADAPTERS: dict[str, tuple[Change, str]] = {
    "no base": (edit("adapter_config.json", base_model_name_or_path=None), "names no base"),
    "base not there": (edit("adapter_config.json", base_model_name_or_path="/no/where"), "the base '/no/where'"),
    "a tensor is missing": (lacking_a_tensor, "q_proj.lora_A"),
    "truncated": (write("adapter_model.safetensors", b"12345678901"), "cannot merge the adapter"),
    "config cut": (write("adapter_config.json", "{"), "adapter_config.json is damaged"),
}


@pytest.mark.parametrize("what", BAD_ADAPTERS)
def test_an_adapter_that_is_not_whole_is_one_line(what: str, tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", str(load_bundled()))
    change, piece = BAD_ADAPTERS[what]
    change(made)
    with pytest.raises(ModelError, match=piece) as caught:
        load(made)
    assert "\n" not in str(caught.value)


def test_adapters_without_a_whole_model_at_the_end_are_refused(tmp_path: Path) -> None:
    itself = adapter(tmp_path / "itself", str(tmp_path / "itself"))
    with pytest.raises(ModelError, match="names no base"):
        load(itself)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(load_bundled()), prompts).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="cannot be merged"):
        load(tmp_path / "prompt")
    with pytest.raises(ModelError, match=r"model\.lora"):
        load(itself, lora=LoraSettings())


# names


def test_names_of_nothing_are_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    shutil.copytree(folder, run / "checkpoint-100")
    for name, piece in {
        "": "no such folder",
        str(tmp_path / "modle"): f"Did you mean '{folder}'?",
        "https://huggingface.co/Qwen/Qwen3-0.6B": r"Hub id \(owner/name\)",
        "out/run/model": "no such folder",
        str(run): f"no config.json.*Did you mean '{run / 'model'}'?",
        str(folder / WEIGHTS): f"is a file.*Name the folder it is in, '{folder}'",
    }.items():
        with pytest.raises(ModelError, match=piece):
            load(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/model")[0].name_or_path == str(folder)


def test_without_the_hub_a_mistyped_name_ends_at_once(folder: Path, tmp_path: Path) -> None:
    """One try, where a download tries for a minute; nothing listens at the address that stands for the Hub."""
    code = "import sys; from vpd.cli import main; sys.exit(main(['train', '--run.output_dir', 'o', *sys.argv[1:]]))"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for name, hint in {"Qwen/Qwen3-0.6BB": "", "tinny": "Did you mean 'tiny'?"}.items():
        done = subprocess.run(
            [sys.executable, "-c", code, "--model.name_or_path", name],
            env=environment | {"PYTHONPATH": str(Path(vpd.__file__).parent.parent)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 2 and "Retrying" not in done.stderr
        assert f"{name!r}: there is no such folder, and the Hub cannot be reached" in done.stderr
        assert done.stderr.count("\n") == 1 and hint in done.stderr and not (tmp_path / "o").exists()


# objects


def test_objects_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    model, tokenizer = load(load_bundled())
    with pytest.raises(ModelError, match=r"no model of transformers; got builtins\.str"):
        loading.check("tiny", tokenizer, "it")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(load_bundled()), LoraConfig(task_type="CAUSAL_LM"))
    for broken in (adapted, adapted.get_base_model()):
        with pytest.raises(ModelError, match=r"adapters in it|no model of transformers"):
            loading.check(broken, tokenizer, "it")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    config = vpd.parse_config({"run": {"output_dir": str(tmp_path / "run")}})
    with pytest.raises(ModelError, match="the model that was passed is not finite"):
        vpd.train(model, config=config, tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_every_end_of_sequence_token_counts(folder: Path) -> None:
    edit("generation_config.json", eos_token_id=[7, 5])(folder)
    model, tokenizer = load(folder)
    assert loading.end_tokens(model, tokenizer) == tuple(sorted({5, 7, tokenizer.eos_token_id}))
    tokenizer.eos_token = None
    assert loading.end_tokens(model, tokenizer) == (5, 7)
    model.generation_config = None
    assert loading.end_tokens(model, tokenizer) == ()


def test_eval_loads_an_adapter_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = adapter(tmp_path / "adapter", str(load_bundled()))
    words = ["--num_samples", "1", "--limit", "2", "--rollout.max_completion_length", "6"]
    assert main(["eval", "--model.name_or_path", str(made), *words]) == 0
    assert "student" in capsys.readouterr().out
