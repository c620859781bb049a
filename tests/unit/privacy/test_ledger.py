"""The ledger: one durable line per release, replays free, nothing rolled back."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cutlayer.errors import StorageError
from cutlayer.privacy.ledger import Ledger, Release
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.storage.log import DurableLog

RULE = MECHANISMS.make("gaussian", 0.02)
NOW = datetime(2026, 11, 21, 8, 0, tzinfo=UTC)


def open_ledger(path: Path) -> Ledger:
    return Ledger(DurableLog(path), "run-1", now=lambda: NOW)


def rows(*names: int, num_vectors: int = 3) -> list[Release]:
    return [Release(key=f"{name:032x}", num_vectors=num_vectors) for name in names]


def account(ledger: Ledger, *names: int, boundary: str = "activations") -> bool:
    return ledger.account(boundary, RULE.event(3 * len(names)), "base", rows(*names))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line)["record"] for line in path.read_text().splitlines()]


def test_a_line_says_who_what_and_how_much_but_no_content(tmp_path: Path):
    with open_ledger(tmp_path / "ledger.jsonl") as ledger:
        assert not account(ledger, 1, 2)
    (line,) = lines(tmp_path / "ledger.jsonl")
    assert line == {
        "time": "2026-11-21T08:00:00.000+00:00",
        "run": "run-1",
        "boundary": "activations",
        "mechanism": "gaussian",
        "scale": 0.02,
        "version": "base",
        "keys": [f"{1:032x}", f"{2:032x}"],
        "vectors": 6,
    }


def test_the_line_is_in_the_file_when_account_returns(tmp_path: Path):
    with open_ledger(tmp_path / "ledger.jsonl") as ledger:
        account(ledger, 1)
        assert len(lines(tmp_path / "ledger.jsonl")) == 1


def test_a_replay_costs_nothing_and_writes_nothing(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        account(ledger, 1, 2)
        before = path.read_bytes()
        assert account(ledger, 2, 1)
        assert path.read_bytes() == before
        summary = ledger.summary()
    assert summary.num_vectors == {"activations": 6}
    assert summary.num_replayed_vectors == 6
    assert summary.num_releases == 2


def test_a_frame_with_old_and_new_rows_pays_for_the_new_ones(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        account(ledger, 1)
        assert not account(ledger, 1, 2)
        assert ledger.summary().num_replayed_vectors == 3
    assert lines(path)[1]["keys"] == [f"{2:032x}"]
    assert lines(path)[1]["vectors"] == 3


def test_the_same_row_twice_in_a_frame_is_paid_once(tmp_path: Path):
    with open_ledger(tmp_path / "ledger.jsonl") as ledger:
        assert not account(ledger, 1, 1)
        assert ledger.summary().num_vectors == {"activations": 3}
        assert ledger.summary().num_replayed_vectors == 3


def test_totals_and_known_rows_survive_a_restart(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        account(ledger, 1, 2)
        account(ledger, 3, boundary="gradients")
        before = ledger.summary()
    with open_ledger(path) as ledger:
        assert ledger.summary() == before
        assert account(ledger, 1, 2, 3)
        assert not account(ledger, 4)
    assert before.num_vectors == {"activations": 6, "gradients": 3}
    assert before.num_lines == 2
    assert before.rules == ("gaussian scale=0.02",)


def test_two_writers_are_refused(tmp_path: Path):
    with (
        open_ledger(tmp_path / "ledger.jsonl"),
        pytest.raises(StorageError, match="another process"),
    ):
        open_ledger(tmp_path / "ledger.jsonl")


def test_an_edited_ledger_is_refused(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        account(ledger, 1)
        account(ledger, 2)
    path.write_text(path.read_text().replace('"vectors":3', '"vectors":1', 1))
    with pytest.raises(StorageError, match="line 1 was changed"):
        open_ledger(path)


@pytest.mark.parametrize(
    "record",
    [
        {"hello": 1},
        {
            "time": "t",
            "run": "r",
            "boundary": "activations",
            "mechanism": "none",
            "scale": None,
            "version": "base",
            "keys": ["zz"],
            "vectors": 1,
        },
    ],
)
def test_a_log_of_something_else_is_refused(tmp_path: Path, record: dict[str, object]):
    path = tmp_path / "ledger.jsonl"
    with DurableLog(path) as log:
        log.append(record)
    with DurableLog(path) as log, pytest.raises(StorageError, match="line 1 is not a ledger line"):
        Ledger(log, "run-1")


def test_a_failed_write_leaves_the_row_unreleased(tmp_path: Path):
    ledger = open_ledger(tmp_path / "ledger.jsonl")
    ledger.close()
    for _ in range(2):
        with pytest.raises(StorageError, match="is closed"):
            account(ledger, 1)
    assert ledger.summary().num_releases == 0


def test_threads_that_release_the_same_row_pay_once(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        threads = [
            threading.Thread(target=lambda: [account(ledger, i) for i in range(20)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.summary().num_vectors == {"activations": 60}
        assert ledger.summary().num_replayed_vectors == 180
    assert len(lines(path)) == 20
