"""``vpd report``: what goes into the page, and the page in a browser.

The tests of the page need Chromium and the package playwright; they are skipped, with the reason, where there is none.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import vpd_train
from report_runs import CLOSING, HEADER, SETTINGS, add_demonstration, write_run

from vpd.cli import main
from vpd.errors import ConfigError, StorageError
from vpd.report.console import Terminal
from vpd.report.html import Options, page, runs_in, watch, write_report
from vpd.report.html.charts import CHARTS, TIMES, charts_with
from vpd.report.html.collect import curves, differing, read_runs, seconds_of, summary, thinned
from vpd.report.html.rows import candidates, chosen_steps
from vpd.report.html.sections import parts_of
from vpd.run_folder.state import Recorder, read

HOSTILE = (
    "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
    "<style>body{display:none}</style>{{ 7 * 7 }} \u202egnp.exe\u2066 \u0645\u0631\u062d\u0628\u0627 "
    "\x1b[31mred\x00\x07 &lt;b&gt; \ud83d half 'quote\" `${document.title='broken'}` \u2028 end"
)


# --- what goes into it


def test_seeds_are_one_group_and_methods_are_others(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{m}-{s}", method=m, seed=s) for m in ("vpd", "grpo") for s in (0, 1)]
    runs, groups = read_runs(folders)
    assert [run.group for run in runs] == [0, 0, 1, 1] and [run.name for run in runs] == [
        "vpd-0",
        "vpd-1",
        "grpo-0",
        "grpo-1",
    ]
    assert [(group.label, group.runs) for group in groups] == [("VPD", (0, 1)), ("GRPO", (2, 3))]
    assert len({group.colour for group in groups}) == 2
    assert differing(groups, runs) == {"both": [("algorithm.name", ["vpd", "grpo"])], "some": []}


def test_groups_of_one_method_are_named_by_what_differs(tmp_path: Path) -> None:
    other = {"algorithm": {**SETTINGS["algorithm"], "teacher_beta": 0.5}}  # type: ignore[dict-item]
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", settings=other)]
    _, groups = read_runs(folders)
    assert [group.label for group in groups] == ["VPD, teacher_beta 0.1", "VPD, teacher_beta 0.5"]
    assert len({group.colour for group in groups}) == 2


def test_the_best_step_is_one_after_training_began(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text(
        '{"step": 0, "eval/accuracy": 0.9}\n{"step": 1, "eval/accuracy": 0.5}\n{"step": 2, "eval/accuracy": 0.4}\n'
    )
    [run], _ = read_runs([tmp_path / "a"])
    assert [summary(run)[key] for key in ("first", "best", "best_step", "last")] == [0.9, 0.5, 1, 0.4]


def test_a_method_that_was_passed_as_an_object_has_its_class_s_name(tmp_path: Path) -> None:
    _, groups = read_runs([write_run(tmp_path / "a", settings={"algorithm": {"object": "mine.Imitate"}})])
    assert [group.label for group in groups] == ["mine.Imitate"]


def test_a_report_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    home = "/home/someone/secret"
    settings = {
        "model": {"name_or_path": f"{home}/base"},
        "algorithm": {"name": f"{home}/mine.py:Mine", "closing": "/no_think"},
        "env": {"name": "code", "path": f"{home}/one/train.jsonl", "folders": [f"{home}/lib", "~/lib"]},
    }
    other = settings | {"env": {**settings["env"], "path": f"{home}/two/train.jsonl"}}
    folders = [write_run(tmp_path / "a", settings=settings), write_run(tmp_path / "b", settings=other)]
    runs, groups = read_runs(folders)
    assert runs[0].settings["env.path"] == "one/train.jsonl" and runs[0].settings["algorithm.closing"] == "/no_think"
    assert [group.label for group in groups] == [
        "mine.py:Mine, path one/train.jsonl",
        "mine.py:Mine, path two/train.jsonl",
    ]
    assert runs[0].settings["env.folders"] == '["secret/lib", "lib"]'
    write_report(folders, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "someone" not in text and str(tmp_path) not in text


def test_a_long_curve_is_thinned_to_means_and_keeps_its_end() -> None:
    points = [(step, float(step)) for step in range(1, 1302)]
    thin = thinned(points, 600)
    assert len(thin) == 434 and thin[:2] == [(3, 2.0), (6, 5.0)] and thin[-1] == (1301, 1300.5)
    assert thinned(points[:600], 600) == points[:600]


def test_not_finite_numbers_leave_a_gap(tmp_path: Path) -> None:
    runs, _ = read_runs([write_run(tmp_path / "a")])
    assert curves(runs)["e_step/shift"] == [[0, [1, 3], [0.0, 0.0]]]


def test_seconds_add_up_and_the_e_step_is_not_counted_twice(tmp_path: Path) -> None:
    runs, _ = read_runs([write_run(tmp_path / "a")])
    assert seconds_of(runs[0]) == {"time/rollout": 6.0, "time/e_step": 3.0, "time/update": 6.0}


def test_of_rollouts_beside_the_update_only_the_wait_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waits = [line | ({"time/rollout_wait": 0.5} if "time/rollout" in line else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in waits))
    [run], _ = read_runs([folder])
    assert seconds_of(run) == {"time/rollout_wait": 1.5, "time/e_step": 3.0, "time/update": 6.0}


def test_every_metric_of_a_chart_is_one_that_runs_have(tmp_path: Path) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def distinct(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"
    )
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "apply rule A to {n} 2 3"}}\n' for n in range(9)))
    data = {"env.name": "dataset", "env.path": tmp_path / "data.jsonl", "env.reward": f"{rewards}:distinct"}
    vpd_train(tmp_path / "grpo", **{"algorithm.name": "grpo", "run.max_steps": 1}, **data)
    options = {"run.max_steps": 3, "run.eval_steps": 1, "run.eval_limit": 4, "rollout.retries": 1}
    vpd_train(tmp_path / "gated", **{"algorithm.name": "gated", "algorithm.e_every": 1}, **options)
    names = {name for method in ("grpo", "gated") for name in read_runs([tmp_path / method])[0][0].record.names()}
    drawn = {name for chart in CHARTS for line in chart.lines for name in (line.metric, line.error) if name}
    assert drawn | set(TIMES) - {"time/rollout_wait"} <= names  # that is of runs with rollout.overlap
    assert charts_with({"reward"})[0]["lines"][0]["metric"] == "reward" and len(charts_with({"reward"})) == 1


@pytest.mark.parametrize(
    ("feedback", "inside"),
    [
        ("Two words.", "Two words."),
        ("a" * 300 + "b" * 300, "a" * 20 + " [...] " + "b" * 20),
        (HEADER + "x", HEADER + "x"),
    ],
)
def test_the_parts_of_a_teachers_prompt(feedback: str, inside: str) -> None:
    prompt, teacher = "<user>Do it.<assistant>", f"<user>Do it.{HEADER}{inside}{CLOSING}<assistant>"
    parts = parts_of(prompt, teacher, [{"source": "environment", "text": feedback}], SETTINGS["prompts"])  # type: ignore[arg-type]
    assert "".join(part.text for part in parts) == teacher
    kinds = [part.kind for part in parts]
    assert kinds[0] == "task" and kinds[1:4] == ["header", "feedback", "closing"] and kinds[-1] == "task"
    found = next(part for part in parts if part.kind == "feedback")
    assert found.text.strip() == inside.strip()
    assert len(found.missing) == (560 if "[...]" in inside else 0)


WITHOUT_LINES = {
    "request": ("request", "<user>Do it.", "<user>Do it. {}", "Two words."),
    "request, and it begins as the template goes on": ("request", "<user>Do it.", "<user>Do it. {}", "<b> of Two."),
    "request, cut": ("request", "<user>Do it.", "<user>Do it.\n\n{}", "a" * 300 + "b" * 300),
    "system": ("system", "<user>Do it.", "<system>{}<user>Do it.", "Two words."),
    "system, behind its own text": ("system", "<system>Be kind.<user>", "<system>Be kind.\n\n{}<user>", "Two words."),
}


@pytest.mark.parametrize(("layout", "asked", "read", "feedback"), WITHOUT_LINES.values(), ids=WITHOUT_LINES)
def test_feedback_without_a_line_above_it_is_found(layout: str, asked: str, read: str, feedback: str) -> None:
    settings = {**SETTINGS["prompts"], "layout": layout}  # type: ignore[dict-item]
    inside = feedback if len(feedback) < 40 else "a" * 20 + " [...] " + "b" * 20
    teacher = f"{read.format(inside)}<assistant>"
    parts = parts_of(f"{asked}<assistant>", teacher, [{"source": "environment", "text": feedback}], settings)
    assert "".join(part.text for part in parts) == teacher
    assert {part.kind for part in parts} == {"task", "feedback"}
    [found] = [part for part in parts if part.kind == "feedback"]
    assert found.text.strip() == inside and len(found.missing) == (560 if "[...]" in inside else 0)


def test_a_demonstration_that_was_cut_ends_where_feedback_without_a_line_begins() -> None:
    context = [
        {"source": "sibling", "kind": "demonstration", "text": "x" * 90},
        {"source": "environment", "kind": "feedback", "text": "Mind the gap, please."},
    ]
    teacher = "<user>Do it. Like this: xxx[...]xxx Mind the gap, please.<assistant>"
    settings = {"layout": "request", "demonstration_header": "\n\nLike this: "}
    parts = parts_of("<user>Do it.<assistant>", teacher, context, settings)
    assert [(part.kind, part.text.strip()) for part in parts] == [
        ("task", "<user>Do it."), ("header", "Like this:"), ("demonstration", "xxx[...]xxx"),
        ("feedback", "Mind the gap, please."), ("task", "<assistant>"),
    ]  # fmt: skip


def test_a_demonstration_and_feedback_are_told_apart_though_spaces_are_lost() -> None:
    settings = {"demonstration_header": " . solution : ", "feedback_header": " . feedback : ", "closing": ""}
    context = [
        {"source": "sibling", "kind": "demonstration", "text": "1 2  3"},
        {"source": "sibling", "kind": "demonstration", "text": "9 9 9"},  # the teacher reads the first alone
        {"source": "environment", "kind": "feedback", "text": "wrong : rule"},
    ]
    teacher = "<user> apply . solution : 1 2 3 . feedback : wrong : rule <assistant>"
    parts = parts_of("<user> apply <assistant>", teacher, context, settings)
    assert [(part.kind, part.text.strip()) for part in parts] == [
        ("task", "<user> apply"), ("header", ". solution :"), ("demonstration", "1 2 3"),
        ("header", ". feedback :"), ("feedback", "wrong : rule"), ("task", "<assistant>"),
    ]  # fmt: skip
    assert not any(part.missing for part in parts)


def test_a_prompt_in_which_no_section_is_found_is_one_part() -> None:
    parts = parts_of(
        "<user>a", "<user>something else", [{"source": "environment", "text": "x"}], {"feedback_header": "H:"}
    )
    assert [part.kind for part in parts] == ["task"] and parts[0].text == "<user>something else"


def test_steps_are_sampled_evenly_and_recorded_rows_come_first(tmp_path: Path) -> None:
    assert chosen_steps(range(1, 1001), 5) == [1, 251, 501, 750, 1000] and chosen_steps([3, 4], 5) == [3, 4]  # type: ignore[arg-type]
    runs, _ = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    found, counts = candidates(runs)
    assert len(found) == 18 and counts == [{"steps": 3, "steps_read": 3}] * 2
    assert all(tokens is not None for _, _, tokens in found[:12]) and not any(t for _, _, t in found[12:])


def test_the_file_keeps_to_its_size_and_says_what_is_left_out(tmp_path: Path) -> None:
    texts = [write_run(tmp_path / f"r{n}", seed=n, steps=12, noise=5000) for n in range(6)]
    out = write_report(texts, tmp_path / "report.html", Options(megabytes=2.5))
    whole = write_report(texts, tmp_path / "whole.html", Options(megabytes=50))
    assert out.stat().st_size <= 2_500_000 < whole.stat().st_size
    shown = re.search(r"Shown: (\d+) of (\d+) rows of (\d+) of (\d+) steps", out.read_text())
    assert shown is not None and 0 < int(shown[1]) < int(shown[2]) == 216 and shown[3] == shown[4] == "72"


def test_the_command_writes_into_the_folder_of_one_run_and_here_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_run(tmp_path / "runs" / name)
    assert main(["report", "runs/one"]) == 0 and (tmp_path / "runs" / "one" / "report.html").is_file()
    assert main(["report", "runs", "--title", "Both"]) == 0 and "<title>Both" in (tmp_path / "report.html").read_text()
    assert "2 run(s)" in capsys.readouterr().out
    assert main(["report", "runs/none"]) == 2 and "holds no run" in capsys.readouterr().err
    assert main(["report", "runs/one", "--megabytes", "1"]) == 2 and "too small" in capsys.readouterr().err
    assert main(["report", "runs/one", "--watch", "--every", "0"]) == 2


def test_a_damaged_or_unfinished_run_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "rollouts" / "step-000001.parquet").write_bytes(b"no")
    (folder / "tokens" / "step-000002.parquet").write_bytes(b"no")
    (folder / "metrics.jsonl").open("a").write('{"step": 4, "rew')
    found, _ = candidates(read_runs([folder])[0])
    assert [(row["step"], tokens is not None) for _, row, tokens in found].count((3, True)) == 2 and len(found) == 6
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "run.json", bare)
    assert "0 of 0 rows" in write_report([bare], tmp_path / "bare.html").read_text()
    with pytest.raises(ConfigError, match="no run"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(StorageError, match="holds no run"):
        runs_in([tmp_path / "nothing"])


def test_a_watched_report_is_written_again_when_the_run_goes_on_and_ends_with_it(tmp_path: Path) -> None:
    folder, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    state = read(folder)
    assert state is not None
    recorder = Recorder(folder=folder, files=page.FileSystem(), settings=state.settings)
    recorder.record("training", 3)
    pages: list[str] = []

    def wait(seconds: float) -> None:
        pages.append(out.read_text())
        if len(pages) == 2:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "reward": 0.777}\n')
            os.utime(folder / "metrics.jsonl", (2e9, 2e9))
        if len(pages) == 3:
            recorder.record("done", 4)

    watch([folder], out, Options(), every=7, console=Terminal(file=open(os.devnull, "w")), wait=wait)  # noqa: SIM115
    assert pages[0] == pages[1] != pages[2] != out.read_text()
    assert "4 of 3" in out.read_text() and out.stat().st_size > 2_000_000


def test_ctrl_c_ends_watching_with_a_whole_report(tmp_path: Path) -> None:
    folder, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    state = read(folder)
    assert state is not None
    Recorder(folder=folder, files=page.FileSystem(), settings=state.settings).record("training", 3)

    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    watch([folder], out, Options(), every=7, console=Terminal(file=open(os.devnull, "w")), wait=wait)  # noqa: SIM115
    assert out.read_text().rstrip().endswith("</html>")


# --- the page in a browser


def chromium() -> str | None:
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = chromium()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@dataclasses.dataclass
class Opened:
    """A page that is ready, and all that went wrong or was asked for on the way."""

    page: Any
    faults: list[str]

    def rows(self) -> int:
        return int(self.page.locator("#count").inner_text().split()[0])


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Any]:
    contexts: list[Any] = []

    def open_it(folders: list[Path], **options: Any) -> Opened:
        path = write_report(folders, tmp_path / "report.html", Options(title="A report"))
        context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
        contexts.append(context)
        opened = Opened(context.new_page(), [])
        opened.page.on("console", lambda message: opened.faults.append(f"{message.type}: {message.text}"))
        opened.page.on("pageerror", lambda error: opened.faults.append(f"error: {error}"))
        opened.page.on(
            "request",
            lambda asked: (
                opened.faults.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None
            ),
        )
        opened.page.goto(path.as_uri())
        opened.page.wait_for_selector("html[data-ready]", timeout=60_000)
        return opened

    yield open_it
    for context in contexts:
        context.close()


def see_everything(page: Any) -> None:
    """Scroll through the page, so that every chart is drawn."""
    height = page.evaluate("document.documentElement.scrollHeight")
    for place in range(0, height, 500):
        page.evaluate(f"scrollTo({{top: {place}, behavior: 'instant'}})")
        page.wait_for_timeout(60)


def test_the_page_shows_its_curves_without_a_fault_and_asks_for_nothing(open_report: Any, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{m}-{s}", method=m, seed=s) for m in ("vpd", "grpo") for s in (0, 1)]
    opened = open_report(folders)
    see_everything(opened.page)
    drawn, figures = opened.page.locator(".plot .main-svg").count(), opened.page.locator("figure.chart").count()
    assert figures >= 10 and drawn >= figures and not opened.faults
    first = opened.page.locator("figure.chart").first
    assert first.locator(".scatterlayer .trace").count() == 6  # a line and a band's two edges for each method
    label = first.locator(".plot").get_attribute("aria-label")
    assert label.startswith("Student on held-out tasks. VPD ends at 0.305; GRPO ends at 0.305")
    first.locator("summary").click()
    first.locator("tbody tr").nth(3).wait_for()
    opened.page.locator("button[data-group='1']").first.click()
    assert first.locator(".scatterlayer .trace").count() == 3
    opened.page.select_option("#metric", "m_step/divergence")
    assert opened.page.locator("#any h3").inner_text() == "m_step/divergence"
    opened.page.select_option("#theme", "dark")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert not opened.faults


def test_seeds_without_a_step_in_common_are_lines_of_their_own(open_report: Any, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"seed-{seed}", seed=seed) for seed in (0, 1)]
    for folder, steps in zip(folders, ((1, 3), (2,)), strict=True):
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k != "reward" or line["step"] in steps} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    opened = open_report(folders)
    see_everything(opened.page)
    drawn = "[...document.querySelectorAll('#any .plot')].flatMap((p) => p.data.map((t) => [t.name, [...t.x]]))"
    assert opened.page.evaluate(drawn) == [["VPD, seed-0", [1, 3]], ["VPD, seed-1", [2]]] and not opened.faults
    opened.page.select_option("#metric", "success")
    assert opened.page.evaluate(drawn)[-1] == ["VPD", [1, 2, 3]]


def test_filters_leave_the_rows_that_they_name(open_report: Any, tmp_path: Path) -> None:
    other = {"env": {"name": "numbers"}}
    opened = open_report([write_run(tmp_path / "a", steps=4), write_run(tmp_path / "b", steps=2, settings=other)])
    page, form = opened.page, "#filters [name={}]"
    assert opened.rows() == 18
    for name, value, left in (
        ("run", "1", 6), ("env", "letters", 12), ("role", "teacher", 0), ("success", "true", 6),
        ("source", "environment", 12), ("source", "-", 6),
    ):  # fmt: skip
        page.select_option(form.format(name), value)
        assert opened.rows() == left, name
        page.click("#filters button[type=reset]")
        page.locator("#count", has_text="18 of 18").wait_for()
    for name, value, left in (
        ("step_from", "3", 6),
        ("step_to", "1", 6),
        ("reward_from", "0.5", 6),
        ("text", "WORD 2", 2),
    ):
        page.fill(form.format(name), value)
        assert opened.rows() == left, name
        page.fill(form.format(name), "")
    page.check(form.format("recorded"))
    assert opened.rows() == 12
    page.fill(form.format("text"), "nothing has this")
    assert opened.rows() == 0 and "No rollout passes" in page.locator("#list").inner_text()
    assert not opened.faults


def test_a_rollout_shows_prompts_tokens_and_probabilities_by_mouse_and_by_keyboard(
    open_report: Any, tmp_path: Path
) -> None:
    opened = open_report([write_run(tmp_path / "a")])
    page = opened.page
    detail = page.locator("#rollout")
    assert detail.locator(".part.feedback").last.inner_text() == "You wrote two words; one was asked for."
    assert detail.locator(".part.closing").count() >= 1
    assert re.fullmatch(r"[✓✗] (attempt|retry), reward [\d.]+", detail.locator(".siblings button").first.inner_text())
    tokens = detail.locator(".token")
    assert "".join(tokens.all_inner_texts()) == "wrong word"
    colours = [tokens.nth(n).evaluate("(e) => e.style.background") for n in (1, 4)]
    assert "--more" in colours[0] and "--less" in colours[1]  # 2 sin(1) - 1 > 0 > 2 sin(4) - 1
    tokens.nth(1).hover()
    tip = page.locator("#tip")
    text = tip.inner_text()
    assert '"r"' in text and "log-ratio +0.68 nats" in text and "60.0 %" in text  # exp(-0.51)
    assert '"b"' in text and '"\\u202e"' in text and "81.9 %" in text  # the teacher's likeliest, exp(-0.2)
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "r" and '"r"' in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    detail.locator("select").select_option("change")
    assert "the E-step made the answer likelier" in detail.inner_text()
    assert "Implicit reward in the E-step" in detail.inner_text()
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    assert "success" in detail.inner_text() and "E-step" not in detail.inner_text()
    assert "null" not in detail.inner_text() and "undefined" not in detail.inner_text()
    page.keyboard.press("End")
    assert "step 3" in page.locator("[aria-selected=true]").inner_text() and "#rollout-0-3-2" in page.url
    assert "Not recorded token by token" in detail.inner_text() and not opened.faults


def test_the_list_opens_at_a_row_with_tokens_and_feedback_and_names_task_and_marks(
    open_report: Any, tmp_path: Path
) -> None:
    opened = open_report([write_run(tmp_path / "a", steps=30)])
    page = opened.page
    chosen = page.locator("#list [aria-selected=true]")
    assert "●" in chosen.inner_text() and "Spell a word." in chosen.inner_text()
    assert page.locator("#rollout .part.feedback").count() and page.locator("#rollout .token").count()
    page.fill("#filters [name=step_from]", "3")
    page.reload()  # which keeps the filters
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    inside = "(e) => e.getBoundingClientRect().top - document.querySelector('#list').getBoundingClientRect().top"
    assert "●" in chosen.inner_text() and 0 <= chosen.evaluate(inside) < 5
    assert "●: recorded token by token" in page.locator("#count").inner_text()
    page.locator("#rollout .legend summary").click()
    legend = page.locator("#rollout .legend")
    page.locator("#rollout .token").first.hover()
    for name in page.locator("#tip tbody th").all_inner_texts():
        assert name in legend.locator("dt").all_inner_texts()
    assert page.locator("#overview a[href='#rollouts']").is_visible() and not opened.faults


def test_a_list_scrolls_to_the_row_that_is_chosen_first(open_report: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=30)
    for step in range(1, 20):
        (folder / "tokens" / f"step-{step:06d}.parquet").unlink()
    opened = open_report([folder])
    chosen = opened.page.locator("#list [aria-selected=true]")
    inside = "(e) => e.getBoundingClientRect().top - document.querySelector('#list').getBoundingClientRect().top"
    assert "step 20" in chosen.inner_text() and 0 <= chosen.evaluate(inside) < 5 and not opened.faults


def test_hostile_text_is_inert(open_report: Any, tmp_path: Path) -> None:
    long = "x" * 1_000_000
    settings = {
        "env": {"name": HOSTILE.replace("\ud83d", "")},
        "model": {"name_or_path": HOSTILE.replace("\ud83d", "")},
    }
    folder = write_run(
        tmp_path / "a<b>&'\u202e", text=HOSTILE, answer=HOSTILE, feedback=HOSTILE + long, settings=settings
    )
    (folder / "metrics.jsonl").open("a").write(json.dumps({"step": 9, "<img src=x>": 1.0, "__proto__": 2.0}) + "\n")
    opened = open_report([folder])
    page = opened.page
    see_everything(page)
    for option in page.locator("#metric option").all():
        page.select_option("#metric", option.get_attribute("value"))
    for item in page.locator("#list .item").all():
        item.click()
    assert page.title() == "A report \u2013 vpd report" and not opened.faults
    assert page.locator("img").count() == 0 and page.evaluate("document.scripts.length") == 4
    text = page.locator("body").inner_text()
    assert "\u202e" not in text and "\x1b" not in text and "\x00" not in text
    assert "\\u202e" in text and "\\x1b" in text and "\\ud83d" in text and "</script>" in text
    assert "characters left out" in text and len(text) < 200_000
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]


def test_nothing_is_wider_than_a_telephone(open_report: Any, tmp_path: Path) -> None:
    opened = open_report([write_run(tmp_path / "a", answer="long" * 60)], color_scheme="dark")
    opened.page.set_viewport_size({"width": 390, "height": 800})
    see_everything(opened.page)
    sizes = opened.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1] and not opened.faults
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    opened.page.emulate_media(reduced_motion="reduce")
    opened.page.locator("nav a[href='#settings']").click()
    tops = "['header', '#settings h2'].map((name) => document.querySelector(name).getBoundingClientRect())"
    header, heading = opened.page.evaluate(tops)
    assert header["bottom"] <= heading["top"]  # which the header does not hide


def test_every_control_has_a_name_and_ids_are_unique(open_report: Any, tmp_path: Path) -> None:
    opened = open_report([write_run(tmp_path / "a"), write_run(tmp_path / "b", method="grpo")])
    see_everything(opened.page)
    nameless = opened.page.evaluate(
        """[...document.querySelectorAll('main select, main input, main button, header select')].filter((e) =>
        !(e.closest('label')?.textContent.trim() || e.getAttribute('aria-label') || e.textContent.trim())).length"""
    )
    doubled = opened.page.evaluate(
        """(() => { const ids = [...document.querySelectorAll('body :not(.plot *)[id]')].map((e) => e.id);
        return ids.filter((id, i) => ids.indexOf(id) !== i); })()"""
    )
    plain = opened.page.evaluate(
        "[...document.querySelectorAll('.plot')].filter((e) => !e.getAttribute('aria-label')).length"
    )
    assert nameless == 0 and plain == 0 and doubled == []
    assert opened.page.locator("h1").count() == 1 and opened.page.locator("html").get_attribute("lang") == "en"


def test_a_demonstration_has_no_outcome(open_report: Any, tmp_path: Path) -> None:
    run = add_demonstration(write_run(tmp_path / "run"), step=4)
    page = open_report([run]).page
    page.locator("#list .item", has_text="demonstration").click()
    detail = page.locator("#rollout").inner_text()
    assert "A demonstration at shown, step 4" in detail and "6 tokens" in detail
    assert "failure" not in detail and "reward" not in detail
    page.select_option("#filters [name=success]", "false")
    assert page.locator("#list .item", has_text="demonstration").count() == 0


def test_without_scripts_the_tables_are_there(browser: Any, tmp_path: Path) -> None:
    path = write_report([write_run(tmp_path / "a")], tmp_path / "report.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    text = page.locator("body").inner_text()
    context.close()
    assert "need JavaScript" in text and "flat_reward" in text and "sampling and grading" in text
