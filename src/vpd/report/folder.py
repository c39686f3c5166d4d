"""The run folder: ``metrics.jsonl`` (one object per step) and ``rollouts/`` (one parquet file per step)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpd.errors import StorageError
from vpd.types import Completion, Group, Metrics


class RunFolder:
    """Writes as the run goes; every line is flushed, so a killed run loses nothing that was told."""

    def __init__(self, folder: Path, tokenizer: Any):
        self.folder = folder
        self._tokenizer = tokenizer

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run will log it again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [
                line for line in path.read_text().splitlines() if _whole(line) and json.loads(line)["step"] <= step
            ]
            path.write_text("".join(line + "\n" for line in lines))
        for file in (self.folder / "rollouts").glob("step-*.parquet"):
            if int(file.stem.split("-")[1]) > step:
                file.unlink()

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                clean = {name: None if math.isnan(value) else value for name, value in metrics.items()}
                file.write(json.dumps({"step": step, **clean}) + "\n")
            if groups:
                (self.folder / "rollouts").mkdir(exist_ok=True)
                pq.write_table(self._table(step, groups), self.folder / "rollouts" / f"step-{step:06d}.parquet")
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.folder}",
                got=str(error),
                do="Free space or mend the permissions, then continue with --run.resume true.",
            ) from error

    def _transcript(self, completion: Completion) -> str:
        """The answer; of several turns everything that was said, with the template's marks between them."""
        return completion.text if completion.turns == 1 else str(self._tokenizer.decode(completion.tokens))

    def _table(self, step: int, groups: Sequence[Group]) -> pa.Table:
        rows = [
            {
                "step": step,
                "group": number,
                "task": r.task.id,
                "prompt": self._tokenizer.decode(r.prompt),
                "teacher_prompt": None if r.teacher_prompt is None else self._tokenizer.decode(r.teacher_prompt.tokens),
                "completion": self._transcript(r.completion),
                "turns": r.completion.turns,
                "tokens": len(r.completion.tokens),
                "finish": r.completion.finish,
                "reward": float(r.grade.reward),
                "success": r.success,
                "feedback": r.grade.feedback,
                "context": json.dumps([{"source": s.source, "text": s.text} for s in r.context]) if r.context else None,
                "source": None if r.teacher_prompt is None else "+".join(r.teacher_prompt.sources),
            }
            for number, group in enumerate(groups)
            for r in group.rollouts
        ]
        text, number = pa.string(), pa.int64()
        kinds = {
            "step": number,
            "group": number,
            "turns": number,
            "tokens": number,
            "reward": pa.float64(),
            "success": pa.bool_(),
        }
        return pa.Table.from_pylist(rows, schema=pa.schema([(name, kinds.get(name, text)) for name in rows[0]]))


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
