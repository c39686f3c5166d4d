"""The documentation site: it builds, its links lead somewhere, it needs no network, and the reference is the code's."""

import argparse
import dataclasses
import html
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import vpd
from vpd import cli
from vpd.config.sections import BESIDE, CHOICES, PLAIN, settings_class
from vpd.monitor import RULES
from vpd.settings import declarations

pytest.importorskip("material", reason="make docs needs mkdocs-material (pip install 'vpd-rl[docs]')")
pytest.importorskip("mkdocstrings", reason="make docs needs mkdocstrings")

ROOT = Path(__file__).resolve().parent.parent
WEBSITE = ROOT / "website"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does; a link or anchor that leads nowhere ends the build."""
    folder = tmp_path_factory.mktemp("site")
    # vpd as this process has it, also where another copy is installed
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


class Page(HTMLParser):
    """What a page is reached by, leads to, and loads."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical":
            self.loaded.append(found["href"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def words(page: Page) -> str:
    return " ".join("".join(page.text).split())


# --- links, and the network


def test_every_link_leads_to_a_page_and_an_anchor(site: Path, pages: dict[str, Page]) -> None:
    """Those too that the builder does not see, such as links on inline code."""
    broken = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            there = (site / name).parent.joinpath(unquote(parts.path)).resolve() if parts.path else site / name
            target = there.relative_to(site).as_posix()
            known = pages[target].anchors if target in pages else set()
            if not there.is_file() or (parts.fragment and unquote(parts.fragment) not in known | {"__top"}):
                broken.append(f"{name}: {link}")
    assert not broken


def test_no_page_loads_anything_from_the_network(site: Path, pages: dict[str, Page]) -> None:
    loaded = {(name, urlsplit(link)) for name, page in pages.items() for link in page.loaded}
    assert not [f"{name}: {link.geturl()}" for name, link in loaded if link.scheme or link.netloc]
    missing = [link.path for name, link in loaded if not (site / name).parent.joinpath(link.path).resolve().is_file()]
    assert not missing and len(loaded) > 100
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?https?:", styles)


def test_every_page_of_docs_is_in_the_navigation(pages: dict[str, Page]) -> None:
    home = {link.partition("#")[0] for link in pages["index.html"].links}
    assert not [path.name for path in (ROOT / "docs").glob("*.md") if f"{path.stem}.html" not in home]


# --- the reference is the code's


def parts_of_settings() -> Iterator[tuple[str, str, Any]]:
    """Page, beginning of the anchors, dataclass."""
    for section, choice in CHOICES.items():
        yield from ((section, f"{section}.{name}", settings_class(place)) for name, place in choice.table.items())
    for section, place in {**PLAIN, **BESIDE}.items():
        yield section, section, settings_class(place)
    yield "model", "model.lora", settings_class("vpd.model.settings:LoraSettings")


def block_of(site: Path, page: str, anchor: str) -> str:
    """The text between an anchor's heading and the next heading."""
    text = (site / page).read_text()
    after = re.split(rf'<h\d id="{re.escape(anchor)}"', text)
    assert len(after) == 2, f"{page} has no heading {anchor}, or two"
    plain = re.sub(r"<[^>]+>", "", re.split(r"<h[1-6]", after[1])[0])
    return " ".join(html.unescape(plain).split())


@pytest.mark.parametrize(("section", "title", "kind"), [pytest.param(*p, id=p[1]) for p in parts_of_settings()])
def test_every_setting_has_its_meaning_type_and_rule(site: Path, section: str, title: str, kind: Any) -> None:
    for field in dataclasses.fields(kind):
        if field.name == "name":
            continue
        block = block_of(site, f"settings/{section}.html", f"{title}.{field.name}")
        declared = declarations(kind)[field.name]
        assert " ".join(declared.meaning.split()) in block
        assert not declared.range or declared.choices or declared.range.removesuffix(", or null") in block
        assert all(str(choice) in block for choice in declared.choices)
        assert "default" in block or "must be given" in block


def test_defaults_and_rules_are_those_of_the_code(site: Path) -> None:
    assert "number · at least 0 · default 1e-05" in block_of(site, "settings/optim.html", "optim.learning_rate")
    assert "list of text · default []" in block_of(site, "settings/engine.html", "engine.vllm.server_args")
    assert "must be given" in block_of(site, "settings/env.html", "env.math.path")
    assert "`" not in block_of(site, "settings/run.html", "run.record_rows")
    with pytest.raises(vpd.ConfigError, match="needs retries to show"):
        vpd.parse_config({"rollout": {"retry_demonstrations": True}})
    shown = re.sub(r"<[^>]+>", "", (site / "settings" / "rollout.html").read_text())
    assert "rollout.retry_demonstrations needs retries to show" in shown
    together = re.sub(r"<[^>]+>", "", (site / "settings" / "index.html").read_text())
    assert "compares the attempts of a group" in together and "does not learn from retries" in together


def test_every_command_and_option_is_explained(site: Path, pages: dict[str, Page]) -> None:
    shown = words(pages["commands.html"])
    commands = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command in cli.COMMANDS:
        assert command.NAME in pages["commands.html"].anchors and " ".join(command.ABOUT.split()) in shown
        for action in commands.choices[command.NAME]._actions:
            help_text = " ".join(((action.help or "") % {**vars(action), "prog": "vpd"}).split())
            assert action.dest == "help" or help_text in shown, f"{command.NAME} {action.dest}"


def test_every_public_name_is_explained(pages: dict[str, Page]) -> None:
    anchors = {anchor for name, page in pages.items() if name.startswith("api/") for anchor in page.anchors}
    assert not [name for name in vpd.__all__ if f"vpd.{name}" not in anchors]
    assert "the reward (a number" in words(pages["api/run.html"])  # of vpd.train's docstring
    data, parts = words(pages["api/data.html"]), words(pages["api/parts.html"])
    assert "payload: Any = None" in data and "tool_call_id" in data  # fields of a dataclass and of a mapping
    assert "__call__(groups: Sequence[Group], writer: Writer)" in parts
    assert "eval_tasks(" in parts  # what an environment inherits from its two halves
    assert not re.search(r":(class|func|mod|meth):", "".join(words(pages[p]) for p in pages if p.startswith("api/")))


def test_names_in_the_text_lead_to_where_they_are_explained(pages: dict[str, Page]) -> None:
    assert "settings/algorithm.html#algorithm.vpd.e_every" in pages["troubleshooting.html"].links
    assert "api/run.html#vpd.train" in pages["own_task.html"].links
    assert "../settings/run.html#run.output_dir" not in pages["settings/run.html"].links  # not on its own page


# --- the page about what goes wrong


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading."""
    behind = (ROOT / "docs" / document).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in behind.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_every_alarm_has_a_row_with_the_settings_of_its_advice() -> None:
    table = {row[0].strip("` "): " ".join(row) for row in rows("troubleshooting.md", "An alarm")}
    assert list(table) == [rule.name for rule in RULES]
    for rule in RULES:
        advice = rule.do if isinstance(rule.do, str) else inspect.getsource(rule.do)
        for setting in re.findall(r"\b(?:algorithm|optim|env)\.\w+", advice):
            assert setting in table[rule.name], f"{rule.name}: {setting}"


def test_every_line_of_an_error_is_one_that_the_code_has() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src" / "vpd").rglob("*.py"))
    quoted = [line for row in rows("troubleshooting.md", "It ends with a line") for line in row[0].split(", ")]
    assert len(quoted) >= 15
    assert not [line for line in quoted if line != "and others about a server" and line not in source]


# --- pictures


def test_drawings_are_those_of_their_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "drawings.py"), str(tmp_path)], check=True, timeout=60)
    drawn = list(tmp_path.iterdir())
    assert drawn
    assert all(path.read_text() == (ROOT / "docs" / "images" / path.name).read_text() for path in drawn)


def test_every_picture_says_which_script_makes_it() -> None:
    told = (ROOT / "docs" / "pictures.md").read_text()
    pictures = [path.name for path in (ROOT / "docs" / "images").iterdir()]
    assert pictures and not [name for name in pictures if name not in told and not name.startswith("reproduce-")]


# --- in a browser, from the disk


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if shutil.which("chromium") is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield instance
        instance.close()


@pytest.fixture
def opened(browser: Any, site: Path) -> Iterator[Any]:
    """Opens a page of the site; at the end there must have been no error, and no request but for files."""
    faults: list[str] = []
    contexts = []

    def open_page(name: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if request.url[:4] == "http" else None)
        page.goto((site / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def test_the_search_works_from_the_disk(opened: Any) -> None:
    page = opened("index.html", viewport={"width": 1200, "height": 800})
    page.click(".md-search__input")
    page.locator(".md-search__input").press_sequentially("retry_max_quote")
    page.wait_for_selector(".md-search-result__link", timeout=20_000)
    links = [link.get_attribute("href") for link in page.locator(".md-search-result__link").all()]
    assert any("settings/algorithm.html" in link for link in links)


@pytest.mark.parametrize("name", ["index.html", "concepts.html", "settings/algorithm.html", "commands.html"])
def test_a_telephone_scrolls_no_page_sideways(opened: Any, name: str) -> None:
    page = opened(name, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_light_and_dark(opened: Any) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        page = opened("concepts.html", color_scheme=scheme, viewport={"width": 1200, "height": 800})
        backgrounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = "getComputedStyle(document.querySelector('svg.drawing text')).fill"
        backgrounds[f"{scheme} ink"] = page.evaluate(ink)
    assert len(set(backgrounds.values())) == 4
