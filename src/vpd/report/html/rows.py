"""The rollouts of a report: a sample of each run's, as plain data for the page.

Every text passes through :func:`clean`: control characters, bidirectional marks and half surrogate pairs are shown as
escapes, and a text that is too long loses its middle.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from vpd.printable import cut, printable
from vpd.report.html.collect import Run
from vpd.report.html.sections import parts_of
from vpd.run_folder.reading import read_rollouts, recorded_tokens, rollout_steps

Row: TypeAlias = dict[str, Any]

LONGEST = 12_000  # characters of one text
MOST_TOKENS = 3000  # of one answer, shown token by token
MOST_STEPS = 48  # of one run
START = 120  # characters of the task in the list
LOGPROBS = ("sampler", "student", "teacher", "student_before", "teacher_before", "teacher_after")


@dataclass(slots=True)
class Texts:
    """Texts that several rows share, each kept once."""

    pool: list[str] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """The place of a text in the pool."""
        if text not in self._places:
            self._places[text] = len(self.pool)
            self.pool.append(text)
        return self._places[text]


def clean(text: str, longest: int = LONGEST) -> str:
    """A text as a page may show it."""
    return printable(cut(text, longest))


def chosen_steps(steps: Sequence[int], most: int = MOST_STEPS) -> list[int]:
    """At most ``most`` of these steps, at equal distances, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    places = {round(number * (len(steps) - 1) / (most - 1)) for number in range(most)}
    return [steps[place] for place in sorted(places)]


def candidates(runs: Sequence[Run]) -> tuple[list[tuple[int, Mapping[str, Any], Mapping[str, Any] | None]], list[Row]]:
    """The rows that a report may show, the more telling first, and for each run how many there are.

    Of every chosen step of every run in turn: the rows that were recorded token by token, then the others, a row of
    each task at a time, with the whole group of a task before the next begins to be left out.
    """
    queues, counts = [], []
    for place, run in enumerate(runs):
        steps = rollout_steps(run.record.folder)
        chosen = chosen_steps(steps)
        for step in chosen:
            queues.append(list(_of_step(place, run, step)))
        counts.append({"steps": len(steps), "steps_read": len(chosen)})
    ordered = []
    for turn in range(max(map(len, queues), default=0)):
        ordered += [queue[turn] for queue in queues if turn < len(queue)]
    return ordered, counts


def _of_step(place: int, run: Run, step: int) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any] | None]]:
    rows = read_rollouts(run.record.folder, [step]).to_pylist()
    recorded = recorded_tokens(run.record.folder, step)
    for number, row in enumerate(rows):
        row["row"] = number
    groups = {rows[number].get("group") for number in recorded if number < len(rows)}
    others = [row for row in rows if row["row"] not in recorded]
    others.sort(key=lambda row: (row.get("group") not in groups, row["row"]))
    for number in sorted(recorded):
        if number < len(rows):
            yield place, rows[number], recorded[number]
    for row in others:
        yield place, row, None


def page_row(place: int, run: Run, row: Mapping[str, Any], tokens: Mapping[str, Any] | None, texts: Texts) -> Row:
    """One rollout as the page takes it; short keys, because there are many."""
    context = _context(row.get("context"))
    prompt = str(row.get("prompt") or "")
    found: Row = {
        "run": place,
        "step": row.get("step", 0),
        "row": row["row"],
        "group": row.get("group", 0),
        "role": row.get("role", "student"),
        "task": texts.add(clean(str(row.get("task") or ""), 300)),
        "start": texts.add(clean(_start_of(row)[:START])),
        "prompt": texts.add(clean(prompt)),
        "answer": clean(str(row.get("completion") or "")),
        "tokens": row.get("tokens", 0),
        "turns": row.get("turns", 1),
        "finish": row.get("finish"),
        "reward": _number(row.get("reward")),
        "success": row.get("success") if row.get("graded") is not False else None,
        "feedback": texts.add(clean(str(row["feedback"]))) if row.get("feedback") else None,
        "source": row.get("source") or "",
        "context": [
            [clean(str(s.get("source", "")), 200), str(s.get("kind", "")), texts.add(clean(str(s.get("text", ""))))]
            for s in context
        ],
        "cut": row.get("teacher_cut"),
    }
    if row.get("teacher_prompt"):
        settings = run.record.settings.get("prompts") or {}
        parts = parts_of(prompt, str(row["teacher_prompt"]), context, settings)
        found["teacher"] = [[p.kind, texts.add(clean(p.text)), texts.add(clean(p.missing))] for p in parts]
    if tokens is not None:
        found["by_token"] = _by_token(tokens, texts)
    return found


def _start_of(row: Mapping[str, Any]) -> str:
    """How the task's last message of a user begins; its name where the run kept no messages."""
    try:
        messages = json.loads(row.get("messages") or "[]")
    except (ValueError, RecursionError):
        messages = []
    texts = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    text = texts[-1] if texts and isinstance(texts[-1], str) else str(row.get("task") or "")
    return " ".join(text[: 10 * START].split())


def _by_token(tokens: Mapping[str, Any], texts: Texts) -> Row:
    """The tokens of an answer with their log-probs, three decimals each."""
    count, k = min(len(tokens["ids"]), MOST_TOKENS), int(tokens["top_k"] or 0)
    found: Row = {
        "texts": [clean(text, 200) for text in tokens["texts"][:count]],
        "left_out": len(tokens["ids"]) - count,
        "k": k,
    }
    if not all(tokens["sampled"]):
        found["sampled"] = [int(sampled) for sampled in tokens["sampled"][:count]]
    for name in LOGPROBS:
        if tokens.get(name):
            found[name] = [_rounded(value) for value in tokens[name][:count]]
    if k:
        found["top"] = [texts.add(clean(text, 60)) for text in tokens["top_texts"][: count * k]]
        for name in ("top_teacher", "top_student"):
            found[name] = [_rounded(value) for value in tokens[name][: count * k]]
    return found


def _context(value: Any) -> list[Mapping[str, Any]]:
    """The sections of the context, none where they cannot be read."""
    try:
        found = json.loads(value) if value else []
    except (ValueError, RecursionError):
        return []
    return [section for section in found if isinstance(section, dict)] if isinstance(found, list) else []


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, (int, float)) and math.isfinite(value) else None
