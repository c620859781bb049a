"""How exact a masked layer is, what the check finds, and how uniform masked values look.

It measures no time (`masked_speed`). Tampering happens between the accelerator's honest product
and the check, through the code that layers run.

Shapes: N = tokens, O and I = outputs and inputs, M = products of a call.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cutlayer.errors import PeerMisbehaved
from cutlayer.tee.masked.field import PRIME, residues
from cutlayer.tee.masked.freivalds import CheckKey
from cutlayer.tee.masked.linear import MaskedLinear, MaskedPlace
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.online import Decoder, OnlineCall
from cutlayer.tee.masked.quantise import quantise_weight
from cutlayer.tee.masked.sources import Pool, PoolLimits

__all__ = ["TAMPERINGS", "Uniformity", "count_detected", "layer_errors", "measure_uniformity"]

Tamper = Callable[[Tensor, Tensor], Tensor]
"""An honest product and that of the question before -> what is returned."""

_NUM_BINS = 256


def layer_errors(width: int, num_tokens: int, bits: Literal[8, 16]) -> tuple[float, float]:
    """Relative error, in the Frobenius norm, of output and input gradient against float32."""
    torch.manual_seed(0)
    layer = nn.Linear(width, width)
    place = MaskedPlace(Multiplier(), Pool(PoolLimits(num_tokens=1, waits=True)))
    masked = MaskedLinear("layer", quantise_weight(layer.weight, bits), place, layer.bias)
    x_NI, gradient_NO = torch.randn(num_tokens, width), torch.randn(num_tokens, width)
    found = []
    for module in (layer, masked):
        inputs = x_NI.clone().requires_grad_()
        y_NO = module(inputs)
        y_NO.backward(gradient_NO)
        assert inputs.grad is not None
        found.append((y_NO.detach(), inputs.grad))
    place.close()
    (y, g), (masked_y, masked_g) = found
    return _relative(masked_y, y), _relative(masked_g, g)


def _flip_a_bit(products_NM: Tensor, _: Tensor) -> Tensor:
    changed = products_NM.clone()
    place, bit = int(torch.randint(changed.numel(), ())), int(torch.randint(31, ()))
    changed.view(-1)[place] ^= 1 << bit
    return changed


def _change_an_entry(products_NM: Tensor, _: Tensor) -> Tensor:
    changed = products_NM.to(torch.int64)
    place = int(torch.randint(changed.numel(), ()))
    changed.view(-1)[place] += 1 if torch.rand(()) < 0.5 else -1
    return residues(changed)


def _swap_rows(products_NM: Tensor, _: Tensor) -> Tensor:
    first, second = torch.randperm(len(products_NM))[:2].tolist()
    changed = products_NM.clone()
    changed[[first, second]] = products_NM[[second, first]]
    return changed


def _answer_the_one_before(_: Tensor, before_NM: Tensor) -> Tensor:
    return before_NM


def _add_low_rank(products_NM: Tensor, _: Tensor) -> Tensor:
    left = torch.randint(1, PRIME, (len(products_NM), 1))
    right = torch.randint(-1000, 1000, (1, products_NM.shape[1]))
    return residues(products_NM.to(torch.int64) + left * right % PRIME)


TAMPERINGS: Mapping[str, Tamper] = {
    "single bit": _flip_a_bit,
    "single entry by one": _change_an_entry,
    "swapped rows": _swap_rows,
    "stale reply": _answer_the_one_before,
    "low rank": _add_low_rank,
}
"""What a hostile accelerator does, by name."""


class _Question:
    """One layer whose accelerator is not honest."""

    def __init__(self, num_tokens: int) -> None:
        torch.manual_seed(0)
        weight = quantise_weight(torch.randn(24, 32), 16)
        self._decoder = Decoder(span=weight.span(False), base=weight.base, scale_O=weight.scale_O)
        self._key = CheckKey(weight, False)
        self._multiplier = Multiplier()
        self._multiplier.hold("layer", weight)
        self._pads = Pool(PoolLimits(num_tokens=1, waits=True))
        self._pads.hold("layer", weight)
        self._num_tokens = num_tokens
        self._before_NM = self._ask()[1]

    def passes(self, tamper: Tamper) -> bool:
        """Whether a tampered product is taken for the right one."""
        call, products_NM, unmask_NM = self._ask()
        before, self._before_NM = self._before_NM, products_NM
        try:
            call.unmask(tamper(products_NM, before), unmask_NM, "accelerator")
        except PeerMisbehaved:
            return False
        return True

    def _ask(self) -> tuple[OnlineCall, Tensor, Tensor]:
        call = OnlineCall(torch.randn(self._num_tokens, 32), self._decoder, self._key)
        pad = self._pads.take("layer", self._num_tokens, False)
        products_NM = self._multiplier.multiply("layer", call.mask(pad), False)
        return call, products_NM, pad.unmask_NM()


def count_detected(name: str, times: int, num_tokens: int = 8) -> int:
    """How many of so many tampered products the check finds; honest ones between must pass."""
    question = _Question(num_tokens)
    assert question.passes(lambda products_NM, _: products_NM)
    return sum(not question.passes(TAMPERINGS[name]) for _ in range(times))


@dataclass(frozen=True, kw_only=True)
class Uniformity:
    """Statistics of masked values of an input that is far from uniform, in standard deviations."""

    chi_square: float
    """Of 256 equal bins, from its mean of 255."""
    kolmogorov: float
    """Largest gap of the distribution times the root of the count; 1.36 is exceeded by 1 in 20."""
    worst_bit: float
    """Of 31 bits, the one that is least balanced."""
    correlation: float
    """With the input."""


def measure_uniformity(num_tokens: int, width: int) -> Uniformity:
    """Mask strongly structured rows and look at what leaves."""
    torch.manual_seed(0)
    weight = quantise_weight(torch.randn(3, width), 16)
    decoder = Decoder(span=weight.span(False), base=weight.base, scale_O=weight.scale_O)
    pads = Pool(PoolLimits(num_tokens=1, waits=True))
    pads.hold("layer", weight)
    x_NI = torch.randn(num_tokens, width).abs() ** 3
    call = OnlineCall(x_NI, decoder, CheckKey(weight, False))
    shares = call.mask(pads.take("layer", num_tokens, False)).flatten().numpy() / PRIME
    count = shares.size
    bins = np.bincount((shares * _NUM_BINS).astype(int), minlength=_NUM_BINS)
    square = float(((bins - count / _NUM_BINS) ** 2).sum() / (count / _NUM_BINS))
    steps = np.arange(1, count + 1) / count
    values = (shares * PRIME).round().astype(np.int64)
    bits = [abs(((values >> bit) & 1).mean() - 0.5) * 2 * math.sqrt(count) for bit in range(31)]
    together = np.corrcoef(shares, x_NI.flatten().numpy())[0, 1]
    return Uniformity(
        chi_square=(square - _NUM_BINS + 1) / math.sqrt(2 * (_NUM_BINS - 1)),
        kolmogorov=float(np.abs(steps - np.sort(shares)).max() * math.sqrt(count)),
        worst_bit=float(max(bits)),
        correlation=float(abs(together) * math.sqrt(count)),
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    wide = wanted.double()
    return float((found.double() - wide).norm() / wide.norm())
