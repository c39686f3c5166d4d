"""Files as they lie there: every form is read, and every fault is one line that names the file and its line."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpd.envs import records
from vpd.errors import DataError

ROWS = [{"prompt": "one é", "n": 1}, {"prompt": "two\u2028lines", "n": 2}]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def zstd(content: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return bytes(stream.getvalue())


def read(path: Path | str, **settings: Any) -> list[Any]:
    return [dict(record) for _, _, record in records.read(str(path), split="train", **settings)]


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.compress,
    "two-members.jsonl.gz": lambda content: gzip.compress(content + b"\n") + gzip.compress(b" \n"),
    "renamed.jsonl": gzip.compress,
    "a.jsonl.zst": zstd,
    "two-frames.zst": lambda content: zstd(content[:9]) + zstd(content[9:]),
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
    "unpacked-by-the-browser.jsonl.gz": bytes,
    "windows.jsonl": lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n\r\n",
    "array.json": lambda _: json.dumps(ROWS, indent=1).encode(),
    "array.json.gz": lambda _: gzip.compress(b"\n " + json.dumps(ROWS).encode() + b"\n"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_records(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS[name](LINES))
    assert read(tmp_path / name) == ROWS


def test_csv_has_texts_and_parquet_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,n\r\n"one, ""two""\nlines",007\r\n\r\nthree,\r\n')
    assert read(tmp_path / "a.csv") == [{"prompt": 'one, "two"\nlines', "n": "007"}, {"prompt": "three", "n": ""}]
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"prompt\tn\none\t1\n"))
    assert read(tmp_path / "a.tsv.gz") == [{"prompt": "one", "n": "1"}]
    (tmp_path / "long.csv").write_text("prompt\n" + "x" * 200_000)
    assert len(read(tmp_path / "long.csv")[0]["prompt"]) == 200_000
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.pq")
    assert read(tmp_path / "a.pq") == ROWS


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == read(tmp_path / "both") == ROWS
    assert [r for _, _, r in records.read(str(tmp_path / "both"), split="test")] == ROWS[1:]
    with pytest.raises(DataError, match=r"both is a folder; got in it dataset_dict\.json, test, train; .*env\.split"):
        list(records.read(str(tmp_path / "both"), split="dev"))


FAULTS: dict[str, tuple[bytes, str]] = {
    "latin.jsonl": ('{"a": 1}\n{"a": "é"}'.encode("latin-1"), "is not UTF-8; got byte 0xe9 in line 2"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), "is not UTF-8; got byte 0xff in line 1"),
    "nan.jsonl": (b'{"a": 1}\n\n{"a": NaN}', "line 3 is not JSON; got NaN is no number of JSON"),
    "inf.jsonl": (b'{"a": -Infinity}', "line 1 is not JSON; got -Infinity is no number"),
    "large.jsonl": (b'{"a": 1e999}', "line 1 is not JSON; got 1e999 is too large a number"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
    "deep.jsonl": (b"{}\n" + b'{"a":' * 100_000, "line 2 is not JSON; got it is nested too deep"),
    "null.jsonl": (b'{"a": 1}\nnull', "line 2 is not an object; got null"),
    "number.jsonl": (b'{"a": 1}\n7', "line 2 is not an object; got int"),
    "pretty.json": (b'{\n "a": 1\n}', "line 1 is not JSON.*one object a line, or a JSON array"),
    "huge.jsonl": (b'{"a": "' + b"x" * 3_000_000, "line 1 is not JSON"),
    "colon.jsonl": (b'{"a": 1}\n{"a" 2}', "line 2 is not JSON; got Expecting ':' delimiter at column 6; expected"),
    "colon.json": (
        b'[{"a": 1},\n {"a":\n 2 3}]',
        "line 2 is not JSON; got Expecting ',' delimiter at column 4 of line 3;",
    ),
    "zeros.jsonl": (b"{}\n" + bytes(100), "line 2 is not JSON"),
    "empty.jsonl": (b"", "is empty; expected a record for each task. Write a record on each line"),
    "blank.jsonl": (b" \n\n", "is empty"),
    "empty.json": (b" [ ] ", "is empty"),
    "cut.json": (b'[{"a": 1},\n {"a": 2}', r"line 2 is not JSON; got ''; expected ',' or the array's end"),
    "comma.json": (b'[{"a": 1},\n]', "line 2 is not JSON"),
    "behind.json": (b'[{"a": 1}]\n[]', "line 1 is not JSON"),
    "mixed.json": (b'[{"a": 1},\n\n 3]', "line 3 is not an object; got int"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], "is a damaged gzip file"),
    "cut.jsonl.zst": (zstd(LINES * 99)[:40], "is a damaged zstd file"),
    "short.csv": (b"a,b\n1,2\n3", "line 3 has another number of columns; got 1 values; expected 2"),
    "twice.csv": (b"a,a\n1,2", "line 1 names no columns"),
    "open.csv": (b'a,b\n"1,2\n', "is not CSV"),
    "header.csv": (b"a,b\n", "is empty; got a header alone"),
    "not.parquet": (b"PAR1 no", "cannot read .*expected a parquet file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    content, told = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        read(tmp_path / name)
    line = str(caught.value)
    assert name in line and "\n" not in line and len(line) < 800


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, told in {
        str(tmp_path / "pipe.jsonl"): "got a pipe or a device",
        "/dev/null": "got a pipe or a device",
        str(tmp_path): "is a folder; got in it pipe.jsonl",
        str(tmp_path / "none.jsonl.gz"): "cannot read",
        "data/none.csv": "cannot read",
        "a\0b": "cannot read",
        "x" * 300: "cannot read",
    }.items():
        with pytest.raises(DataError, match=told):
            read(path)


def test_a_text_that_may_be_missing_is_none_where_a_table_says_nothing() -> None:
    for nothing in (None, float("nan"), ""):
        assert records.optional_text({"system": nothing}, "system", "row 0") is None
    assert records.optional_text({}, "system", "row 0") is None
    assert records.optional_text({"system": "Be brief."}, "system", "row 0") == "Be brief."
    with pytest.raises(DataError, match="row 0 has no text 'system'"):
        records.optional_text({"system": 3}, "system", "row 0")


def test_a_record_in_verls_schema_is_read_as_the_one_it_was_made_of() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A or B?"}]
    record = {"prompt": chat, "reward_model": {"ground_truth": "B"}, "extra_info": {"index": "7"}}
    read = records.from_verl(record, "row 0")
    assert (read["prompt"], read["system"], read["answer"]) == ("A or B?", "Be brief.", "B")
    assert records.name_of(read, 0, "idx", "extra_info.index") == "7" and records.name_of(read, 0, "idx") == "0"
    prepared = {"prompt": "A or B?", "answer": "B"}
    assert records.from_verl(prepared, "row 0") is prepared
    with pytest.raises(DataError, match="row 0: 'prompt' is a conversation"):
        records.from_verl({**record, "prompt": chat[1:] * 2}, "row 0")
