"""What the site is made of besides docs/: generated pages, files from elsewhere, links between them."""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import command_pages
import python_pages
import settings_pages
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Files outside of docs/ that are pages of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/vpd_from_scratch.py": "vpd_from_scratch.md",
    "notebooks/first_run.ipynb": "notebooks/first_run.md",
    "notebooks/own_grader_and_feedback.ipynb": "notebooks/own_grader_and_feedback.md",
    "notebooks/comparing_methods.ipynb": "notebooks/comparing_methods.md",
}
LINK = re.compile(r"\[([^]\[]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"^(?:```.*?^```|(?:    [^\n]*\n?)+)", re.DOTALL | re.MULTILINE)
DRAWING = re.compile(r'<img alt="([^"]*)" src="([^"]*)\.svg" ?/?>')
CODE = re.compile(r"(?<!<pre>)(<a [^>]*>)?<code>(?:--)?([\w.]+)(?:\([^<]*\)|:? [^<]*)?</code>")


def on_config(config: Any) -> Any:
    """The navigation of the reference is that of its pages."""
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    reference[:0] = [{"Settings": settings_pages.navigation()}]
    reference[2:2] = [{"Python": python_pages.navigation()}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are generated and those from elsewhere."""
    generated = {**settings_pages.pages(), **command_pages.pages(), **python_pages.pages()}
    for source, path in ELSEWHERE.items():
        generated[path] = _with_links(source, path, _markdown_of(ROOT / source))
    for path, text in generated.items():
        files.append(File.generated(config, path, content=text))
    return files


def _markdown_of(path: Path) -> str:
    """A file as a page: Markdown as it is, a program as one block, a notebook's cells one after the other."""
    if path.suffix == ".py":
        return f"# The method in one file\n\n`{path.relative_to(ROOT)}`\n\n```python\n{path.read_text()}```\n"
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts) + "\n"


def on_page_markdown(markdown: str, page: Page, **others: Any) -> str:
    """Links out of docs/ lead to the pages that these files are here."""
    if page.file.generated_by:
        return markdown
    return _with_links(f"docs/{page.file.src_uri}", page.file.src_uri, markdown)


def _with_links(source: str, path: str, markdown: str) -> str:
    """The text of the file ``source`` as the page ``path``: its links are those of the site."""
    blocks = [(found.start(), found.end()) for found in BLOCK.finditer(markdown)]

    def moved(found: re.Match[str]) -> str:
        if any(start <= found.start() < end for start, end in blocks):
            return found[0]
        text = _title(source, found[2]) if found[1] == found[2] else found[1]
        return f"[{text}]({_target(source, path, found[2])}{found[3] or ''})"

    return LINK.sub(moved, markdown)


def _title(source: str, link: str) -> str:
    """The title of a page, in the place of its file's name."""
    head = (ROOT / source).parent.joinpath(link).read_text().partition("\n")[0]
    return head.removeprefix("# ") if head.startswith("# ") else link


def _target(source: str, path: str, link: str) -> str:
    if "://" in link:
        return link
    file = (ROOT / source).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
    there = ELSEWHERE.get(file, file.removeprefix("docs/"))
    return "../" * path.count("/") + there


def on_page_content(content: str, page: Page, **others: Any) -> str:
    """Drawings stand in the page itself, so that they follow its colours; names lead to where they are explained."""
    content = DRAWING.sub(_drawing, content)
    return content if page.file.src_uri.startswith(("settings/", "LOG")) else _linked(content, page)


def _drawing(found: re.Match[str]) -> str:
    svg = (ROOT / "docs" / "images" / f"{Path(found[2]).name}.svg").read_text()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(found[1])}"', 1)


PLACES = {**settings_pages.anchors(), **python_pages.anchors()}


def _linked(content: str, page: Page) -> str:
    """Inline code that names a setting or a public name of Python becomes a link."""

    def link(found: re.Match[str]) -> str:
        place = PLACES.get(found[2])
        if found[1] or place is None or place.startswith(f"{page.file.dest_uri}#"):
            return found[0]
        path = "../" * page.file.dest_uri.count("/")
        return f'<a class="name" href="{path}{place}">{found[0]}</a>'

    return CODE.sub(link, content)
