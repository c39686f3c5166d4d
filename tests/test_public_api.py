"""``import vpd``: the names, their signatures, and how little is loaded for them."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vpd

NAMES = [
    "Algorithm",
    "Completion",
    "Config",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineParts",
    "Env",
    "EnvError",
    "EvalOptions",
    "Evaluation",
    "Example",
    "Feedback",
    "FeedbackError",
    "Grade",
    "Group",
    "Message",
    "Metrics",
    "ModelError",
    "Needs",
    "Observer",
    "Parts",
    "Rollout",
    "Run",
    "SandboxError",
    "Section",
    "Settings",
    "Solution",
    "SolveOptions",
    "StorageError",
    "Task",
    "TrainingError",
    "Try",
    "VPDError",
    "Writer",
    "assemble",
    "check_env",
    "collect",
    "evaluate",
    "extend",
    "load_config",
    "parse_config",
    "per_row",
    "sft",
    "solve",
    "train",
]

PARAMETERS = {
    "train": "model, tasks, grader, *, tokenizer, algorithm, feedback, callbacks, more",
    "assemble": "config, *, model, tokenizer, env, feedback, observers, ranks",
    "collect": "path, model, tasks, grader, *, options, tokenizer, more",
    "sft": "model, data, *, tokenizer, algorithm, callbacks, more",
    "solve": "model, tasks, grader, *, options, output, tokenizer, algorithm, feedback, more",
    "evaluate": "model, tasks, grader, *, options, tokenizer, algorithm, feedback, more",
    "Run": "folder",
    "load_config": "path, overrides",
    "parse_config": "data",
    "per_row": "grade_one",
    "extend": "group, sections, when",
    "Task": "*, id, messages, payload, tools",
    "Grade": "*, reward, success, feedback, informative, metrics, graded",
    "Section": "*, kind, source, text, quotes, tokens, cut, control_tokens, clipped",
    "EvalOptions": "*, num_samples, temperature, top_p, limit, teacher",
    "SolveOptions": "*, task, train, budget, repeats, compare",
    "Needs": "*, group, feedback, teacher, initial_copy, external_model, student_fraction, other_answers, "
    "own_chat_template, top_k, learns_from_retries, remote_teacher, preferences, on_policy, learns_answers",
    "EngineParts": "*, tokenizer, eos_ids, max_rows, longest, ranks, learner_is_narrow",
}


def parameters(function: object) -> str:
    words, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        words.append(parameter.name)
    return ", ".join(words)


def test_the_public_names() -> None:
    assert sorted(vpd.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(vpd))
    for name in NAMES:
        assert getattr(vpd, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        vpd.nonsense  # noqa: B018


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_public_signatures(name: str) -> None:
    assert parameters(getattr(vpd, name)) == PARAMETERS[name]


def test_a_public_name_is_no_module_of_ours() -> None:
    """Importing ``vpd.x`` sets the attribute x of vpd, which must not hide a public name."""
    folder = Path(vpd.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(NAMES)


def test_a_public_name_is_the_one_of_its_module() -> None:
    assert vpd.load_config is importlib.import_module("vpd.config").load
    assert vpd.Task is importlib.import_module("vpd.types").Task


HOOK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "numpy", "accelerate", "pyarrow", "matplotlib"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
"""
ENV = """
from vpd import Grade, Task, per_row

class Mine:
    def task(self, index, *, seed):
        return Task(id=str(index), messages=({"role": "user", "content": f"question {index}"},), payload=str(index))
    def eval_tasks(self, limit):
        return [self.task(i, seed=0) for i in range(-4, 0)][:limit]
    def solution(self, task):
        return task.payload
    @per_row
    def grade(self, task, text):
        right = text == task.payload
        return Grade(reward=float(right), feedback=None if right else f"{len(text)} letters, which is too many.")
"""
LIGHT = {
    "vpd init": "from vpd.cli import main; assert main(['init', '--yes']) == 0",
    "vpd convert": "from vpd.cli import main; assert main(['convert', 'trl.yaml', '--env.name', 'digits']) == 0",
    "import vpd": "import vpd; vpd.Task; vpd.Grade; vpd.per_row; vpd.VPDError; vpd.check_env",
    "import vpd.config": "import vpd.config",
    "vpd --help": "from vpd.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "vpd check": "from vpd.cli import main; assert main(['check', 'mine.py:Mine']) == 0",
    "vpd check digits": "from vpd.cli import main; assert main(['check', 'digits', '--env.length', '3']) == 0",
}


@pytest.mark.parametrize("what", LIGHT)
def test_light_commands_load_nothing_heavy_and_start_at_once(what: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENV)
    (tmp_path / "trl.yaml").write_text("model_name_or_path: tiny\nreward_funcs: [a.b]\ndataset_name: x.jsonl\n")
    clock = """
import time
start = time.process_time()
sum(i * i for i in range(2_000_000))  # what this machine, as busy as it is, takes for a fixed piece of work
print('times as long', start / (time.process_time() - start))
"""
    done = subprocess.run(
        [sys.executable, "-c", HOOK + LIGHT[what] + clock],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(vpd.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.split()[-1]) < 15.0  # torch alone is twenty; without it 6 to 12 on a busy machine


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_environment_says_otherwise(before: str | None, after: str) -> None:
    """Busy waiting makes a shared machine several times slower; torch reads the variable when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(Path(vpd.__file__).parent.parent)} | (
        {"OMP_WAIT_POLICY": before} if before else {}
    )
    code = HOOK + "import os, vpd; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == after, done.stderr


def test_the_hook_notices() -> None:
    done = subprocess.run([sys.executable, "-c", HOOK + "import torch"], capture_output=True, text=True, check=False)
    assert "torch was imported" in done.stderr
