"""Many clients in a benchmark: what is counted, and that both sides really run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.federation_sides import Case, Ours, Subject, subject
from benchmarks.link import LinkProfile
from benchmarks.many_clients import ClientRun, step_seconds, turn_seconds
from benchmarks.many_naive import NaiveFederation
from benchmarks.split import make_kits
from benchmarks.subjects import equal_rows, write_tiny_llama
from benchmarks.workers import Worker, WorkerGroup

RTT_S = 0.010


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(write_tiny_llama(tmp_path_factory.mktemp("model")), 2)


@pytest.fixture(scope="module")
def ours(model: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ours]:
    kits = make_kits(tmp_path_factory.mktemp("work") / "kits", ["owner0", "owner1"])
    with (
        WorkerGroup("benchmarks.many_clients", 2, num_threads=1) as group,
        Ours(model, kits, group, 1, {}) as running,
    ):
        yield running


def _run(ends_s: list[float], begins_s: list[float] | None = None) -> ClientRun:
    return ClientRun(
        begins_s=tuple(begins_s or [0.0] * len(ends_s)),
        ends_s=tuple(ends_s),
        losses=(),
        cpu_s=0.0,
        peak_bytes=0,
    )


def test_clients_at_different_speeds_count_by_the_steps_they_take() -> None:
    """One step a second and two a second: together three, so two clients' steps take 2 / 3 s."""
    slow, fast = _run([1.0, 2.0, 3.0, 4.0]), _run([0.5 * n for n in range(1, 9)])
    assert step_seconds([slow, fast], 1, num_pieces=1) == pytest.approx((2 / 3,))


def test_time_in_which_a_client_has_finished_does_not_count() -> None:
    early, late = _run([1.0, 2.0]), _run([1.0, 2.0, 2.1, 2.2])
    assert step_seconds([early, late], 1, num_pieces=1) == pytest.approx((1.0,))


def test_clients_that_never_work_at_once_count_from_the_first_to_the_last() -> None:
    runs = [_run([1.0, 2.0]), _run([3.0, 4.0])]
    assert step_seconds(runs, 1) == pytest.approx((3.0,))


def test_a_turn_is_the_sum_of_the_clients_steps() -> None:
    runs = [_run([1.0, 5.0], [0.0, 3.0]), _run([3.0, 6.0], [1.0, 5.0])]
    assert turn_seconds(runs, 1) == (3.0,)


@pytest.mark.parametrize("link", ["loopback", "lan"])
def test_clients_train_at_the_same_time(ours: Ours, link: str) -> None:
    case = Case(link=link, num_rows=2, length=8, steps=4, warmup=1)
    measured = ours.together(case)
    assert len(measured.seconds) == 5
    assert measured.bytes_up_per_token > 2 * 2 * 64
    assert measured.server_peak_bytes > 0


def test_clients_train_in_turn(ours: Ours) -> None:
    case = Case(link="lan", num_rows=1, length=8, steps=3, warmup=1)
    measured = ours.in_turn(case, num_threads=1)
    # Two round trips of 5 ms of each client, one after the other.
    assert min(measured.seconds) >= 2 * 2 * 0.005


def test_naive_clients_wait_for_each_other(model: Subject) -> None:
    link = LinkProfile(rtt_ms=RTT_S * 1e3, rate_mbit_per_s=None)
    with NaiveFederation(model.folder, model.lower, model.upper, link, 2) as naive:
        rows = [equal_rows(1, 8, model.vocab_size, seed) for seed in range(2)]
        for num_threads in (1, 2):
            seconds = naive.round_seconds(rows, 2, num_threads)
            assert len(seconds) == 2
            assert min(seconds) >= 2 * 3 * RTT_S


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    worker = Worker("benchmarks.no_such_module", num_threads=1)
    with pytest.raises(RuntimeError, match="status 1"):
        worker.expect_ready()
    worker.close()
