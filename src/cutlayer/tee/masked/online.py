"""What runs inside for every token: quantise, mask, unmask, check. As few passes as possible.

It sends nothing and draws no pads. Tokens go through in pieces that stay in the cache. Rounding
is free: a float32 plus 1.5 * 2^23 has the rounded number in its low bits, and what is in the high
bits is a constant that belongs to the pad (`OFFSET`).

Shapes: N = tokens, K = inputs, M = products, O = outputs, B = blocks of a direction
(`quantise.Span`), L = limbs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.tee.masked.field import (
    CENTRE,
    Words,
    check_form,
    check_range,
    reduce_,
    words,
)
from cutlayer.tee.masked.freivalds import CheckKey, ProductCheck
from cutlayer.tee.masked.offload import Pad
from cutlayer.tee.masked.quantise import Span

__all__ = ["OFFSET", "Decoder", "OnlineCall"]

_ROUNDING = 12582912.0
OFFSET = 0x4B400000
"""Bits of the rounding constant as an integer: pad = uniform residue + OFFSET."""

_PIECE = 1 << 16
_MAX_ROWS = 128
_PLAIN_NORMS = (1e-14, 1e18)
"""Between these, squares in float32 neither vanish nor overflow."""
_MAX_SCALE = 2.0**120


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """How products of a direction become numbers."""

    span: Span
    base: int
    scale_O: Tensor | None
    """float32, by output; None where the scale went into the input."""


class OnlineCall:
    """One masked product from its input to its output; used once, in the order of its methods."""

    def __init__(self, x_NK: Tensor, decoder: Decoder, key: CheckKey) -> None:
        """
        Args:
            x_NK: float32 on the CPU.
            decoder: of the layer's direction.
            key: of the layer's direction.

        Raises:
            ModelError: a value is not finite.
        """
        self._x_NK = x_NK.contiguous()
        self._decoder = decoder
        self._check = ProductCheck(key, x_NK.shape[0])
        self._scale_NB = _scales(self._x_NK, decoder.span)

    def mask(self, pad: Pad) -> Tensor:
        """Levels plus pad mod p, int32 [N, K]; the input is let go."""
        x_NK = self._x_NK
        masked_NK = torch.empty(x_NK.shape, dtype=torch.int32)
        rows = _rows(x_NK)
        levels = torch.empty(min(rows, x_NK.shape[0]), x_NK.shape[1], dtype=torch.float32)
        for start in range(0, x_NK.shape[0], rows):
            place = slice(start, start + rows)
            piece, out = x_NK[place], masked_NK[place]
            level = levels[: piece.shape[0]]
            self._scale(piece, self._scale_NB[place], level)
            level.add_(_ROUNDING)
            self._check.add_inputs(start, level)
            sums, bits = words(out), words(level.view(torch.int32))
            pad.fill(sums)
            # In [1, 2p): the constant's bits are far from both ends of an unsigned word.
            np.add(sums, bits, out=sums)
            reduce_(sums, bits)
        del self._x_NK
        return masked_NK

    def unmask(self, products_NM: Tensor, unmask_NM: Tensor, sender: str) -> Tensor:
        """The layer's output [N, O] in float32, if the products are right.

        Args:
            products_NM: int32, of the masked input; from the accelerator.
            unmask_NM: int32, from the pad.
            sender: whom to name in errors.

        Raises:
            PeerMisbehaved: they are not; nothing is returned.
        """
        num_tokens, span = self._scale_NB.shape[0], self._decoder.span
        for values in (products_NM, unmask_NM):
            check_form(values, (num_tokens, span.num_products), sender)
        products_NM, unmask_NM = products_NM.contiguous(), unmask_NM.contiguous()
        y_NO = torch.empty(num_tokens, span.num_outputs, dtype=torch.float32)
        inverse_NB, rows = self._scale_NB.reciprocal(), _rows(products_NM)
        # One piece of memory twice: as spare words, then as float32.
        sums, spare = torch.empty(2, min(rows, num_tokens), span.num_products, dtype=torch.int32)
        for start in range(0, num_tokens, rows):
            place = slice(start, start + rows)
            found = products_NM[place]
            centred, floats = sums[: found.shape[0]], spare[: found.shape[0]]
            _unmask(words(found), words(unmask_NM[place]), (words(centred), words(floats)), sender)
            self._check.add_products(start, centred)
            centred.sub_(CENTRE)
            levels_NM = floats.view(torch.float32).copy_(centred)
            self._decode(levels_NM, inverse_NB[place], y_NO[place])
        self._check.finish(int(_ROUNDING), CENTRE, sender)
        return y_NO

    def _scale(self, x_NK: Tensor, scale_NB: Tensor, out: Tensor) -> None:
        """Each block by its own number: a block with large values takes nothing from the others."""
        block = self._decoder.span.block
        for number in range(self._decoder.span.num_blocks):
            place = slice(number * block, (number + 1) * block)
            torch.mul(x_NK[:, place], scale_NB[:, number : number + 1], out=out[:, place])

    def _decode(self, levels_NM: Tensor, inverse_NB: Tensor, y_NO: Tensor) -> None:
        decoder, span = self._decoder, self._decoder.span
        parts_NLBO = levels_NM.view(-1, span.num_limbs, span.num_blocks, span.num_outputs)
        if span.num_blocks > 1:
            parts_NLBO = parts_NLBO.mul_(inverse_NB[:, None, :, None]).sum(dim=2, keepdim=True)
        high_NO = parts_NLBO[:, 0, 0]
        if span.num_limbs == 2:
            high_NO = torch.add(parts_NLBO[:, 1, 0], high_NO, alpha=decoder.base, out=y_NO)
        if span.num_blocks == 1:
            torch.mul(high_NO, inverse_NB, out=y_NO)
        elif span.num_limbs == 1:
            y_NO.copy_(high_NO)
        if decoder.scale_O is not None:
            y_NO.mul_(decoder.scale_O)


def _rows(values: Tensor) -> int:
    return max(1, min(_MAX_ROWS, _PIECE // values.shape[1]))


def _unmask(found: Words, taken: Words, out: tuple[Words, Words], sender: str) -> None:
    """Products of the input alone, plus CENTRE, to the first of two; the other is overwritten."""
    check_range(found, taken, sender=sender)
    np.add(found, taken, out=out[0])
    reduce_(*out)


def _scales(x_NK: Tensor, span: Span) -> Tensor:
    """What each block of each row is multiplied by so that its norm is its bound, [N, B]."""
    norms_NB = _norms(x_NK, span, torch.float32)
    lowest, highest = (float(bound) for bound in norms_NB.aminmax())
    if not _PLAIN_NORMS[0] <= lowest <= highest <= _PLAIN_NORMS[1]:
        norms_NB = _norms(x_NK, span, torch.float64)
        if not bool(torch.isfinite(norms_NB).all()):
            raise ModelError(
                "a masked layer got a value that is not finite, which no field can hold; lower "
                "train.lr, or check the model's files"
            )
    if span.num_blocks == 1:
        scale_NB = norms_NB.reciprocal_().mul_(span.bounds[0])
    else:
        scale_NB = torch.tensor(span.bounds, dtype=norms_NB.dtype) / norms_NB
    return scale_NB.clamp_(max=_MAX_SCALE).to(torch.float32)


def _norms(x_NK: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    pieces = [x_NK] if span.num_blocks == 1 else x_NK.split(span.block, dim=1)
    norms = [torch.linalg.vector_norm(p, dim=1, keepdim=True, dtype=dtype) for p in pieces]
    return norms[0] if len(norms) == 1 else torch.cat(norms, dim=1)
