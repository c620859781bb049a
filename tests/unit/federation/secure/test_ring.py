"""Real values become integers and come back; what cannot is refused before it is masked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.errors import ConfigError, DataError, ProtocolError
from cutlayer.federation.secure.ring import check_headroom, dequantise, quantise
from cutlayer.federation.settings import SecureSettings

_POLICY = SecureSettings()


@given(
    values=st.lists(st.floats(-16, 16, width=32), min_size=1, max_size=20),
    weight=st.integers(1, 1 << 20),
)
def test_one_update_comes_back(values: list[float], weight: int) -> None:
    quantised = quantise(torch.tensor(values), weight, _POLICY)
    mean_N, total_weight = dequantise(quantised.vector_M, _POLICY, 1)
    assert total_weight == weight
    assert quantised.num_clipped == 0
    assert float((mean_N - torch.tensor(values).double()).abs().max()) <= 2**-29


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_is_taken(dtype: torch.dtype) -> None:
    values_N = torch.tensor([0.5, -0.25, 3.0], dtype=dtype)
    mean_N, _ = dequantise(quantise(values_N, 7, _POLICY).vector_M, _POLICY, 1)
    assert torch.equal(mean_N, values_N.double())


def test_values_beyond_the_range_are_clipped_and_counted() -> None:
    quantised = quantise(torch.tensor([16.0, 16.5, -40.0, 1e30, 0.0]), 3, _POLICY)
    mean_N, _ = dequantise(quantised.vector_M, _POLICY, 1)
    assert quantised.num_clipped == 3
    assert mean_N.tolist() == [16.0, 16.0, -16.0, 16.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_never_leaves(value: float) -> None:
    with pytest.raises(DataError, match="1 of 3 values of this member's update are NaN or inf"):
        quantise(torch.tensor([1.0, value, 2.0]), 3, _POLICY)


def test_a_weight_is_capped_and_never_negative() -> None:
    assert int(quantise(torch.zeros(1), 1 << 30, _POLICY).vector_M[-1]) == 1 << 20
    with pytest.raises(DataError, match="weight -1"):
        quantise(torch.zeros(1), -1, _POLICY)


def test_quantising_leaves_the_update_as_it_was() -> None:
    values_N = torch.tensor([20.0, 1.0])
    quantise(values_N, 3, _POLICY)
    assert values_N.tolist() == [20.0, 1.0]


def test_settings_that_could_wrap_are_refused() -> None:
    check_headroom(2047, _POLICY)
    with pytest.raises(ConfigError, match=r"2048 members could reach 2\^63.*value_bits=28"):
        check_headroom(2048, _POLICY)
    check_headroom(511, SecureSettings(value_bits=30))


def test_largest_honest_sum_does_not_wrap() -> None:
    policy = SecureSettings(value_bits=30)
    one_M = quantise(torch.tensor([16.0, -16.0]), 1 << 20, policy).vector_M
    mean_N, total_weight = dequantise(one_M * 511, policy, 511)
    assert mean_N.tolist() == [16.0, -16.0]
    assert total_weight == 511 << 20


@pytest.mark.parametrize("total_weight", [0, -5, 3 * (1 << 20) + 1])
def test_impossible_weights_are_refused(total_weight: int) -> None:
    with pytest.raises(ProtocolError, match=f"add up to {total_weight}"):
        dequantise(torch.tensor([1, 2, total_weight]), _POLICY, 3)


def test_a_mean_beyond_the_range_is_refused() -> None:
    sum_M = quantise(torch.tensor([16.0]), 5, _POLICY).vector_M
    dequantise(sum_M, _POLICY, 1)
    sum_M[0] += 1
    with pytest.raises(ProtocolError, match=r"exceeds secure\.value_range=16"):
        dequantise(sum_M, _POLICY, 1)


def test_an_update_without_values_is_its_weight() -> None:
    mean_N, total_weight = dequantise(quantise(torch.zeros(0), 4, _POLICY).vector_M, _POLICY, 1)
    assert mean_N.numel() == 0
    assert total_weight == 4
