"""Public weights as small integers, and how large an input may be so that no product wraps.

It holds no secrets and computes no products. A weight row is scale * (base * high + low), with
both limbs small integers; 8 bits have one limb. By Cauchy-Schwarz |x . w| <= |x| |w|: an input
whose norm, block by block, stays under a direction's bounds gives a product in (-p/2, p/2).

Shapes: O and I = outputs and inputs of the layer, L = limbs, B = blocks, K = contracted features
of a direction, M = its other features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.tee.masked.field import CENTRE

__all__ = ["FieldWeight", "Span", "quantise_weight"]

MAX_LEVEL = 2**22 - 2
"""Of a quantised input: what the mantissa of a float32 holds beside the rounding constant."""

_MAX_LIMB = 511
_MAX_BLOCKS = 64
_ERROR_OF_ROUNDING = 1 / math.sqrt(12)
_WANTED_INPUT_ERROR = {8: 3e-4, 16: 7e-5}
"""By bits of the weight: of 8, the weight's own rounding is far larger."""
_USUAL_BLOCK = 4096
_MAX_WIDENED = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Span:
    """One direction of a layer: which features are contracted, in which blocks, how far."""

    num_inputs: int
    """K."""
    num_outputs: int
    """M."""
    num_limbs: int
    block: int
    """Contracted features of a block; the last may have fewer."""
    bounds: tuple[float, ...]
    """Largest norm of a block of a quantised input."""

    @property
    def num_blocks(self) -> int:
        """B."""
        return len(self.bounds)

    @property
    def num_products(self) -> int:
        """Residues that come back per token: L * B * M, in that order."""
        return self.num_limbs * self.num_blocks * self.num_outputs


@dataclass(frozen=True, kw_only=True)
class FieldWeight:
    """A frozen matrix in integers."""

    limbs_LOI: Tensor
    """int8, or int16 where there are two; the high limb first."""
    base: int
    """What the high limb counts."""
    scale_O: Tensor
    """float32: one unit of a row."""

    blocks_IO: tuple[int, int]
    """Contracted features of a block, forward and backward."""

    @property
    def limit(self) -> int:
        """No integer is larger."""
        return 127 if self.limbs_LOI.dtype is torch.int8 else _MAX_LIMB

    def matrices_LMK(self, transpose: bool) -> Tensor:
        """The limbs as they are multiplied in a direction."""
        return self.limbs_LOI.mT if transpose else self.limbs_LOI

    def pieces(self, transpose: bool) -> Iterator[Tensor]:
        """[M, k] of every limb and block, in the order of the products."""
        for limb in self.matrices_LMK(transpose):
            yield from limb.split(self.blocks_IO[transpose], dim=1)

    def span(self, transpose: bool) -> Span:
        """The direction's shapes and bounds; costs a pass over the weights."""
        matrices_LMK = self.matrices_LMK(transpose)
        num_limbs, num_outputs, num_inputs = matrices_LMK.shape
        block = self.blocks_IO[transpose]
        return Span(
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            num_limbs=num_limbs,
            block=block,
            bounds=_bounds(matrices_LMK, block),
        )

    def decoded_OI(self) -> Tensor:
        """The matrix that the integers stand for, in float64."""
        wide = self.limbs_LOI.to(torch.float64)
        total = wide[0] if len(wide) == 1 else wide[0] * self.base + wide[1]
        return total * self.scale_O.to(torch.float64)[:, None]


def quantise_weight(weight_OI: Tensor, bits: Literal[8, 16]) -> FieldWeight:
    """Round a frozen matrix, each row by its own largest value.

    Args:
        weight_OI: any float type, finite.
        bits: 8, one limb of int8; 16, two limbs, which keep a float32 layer's numbers to 1e-4.

    Raises:
        ModelError: it is not finite.
    """
    wide_OI = weight_OI.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(wide_OI).all()):
        raise ModelError("a frozen weight is not finite and cannot be masked; check the model file")
    largest_O = wide_OI.abs().amax(dim=1)
    if bits == 8:
        levels_OI, scale_O = _levels(wide_OI, largest_O, 127)
        return _field_weight(levels_OI.to(torch.int8)[None], 1, scale_O, bits)
    levels_OI, scale_O = _levels(wide_OI, largest_O, _steps(wide_OI, largest_O))
    base = _base(levels_OI)
    high_OI = torch.round(levels_OI / base)
    low_OI = levels_OI - high_OI * base
    return _field_weight(torch.stack([high_OI, low_OI]).to(torch.int16), base, scale_O, bits)


def _field_weight(limbs_LOI: Tensor, base: int, scale_O: Tensor, bits: int) -> FieldWeight:
    wanted = _WANTED_INPUT_ERROR[bits]
    blocks = (_block(limbs_LOI, wanted), _block(limbs_LOI.mT, wanted))
    return FieldWeight(limbs_LOI=limbs_LOI, base=base, scale_O=scale_O, blocks_IO=blocks)


def _levels(weight_OI: Tensor, largest_O: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Integers up to `steps`, as float32, and one unit of each row; rows of zeros stay zeros."""
    scale_O = largest_O / steps
    inverse_O = torch.where(scale_O > 0, scale_O.reciprocal(), 0.0)
    # A row of denormals has no finite inverse: it is zero to every product.
    inverse_O = torch.where(torch.isfinite(inverse_O), inverse_O, 0.0)
    levels_OI = (weight_OI * inverse_O[:, None]).round_().clamp_(-steps, steps)
    return levels_OI, scale_O


def _steps(weight_OI: Tensor, largest_O: Tensor) -> int:
    """The number of levels at which the roundings of weight and input together are smallest.

    More levels round the weight less, but their longer rows leave less room for the input.
    """
    num_outputs, num_inputs = weight_OI.shape
    norms_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.float64)
    largest = float(torch.linalg.vector_norm(largest_O.double()))
    norm = max(float(torch.linalg.vector_norm(norms_O)), 1e-300)
    weight_error = _ERROR_OF_ROUNDING * math.sqrt(num_inputs) * largest / norm
    fullest = float((norms_O / largest_O.double().clamp_min(1e-300)).max()) / math.sqrt(num_inputs)
    width = min(max(num_inputs, num_outputs), _USUAL_BLOCK)
    input_error = _ERROR_OF_ROUNDING * width / CENTRE * math.sqrt(fullest * _ERROR_OF_ROUNDING)

    def error(steps: int) -> float:
        return math.hypot(weight_error / steps, input_error * math.sqrt(steps))

    return min((round(2 ** (half / 2)) for half in range(26, 37)), key=error)


def _base(levels_OI: Tensor) -> int:
    """The base that makes both limbs' rows about equally long, with limbs of at most 511."""
    longest = float(torch.linalg.vector_norm(levels_OI, dim=1).max())
    typical = longest / math.sqrt(levels_OI.shape[1])
    even = math.sqrt(typical / _ERROR_OF_ROUNDING)
    least = float(levels_OI.abs().max()) / (_MAX_LIMB - 1)
    return int(min(max(even, least, 2.0), 2 * _MAX_LIMB)) + 1


def _block(matrices_LMK: Tensor, wanted_error: float) -> int:
    """The widest block that keeps the error of the input's quantisation small."""
    num_inputs = matrices_LMK.shape[2]

    def error(num_blocks: int) -> float:
        block = -(-num_inputs // num_blocks)
        return _ERROR_OF_ROUNDING * math.sqrt(block) / min(_bounds(matrices_LMK, block))

    # Half as wide a block has about half the error: few passes over a large matrix are enough.
    num_blocks = max(1, int(error(1) / wanted_error))
    while num_blocks < min(num_inputs, _MAX_BLOCKS) and error(num_blocks) > wanted_error:
        num_blocks += 1
    return -(-num_inputs // min(num_blocks, num_inputs, _MAX_BLOCKS))


def _bounds(matrices_LMK: Tensor, block: int) -> tuple[float, ...]:
    return tuple(_bound(piece) for piece in matrices_LMK.split(block, dim=2))


def _bound(matrices_LMk: Tensor) -> float:
    """Largest norm of a block of levels, whatever its direction."""
    height = max(1, _MAX_WIDENED // matrices_LMk.shape[2])
    norms = (
        torch.linalg.vector_norm(piece.float(), dim=2).max()
        for piece in matrices_LMk.split(height, dim=1)
    )
    longest = float(max(norms))
    # Sums of squares in float32 are short by less than 2^-12 for any width that fits in memory.
    room = (CENTRE - 2) / max(longest * (1 + 2**-12), 1.0)
    rounding = 0.5 * math.sqrt(matrices_LMk.shape[2])
    bound = min(room, MAX_LEVEL) * (1 - 2**-12) - rounding - 1
    assert bound > 1, "a block of so many features leaves no room for levels"
    return bound
