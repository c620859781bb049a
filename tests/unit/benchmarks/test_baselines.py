"""Both baselines end to end, as the benchmarks call them."""

from pathlib import Path

import pytest

from benchmarks.baselines import (
    NaiveSetup,
    Timed,
    fastest,
    naive_generation,
    naive_training,
    unsplit_training,
)
from benchmarks.link import LinkProfile
from benchmarks.subjects import equal_rows, write_tiny_llama
from benchmarks.unsplit import UnsplitRequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def setup(folder: Path) -> NaiveSetup:
    link = LinkProfile(rtt_ms=20.0, rate_mbit_per_s=None)
    return NaiveSetup(model_folder=folder, lower=2, upper=4, link=link, mask_form="2d")


def test_a_naive_step_waits_for_three_round_trips(setup: NaiveSetup) -> None:
    timed, crossed = naive_training(setup, equal_rows(1, 8, 256), steps=3)
    assert min(timed.details.seconds) >= 3 * 0.020
    assert crossed.bytes_up >= sum(timed.details.bytes_up)


def test_a_naive_token_waits_for_two_round_trips(setup: NaiveSetup) -> None:
    timed = naive_generation(setup, equal_rows(1, 8, 256)[0], new_tokens=4, lengths_sampled=2)
    assert timed.seconds >= 4 * 2 * 0.020


def test_the_unsplit_step_is_timed_without_its_warm_up(folder: Path) -> None:
    request = UnsplitRequest(model_folder=str(folder), rows=equal_rows(1, 8, 256), steps=3)
    timed = unsplit_training(request, num_threads=1)
    assert min(timed.details.seconds[1:]) <= timed.seconds <= max(timed.details.seconds[1:])


def test_the_fastest_thread_setting_is_kept_and_named() -> None:
    taken_s = {1: 0.3, 2: 0.2, 4: 0.4}
    best = fastest(
        lambda count: Timed(seconds=taken_s[count], num_threads=count, details=None), (1, 2, 4)
    )
    assert (best.seconds, best.num_threads) == (0.2, 2)
