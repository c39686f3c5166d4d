"""The model card, ``README.md`` beside an exported model: method, data, settings, results, commit.

It names no folder of the machine it was trained on: of an absolute path only the last part is kept.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import vpd
from vpd.printable import one_line
from vpd.report.methods import METHODS
from vpd.report.public import public
from vpd.run_folder.reading import RunRecord

FILE = "README.md"
#: settings that say nothing about the model
ELSEWHERE = {
    "run": (
        *("output_dir", "resume", "report_to", "log_completions", "save_steps", "save_total_limit"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
    )
}
RESULTS = (
    ("student, held-out tasks", "eval/accuracy"),
    ("failed attempts again, with feedback", "eval_teacher/accuracy"),
    ("failed attempts again, without", "eval_teacher/student_accuracy"),
    ("gain from feedback", "eval_teacher/gain"),
    ("reward on training tasks", "reward"),
)


def model_card(record: RunRecord, *, step: int | None = None, commit: str | None = None) -> str:
    """The card of a run's model after ``step`` (None: the run's last); ``commit`` of vpd's source, if it is known."""
    settings: Mapping[str, Any] = public({name: _kept(name, part) for name, part in record.settings.items()})
    step = record.step if step is None else step
    name = str(public(record.method))
    base, env = str(settings.get("model", {}).get("name_or_path")), settings.get("env", {})
    source = str(env.get("path") or env.get("name") or env.get("object"))
    feedback = [str(part.get("name") or part.get("object")) for part in settings.get("feedback", [])]
    made = f"vpd {vpd.__version__}" + (f", commit {commit}" if commit else "")
    lines = [
        f"---\n{yaml.safe_dump(_header(record.settings, name), sort_keys=False)}---",
        f"# {one_line(base)}, trained with {name}",
        f"{_method(name)}, {step} step{'s' * (step != 1)}, with {made}.",
        "## Data",
        f"Tasks: `{_code(source)}`. Feedback: {', '.join(f'`{_code(part)}`' for part in feedback) or 'none'}.",
        "## Results",
        _results(record, step),
        "## Settings",
        _indented(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)),
        "## Use",
        _indented(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER OR HUB ID")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER OR HUB ID")'
        ),
    ]
    return "\n\n".join(lines) + "\n"


def _method(name: str) -> str:
    """What a method is, with its paper if it has one; a method of the user's has its name alone."""
    if name not in METHODS:
        return _code(name)
    words, paper = METHODS[name].in_words, METHODS[name].paper
    return words if paper is None else f"{words} ([arXiv {paper}](https://arxiv.org/abs/{paper}))"


def source_commit() -> str | None:
    """The git commit of vpd's own source, with ``+`` where files differ from it; None if it is not in a repository."""
    folder = Path(vpd.__file__).parent
    if not _git(folder, "ls-files", "__init__.py"):  # installed inside of somebody else's repository
        return None
    commit, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return f"{commit}+" if commit and changed else commit or None


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _header(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What the Hub reads."""
    base = str(settings.get("model", {}).get("name_or_path", ""))
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "/", "~", "(")) and not Path(base).exists()
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id:
        header["base_model"] = base
    return header | {"tags": ["vpd", one_line(method)]}


def _results(record: RunRecord, step: int) -> str:
    rows = []
    for label, metric in RESULTS:
        found = [(at, value) for at, value in record.series(metric) if at <= step]
        if found:
            (first, before), (last, after) = found[0], found[-1]
            rows.append(f"| {label} | `{metric}` | {before:.3f} (step {first}) | {after:.3f} (step {last}) |")
    if not rows:
        return "None were measured."
    return "\n".join(["| | metric | first | last |", "|---|---|---|---|", *rows])


def _kept(name: str, part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    return {key: value for key, value in part.items() if key not in ELSEWHERE.get(name, ())}


def _code(text: str) -> str:
    return one_line(text).replace("`", "'")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.rstrip().split("\n"))
