"""The scale benchmark: its sums are right, and its bytes are split as it says."""

import json

import pytest

from benchmarks.scale import main, measure_round, measure_scheduler


def test_a_round_counts_every_frame_of_every_client() -> None:
    point = measure_round(5)
    # Five calls and five answers each; nobody of five vanishes.
    assert point.messages == 10
    assert point.update_bytes == 8 * 2001 + 4 * 2000
    assert point.names_bytes == 5 * len("hospital-0000") + 5
    assert 0 < point.protocol_bytes < point.update_bytes
    assert point.max_error < 1e-6


def test_the_scheduler_decides_for_every_client_that_waits() -> None:
    assert measure_scheduler(20, decisions=5) > 0


def test_the_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = main(["--profile", "smoke", "--json", "--clients", "6"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == result
    assert printed["clients"] == 6
    assert printed["messages_per_client"] == 10
