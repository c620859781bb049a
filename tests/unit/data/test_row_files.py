"""Rows as files that the ordinary reader reads."""

from datetime import date
from pathlib import Path

import pytest

from cutlayer.data.row_files import write_row_files
from cutlayer.data.sources import read_records
from cutlayer.errors import DataError, StorageError

ROWS: list[dict[str, object]] = [
    {"text": "Zwölf Pfund £ sind\nviel", "stars": 5},
    {"text": "", "stars": None},
]


def test_the_reader_gets_back_what_was_written(tmp_path: Path) -> None:
    train, heldout = write_row_files(tmp_path / "owner" / "own", ROWS, ROWS[:1])
    assert [dict(r.fields) for r in read_records(train, "jsonl")] == ROWS
    assert [dict(r.fields) for r in read_records(heldout, "jsonl")] == ROWS[:1]


def test_a_value_that_json_lacks_becomes_its_text(tmp_path: Path) -> None:
    train, _ = write_row_files(tmp_path, [{"day": date(2026, 11, 21)}], ROWS)
    (record,) = read_records(train, "jsonl")
    assert record.text("day") == "2026-11-21"


def test_half_a_surrogate_pair_is_left_to_the_reader_who_names_the_row(tmp_path: Path) -> None:
    train, _ = write_row_files(tmp_path, [*ROWS, {"text": "half \ud83d"}], [])
    *_, last = read_records(train, "jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl:3"):
        last.text("text")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "owner").write_text("a file")
    with pytest.raises(StorageError, match=r"create folder .*owner"):
        write_row_files(tmp_path / "owner", ROWS, ROWS)
