"""A masked layer against the layer that it replaces."""

import pytest
import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError, PeerMisbehaved
from cutlayer.tee.masked.field import PRIME
from cutlayer.tee.masked.linear import MaskedLinear
from tests.masked_worlds import HostileAccelerator, masked, pooled_place


def _error(found: Tensor, wanted: Tensor) -> float:
    wide, right = found.detach().double(), wanted.detach().double()
    return float((wide - right).norm() / right.norm())


def _both(
    layer: nn.Linear, other: MaskedLinear, x: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    found = []
    torch.manual_seed(7)
    gradient = torch.randn(*x.shape[:-1], layer.out_features)
    for module in (layer, other):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.backward(gradient)
        assert inputs.grad is not None
        found.append((y.detach(), inputs.grad))
    return found[0], found[1]


@pytest.mark.parametrize("shape", [(64, 33), (33, 64), (700, 40), (1, 1)])
@pytest.mark.parametrize("num_tokens", [1, 3, 5, 200])
def test_it_equals_the_plain_layer_both_ways(shape: tuple[int, int], num_tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*shape)
    place = pooled_place()
    plain, other = _both(layer, masked(layer, place), torch.randn(num_tokens, shape[0]))
    assert _error(other[0], plain[0]) < 1e-4
    assert _error(other[1], plain[1]) < 1e-4
    place.close()


def test_it_equals_a_layer_with_outliers() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 192)
    with torch.no_grad():
        layer.weight[:, 3] *= 20
    x = torch.randn(20, 256)
    x[:, 5] *= 100
    plain, other = _both(layer, masked(layer, pooled_place()), x)
    assert _error(other[0], plain[0]) < 1e-4
    assert _error(other[1], plain[1]) < 1e-4


def test_eight_bits_equal_the_layer_of_rounded_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    other = masked(layer, pooled_place(), bits=8)
    x = torch.randn(9, 128)
    assert 1e-3 < _error(other(x), layer(x)) < 1e-2


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    other = masked(layer, pooled_place())
    x = torch.randn(7, 40)
    alone = torch.cat([other(row[None]) for row in x])
    assert torch.equal(other(x), alone)


def test_numbers_of_any_size_are_kept() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=False)
    other = masked(layer, pooled_place())
    x = torch.randn(6, 40)
    for factor in (1e-30, 1e-10, 1.0, 1e10, 1e30):
        assert _error(other(x * factor), layer(x * factor)) < 1e-4
    assert not other(torch.zeros(2, 40)).any()


def test_shapes_dtypes_and_empty_calls_are_those_of_a_layer() -> None:
    layer = nn.Linear(8, 6).to(torch.bfloat16)
    other = masked(layer, pooled_place())
    y = other(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert y.shape == (2, 3, 6)
    assert other(torch.zeros(0, 8, dtype=torch.bfloat16)).shape == (0, 6)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_value_that_is_not_finite_is_an_error_before_anything_leaves(value: float) -> None:
    accelerator = HostileAccelerator()
    other = masked(nn.Linear(8, 6), pooled_place(accelerator))
    x = torch.randn(2, 8)
    x[1, 2] = value
    with pytest.raises(ModelError, match="not finite"):
        other(x)
    assert not accelerator.seen


def test_no_weight_is_inside() -> None:
    other = masked(nn.Linear(80, 60), pooled_place())
    assert other.weight.shape == (60, 80)
    assert other.weight.untyped_storage().nbytes() == 1
    with pytest.raises(RuntimeError):
        nn.functional.linear(torch.randn(2, 80), other.weight)


def test_after_a_wrong_product_nothing_is_sent_again() -> None:
    accelerator = HostileAccelerator(lambda z: (z + 1) % PRIME)
    other = masked(nn.Linear(8, 6), pooled_place(accelerator))
    with pytest.raises(PeerMisbehaved, match="wrong product"):
        other(torch.randn(2, 8))
    accelerator.tamper = None
    with pytest.raises(PeerMisbehaved, match="wrong product"):
        other(torch.randn(2, 8))
    assert len(accelerator.seen) == 1


def test_the_same_input_is_never_masked_alike() -> None:
    accelerator = HostileAccelerator()
    other = masked(nn.Linear(64, 6), pooled_place(accelerator))
    x = torch.randn(4, 64)
    for _ in range(3):
        other(x)
    first, second, third = accelerator.seen
    assert (first != second).float().mean() > 0.99
    assert (second != third).float().mean() > 0.99


def test_wide_layers_keep_small_values_beside_large_ones() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20000, 6)
    x = torch.randn(5, 20000)
    x[:, :4] *= 1e4
    # A block of zeros beside others.
    x[1, :15000] = 0
    plain, other = _both(layer, masked(layer, pooled_place()), x)
    assert _error(other[0], plain[0]) < 1e-4
    # As at the gradient of a loss: one side is the vocabulary.
    head = nn.Linear(6, 20000)
    plain, other = _both(head, masked(head, pooled_place()), torch.randn(5, 6))
    assert _error(other[1], plain[1]) < 1e-4
