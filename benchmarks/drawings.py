"""The drawings of the documentation, as SVG that follows the colours of the page it stands in.

python benchmarks/drawings.py docs/images
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

# In the documentation's pages the colours are the theme's; a file that is looked at alone has these.
STYLE = """\
.drawing text { font: 15px system-ui, sans-serif; fill: var(--md-default-fg-color, #222); text-anchor: middle }
.drawing .strong { font-weight: 700; font-size: 18px }
.drawing .left { text-anchor: start }
.drawing rect { fill: #8883; stroke: #888; stroke-width: 1.5 }
.drawing .student rect { fill: #3b82c433; stroke: #3b82c4; stroke-width: 2.5 }
.drawing .teacher rect { fill: #d9731a33; stroke: #d9731a; stroke-width: 2.5 }
.drawing .frame { fill: none; stroke-dasharray: 6 5 }
.drawing path { fill: none; stroke: #888; stroke-width: 2; marker-end: url(#head) }
.drawing .step { stroke-width: 4 }
.drawing .e { stroke: #d9731a; marker-end: url(#head-e) }
.drawing .m { stroke: #3b82c4; marker-end: url(#head-m) }
@media (prefers-color-scheme: dark) { .drawing text { fill: var(--md-default-fg-color, #ddd) } }"""
HEADS = "".join(
    f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="{width}" markerHeight="{width}"'
    f' orient="auto"><path d="M0 0L10 5L0 10z" style="fill:{colour};stroke:none;marker-end:none"/></marker>'
    for name, colour, width in (("head", "#888", 7), ("head-e", "#d9731a", 4.5), ("head-m", "#3b82c4", 4.5))
)


def box(x: int, y: int, title: str, about: str, kind: str = "", width: int = 230) -> str:
    """A box of 76 in height with a title and a line about it."""
    middle = x + width // 2
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="76" rx="8"/>'
    return f'<g class="{kind}">{rect}{words(middle, y + 32, title, "strong")}{words(middle, y + 58, about)}</g>'


def words(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>'


def arrow(path: str, kind: str = "") -> str:
    return f'<path d="{path}" class="{kind}"/>'


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", HEADS, *parts, "</svg>", ""])


def loop() -> str:
    """One iteration: attempts, grades, context, E-step, M-step."""
    parts = [
        '<rect class="frame" x="24" y="104" width="276" height="428" rx="12"/>',
        words(162, 521, "one network, two prompts"),
        box(47, 10, "Task x", "messages to answer"),
        box(47, 126, "Student π(y|x)", "reads the task", "student"),
        box(47, 418, "Teacher q(y|x,C)", "reads task and context", "teacher"),
        box(396, 126, "Attempts y", "G for each task"),
        box(396, 262, "Grader", "reward, and why"),
        box(396, 418, "Context C", "feedback on this attempt"),
        arrow("M162 86V122"),
        arrow("M47 48H10V456H43"),
        arrow("M277 164H392"),
        arrow("M511 202V258"),
        arrow("M556 338V414"),
        arrow("M396 470H281"),
        arrow("M440 338V384H232V412", "step e"),
        arrow("M112 418V208", "step m"),
        words(128, 270, "M-step", "strong left"),
        words(128, 294, "towards the teacher,", "left"),
        words(128, 314, "token by token", "left"),
        words(308, 330, "E-step", "strong left"),
        words(308, 354, "successes up,", "left"),
        words(308, 374, "failures down", "left"),
    ]
    return drawing(640, 540, "One iteration of VPD", parts)


DRAWINGS = {"loop.svg": loop}


def main(folder: str) -> None:
    for name, draw in DRAWINGS.items():
        (Path(folder) / name).write_text(draw())


if __name__ == "__main__":
    main(*sys.argv[1:])
