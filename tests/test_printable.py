"""Text from outside, wherever it is shown or kept: a grader's exception, feedback, an id, a setting."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import LetterTokenizer
from helpers import vpd_train

from vpd.cli import main
from vpd.errors import VPDError
from vpd.monitor import Alarm
from vpd.printable import LogFormatter, for_terminal, printable
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.report.console import ConsoleProgress, Terminal

CLIPBOARD = "\x1b]52;c;aGk=\x07"
REVERSED = "\u202e"
HALF = "\ud83d"
HOSTILE = f"{CLIPBOARD}{REVERSED}{HALF}\x9b31m\x08"


def hidden(text: str) -> list[str]:
    """The characters of a text that a terminal would act on, or could not take."""
    return [c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2066\ud83d")]


@pytest.mark.parametrize(
    "text", ["plain", "zwei\nZeilen\t!", "\u4e2d\u3000\u6587", "\u0645\u06cc\u200c", "\N{MAN}\u200d\N{ROCKET}"]
)
def test_text_that_people_write_stays_what_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_a_terminal_would_act_on_is_shown_instead() -> None:
    assert printable(HOSTILE) == r"\x1b]52;c;aGk=\x07\u202e\ud83d\x9b31m\x08"


def test_an_error_is_one_line_of_bounded_length_whatever_it_quotes() -> None:
    error = VPDError(f"what {HOSTILE}", got="x" * 10**7, expected="one\ntwo", do=f"do {HOSTILE}")
    assert not hidden(str(error)) and "\n" not in str(error) and len(str(error)) < 10_000
    assert "9998000 characters left out" in str(error)


def test_a_setting_that_repeats_itself_makes_a_short_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ", ".join(f"&a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 8))
    (tmp_path / "run.yaml").write_text(f"rollout:\n  num_generations: [&a0 [x, x], {levels}]\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert len(capsys.readouterr().err) < 1000


@pytest.fixture
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set and a file with graders, named from its folder."""
    rows = [f'{{"prompt": "apply rule A to 1 2 3 4 5 {i}", "id": "{i}"}}' for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    (tmp_path / "rewards.py").write_text(
        f"""
def raises(completions, **columns):
    raise ValueError({HOSTILE!r})

def half(completions, **columns):
    return [(0.0, "feedback " + {HOSTILE!r})] * len(completions)
"""
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(function: str, **changes: Any) -> int:
    settings = {"env__name": "dataset", "env__path": "data.jsonl", "env__eval_share": 0.25, "run__max_steps": 1}
    return vpd_train(Path("out"), env__reward=f"rewards.py:{function}", **settings, **changes)


def test_what_a_grader_raises_is_shown_and_not_obeyed(grader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset("raises") == 2
    shown = capsys.readouterr()
    assert r"\x1b]52;c;aGk=\x07" in shown.err and not hidden(shown.err)


def test_a_row_that_could_not_be_graded_is_logged_as_safely(grader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset("raises", env__max_failed=1, algorithm__name="grpo") == 0
    logged = "\n".join(line for line in capsys.readouterr().out.splitlines() if "could not be graded" in line)
    assert r"\x1b]52;c;aGk=\x07" in logged and not hidden(logged)


def test_half_a_surrogate_pair_in_feedback_is_kept_as_an_escape(grader: Path) -> None:
    assert dataset("half") == 0
    table = pq.read_table(grader / "out" / "rollouts" / "step-000001.parquet")
    assert set(table["feedback"].to_pylist()) == {f"feedback {CLIPBOARD}{REVERSED}\\ud83d\x9b31m\x08"}


def test_half_a_surrogate_pair_in_a_task_is_kept_as_an_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(
        """
from vpd import Grade, Task, per_row

class Half:
    def task(self, index, *, seed):
        return Task(id=f"\\ud83d{index}", messages=({"role": "user", "content": "apply rule A to 1 \\ud83d"},))

    def eval_tasks(self, limit):
        return [self.task(99, seed=0)]

    @per_row
    def grade(self, task, text):
        return Grade(reward=0.0, feedback="no")
"""
    )
    monkeypatch.chdir(tmp_path)
    assert vpd_train(Path("out"), env__name="own.py:Half", run__max_steps=1) == 0
    table = pq.read_table(tmp_path / "out" / "rollouts" / "step-000001.parquet")
    assert table["task"].to_pylist()[0] == "\\ud83d0"


class CountingTokenizer(LetterTokenizer):
    """Keeps the length of the longest text that it was given."""

    longest = 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.longest = max(self.longest, len(text))
        return super().encode(text, **options)


def test_megabytes_of_feedback_are_cut_before_they_are_tokenised() -> None:
    tokenizer = CountingTokenizer()
    prompter = Prompter(tokenizer, PromptSettings(), window=None, max_completion_length=8)
    fitted = prompter.fit("begin " + "x" * 10**7 + " end", budget=100)
    assert tokenizer.longest < 10_000
    assert fitted.text.startswith("begin xx") and fitted.text.endswith("xx end") and fitted.length <= 100
    assert fitted.cut == pytest.approx(10**7, rel=1e-3)  # a letter is a token here


def shown_by(use: Any) -> str:
    out = io.StringIO()
    use(Terminal(file=out, width=200))
    return out.getvalue()


def test_the_terminal_shows_texts_tables_and_alarms() -> None:
    from rich.table import Table

    def table(console: Terminal) -> None:
        made = Table("a", title=HOSTILE)
        made.add_row(HOSTILE)
        console.print(made)

    def alarm(console: Terminal) -> None:
        ConsoleProgress(3, title=HOSTILE, console=console).warn(Alarm(step=1, rule="r", saw=HOSTILE, do="d"))

    for use in (lambda console: console.print(HOSTILE), table, alarm):
        text = shown_by(use)
        assert r"\x1b]52;c;aGk=\x07" in text and not hidden(text)


def test_the_log_shows_them_too() -> None:
    record = logging.LogRecord("vpd", logging.INFO, "", 0, "%s", (HOSTILE + "y" * 10**6,), None)
    text = LogFormatter("%(message)s").format(record)
    assert text.startswith(r"\x1b]52") and not hidden(text) and len(text) < 50_000


def test_a_traceback_shows_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "digits"])  # as every command, it sets the hook
    error = RuntimeError(HOSTILE)
    sys.excepthook(RuntimeError, error, None)
    assert for_terminal(HOSTILE) in capsys.readouterr().err
