"""The ledger: one durable line per release, replays free, nothing rolled back."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cutlayer.errors import BudgetExceeded, StorageError
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


PLAIN = MECHANISMS.make("none")


def generate(ledger: Ledger, *names: int, version: str = "base", limit: int | None = None) -> bool:
    """A release of one vector for each name, at the gate of generation."""
    event = PLAIN.event(len(names))
    return ledger.account("generation", event, version, rows(*names, num_vectors=1), limit)


def test_what_may_go_ahead_leaves_without_a_line_and_is_named_by_the_next(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        ledger.go_ahead("generation", PLAIN.event(2), "base")
        assert not generate(ledger, 1)
        assert not generate(ledger, 2)
        assert generate(ledger, 1), "what left ahead is known"
        assert len(lines(path)) == 1
        ledger.go_ahead("generation", PLAIN.event(1), "base")
        assert [(line["keys"], line["vectors"], line["ahead"]) for line in lines(path)] == [
            ([], 0, 2),
            ([f"{1:032x}", f"{2:032x}"], 2, 1),
        ]
        assert ledger.summary().num_vectors == {"generation": 2}


def test_a_closed_ledger_counts_what_left_and_no_more(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        ledger.go_ahead("generation", PLAIN.event(5), "base")
        generate(ledger, 1)
    for _ in range(2):
        with open_ledger(path) as ledger:
            assert ledger.summary().num_vectors == {"generation": 1}
            assert ledger.summary().num_lines == len(lines(path)) == 2
            assert generate(ledger, 1)


@pytest.mark.parametrize("num_left", [0, 1, 3])
def test_after_a_crash_all_that_might_have_left_counts_once(tmp_path: Path, num_left: int):
    path, copy = tmp_path / "ledger.jsonl", tmp_path / "crashed.jsonl"
    with open_ledger(path) as ledger:
        generate(ledger, 7)
        ledger.go_ahead("generation", PLAIN.event(3), "base")
        for name in range(num_left):
            generate(ledger, name)
        copy.write_bytes(path.read_bytes())
    for _ in range(2):
        with open_ledger(copy) as again:
            assert again.summary().num_vectors == {"generation": 4}


def test_the_day_counts_what_may_have_left_before_a_crash(tmp_path: Path):
    path, copy = tmp_path / "ledger.jsonl", tmp_path / "crashed.jsonl"
    with open_ledger(path) as ledger:
        ledger.go_ahead("generation", PLAIN.event(3), "base")
        copy.write_bytes(path.read_bytes())
        for name in range(3):
            generate(ledger, name, limit=3)
        with pytest.raises(BudgetExceeded):
            generate(ledger, 4, limit=3)
    with open_ledger(copy) as again, pytest.raises(BudgetExceeded):
        generate(again, 4, limit=3)


@pytest.mark.parametrize("case", ["more", "version", "boundary", "day"])
def test_what_is_not_allowed_pays_with_a_line_of_its_own(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "ledger.jsonl"
    with open_ledger(path) as ledger:
        ledger.go_ahead("generation", PLAIN.event(2), "base")
        generate(ledger, 1)
        if case == "more":
            generate(ledger, 2, 3)
        elif case == "version":
            generate(ledger, 2, 3, version="step1")
        elif case == "boundary":
            account(ledger, 2, 3)
        else:
            monkeypatch.setattr(ledger, "_now", lambda: NOW.replace(day=22))
            generate(ledger, 2, 3)
        written = lines(path)
        assert [line["keys"] for line in written] == [
            [],
            [f"{1:032x}"],
            [f"{2:032x}", f"{3:032x}"],
        ]
        generate(ledger, 4)
        assert len(lines(path)) == 4, "the allowance ended with the next line"


def test_rules_with_an_epsilon_never_go_ahead(tmp_path: Path):
    path, rule = tmp_path / "ledger.jsonl", MECHANISMS.make("clipped_gaussian", 1.0, 1.0)
    with open_ledger(path) as ledger:
        ledger.go_ahead("generation", rule.event(2), "base")
        assert not lines(path)


def test_a_disk_that_fails_lets_nothing_more_go_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with open_ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.go_ahead("generation", PLAIN.event(2), "base")
        generate(ledger, 1)

        def full(*_: object) -> None:
            raise StorageError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr("cutlayer.storage.log.write_all", full)
            with pytest.raises(StorageError):
                ledger.go_ahead("generation", PLAIN.event(2), "base")
            with pytest.raises(StorageError):
                generate(ledger, 2)
        generate(ledger, 2)
        assert ledger.summary().num_vectors == {"generation": 2}
    assert lines(tmp_path / "ledger.jsonl")[1]["keys"] == [f"{1:032x}"]
