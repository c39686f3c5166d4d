"""The documents against the code: every name exists, every command parses, every link leads somewhere, examples run."""

import argparse
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import vpd
from vpd import cli
from vpd.commands import train
from vpd.config import SECTIONS, load, load_env, parse
from vpd.config.dry_run import load_dry_run
from vpd.config.sections import BESIDE, CHOICES, PLAIN, settings_class
from vpd.engines import Engine
from vpd.envs import Env
from vpd.learners import TrainedLearner
from vpd.model.scorer import Scorer

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "models.md"  # written by make models, and full of transformers' names
DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in (ROOT / "docs").glob("*.md") if p != TABLE)])
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCS}
HISTORY = "docs/LOG.md"  # quotes commands, names and options of their commits, of others, and with mistakes

#: Names that are not this project's, with whose they are.
FOREIGN = {
    "AutoModelForCausalLM.from_pretrained": "transformers",
    "logging.basicConfig": "logging",
    **dict.fromkeys(("datasets.Dataset",), "datasets"),
    "torch.compile": "torch",
    "transformers.generate": "transformers",
    **dict.fromkeys(("signal.alarm", "sys.exit", "sys.stdout", "os._exit", "os.fork", "logging.disable"), "Python"),
    "reward_model.ground_truth": "a column of verl's records",
    **dict.fromkeys(("data.train_batch_size", "trainer.total_epochs"), "verl"),
    "floor.count": "benchmarks/floor.py",
    "trl.experimental": "TRL",
}
#: Files that a run writes or a user has; none of them is in the repository.
NOT_IN_THE_REPOSITORY = {
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "alarms.jsonl",
    "trainer.json",
    "vpd_prompts.json",
    "server.json",
    "groups.json",
    "generation_config.json",
}
#: What the documents call an object of these protocols.
OBJECTS: dict[str, Any] = {"learner": TrainedLearner, "env": Env, "engine": Engine, "scorer": Scorer, "run": vpd.Run}
#: Commands with words that stand for something else; their first word is a command all the same.
PATTERNS = ("vpd check NAME --env.key value",)

COMMANDS = tuple(command.NAME for command in cli.COMMANDS)

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+)(?:\(.*\))?(?:\.\w+\(.*\))?")
PATH = re.compile(r"[\w./-]+\.(?:py|md|yaml|yml|json|jsonl|png|parquet|toml)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(text) if kind == language]


def named_blocks(text: str) -> dict[str, str]:
    """The blocks that begin by naming their file (``# my_env.py``), by that name."""
    found = [block for language in ("python", "yaml") for block in blocks(text, language)]
    return {named[1]: block for block in found if (named := re.match(r"# (\w+\.\w+)\n", block))}


def inline(text: str) -> Iterator[str]:
    """Inline code, which may go on in the next line of a paragraph or stand in the cell of a table."""
    prose = FENCED.sub("", text)
    lines = [("\n" + line + "\n") if line.startswith("|") else line for line in prose.split("\n") if line[:4] != "    "]
    for paragraph in "\n".join(lines).split("\n\n"):
        yield from (" ".join(found.split()) for found in INLINE.findall(paragraph))


def shell(text: str) -> Iterator[str]:
    """The lines of indented blocks and of those for a shell, continued ones joined."""
    joined = FENCED.sub("", text).replace("\\\n", " ")
    yield from (line.strip() for line in joined.split("\n") if line.startswith("    "))
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip().removeprefix("do ") for part in line.split(";"))


def of_all_documents(kind: Any) -> list[Any]:
    return [pytest.param(doc, found, id=f"{doc}: {found}"[:90]) for doc, text in TEXTS.items() for found in kind(text)]


def of_documents_of_today(kind: Any) -> list[Any]:
    return [found for found in of_all_documents(kind) if found.values[0] != HISTORY]


@functools.cache
def classes() -> dict[str, list[Any]]:
    """Every class of the package, by its name."""
    found: dict[str, list[Any]] = {}
    for module in pkgutil.walk_packages(vpd.__path__, "vpd."):
        members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        for name, kind in members:
            if kind.__module__.startswith("vpd.") and kind not in found.setdefault(name, []):
                found[name].append(kind)
    return found


def settings_of(section: str) -> set[str]:
    """Every key that a section may have."""
    places = CHOICES[section].table.values() if section in CHOICES else [PLAIN[section]]
    return {"name"} | {f.name for place in places for f in dataclasses.fields(settings_class(place))}


def is_setting(name: str) -> bool:
    section, _, key = name.partition(".")
    if section in BESIDE:
        return key in {field.name for field in dataclasses.fields(settings_class(BESIDE[section]))}
    return section in SECTIONS and key.split(".")[0] in settings_of(section)


def is_option_of_settings(word: str) -> bool:
    return word == "--feedback" or is_setting(word.removeprefix("--").partition("=")[0])


def has(owner: Any, members: list[str]) -> bool:
    """Whether ``owner.a.b`` exists; a field of a dataclass or protocol counts, and ends the walk."""
    for name in members:
        fields = {key for kind in getattr(owner, "__mro__", ()) for key in vars(kind).get("__annotations__", {})}
        if not hasattr(owner, name):
            return name in fields and name == members[-1]
        owner = getattr(owner, name)
    return True


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one: with or without ``vpd.``, or from a class's name on."""
    parts = name.removeprefix("vpd.").split(".")
    for length in range(len(parts), -1, -1):
        try:
            module = importlib.import_module(".".join(["vpd", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        if length and has(module, parts[length:]):
            return True
        if not length and name.startswith("vpd.") and has(module, parts):
            return True
    starts = [*classes().get(parts[0], []), *([OBJECTS[parts[0]]] if parts[0] in OBJECTS else [])]
    named = classes().get(parts[1], []) if len(parts) > 1 else []
    inside = [kind for kind in named if kind.__module__.endswith(f".{parts[0]}")]
    return any(has(kind, parts[2:]) for kind in inside) or any(has(kind, parts[1:]) for kind in starts)


def names(text: str) -> Iterator[str]:
    for code in dict.fromkeys(inline(text)):
        found = DOTTED.fullmatch(code)
        if found and not PATH.fullmatch(code):
            yield found[1]


@pytest.mark.parametrize(("document", "name"), of_documents_of_today(names))
def test_a_name_in_a_document_exists(document: str, name: str) -> None:
    assert name in FOREIGN or is_setting(name) or exists(name)


def test_every_exception_is_needed() -> None:
    quoted = {name for document, text in TEXTS.items() if document != HISTORY for name in names(text)}
    assert not set(FOREIGN) - quoted
    assert not [name for name in FOREIGN if exists(name)]
    inline_codes = {code for text in TEXTS.values() for code in inline(text)}
    assert not NOT_IN_THE_REPOSITORY - inline_codes


@pytest.mark.parametrize(
    "name",
    [
        "losses.bcoo",
        "vpd.losses.bcoo",
        "algorithms.vpd.VPD.stepp",
        "Example.teacherr",
        "algorithm.e_evry",
        "vpd.trainn",
    ],
)
def test_a_wrong_name_is_found(name: str) -> None:
    assert not is_setting(name) and not exists(name)


def paths(text: str) -> Iterator[str]:
    yield from (code for code in dict.fromkeys(inline(text)) if PATH.fullmatch(code))


@pytest.mark.parametrize(("document", "path"), of_documents_of_today(paths))
def test_a_file_in_a_document_exists(document: str, path: str) -> None:
    if path in NOT_IN_THE_REPOSITORY or path in {name for text in TEXTS.values() for name in named_blocks(text)}:
        return
    inside = [found for folder in ("src", "benchmarks") for found in (ROOT / folder).rglob(Path(path).name)]
    assert (ROOT / path).exists() or any(str(found).endswith(f"/{path}") for found in inside)


@pytest.mark.parametrize(("document", "link"), of_all_documents(lambda text: dict.fromkeys(LINK.findall(text))))
def test_a_link_leads_to_a_file(document: str, link: str) -> None:
    assert link.startswith(("https://", "http://")) or ((ROOT / document).parent / link).exists()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the documents' own blocks begin by naming (``# my_env.py``), and the examples."""
    for text in TEXTS.values():
        for name, block in named_blocks(text).items():
            (tmp_path / name).write_text(block)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def commands(text: str) -> Iterator[str]:
    """Every ``vpd ...`` of indented blocks and inline code, without the name alone."""
    for line in [*shell(text), *inline(text)]:
        for part in line.split(" && "):
            if part.startswith("vpd "):
                yield part


def check_settings(options: argparse.Namespace, rest: list[str]) -> None:
    """Load the settings of a command without running it."""
    if options.command.NAME == "check":
        load_env(None, ["--env.name", options.env, *rest])
    else:
        load(vars(options).get("config"), rest)


@pytest.mark.parametrize(("document", "line"), of_all_documents(commands))
def test_a_command_in_a_document_parses(document: str, line: str, workplace: Path) -> None:
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    if line in PATTERNS or words[-1] == "--help" or len(words) == 1:  # a command may be named without its arguments
        assert words[0] in (*COMMANDS, "--help")
        return
    options, rest = cli._parser().parse_known_args(words)
    assert options.command.SETTINGS or not rest, f"unknown arguments: {rest}"
    if document == HISTORY:
        assert not [word for word in rest if word.startswith("--") and not is_option_of_settings(word)]
    elif options.command.SETTINGS:
        if options.command is train:
            _, rest = load_dry_run(options.config, rest, wanted=options.dry_run)
        if "verifiers" in rest:
            pytest.importorskip("verifiers")  # its settings ask for the package
        check_settings(options, rest)


@pytest.mark.parametrize("line", ["vpd train --algorithm.e_evry 3", "vpd demo --sed 1", "vpd train --run.max_steps 0"])
def test_a_wrong_command_is_found(line: str, workplace: Path) -> None:
    with pytest.raises((vpd.ConfigError, AssertionError)):
        test_a_command_in_a_document_parses("README.md", line, workplace)


def fragments(text: str) -> Iterator[str]:
    """``--key value`` without a command before it."""
    yield from (code for code in dict.fromkeys(inline(text)) if code.startswith("--"))


@pytest.mark.parametrize(("document", "fragment"), of_documents_of_today(fragments))
def test_an_option_in_a_document_is_known(document: str, fragment: str) -> None:
    known = {action for command in COMMANDS for action in option_names(command)}
    for word in shlex.split(fragment):
        if word.startswith("--"):
            assert word in known or is_option_of_settings(word) or word == "--section.key", word


def option_names(command: str) -> set[str]:
    commands_of = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name for action in commands_of.choices[command]._actions for name in action.option_strings}


@pytest.mark.parametrize(("document", "line"), of_all_documents(lambda text: dict.fromkeys(shell(text))))
def test_other_commands_name_targets_and_scripts(document: str, line: str) -> None:
    words = shlex.split(line, comments=True) if line.startswith(("make ", "python ")) else []
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:1] == ["python"]:
        source = (ROOT / words[1]).read_text()
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source]


@pytest.mark.parametrize("document", TEXTS)
def test_the_extras_that_a_document_installs_exist(document: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install[^\n`]*'[^'\n]*\[([a-z,-]+)\]'", TEXTS[document])
    assert not {extra for extras in named for extra in extras.split(",")} - set(known)


@pytest.mark.parametrize(("document", "block"), of_all_documents(lambda text: blocks(text, "yaml")))
def test_a_configuration_in_a_document_parses(document: str, block: str, workplace: Path) -> None:
    data = yaml.safe_load(block)
    assert set(data) <= set(SECTIONS)
    parse(data)


def test_the_readme_s_file_shows_every_section() -> None:
    shown = next(yaml.safe_load(block) for block in blocks(TEXTS["README.md"], "yaml") if "run.yaml" in block)
    assert set(shown) == set(SECTIONS)


SMALL = {
    "rollout": {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6},
    "run": {"max_steps": 1, "eval_limit": 1},
}


def test_the_environment_of_the_guide_passes_its_check(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "my_env.py:Capitals"]) == 0
    assert "one was asked for, a city's name" in capsys.readouterr().out


def test_the_guide_s_source_method_and_engine_train(workplace: Path) -> None:
    line = next(line for line in shell(TEXTS["docs/extending.md"]) if "my_algorithm.py" in line)
    small = [f"--{section}.{key}={value}" for section, part in SMALL.items() for key, value in part.items()]
    assert cli.main([*shlex.split(line)[1:], *small]) == 0
    last = (workplace / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "imitate/rows" in last and "teacher/from_environment+length" in last


@pytest.mark.parametrize(("document", "block"), of_all_documents(lambda text: blocks(text, "python")))
def test_a_python_block_compiles(document: str, block: str) -> None:
    compile(block, document, "exec")


@pytest.mark.parametrize("name", ["math", "science", "tooluse"])
def test_an_environment_reads_the_record_of_its_section(workplace: Path, name: str) -> None:
    section = TEXTS["docs/environments.md"].split(f"\n## {name}\n")[1].split("\n## ")[0]
    (workplace / "record.json").write_text(f"[{blocks(section, 'json')[0]}]")
    env = load_env(None, ["--env.name", name, "--env.path", "record.json", "--env.eval_share", "0"])
    task = env.task(0, seed=0)
    assert [grade.reward for grade in env.grade([task], [env.solution(task)])] == [1.0]


def test_the_first_hour_s_program_trains(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = named_blocks(TEXTS["docs/first_hour.md"])["hour.py"]
    exec(in_one_step(program).replace("make(200)", "make(16)"), {})
    assert "Best(metric='eval/accuracy', step=1" in capsys.readouterr().out


def test_the_readme_s_python_runs_and_is_short(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = next(block for block in blocks(TEXTS["README.md"], "python") if "first_run.py" in block)
    assert shown.count("\n") <= 20
    exec(in_one_step(shown), {})
    assert "Best(metric='eval/accuracy', step=1" in capsys.readouterr().out
    assert (workplace / "first" / "model" / "vpd_prompts.json").is_file()


def in_one_step(block: str) -> str:
    return block.replace(
        '"max_steps": 30, "eval_steps": 10, "eval_limit": 32', '"max_steps": 1, "eval_steps": 1, "eval_limit": 2'
    )


def test_the_page_about_python_runs_from_front_to_end(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks(TEXTS["docs/python.md"], "python"):
        exec(in_one_step(block), names)
    out = capsys.readouterr().out
    assert "the environment was passed as an object (6" in out and "Pass env= (or tasks= and grader=) again" in out
    assert names["solution"].tries["adapt"][0].solved and not names["solution"].tries["best_of"][0].solved
    assert names["result"].retries and (workplace / "exported" / "README.md").is_file()


def test_every_promise_names_tests_that_exist() -> None:
    promises = TEXTS["docs/reliability.md"].split("## Promises")[1].split("\n## ")[0]
    rows = [line for line in promises.splitlines() if line[:2] == "| "][1:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
