"""Original files: what is found, what is read, and how a damaged one is named."""

from pathlib import Path

import pytest

from cutlayer.errors import DataError
from cutlayer.evaluation.published.original_files import (
    file_of,
    json_file,
    json_lines,
    records_of,
    text_file,
    texts_of,
)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "rows.json"
    path.write_bytes(data)
    return path


def test_the_preferred_file_is_taken_first(tmp_path: Path) -> None:
    for name in ("b.json", "a.json"):
        (tmp_path / name).touch()
    assert file_of(tmp_path, ["z.json", "b.json", "a.json"]) == tmp_path / "b.json"


def test_a_file_within_a_folder_is_found_also_when_it_is_given_itself(tmp_path: Path) -> None:
    (tmp_path / "BoolQ").mkdir()
    path = tmp_path / "BoolQ" / "val.jsonl"
    path.touch()
    assert file_of(tmp_path, ["BoolQ/val.jsonl"]) == path
    assert file_of(path, ["BoolQ/val.jsonl"]) == path


def test_what_was_looked_for_is_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no a\.json or b\.json; fetch"):
        file_of(tmp_path, ["a.json", "b.json"])
    with pytest.raises(DataError, match=r"nowhere does not exist.*a\.json"):
        file_of(tmp_path / "nowhere", ["a.json"])
    with pytest.raises(DataError, match=r"rows\.json is not a\.json"):
        file_of(written(tmp_path, b"{}"), ["a.json"])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_file_is_read_with_and_without_a_byte_order_mark(
    tmp_path: Path, mark: bytes
) -> None:
    assert json_file(written(tmp_path, mark + b'{"a": ["\xc3\xa9"]}')) == {"a": ["é"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; fetch it again"),
        (b" \n ", "is empty; fetch it again"),
        (b'{"a": 1,\n "secret": "te', r":2 column 12: malformed JSON.*truncated, fetch it again"),
        (b'{"a": "secret\xff"}', "byte 13 is not UTF-8.*truncated, fetch it again"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "too long a number"),
    ],
)
def test_a_damaged_json_file_is_named_with_its_place(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = written(tmp_path, data)
    with pytest.raises(DataError, match=message) as caught:
        json_file(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.json: No such file"):
        json_file(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        text_file(tmp_path)


def test_json_lines_are_records_that_know_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"a": 1}\n\n{"a": 2}\n')
    assert [(r.value("a"), r.where) for r in json_lines(path)] == [
        (1, f"{path}:1"),
        (2, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "no records"), (b'{"a": 1}\n{"secr', r":2: malformed JSON"), (b"[1]\n", ":1: a list")],
)
def test_damaged_json_lines_are_named_with_the_remedy(
    tmp_path: Path, data: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=f"{message}.*truncated, fetch it again") as caught:
        list(json_lines(written(tmp_path, data)))
    assert "secr" not in str(caught.value)


def test_line_ends_are_made_the_same(tmp_path: Path) -> None:
    assert text_file(written(tmp_path, b"a\r\nb\n")) == "a\nb\n"


def test_records_within_a_file_know_their_place() -> None:
    (record,) = records_of([{"a": 1}], "f.json: data")
    assert record.where == "f.json: data[0]"
    with pytest.raises(DataError, match=r"f\.json: data is no list"):
        records_of({"a": 1}, "f.json: data")
    with pytest.raises(DataError, match=r"f\.json: data\[1\] is no object"):
        records_of([{}, 7], "f.json: data")


def test_texts_within_a_file_are_checked_one_by_one() -> None:
    assert texts_of(["a", "b"], "f.json: ids") == ["a", "b"]
    with pytest.raises(DataError, match=r"f\.json: ids is no list"):
        texts_of("ab", "f.json: ids")
    with pytest.raises(DataError, match=r"f\.json: ids: column '1' is a value of type int"):
        texts_of(["a", 7], "f.json: ids")
