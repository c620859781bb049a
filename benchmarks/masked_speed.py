"""What a masked layer costs inside, and what its pad costs elsewhere; one core.

It measures no errors (`masked_errors`). Layer and inside are timed in turns, so that a noisy
machine is noisy to both.

Shapes: N = tokens, K = inputs and M = products of a direction.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor, nn

from benchmarks.report import median
from cutlayer.tee.masked.field import Words
from cutlayer.tee.masked.freivalds import CheckKey
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.online import Decoder, OnlineCall
from cutlayer.tee.masked.pads import SEED_BYTES, PadStream
from cutlayer.tee.masked.quantise import quantise_weight

__all__ = ["LayerCost", "measure_layer"]

Bits = Literal[8, 16]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Microseconds per token, on one core."""

    width: int
    num_tokens: int
    weight_bits: int
    layer_us: float
    """x W^T in float32."""
    inside_us: float
    """Quantise, expand and add the pad, take it off, check, scale."""
    backward_us: float
    """The same for a gradient."""
    unsealing_us: float
    """Opening a dealer's answer."""
    pad_us: float
    """Expanding a pad and multiplying it: at the dealer, or while idle."""
    bytes_per_token: int
    """Between inside and accelerator, both ways."""

    @property
    def online_speedup(self) -> float:
        """How much less the inside computes than if it ran the layer."""
        return self.layer_us / self.inside_us

    @property
    def offline_ratio(self) -> float:
        """What somebody else computes for each run of the layer."""
        return self.pad_us / self.layer_us


class _Pad:
    """A dealt pad whose product has arrived."""

    def __init__(self, seed: bytes, unmask_NM: Tensor) -> None:
        self._stream, self._unmask_NM = PadStream(seed), unmask_NM

    def fill(self, out: Words) -> None:
        self._stream.fill(out)

    def unmask_NM(self) -> Tensor:
        return self._unmask_NM


class _Direction:
    """One direction of a layer with one pad and its masked product, to time what is inside."""

    def __init__(self, layer: nn.Linear, bits: Bits, num_tokens: int, transpose: bool) -> None:
        weight = quantise_weight(layer.weight, bits)
        self.span = weight.span(transpose)
        scale_O = None if transpose else weight.scale_O
        self._scale_O = weight.scale_O if transpose else None
        self._decoder = Decoder(span=self.span, base=weight.base, scale_O=scale_O)
        self._key = CheckKey(weight, transpose)
        self._x_NK = torch.randn(num_tokens, self.span.num_inputs)
        self._seed, self._transpose = os.urandom(SEED_BYTES), transpose
        self._multiplier = Multiplier()
        self._multiplier.hold("layer", weight)
        self.unmask_NM = self.make_pad()
        self._products_NM = self._multiplier.multiply("layer", self._call()[1], transpose)

    def make_pad(self) -> Tensor:
        """What a dealer does."""
        num_tokens = len(self._x_NK)
        return self._multiplier.unmask_NM("layer", self._seed, num_tokens, self._transpose)

    def inside(self) -> None:
        """Everything but the accelerator's product."""
        call, _ = self._call()
        call.unmask(self._products_NM, self.unmask_NM, "accelerator")

    def _call(self) -> tuple[OnlineCall, Tensor]:
        x_NK = self._x_NK if self._scale_O is None else self._x_NK * self._scale_O
        call = OnlineCall(x_NK, self._decoder, self._key)
        # The timing's pad is the same each time; a product's never is.
        return call, call.mask(_Pad(self._seed, torch.empty(0)))


def measure_layer(width: int, num_tokens: int, bits: Bits, repeats: int) -> LayerCost:
    """Costs of a square layer.

    Args:
        width: inputs and outputs.
        num_tokens: of one call.
        bits: of the weights.
        repeats: timings of which the median counts.
    """
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=False)
    forward = _Direction(layer, bits, num_tokens, transpose=False)
    backward = _Direction(layer, bits, num_tokens, transpose=True)
    x_NI, sealing = torch.randn(num_tokens, width), AESGCM(bytes(32))
    sealed = sealing.encrypt(bytes(12), forward.unmask_NM.numpy().tobytes(), None)
    with torch.no_grad():
        layer_us, inside_us, backward_us, unsealing_us = _in_turns(
            [
                lambda: layer(x_NI),
                forward.inside,
                backward.inside,
                lambda: sealing.decrypt(bytes(12), sealed, None),
            ],
            num_tokens,
            repeats,
        )
    (pad_us,) = _in_turns([forward.make_pad], num_tokens, max(2, repeats // 4))
    return LayerCost(
        width=width,
        num_tokens=num_tokens,
        weight_bits=bits,
        layer_us=layer_us,
        inside_us=inside_us,
        backward_us=backward_us,
        unsealing_us=unsealing_us,
        pad_us=pad_us,
        bytes_per_token=4 * (width + forward.span.num_products),
    )


def _in_turns(
    works: list[Callable[[], object]], num_tokens: int, repeats: int
) -> tuple[float, ...]:
    """Median microseconds per token of each, of CPU time: whoever else runs is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, times, strict=True):
            # Once unmeasured: each then finds its own data where the one before left it.
            work()
            began_s = time.thread_time()
            work()
            taken.append((time.thread_time() - began_s) / num_tokens * 1e6)
    return tuple(map(median, times))
