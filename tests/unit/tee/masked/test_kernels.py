"""Conformance of every kernel: exact, whatever the numbers are."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, PeerMisbehaved
from cutlayer.tee.masked.field import (
    PRIME,
    add_,
    centred,
    check_form,
    check_range,
    residues,
    words,
)
from cutlayer.tee.masked.kernels import KERNELS, all_products, choose_kernel
from cutlayer.tee.masked.quantise import quantise_weight


def _exact(x_NK: Tensor, weight_OK: Tensor) -> Tensor:
    product = x_NK.numpy().astype(object) @ weight_OK.numpy().astype(object).T
    return torch.from_numpy((product % PRIME).astype(np.int64)).to(torch.int32)


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize(("limit", "kind"), [(127, torch.int8), (511, torch.int16)])
@pytest.mark.parametrize("width", [1, 40, 700])
def test_a_kernel_is_exact(name: str, limit: int, kind: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    x_NK = torch.randint(0, PRIME, (5, width), dtype=torch.int32)
    weight_OK = torch.randint(-limit, limit + 1, (9, width)).to(kind)
    assert torch.equal(KERNELS.get(name).multiply(x_NK, weight_OK, limit), _exact(x_NK, weight_OK))


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_kernel_is_exact_at_the_extremes(name: str, sign: int) -> None:
    x_NK = torch.full((2, 9000), PRIME - 1, dtype=torch.int32)
    x_NK[1, ::2] = PRIME // 2 + 1
    weight_OK = torch.full((3, 9000), sign * 511, dtype=torch.int16)
    assert torch.equal(KERNELS.get(name).multiply(x_NK, weight_OK, 511), _exact(x_NK, weight_OK))


@pytest.mark.parametrize("transpose", [False, True])
def test_blocks_and_limbs_come_in_the_order_of_the_span(transpose: bool) -> None:
    torch.manual_seed(0)
    weight = quantise_weight(torch.randn(6, 10), 16)
    blocks = {"limbs_LOI": weight.limbs_LOI, "base": weight.base, "scale_O": weight.scale_O}
    narrow = type(weight)(**blocks, blocks_IO=(4, 5))
    width = 6 if transpose else 10
    x_NK = torch.randint(0, PRIME, (3, width), dtype=torch.int32)
    found = all_products(KERNELS.get("float64"), narrow, x_NK, transpose)
    span = narrow.span(transpose)
    assert found.shape == (3, span.num_products)
    per_block = found.view(3, span.num_limbs, span.num_blocks, span.num_outputs)
    joined = residues(per_block.to(torch.int64).sum(dim=2))
    whole = [_exact(x_NK, limb) for limb in narrow.matrices_LMK(transpose).to(torch.int64)]
    assert torch.equal(joined, torch.stack(whole, dim=1))


def test_int8_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="choose float64"):
        choose_kernel("int8", torch.device("cpu"))


def test_sums_of_residues_are_residues() -> None:
    edge = torch.tensor([0, 1, PRIME - 1, PRIME // 2, 5], dtype=torch.int32)
    for other in edge.tolist():
        total = edge.clone()
        add = torch.full_like(edge, other)
        add_(words(total), words(add), np.empty(5, dtype=np.uint32))
        assert torch.equal(total, residues(edge.to(torch.int64) + other))


def test_centred_residues_stand_for_the_same_numbers() -> None:
    numbers = torch.tensor([0, 1, -1, PRIME // 2, -(PRIME // 2)], dtype=torch.int64)
    assert torch.equal(centred(residues(numbers)), numbers)


@pytest.mark.parametrize("value", [PRIME, -1, -(2**31)])
def test_a_word_outside_the_field_is_refused(value: int) -> None:
    values = torch.tensor([[1, value]], dtype=torch.int64).to(torch.int32)
    with pytest.raises(PeerMisbehaved, match="outside the field"):
        check_range(words(values), sender="worker")


def test_another_shape_or_type_is_refused() -> None:
    for values in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2)):
        with pytest.raises(PeerMisbehaved, match="asked was"):
            check_form(values, (3, 2), "worker")
