"""Every kind of source gives the same records, and says where a bad one is."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cutlayer.data.sources import Record, read_records, source_kinds
from cutlayer.errors import DataError

ROWS = [{"a": "one", "b": 'Grüße, "x"'}, {"a": "two\nlines", "b": "y\tz"}, {"a": "3", "b": "w"}]


def _write_jsonl(path: Path) -> Path:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def _write_separated(path: Path, delimiter: str, suffix: str) -> Path:
    file = path / f"rows{suffix}"
    quoted = [[v.replace('"', '""') for v in row.values()] for row in ROWS]
    lines = [delimiter.join(f'"{v}"' for v in values) for values in quoted]
    file.write_text("\n".join([f"a{delimiter}b", *lines]) + "\n", newline="")
    return file


def _write_parquet(path: Path) -> Path:
    file = path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file


def _write_saved(path: Path) -> Path:
    folder = path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "jsonl": _write_jsonl,
    "csv": lambda path: _write_separated(path, ",", ".csv"),
    "tsv": lambda path: _write_separated(path, "\t", ".tsv"),
    "parquet": _write_parquet,
    "datasets": _write_saved,
}


def test_every_registered_kind_is_tested() -> None:
    assert source_kinds() == sorted(WRITERS)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_every_kind_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    assert [dict(record.fields) for record in read_records(path)] == ROWS
    assert [dict(record.fields) for record in read_records(path, kind)] == ROWS


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_every_record_says_where_it_stands(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    places = [record.where for record in read_records(path)]
    # A quoted line break makes the third CSV record begin at line 5.
    lines = {"jsonl": [":1", ":2", ":3"], "csv": [":2", ":3", ":5"], "tsv": [":2", ":3", ":5"]}
    expected = lines.get(kind, [" row 1", " row 2", " row 3"])
    assert places == [f"{path}{place}" for place in expected]


def _error(path: Path, kind: str | None = None, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path, kind, split))
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no records"),
        (b"\n \n", "has no records"),
        (b'{"a": "x"}\n{"a": \n', ":2: malformed JSON at column"),
        (b'{"a": "x"}\n["a"]\n', ":2: a list, expected one JSON object"),
        (b'{"a": "x"}\n\n{"a": "\xff"}\n', ":3: byte 7 of the line (0xff) is not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", ":1: malformed JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", ":1: malformed JSON"),
    ],
)
def test_bad_jsonl_names_the_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert expected in _error(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no records"),
        (b"a,b\n", "has no records"),
        (b"a,b\n1,2\n1,2,3\n", ":3: 3 values for 2 columns"),
        (b"a,b\n1,2\n1\n", ":3: 1 values for 2 columns"),
        (b'a,b\n1,2\n"1,2\n', ":3: malformed row"),
        (b"a,a\n1,2\n", ":1: column names ['a'] appear twice"),
        (b"a,b\n1,\xe9\n", ":2: byte 2 of the line (0xe9) is not UTF-8"),
        (b"a,b\n1," + b"x" * 200_000 + b"\n", ":2: malformed row: field larger"),
    ],
)
def test_bad_csv_names_the_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert expected in _error(path)


def test_a_malformed_line_does_not_put_the_owners_text_into_the_message(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"diagnosis": "secret"\n')
    assert "secret" not in _error(path)


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n")
    assert [dict(record.fields) for record in read_records(path)] == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet at all PAR1"])
def test_a_broken_parquet_file_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert "is not a readable Parquet" in _error(path)


def test_a_broken_saved_dataset_is_a_data_error(tmp_path: Path) -> None:
    folder = _write_saved(tmp_path)
    (folder / "train" / "state.json").write_text("{")
    assert "is not a readable datasets folder" in _error(folder)


def test_an_unknown_split_names_the_known_ones(tmp_path: Path) -> None:
    folder = _write_saved(tmp_path)
    assert "has no split 'validation'; the splits are train" in _error(folder, None, "validation")


def test_a_folder_of_plain_files_is_read_by_split(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    (tmp_path / "README.md").write_text("not data")
    trained = [record.fields["name"] for record in read_records(tmp_path)]
    assert trained == ["train-0.jsonl", "train-1.jsonl"]
    validated = read_records(tmp_path, split="validation")
    assert [record.fields["name"] for record in validated] == ["validation.jsonl"]
    assert "no file name begins with 'test'" in _error(tmp_path, None, "test")


def test_a_single_file_in_a_folder_never_passes_for_another_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": "x"}\n')
    assert "no file name begins with 'validation'" in _error(tmp_path, None, "validation")


def test_an_empty_folder_says_what_it_looked_for(tmp_path: Path) -> None:
    assert "no saved dataset and no data file (.csv" in _error(tmp_path)


def test_a_missing_path_an_unknown_suffix_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    assert "does not exist" in _error(tmp_path / "nothing.jsonl")
    path = tmp_path / "rows.xlsx"
    path.write_text("x")
    assert "unknown suffix '.xlsx'" in _error(path)
    assert "unknown kind of data 'excel'; choose one of csv" in _error(path, "excel")
    assert "is not a readable file" in _error(tmp_path, "jsonl")


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x"}\n' * 100 + "broken\n")
    records = read_records(path)
    assert next(records).fields == {"a": "x"}  # the broken line 101 was not reached


def test_a_wrong_column_names_the_known_ones() -> None:
    record = Record({"prompt": "p", "topic": 3, "half": "\ud800"}, "f:7")
    with pytest.raises(DataError, match=r"f:7: no column 'promt'; did you mean 'prompt'\? the col"):
        record.text("promt")
    with pytest.raises(DataError, match="f:7: column 'topic' is a value of type int, expected tex"):
        record.text("topic")
    with pytest.raises(DataError, match="f:7: column 'half' holds half a surrogate pair"):
        record.text("half")
