"""``vpd export``, the model card and ``push_to_hub``: folders that load, a converter, a Hub on this machine."""

import base64
import http.server
import json
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from helpers import vpd_train
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import vpd
from vpd.cli import main
from vpd.config.sections import ALGORITHMS
from vpd.errors import StorageError
from vpd.recipes.export import UPLOAD_ERRORS, push_run
from vpd.report.methods import METHODS
from vpd.report.model_card import model_card, source_commit
from vpd.run_folder.files import FileSystem
from vpd.run_folder.reading import read_run
from vpd.run_folder.state import Recorder

STEPS = {"run__max_steps": 2, "run__save_steps": 1, "run__eval_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole model in ``whole``, and one of an adapter in ``lora``."""
    folder = tmp_path_factory.mktemp("runs")
    assert vpd_train(folder / "whole", **STEPS, algorithm__name="vpd") == 0
    assert vpd_train(folder / "lora", **STEPS, model__lora="{r: 2}", optim__learning_rate=0.05) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_the_exported_model_is_the_run_s(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "whole"), str(tmp_path / "mine")]) == 0
    assert equal(weights(tmp_path / "mine"), weights(runs / "whole" / "model"))
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template
    assert (tmp_path / "mine" / "vpd_prompts.json").is_file() and (tmp_path / "mine" / "README.md").is_file()


def test_a_checkpoint_is_exported_without_the_optimiser(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "whole"), str(tmp_path / "one"), "--checkpoint", "1"]) == 0
    assert not equal(weights(tmp_path / "one"), weights(runs / "whole" / "model"))
    assert not (tmp_path / "one" / "state.pt").exists() and not (tmp_path / "one" / "trainer.json").exists()
    assert ", 1 step," in (tmp_path / "one" / "README.md").read_text()


def test_an_adapter_alone_and_merged_from_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    run = vpd.Run(runs / "lora")
    adapter = run.export(tmp_path / "adapter", form="adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    assert equal(dict(loaded.state_dict()), weights(runs / "lora" / "model"))
    assert main(["export", str(runs / "lora"), str(tmp_path / "merged"), "--checkpoint", "2"]) == 0
    assert equal(weights(tmp_path / "merged"), weights(runs / "lora" / "model"))
    assert json.loads((tmp_path / "merged" / "vpd_prompts.json").read_text())


WRONG: dict[str, tuple[list[str], str]] = {
    "no run": (["nowhere", "mine"], "nowhere holds no run"),
    "no adapter": (["whole", "mine", "--form", "adapter"], "got a run in phase done. It trained the whole"),
    "no such checkpoint": (["whole", "mine", "--checkpoint", "7"], "There is checkpoint-1, checkpoint-2"),
    "a checkpoint without one": (["whole", "mine", "--form", "adapter", "--checkpoint", "1"], "has no adapter"),
    "something there": (["whole", "whole"], "whole exists; expected a new place"),
    "nowhere to": (["whole"], "nowhere to export to"),
    "no converter": (["whole", "m.gguf", "--form", "gguf", "--converter", "no.py"], "got no file no.py. Install"),
    "gguf of an adapter": (
        ["lora", "m.gguf", "--form", "gguf", "--checkpoint", "1", "--converter", "fake.py"],
        "GGUF is made of a whole model",
    ),
    "gguf to the Hub": (["whole", "--form", "gguf", "--push_to_hub", "me/mine"], "uploads what the run exported"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_exported_is_one_line(
    what: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    (runs / "fake.py").write_text("")
    words, message = WRONG[what]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error
    assert not (runs / "mine").exists() and not (runs / "m.gguf").exists()


CONVERTER = """
import json, pathlib, sys
source, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
assert words[0] == "--outfile" and words[2:] == ["--outtype", "q8_0"], words
assert (source / "model.safetensors").is_file()
if json.loads((source / "config.json").read_text())["model_type"] != {type!r}:
    sys.exit("Model architecture not supported")
pathlib.Path(words[1]).write_bytes(b"GGUF and the rest")
"""


def test_gguf_through_llama_cpp_s_converter(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    words = ["export", str(runs / "whole"), str(tmp_path / "m.gguf"), "--form", "gguf", "--outtype", "q8_0"]
    script.write_text(CONVERTER.format(type="other"))
    assert main([*words, "--converter", str(script)]) == 2
    assert "exit code 1: Model architecture not supported" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert_hf_to_gguf.py"]
    script.write_text(f"#!{sys.executable}\n" + CONVERTER.format(type="llama"))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(words) == 0 and (tmp_path / "m.gguf").read_bytes().startswith(b"GGUF")
    monkeypatch.setenv("PATH", "")
    assert main([*words[:2], str(tmp_path / "n.gguf"), *words[3:]]) == 2
    assert "got none on the PATH" in capsys.readouterr().err


# the card


def test_a_card_says_method_data_settings_results_and_commit(runs: Path) -> None:
    text = (runs / "whole" / "model" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["vpd", "vpd"]}
    commit = source_commit()
    assert commit is None or f"commit {commit}" in text
    assert "Variational Policy Distillation" in text and ", 2 steps," in text and "Tasks: `digits`" in text
    assert "| student, held-out tasks | `eval/accuracy` | 0." in text and "(step 0)" in text and "(step 2)" in text
    block = text.split("## Settings\n\n")[1].split("\n\n## Use")[0]
    settings = yaml.safe_load(block)
    assert settings["optim"]["learning_rate"] == 1e-3 and "output_dir" not in settings["run"]
    assert str(runs) not in text


def record(folder: Path, settings: dict[str, Any]) -> None:
    Recorder(folder=folder, files=FileSystem(), settings=settings).record("done", 1)


@pytest.mark.parametrize(
    ("algorithm", "line"),
    [
        ({"name": "vpd"}, "Variational Policy Distillation ([arXiv 2605.15113](https://arxiv.org/abs/2605.15113)), 1 "),
        ({"name": "grpo"}, "GRPO ([arXiv 2402.03300](https://arxiv.org/abs/2402.03300)), 1 step, with vpd"),
        (
            {"name": "plare"},
            "PLARE, learning from a judge's preferences ([arXiv 2507.23391](https://arxiv.org/abs/2507.23391))",
        ),
        (
            {"name": "ldd"},
            "language dynamics distillation ([arXiv 2210.00066](https://arxiv.org/abs/2210.00066)), 1 step",
        ),
        ({"name": "sft"}, "supervised fine-tuning, 1 step, with vpd"),
        ({"object": "mine.Imitate"}, "mine.Imitate, 1 step, with vpd"),
    ],
)
def test_a_card_names_the_paper_of_its_method(algorithm: dict[str, Any], line: str, tmp_path: Path) -> None:
    record(tmp_path, {"algorithm": algorithm})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert f"\n\n{line}" in model_card(read_run(tmp_path))


def test_card_and_report_know_every_method_that_ships() -> None:
    assert set(METHODS) == set(ALGORITHMS)


def test_a_card_names_no_folder_and_breaks_out_of_nothing(tmp_path: Path) -> None:
    settings = {
        "model": {"name_or_path": "Qwen/Qwen3-0.6B"},
        "env": {"name": "math", "path": "/home/someone/secret/train.jsonl"},
        "feedback": [{"name": "environment"}, {"object": "`x`\n# y"}],
        "algorithm": {"name": "grpo"},
    }
    record(tmp_path, settings)
    text = model_card(read_run(tmp_path), commit="abc")
    assert "someone" not in text and "Tasks: `train.jsonl`" in text and "base_model: Qwen/Qwen3-0.6B" in text
    assert "\n# y" not in text and "None were measured." in text and "commit abc" in text


# the Hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """What ``huggingface_hub`` asks when a folder is uploaded; every file is part of the commit itself."""

    made: dict[str, Any]
    uploaded: dict[str, bytes]
    down = False

    def do_GET(self) -> None:
        self._answer({"name": "me", "sha": "0" * 40, "id": "me/mine", "siblings": []})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert self.headers["Authorization"] == "Bearer hf_test"
        if self.down:
            self._answer({"error": "no space left for this account"}, 403)
        elif self.path == "/api/repos/create":
            self.made.update(json.loads(content))
            self._answer({"url": f"{huggingface_hub.constants.ENDPOINT}/me/mine", "name": "me/mine", "id": "1"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {
                    "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/mine/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, data: Any, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.made, FakeHub.uploaded, FakeHub.down = {}, {}, False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield FakeHub
    server.shutdown()


def test_a_run_is_uploaded_when_it_is_done(hub: type[FakeHub], tmp_path: Path) -> None:
    pushed = {"run__push_to_hub": "true", "run__hub_model_id": "me/mine", "run__max_steps": 1}
    assert vpd_train(tmp_path / "run", **pushed) == 0
    assert hub.made["name"] == "mine" and hub.made["organization"] == "me"
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    local = {path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()}
    assert hub.uploaded == local and b"hub_model_id" not in local["README.md"]


def test_a_failed_upload_loses_nothing_and_can_be_made_again(
    hub: type[FakeHub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.down = True
    pushed = {"run__push_to_hub": "true", "run__hub_model_id": "me/mine", "run__max_steps": 1}
    assert vpd_train(tmp_path / "run", **pushed) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot upload" in error and "403" in error
    again = error.split("try again with: vpd ")[1].split()
    assert vpd.Run(tmp_path / "run").record.phase == "done"
    hub.down = False
    assert main([word.rstrip(".") for word in again]) == 0 and "model.safetensors" in hub.uploaded


def test_a_hub_that_cannot_be_reached_is_one_line(runs: Path, hub: type[FakeHub]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(StorageError, match=r"cannot upload .* to me/mine; got .*try again with"):
        push_run(runs / "whole", "me/mine", private=True, api=huggingface_hub.HfApi(endpoint=nobody))
    assert not {Exception, BaseException} & set(UPLOAD_ERRORS)


class Recording:
    """The part of ``HfApi`` that is used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, folder_path, commit_message))


def test_an_adapter_is_uploaded_where_it_is_asked_for(runs: Path) -> None:
    api = Recording()
    assert push_run(runs / "lora", "me/mine", private=False, form="adapter", api=api) == "https://hub/me/mine"
    expected = ("upload", "me/mine", runs / "lora" / "adapter", "Trained with vpd: adapter")
    assert api.calls == [("create", "me/mine", False, True), expected]


def test_without_a_token_or_a_place_the_run_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for changes, message in (
        ({"run__hub_model_id": "me/mine"}, "uploading to the Hub needs a token; got none. Run hf auth login"),
        ({}, "run.push_to_hub needs a place; got run.hub_model_id None; expected owner/name"),
        ({"run__hub_model_id": "a/b/c"}, "got run.hub_model_id a/b/c"),
    ):
        assert vpd_train(tmp_path / "run", run__push_to_hub="true", **changes) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
