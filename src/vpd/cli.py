"""The command ``vpd``: train, eval, check, replay, demo, reproduce, model.

A user's mistake is one line on stderr and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import vpd
from vpd.errors import ConfigError, Interrupted, VPDError
from vpd.printable import LogFormatter, for_terminal
from vpd.report.streams import FAREWELL, keep_open
from vpd.settings import expand_path

REPRODUCE = """\
Writes claims.json, reproduction.md (claims with their numbers and verdicts) and a picture of each setting to
--output_dir. Raw runs stay in its runs/ and are used again while configuration and code are the same, so the same
command continues an interrupted suite.

settings (SETTING): sparse sibling self_critique rigid cold noisy partial changing

Base models for seeds other than 0 are made on first use (under a minute each) and cached in $VPD_CACHE, else
$XDG_CACHE_HOME/vpd, else ~/.cache/vpd. The default suite takes about 15 minutes with --jobs 2.
"""


STOPPED_AND_SAVED = 75
EXIT_CODES = """\
exit codes
  0    done
  1    a fault of vpd: a traceback; please report it
  2    a mistake or an outside fault (settings, data, grader, disk), in one line; nothing was lost
  75   stopped by Ctrl-C or SIGTERM, and a checkpoint of the last whole step is saved: run it again with
       --run.resume true
  130, 143  stopped by Ctrl-C or SIGTERM before there was a step to save, or at once by a second Ctrl-C
"""
SECTIONS = ("model", "env", "feedback", "prompts", "rollout", "engine", "algorithm", "optim", "run")
SETTINGS = """\
settings
  In the file, or as --section.key value (or --section.key=value), which wins over the file. Each line: the key, what it
  means, (its range), [its default]."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code is one of EXIT_CODES."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.excepthook = _show_traceback
    outputs = keep_open()
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and not options.takes_settings:
            parser.error(for_terminal(f"unknown arguments: {' '.join(rest)}"))
        for output in outputs:
            output.farewell = FAREWELL
        return _run(options, rest)
    except VPDError as error:
        print(for_terminal(f"vpd: error: {error}"), file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(for_terminal(f"vpd: {stop}"), file=sys.stderr)
        return STOPPED_AND_SAVED if stop.saved else 128 + stop.signal
    except KeyboardInterrupt:
        print("vpd: interrupted; checkpoints already written are whole", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the command; a part that is not ours may exit in it, which is never a success."""
    try:
        with _log_shown():
            options.command(options, rest)
    except SystemExit as error:
        message = f"vpd: error: something in the run called exit({error.code!r}); it is not done"
        print(for_terminal(message), file=sys.stderr)
        return 1
    return 0


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of ours, with its traceback; its message may quote text from outside."""
    sys.stderr.write(for_terminal("".join(traceback.format_exception(kind, error, trace))))


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """What the library logs, such as which sandbox runs programs, as plain lines on stdout."""
    logger, handler = logging.getLogger("vpd"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(LogFormatter("%(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Command(argparse.ArgumentParser):
    """A command; ``sections`` of the settings follow its help, and are only loaded when that is asked for."""

    sections: tuple[str, ...] = ()

    def format_help(self) -> str:
        if self.sections:
            self.epilog = f"{EXIT_CODES}\n{_settings_help(self.sections)}"
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    about = "Post-train language models from language feedback."
    parser = argparse.ArgumentParser(
        prog="vpd", description=about, epilog=EXIT_CODES, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"vpd {vpd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Command)

    def command(name: str, function: Any, text: str, *, settings: Sequence[str] = ()) -> _Command:
        sub: _Command = commands.add_parser(
            name, help=text, description=textwrap.fill(text, 100), formatter_class=_Help, allow_abbrev=False
        )
        sub.set_defaults(command=function, takes_settings=bool(settings))
        sub.sections = tuple(settings)
        if settings:
            sub.add_argument("--config", action=_Once, help="YAML file of settings; --section.key value wins over it")
        return sub

    command(
        "train",
        _train,
        "Train a model with VPD, evidence-gated VPD, SDPO, GKD, GRPO or a hybrid. Without any argument: VPD on the "
        "shipped tiny base and the task digits, less than a minute on one core.",
        settings=SECTIONS,
    )
    _eval_options(
        command(
            "eval",
            _eval,
            "Sample answers to the held-out tasks and print avg@k and pass@k with standard errors.",
            settings=SECTIONS,
        )
    )
    _check_options(
        command(
            "check",
            _check,
            "Test an environment: tasks, grades and feedback as training relies on them.",
            settings=("env",),
        )
    )
    command(
        "replay",
        _replay,
        "Run an iteration again that stopped at a number that is not finite, and show where the first one is.",
    ).add_argument("dump", type=Path, help="the folder that the error names, OUT/nonfinite-step-N")
    _demo_options(
        command(
            "demo",
            _demo,
            "GRPO, SDPO, VPD and evidence-gated VPD learn one task from one tiny model, in about a minute on two "
            "cores.",
        )
    )
    _reproduce_options(command("reproduce", _reproduce, "Test the paper's claims in miniature, on a CPU."))
    _model_options(command("model", _model, "Make a from_pretrained folder: smollm2-135m, or tiny made again."))
    return parser


class _Once(argparse.Action):
    """Takes a path, and no second one: two files are not merged."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if vars(namespace)[self.dest] is not None:
            raise ConfigError(f"{option} is given twice", expected="one file; --section.key value changes a setting")
        setattr(namespace, self.dest, expand_path(values, str(option)))


def _path(text: str) -> Path:
    return Path(expand_path(text, "the command line"))


def _eval_options(evaluation: _Command) -> None:
    evaluation.add_argument("--num_samples", type=int, default=8, help="k, answers per task, at least 1 (default 8)")
    evaluation.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature, at least 0; 0 is greedy (default 1)"
    )
    evaluation.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling, above 0 to 1 (default 1: off)")
    evaluation.add_argument("--limit", type=int, help="at most so many held-out tasks (default all)")
    evaluation.add_argument(
        "--teacher",
        action="store_true",
        help="answer failed attempts again, with their feedback and (unless run.eval_control is false) without",
    )
    evaluation.add_argument("--output", type=_path, help="also write the numbers to this JSON file")


def _check_options(check: _Command) -> None:
    check.add_argument(
        "env", help="a shipped environment's name or my_env.py:MyEnv; settings follow as --env.key value"
    )
    check.add_argument("--tasks", type=int, default=32, help="training tasks to draw (default 32)")
    check.add_argument("--seed", type=int, default=0, help="seed that the tasks are drawn with (default 0)")


def _demo_options(demo: _Command) -> None:
    demo.add_argument(
        "--output_dir",
        type=_path,
        default=Path("demo-out"),
        help="where results.json and curves.png go (default demo-out)",
    )
    demo.add_argument("--seeds", type=int, default=1, help="runs per method (default 1)")
    demo.add_argument("--steps", type=int, default=100, help="iterations per run (default 100)")
    demo.add_argument("--seed", type=int, default=0, help="first seed (default 0)")


def _reproduce_options(suite: _Command) -> None:
    suite.epilog = REPRODUCE
    suite.add_argument("settings", nargs="*", metavar="SETTING", help="only the claims of these settings (default all)")
    size = suite.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two minutes: shipped bases, one seed, two settings")
    size.add_argument("--all", action="store_true", help="all claims, at most 90 minutes on two cores")
    suite.add_argument("--only", action="append", default=[], metavar="CLAIM", help="test only this claim (repeatable)")
    suite.add_argument(
        "--seeds", type=int, help="runs per method (default 3, with --quick 1; side claims get at most 3)"
    )
    suite.add_argument("--first_seed", type=int, default=0, help="first seed (default 0)")
    suite.add_argument("--jobs", type=int, default=1, help="parallel processes of one thread each (default 1)")
    suite.add_argument(
        "--tune", action="store_true", help="choose learning rates instead of testing claims; writes rates.yaml"
    )
    suite.add_argument("--rates", type=_path, help="rates.yaml written by --tune (default: the shipped table)")
    suite.add_argument("--output_dir", type=_path, default=Path("reproduce-out"), help="(default reproduce-out)")


def _model_options(model: _Command) -> None:
    model.add_argument("name", choices=["smollm2-135m", "tiny"], help="which model to make")
    model.add_argument("folder", type=_path, help="where it is written")
    model.add_argument("--seed", type=int, help="tiny only: seed of its weights and warm-up (default 0)")


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load

    config = load(options.config, rest)
    from vpd.recipes.train import train  # after the settings are checked: it loads torch

    train(config)


def _eval(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load
    from vpd.evaluation import EvalOptions
    from vpd.recipes.results import check_output, write_results

    chosen = EvalOptions(**{field.name: vars(options)[field.name] for field in dataclasses.fields(EvalOptions)})
    config = load(options.config, rest)
    if options.output:
        check_output(options.output)
    from vpd.recipes.evaluation import evaluate, show  # loads torch

    result = evaluate(config, chosen)
    show(result, chosen.num_samples)
    if options.output:
        write_results(options.output, {"student": result.student, "teacher": result.teacher, "control": result.control})


def _check(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.config import load_env
    from vpd.recipes.check import check

    check(load_env(options.config, ["--env.name", options.env, *rest]), tasks=options.tasks, seed=options.seed)


def _replay(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.recipes.replay import replay

    replay(options.dump)


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.lab.demo import demo

    demo(options.output_dir, seeds=options.seeds, steps=options.steps, first_seed=options.seed)


def _reproduce(options: argparse.Namespace, rest: list[str]) -> None:
    from vpd.lab.reproduce.methods import RATES
    from vpd.lab.reproduce.suite import Options, reproduce, tune_rates

    chosen = Options(
        output=options.output_dir,
        settings=tuple(options.settings),
        suite="quick" if options.quick else "all" if options.all else "default",
        only=tuple(options.only),
        seeds=options.seeds,
        first_seed=options.first_seed,
        jobs=options.jobs,
        rates=options.rates or RATES,
    )
    if options.tune:
        tune_rates(chosen)
    else:
        reproduce(chosen)


def _model(options: argparse.Namespace, rest: list[str]) -> None:
    if options.name == "tiny":
        from vpd.lab import tiny

        tiny.build(options.folder, tiny.SEED if options.seed is None else options.seed)
    else:
        from vpd.lab import smollm2

        smollm2.build(options.folder)
    print(for_terminal(f"{options.folder} is ready: --model.name_or_path {options.folder}"))


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the epilog's layout."""


def _settings_help(sections: Sequence[str]) -> str:
    """Every setting of the sections with its meaning, range and default, as the dataclasses declare them."""
    from vpd.config import OPTIM_OF_SHIPPED_BASES
    from vpd.config.sections import CHOICES, PLAIN, settings_class

    lines = [SETTINGS]
    for section in sections:
        if section in CHOICES:
            lines += _choice_help(section)
            continue
        lines += _section_help(section, settings_class(PLAIN[section]))
        if section == "model":
            lines += _section_help("model.lora", settings_class("vpd.model.settings:LoraSettings"))
        if section == "optim":
            changed = ", ".join(f"{key} {value}" for key, value in OPTIM_OF_SHIPPED_BASES.items())
            lines.append(f"    (where model.name_or_path is a shipped base such as tiny, the defaults are: {changed})")
    return "\n".join(lines)


def _choice_help(section: str) -> list[str]:
    from vpd.config.sections import CHOICES, settings_class

    choice = CHOICES[section]
    names = ", ".join(choice.table)
    lines = [f"\n  {section}.name: one of {names} (default {choice.default})."]
    if section == "feedback":
        lines = [f"\n  feedback: a list of names or {{name: ..., key: value}}; {names} (default [environment])."]
    own = f"Your own {choice.kind} ({choice.contract}): --{choice.example}; further keys are passed to it."
    lines += textwrap.wrap(own, 118, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    for name, place in choice.table.items():
        lines += _section_help(f"{section} {name}", settings_class(place))
    return lines


def _section_help(title: str, kind: Any) -> list[str]:
    from vpd.settings import declarations

    about = " ".join((kind.__doc__ or "").partition("\n\n")[0].partition("  Raises ")[0].replace("``", "").split())
    lines = ["", *textwrap.wrap(f"{title}: {about}", 118, initial_indent="  ", subsequent_indent="    ")]
    declared = declarations(kind)
    for field in dataclasses.fields(kind):
        if field.name == "name" or not field.init:
            continue
        declaration = declared[field.name]
        text = declaration.meaning + (f" ({declaration.range})" if declaration.range else "")
        text += _default(kind, field, declaration.optional)
        lines += textwrap.wrap(
            f"{field.name:<30}{text}", 118, initial_indent="    ", subsequent_indent=" " * 34, break_long_words=False
        )
    return lines


def _default(kind: Any, field: "dataclasses.Field[Any]", optional: bool) -> str:
    """`` [default]``; nothing for a setting that must be given."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif value is None and not optional:
        value = vars(kind())[field.name]  # decided when the object is made
    if isinstance(value, tuple | list):
        return f" {_show(value)}"
    return "" if value is dataclasses.MISSING else f" [{_show(value)}]"


def _show(value: Any) -> str:
    """A value as a configuration spells it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_show, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main())
