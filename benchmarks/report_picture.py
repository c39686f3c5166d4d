"""The README's picture of a report: a rollout of ``vpd demo`` with what its teacher makes of each token.

    vpd demo --output_dir demo-out
    python benchmarks/report_picture.py demo-out/report.html docs/images/report.png

Needs Chromium (``apt-get install chromium``) and ``pip install playwright``.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1180, 920
STRONGEST = """() => {
  const strength = (token) => Number(/, ([\\d.]+)\\)$/.exec(token.style.background)?.[1] || 0);
  const tokens = [...document.querySelectorAll("#rollout .token")].map(strength);
  return tokens.indexOf(Math.max(...tokens));
}"""


def main(report: str, picture: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(bypass_csp=True, viewport={"width": WIDTH, "height": HEIGHT}).new_page()
        page.goto(Path(report).resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        choose(page)
        shown = page.screenshot()
        browser.close()
    image = Image.open(io.BytesIO(shown)).convert("P", palette=Image.Palette.ADAPTIVE, colors=255)
    image.save(picture, optimize=True)


def choose(page: Page) -> None:
    """A failed attempt under VPD that was recorded token by token, and its most telling token."""
    runs = page.locator("#filters [name=run] option").all_inner_texts()
    page.select_option("#filters [name=run]", label=next(name for name in runs if name.startswith("vpd")))
    page.select_option("#filters [name=success]", "false")
    page.check("#filters [name=recorded]")
    page.fill("#filters [name=step_from]", "11")
    page.locator("#list .item").first.click()
    page.evaluate("document.querySelector('#rollout').scrollIntoView({behavior: 'instant'})")
    page.locator("#rollout .token").nth(page.evaluate(STRONGEST)).hover()
    page.wait_for_timeout(300)


if __name__ == "__main__":
    main(*sys.argv[1:])
