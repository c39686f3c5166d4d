"""The run folder: ``metrics.jsonl`` (an object for each step), ``rollouts/`` and ``tokens/`` (a parquet file each)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpd.learners.token_records import TokenRecord
from vpd.printable import well_formed
from vpd.quoting import feedback_quoted
from vpd.run_folder.files import FileSystem, rewind_lines
from vpd.run_folder.reading import METRICS, ROLLOUTS, TOKENS, step_file
from vpd.run_folder.token_tables import token_table
from vpd.types import Completion, Group, Metrics, Rollout, attempts_and_retries


class RunFolder:
    """An observer; what it has written is on the disk when a step ends, and a kill loses none of it."""

    def __init__(self, folder: Path, tokenizer: Any, *, files: FileSystem | None = None):
        self.folder = folder
        self._tokenizer = tokenizer
        self._files = files or FileSystem()

    def rewind(self, step: int) -> None:
        """Drop the lines and rollouts after ``step``: a continued run writes them again."""
        rewind_lines(self.folder / METRICS, step, self._files)
        for path in (path for name in (ROLLOUTS, TOKENS) for path in (self.folder / name).glob("step-*.parquet")):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                self._files.remove(path)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing: the files are the memory."""

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        if groups:
            self._write(ROLLOUTS, step, self._table(step, groups))
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._files.append_line(self.folder / METRICS, json.dumps({"step": step, **clean}))

    def on_token_records(self, step: int, records: Sequence[TokenRecord]) -> None:
        self._write(TOKENS, step, token_table(step, records, self._tokenizer))

    def _write(self, name: str, step: int, table: pa.Table) -> None:
        path = step_file(self.folder / name, step)
        self._files.write_atomically(path, lambda partial: pq.write_table(table, partial, compression="zstd"))

    def _transcript(self, completion: Completion) -> str:
        """The answer; of several turns everything that was said, with the template's marks between them."""
        return completion.text if completion.turns == 1 else str(self._tokenizer.decode(completion.tokens))

    def _table(self, step: int, groups: Sequence[Group]) -> pa.Table:
        quoted = {
            id(retry): feedback_quoted(attempt, retry)
            for group in groups
            for attempt in group.rollouts
            for retry in attempt.retries
        }
        rows = [
            {
                "role": role,
                "step": step,
                "group": number,
                "task": r.task.id,
                "prompt": self._tokenizer.decode(r.prompt),
                "teacher_prompt": None if r.teacher_prompt is None else self._tokenizer.decode(r.teacher_prompt.tokens),
                "completion": self._transcript(r.completion),
                "version": r.completion.version,
                "turns": r.completion.turns,
                "tokens": len(r.completion.tokens),
                "finish": r.completion.finish,
                "reward": float(r.grade.reward),
                "success": r.success,
                "feedback": r.grade.feedback,
                "context": _sections(r),
                "comparisons": _comparisons(r),
                "source": None if r.teacher_prompt is None else "+".join(r.teacher_prompt.sources) or None,
                "teacher_cut": None if r.teacher_prompt is None else r.teacher_prompt.cut,
                "messages": json.dumps(r.task.messages, default=str),
                "tools": json.dumps(r.task.tools, default=str) if r.task.tools else None,
                "informative": r.grade.informative,
                "graded": r.grade.graded,
                "quoted": quoted.get(id(r)),
            }
            for number, role, r in attempts_and_retries(groups)
        ]
        rows = [{name: well_formed(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
        text, number = pa.string(), pa.int64()
        kinds = {
            "step": number,
            "group": number,
            "version": number,
            "turns": number,
            "tokens": number,
            "teacher_cut": number,
            "reward": pa.float64(),
            "success": pa.bool_(),
            "informative": pa.bool_(),
            "graded": pa.bool_(),
            "quoted": number,
        }
        return pa.Table.from_pylist(rows, schema=pa.schema([(name, kinds.get(name, text)) for name in rows[0]]))


def _sections(rollout: Rollout) -> str | None:
    """The context as JSON: each section's source, kind and whole text."""
    sections = [{"source": s.source, "kind": s.kind, "text": s.text} for s in rollout.context]
    return json.dumps(sections) if sections else None


def _comparisons(rollout: Rollout) -> str | None:
    """A judge's comparisons as JSON: which attempt of the group with, and which of the two it preferred."""
    verdict = {True: "this", False: "other", None: "unsure"}
    found = [{"other": one.other, "preferred": verdict[one.preferred]} for one in rollout.comparisons]
    return json.dumps(found) if found else None
