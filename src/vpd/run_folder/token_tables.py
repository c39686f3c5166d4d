"""``tokens/step-N.parquet``: a few rows of each step, token by token (:mod:`vpd.learners.token_records`).

========================= ==========================================================================================
column                    of one row
========================= ==========================================================================================
step, row                 which row of ``rollouts/step-N.parquet`` it is, counted from 0
ids, texts, sampled       [T] tokens, what each adds to the text, and whether the model sampled it or not
sampler                   [T] log-probs of the weights that sampled it
student, teacher          [T] log-probs as the M-step sees them
top_k                     K, how many of the teacher's likeliest tokens were kept
top_ids, top_texts        [T*K] these tokens
top_teacher, top_student  [T*K] their log-probs
student_before            [T] log-probs of the weights that the E-step trains, as student and as teacher before it, and
teacher_before            as teacher after it; null where there was no E-step
teacher_after
========================= ==========================================================================================

Log-probs are natural logarithms in 32 bits; null: not scored (a row without a teacher).
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from vpd.learners.token_records import TokenRecord
from vpd.printable import well_formed

LONGEST_CHARACTER = 4  # tokens: bytes of a character in UTF-8
_NUMBERS, _IDS, _TEXTS = pa.list_(pa.float32()), pa.list_(pa.int32()), pa.list_(pa.string())
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "row": pa.int64(),
        "ids": _IDS,
        "texts": _TEXTS,
        "sampled": pa.list_(pa.bool_()),
        "sampler": _NUMBERS,
        "student": _NUMBERS,
        "teacher": _NUMBERS,
        "top_k": pa.int64(),
        "top_ids": _IDS,
        "top_texts": _TEXTS,
        "top_teacher": _NUMBERS,
        "top_student": _NUMBERS,
        "student_before": _NUMBERS,
        "teacher_before": _NUMBERS,
        "teacher_after": _NUMBERS,
    }
)


def token_table(step: int, records: Sequence[TokenRecord], tokenizer: Any) -> pa.Table:
    """The records of a step as they are written."""
    spelled: dict[int, str] = {}
    rows = []
    for record in records:
        completion = record.rollout.completion
        top_ids = [token for tokens in record.top_ids for token in tokens]
        for token in set(top_ids) - spelled.keys():
            spelled[token] = well_formed(str(tokenizer.decode([token])))
        rows.append(
            {
                "step": step,
                "row": record.row,
                "ids": completion.tokens,
                "texts": token_texts(tokenizer, completion.tokens),
                "sampled": completion.sampled,
                "sampler": completion.logprobs,
                "top_k": len(record.top_ids[0]) if record.top_ids else 0,
                "top_ids": top_ids,
                "top_texts": [spelled[token] for token in top_ids],
                "top_teacher": [value for values in record.top_teacher for value in values],
                "top_student": [value for values in record.top_student for value in values],
                **{name: values or None for name, values in _per_token(record).items()},
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens stands at its last one."""
    texts: list[str] = []
    start = shown = 0  # the text of tokens[start:shown] is known
    for end in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(list(tokens[start:end])))
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}") and end - shown < LONGEST_CHARACTER
        if incomplete and end < len(tokens):
            texts.append("")
            continue
        before = str(tokenizer.decode(list(tokens[start:shown]))) if shown > start else ""
        texts.append(well_formed(text[len(before) :]))
        start, shown = shown, end
    return texts


def _per_token(record: TokenRecord) -> dict[str, tuple[float, ...]]:
    return {
        "student": record.student,
        "teacher": record.teacher,
        "student_before": record.student_before,
        "teacher_before": record.teacher_before,
        "teacher_after": record.teacher_after,
    }
