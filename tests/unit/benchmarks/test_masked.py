"""The benchmark of masked layers: it measures what it says."""

import json
from pathlib import Path

import pytest

from benchmarks.masked_errors import (
    TAMPERINGS,
    count_detected,
    layer_errors,
    measure_uniformity,
)
from benchmarks.masked_kernels import main
from benchmarks.masked_speed import measure_layer
from benchmarks.masked_training import final_losses


@pytest.mark.parametrize("name", TAMPERINGS)
def test_all_of_one_kind_of_tampering_is_detected(name: str) -> None:
    assert count_detected(name, 100) == 100


def test_errors_are_those_of_a_float32_layer() -> None:
    forward, backward = layer_errors(192, 20, 16)
    assert 0 < forward < 1e-4
    assert 0 < backward < 1e-4


def test_masked_values_look_uniform() -> None:
    found = measure_uniformity(64, 512)
    assert abs(found.chi_square) < 5
    assert found.kolmogorov < 2.3
    assert found.worst_bit < 5
    assert found.correlation < 4


def test_costs_are_positive_and_bytes_are_counted() -> None:
    cost = measure_layer(64, 8, 16, repeats=1)
    assert min(cost.layer_us, cost.inside_us, cost.backward_us, cost.pad_us) > 0
    assert cost.bytes_per_token == 4 * (64 + 2 * 64)


def test_masked_training_stays_with_plain_training(tmp_path: Path) -> None:
    plain, masked = final_losses(tmp_path, steps=3, num_rows=2)
    assert masked == pytest.approx(plain, rel=1e-3)


def test_exact_kernels_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--profile", "smoke", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["us_per_token_float64"] > 0
