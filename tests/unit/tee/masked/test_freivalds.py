"""Every wrong product is found: the kinds of tampering, and the ways to count."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cutlayer.errors import PeerMisbehaved
from cutlayer.tee.masked.field import PRIME, residues
from cutlayer.tee.masked.freivalds import CheckKey, ProductCheck
from cutlayer.tee.masked.kernels import KERNELS, all_products
from cutlayer.tee.masked.quantise import FieldWeight, quantise_weight
from tests.masked_worlds import HostileAccelerator, masked, pooled_place

Tamper = Callable[[Tensor], Tensor]


def _flip_a_bit(products: Tensor) -> Tensor:
    changed = products.clone()
    place, bit = int(torch.randint(products.numel(), ())), int(torch.randint(31, ()))
    changed.view(-1)[place] ^= 1 << bit
    return changed


def _one_entry(products: Tensor) -> Tensor:
    changed = products.to(torch.int64)
    place = int(torch.randint(products.numel(), ()))
    changed.view(-1)[place] += 1 if torch.rand(()) < 0.5 else -1
    return residues(changed)


def _swap_rows(products: Tensor) -> Tensor:
    order = torch.arange(len(products))
    order[:2] = torch.tensor([1, 0])
    return products[order].contiguous()


def _low_rank(products: Tensor) -> Tensor:
    left = torch.randint(PRIME, (len(products), 1))
    right = torch.randint(1000, (1, products.shape[1]))
    return residues(products.to(torch.int64) + left * right % PRIME)


def _compensated_limbs(products: Tensor) -> Tensor:
    """The low limb's numbers changed and the high limb's so that the sum would be as before."""
    changed = products.to(torch.int64)
    half = products.shape[1] // 2
    changed[0, 0] += PRIME - 1
    changed[0, half] += 313
    return residues(changed)


def _stale() -> Tamper:
    before: list[Tensor] = []

    def tamper(products: Tensor) -> Tensor:
        before.append(products.clone())
        return before[-2] if len(before) > 1 else products

    return tamper


@pytest.fixture(scope="module")
def weight() -> FieldWeight:
    torch.manual_seed(0)
    return quantise_weight(torch.randn(24, 40), 16)


@pytest.fixture(scope="module")
def key(weight: FieldWeight) -> CheckKey:
    return CheckKey(weight, False)


def _passes(key: CheckKey, levels_NK: Tensor, products_NM: Tensor, piece: int = 50) -> bool:
    check = ProductCheck(key, len(levels_NK))
    for start in range(0, len(levels_NK), piece):
        check.add_inputs(start, levels_NK[start : start + piece])
        check.add_products(start, products_NM[start : start + piece])
    try:
        check.finish(0, 0, "worker")
    except PeerMisbehaved:
        return False
    return True


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 60, 700])
@pytest.mark.parametrize("transpose", [False, True])
def test_right_products_pass(weight: FieldWeight, num_tokens: int, transpose: bool) -> None:
    key = CheckKey(weight, transpose)
    levels = torch.randint(PRIME, (num_tokens, key.num_inputs), dtype=torch.int32)
    products = all_products(KERNELS.get("float64"), weight, levels, transpose)
    assert _passes(key, levels, products)
    check = ProductCheck(key, num_tokens)
    for start in range(0, num_tokens, 100):
        # As the layers use it: both sides are shifted by a constant.
        check.add_inputs(start, levels[start : start + 100].double() + 12582912)
        check.add_products(start, residues(products[start : start + 100].long() + 2**30))
    check.finish(12582912, 2**30, "worker")


def test_a_vocabulary_of_a_large_model_is_checked() -> None:
    """262,208 outputs in two limbs and blocks are more products than float64 adds up at once."""
    torch.manual_seed(2)
    limbs_LOI = torch.randint(-511, 512, (2, 262208, 5), dtype=torch.int16)
    weight = FieldWeight(
        limbs_LOI=limbs_LOI, base=600, scale_O=torch.ones(262208), blocks_IO=(2, 262208)
    )
    key = CheckKey(weight, False)
    levels = torch.randint(PRIME, (2, 5), dtype=torch.int32)
    products = all_products(KERNELS.get("float64"), weight, levels, False)
    assert _passes(key, levels, products)
    assert not _passes(key, levels, _one_entry(products))


@pytest.mark.parametrize(
    "tamper", [_flip_a_bit, _one_entry, _swap_rows, _low_rank, _compensated_limbs]
)
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_wrong_products_do_not(
    weight: FieldWeight, key: CheckKey, tamper: Tamper, num_tokens: int
) -> None:
    torch.manual_seed(1)
    levels = torch.randint(PRIME, (num_tokens, 40), dtype=torch.int32)
    products = all_products(KERNELS.get("float64"), weight, levels, False)
    assert not any(_passes(key, levels, tamper(products)) for _ in range(100))


def test_the_check_misses_what_it_may_miss() -> None:
    """With one bit of secrets half of all wrong products pass: the numbers above mean something."""
    missed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        coefficients = torch.randint(2, (1, 8)).double()
        wrong = torch.zeros(8, 3, dtype=torch.float64)
        wrong[seed % 8] = 5
        missed += int(not (coefficients @ wrong).any())
    assert 15 < missed < 45


@pytest.mark.parametrize(
    "tamper",
    [
        _flip_a_bit,
        _one_entry,
        _swap_rows,
        _low_rank,
        lambda z: z.float().view(torch.int32) | 0x7FC00000,
        lambda z: z[:, :-1],
        lambda z: torch.full_like(z, PRIME),
        lambda z: z - 2**31,
    ],
    ids=["bit", "entry", "rows", "rank", "nan", "shape", "excess", "negative"],
)
def test_a_layer_gives_out_nothing_of_a_wrong_answer(tamper: Tamper) -> None:
    torch.manual_seed(0)
    accelerator = HostileAccelerator()
    other = masked(nn.Linear(12, 9), pooled_place(accelerator))
    x = torch.randn(5, 12)
    other(x)
    accelerator.tamper = tamper
    with pytest.raises(PeerMisbehaved):
        other(x)


def test_an_answer_to_an_earlier_question_is_found() -> None:
    accelerator = HostileAccelerator(_stale())
    other = masked(nn.Linear(12, 9), pooled_place(accelerator))
    x = torch.randn(5, 12)
    other(x)
    with pytest.raises(PeerMisbehaved, match="wrong product"):
        other(x)
