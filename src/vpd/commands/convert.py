"""Settings and data of other libraries as this one's."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd.commands import SECTIONS, path
from vpd.errors import ConfigError, DataError
from vpd.printable import for_terminal

if TYPE_CHECKING:
    from vpd.config.convert import Converted
    from vpd.config.convert.reward_functions import Extracted
    from vpd.envs.data_conversion import ConvertedData

NAME = "convert"
ABOUT = (
    "Take over settings of TRL (SDPO, GRPO, GKD), verl or SDPO's code, or a data set of theirs: every key is mapped,"
    " ignored or impossible, with the reason."
)
SETTINGS: tuple[str, ...] = SECTIONS
FORMS = ("trl-sdpo", "trl-grpo", "trl-gkd", "verl", "sdpo")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=path,
        help="YAML or JSON of settings, a Python script that makes a config of TRL's, a shell script of Hydra overrides"
        " (none is executed), or a data set: parquet, JSON lines, JSON, CSV, or a folder of save_to_disk",
    )
    parser.add_argument("--from", dest="origin", choices=FORMS, help="what it is (default: recognized by its keys)")
    parser.add_argument(
        "--output",
        type=path,
        help="the file to write (default: settings are printed); reward functions of a script that trains are then"
        " written too, to a file beside the script",
    )
    parser.add_argument(
        "--num_processes", type=int, default=1, help="processes that TRL ran in, for its batch size (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="print what became of each key as JSON")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config.convert.files import is_settings

    if options.num_processes < 1:
        raise ConfigError("--num_processes is out of range", got=options.num_processes, expected="at least 1")
    if options.output is not None and options.output.exists():
        raise ConfigError(
            f"{options.output} exists", expected="a file that is still to be written", do="Choose another --output."
        )
    if is_settings(options.file):
        _convert_settings(options, rest)
    else:
        if rest:
            raise ConfigError(f"{rest[0]} is of no use here", expected="a data set has no settings")
        _convert_data(options)


def _convert_settings(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import pairs_of
    from vpd.config.convert import Foreign, convert, count_records, lines_of, settings_of
    from vpd.config.convert.files import read
    from vpd.config.convert.reward_functions import extracted, moved
    from vpd.config.reading import inline
    from vpd.run_folder.files import write_text

    dialect, flat = read(options.file, options.origin)
    foreign = Foreign(given=flat, defaults=dialect.defaults, num_processes=options.num_processes)
    env = settings_of(dialect, foreign, lines_of(dialect, foreign)).get("env", {})
    env |= {key.removeprefix("env."): value for key, value in pairs_of(rest) if key.startswith("env.")}
    tasks = count_records(env.get("path"), subset=env.get("subset"), split=env.get("split", "train"))
    if tasks is not None and not env.get("eval_path"):
        tasks = max(round(tasks * (1 - _share(env.get("eval_share")))), 1)
    foreign = Foreign(given=flat, defaults=dialect.defaults, num_processes=options.num_processes, tasks=tasks)
    if not options.json:
        _show_lines(lines_of(dialect, foreign), f"{options.file}: {dialect.name}")
    converted = convert(dialect, foreign, rest)
    found, first, written = extracted(options.file, converted.settings), None, ""
    if found is not None and found.text is not None and options.output is not None:
        beside = _beside(options.file, found.text)
        rewards = moved(converted.settings, options.file, beside)
        converted = convert(dialect, foreign, [*rest, "--env.reward", inline(rewards)])
        write_text(beside, found.text)
        written = f"{beside} is written: {', '.join(found.functions)}, with what they need of {options.file.name}.\n"
    elif found is not None:
        first = _first(options.file, found)
    text = converted.to_yaml(options.file.name, first)
    if options.output is not None:
        write_text(options.output, text)
    if options.json:
        _print(json.dumps(_as_json(converted), indent=1, default=str))
    elif options.output is None:
        _print(text)
    else:
        count = len(converted.of("impossible"))
        lost = f"; {count} key(s) could not be taken over" if count else ""
        train = f"vpd train --config {options.output}"
        then = f".\n{first}\nThen: {train}" if first else f": {train}"
        _print(f"{written}{options.output} is written{lost}{then}")


def _share(value: Any) -> float:
    """The share of the records that is held out; 0 where the setting is none, which is refused later."""
    return value if isinstance(value, (int, float)) and 0 <= value < 1 else 0.0


def _beside(script: Path, text: str) -> Path:
    """The file for a script's reward functions, in its folder, so that what they import is found."""
    path = script.with_name(f"{script.stem}_rewards.py")
    if path.exists() and path.read_text() != text:
        raise ConfigError(
            f"{path} exists, where the reward functions of {script.name} are to be written",
            do=f"Rename it, or give --env.reward {path}:FUNCTION where it has them.",
        )
    return path


def _first(script: Path, found: "Extracted") -> str:
    """What must be done before a run, where the functions are not written to a file of their own."""
    functions = ", ".join(found.functions)
    if not found.missing:
        return f"First: give --output; it writes {functions} to a file too, for loading {script.name} would train."
    return (
        f"First: move {functions} out of {script.name} into a file that starts nothing, and set env.reward to it"
        f" ({', '.join(f'my_rewards.py:{f}' for f in found.functions)}). They use {', '.join(found.missing)}, which"
        f" only running {script.name} makes."
    )


def _show_lines(lines: Any, title: str) -> None:
    from rich import box
    from rich.table import Table

    from vpd.report.console import Terminal

    table = Table("there", "here", title=for_terminal(title), title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for column in table.columns:
        column.overflow = "fold"
    for heading, style, rows in _sections(lines):
        if rows:
            table.add_row(f"[{style}]{heading}[/]", "")
            for there, here in rows:
                table.add_row(*map(_plain, (there, here)))
            table.add_section()
    Terminal().print(table)


def _sections(lines: Any) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """A heading, its style, and a row for each key; ignored keys with one reason share one."""
    for default, heading in ((False, "mapped"), (True, "mapped: what it takes where nothing is given")):
        yield heading, "bold green", [_row(x) for x in lines if x.outcome.verdict == "mapped" and x.default == default]
    together: dict[str, list[str]] = {}
    for line in lines:
        if line.outcome.verdict == "ignored":
            together.setdefault(line.outcome.why, []).append(line.key)
    yield "ignored", "bold", [(_some(keys), why) for why, keys in together.items()]
    yield "impossible", "bold red", [_row(line) for line in lines if line.outcome.verdict == "impossible"]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _row(line: Any) -> tuple[str, str]:
    here = ", ".join(f"{key}: {_yaml(value)}" for key, value in line.outcome.settings.items())
    why = f" ({line.outcome.why})" if here and line.outcome.why else line.outcome.why
    return f"{line.key}: {_yaml(line.value)}", here + why


def _as_json(converted: "Converted") -> dict[str, Any]:
    keys = [
        {
            "key": line.key,
            "value": line.value,
            "default": line.default,
            "verdict": line.outcome.verdict,
            "settings": dict(line.outcome.settings),
            "why": line.outcome.why,
        }
        for line in converted.lines
    ]
    return {"from": converted.dialect, "settings": converted.settings, "keys": keys}


def _convert_data(options: argparse.Namespace) -> None:
    from vpd.envs.data_conversion import convert_data

    data = convert_data(str(options.file))
    if options.output is not None:
        _write_records(options.output, data)
    env = {"name": data.env["name"], "path": str(options.output or options.file), **data.env}
    if options.json:
        columns = [{"column": c.name, "becomes": c.becomes, "why": c.why} for c in data.columns]
        _print(json.dumps({"form": data.form, "records": len(data.records), "columns": columns, "env": env}, indent=1))
        return
    _show_columns(data, f"{options.file}: {len(data.records)} records, {data.form}")
    _print(f"env: {_yaml(env, 10_000)}")


def _show_columns(data: "ConvertedData", title: str) -> None:
    from rich.table import Table

    from vpd.report.console import Terminal

    table = Table("column", "here", "why", title=for_terminal(title), title_justify="left")
    for column in data.columns:
        table.add_row(*map(_plain, (column.name, column.becomes, column.why)))
    Terminal().print(table)


def _write_records(output: Path, data: "ConvertedData") -> None:
    from vpd.run_folder.files import write_text

    try:
        lines = [json.dumps(record, allow_nan=False) for record in data.records]
    except (TypeError, ValueError) as error:
        raise DataError(
            "a record holds what is no JSON, such as an image", got=str(error), expected="texts and numbers"
        ) from error
    write_text(output, "\n".join(lines) + "\n")


def _yaml(value: Any, longest: int = 60) -> str:
    """A value on one line, as YAML spells it, cut where it is longer."""
    from vpd.config.reading import inline

    text = inline(value)
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(for_terminal(text))


def _print(text: str) -> None:
    print(for_terminal(text), file=sys.stdout)
