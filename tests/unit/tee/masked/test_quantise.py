"""Weights in integers: small errors, and no product that wraps."""

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.tee.masked.field import CENTRE
from cutlayer.tee.masked.online import _scales
from cutlayer.tee.masked.quantise import MAX_LEVEL, quantise_weight


def _heavy(num_outputs: int, num_inputs: int) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(num_outputs, num_inputs)
    weight[:, 3] *= 20
    weight[5] *= 1e-3
    return weight


@pytest.mark.parametrize("shape", [(48, 32), (33, 700), (300, 64)])
def test_two_limbs_keep_the_weight(shape: tuple[int, int]) -> None:
    weight_OI = _heavy(*shape)
    decoded = quantise_weight(weight_OI, 16).decoded_OI()
    assert (decoded - weight_OI).norm() < 1e-4 * weight_OI.norm()


def test_one_limb_is_within_half_a_step() -> None:
    weight_OI = _heavy(20, 40)
    weight = quantise_weight(weight_OI, 8)
    assert weight.limbs_LOI.dtype is torch.int8
    assert ((weight.decoded_OI() - weight_OI).abs() <= 0.51 * weight.scale_O[:, None]).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_worst_input_does_not_wrap(bits: int, transpose: bool) -> None:
    weight = quantise_weight(_heavy(90, 400), 16 if bits == 16 else 8)
    assert int(weight.limbs_LOI.abs().max()) <= weight.limit
    span = weight.span(transpose)
    for number, matrix_Mk in enumerate(weight.pieces(transpose)):
        block = number % span.num_blocks
        # By Cauchy-Schwarz nothing is larger than an input along a row of weights.
        worst_Mk = matrix_Mk.double() * 1e3
        x_MK = torch.zeros(len(worst_Mk), span.num_inputs)
        x_MK[:, block * span.block : block * span.block + worst_Mk.shape[1]] = worst_Mk
        scales_MK = _scales(x_MK, span).repeat_interleave(span.block, dim=1)
        levels_MK = (x_MK * scales_MK[:, : span.num_inputs]).round().double()
        assert float(levels_MK.abs().max()) <= MAX_LEVEL
        levels_Mk = levels_MK[:, block * span.block : block * span.block + worst_Mk.shape[1]]
        products = levels_Mk @ matrix_Mk.double().mT
        assert float(products.abs().max()) <= CENTRE - 2
        assert float(products.abs().max()) > 0.5 * CENTRE or span.num_inputs < 4096


def test_wide_layers_are_cut_in_blocks() -> None:
    torch.manual_seed(0)
    weight = quantise_weight(torch.randn(4, 30000), 16)
    assert weight.span(False).num_blocks > 1
    assert weight.span(True).num_blocks == 1


def test_rows_of_zeros_stay_zeros() -> None:
    for bits in (8, 16):
        weight = quantise_weight(torch.zeros(3, 5), 16 if bits == 16 else 8)
        assert not weight.decoded_OI().any()
        assert weight.span(False).bounds[0] > 1


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.ones(2, 2)
    weight[1, 1] = value
    with pytest.raises(ModelError, match="not finite"):
        quantise_weight(weight, 16)
