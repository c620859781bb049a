"""The field F_p with p = 2^31 - 1: residues as int32 tensors, and the few operations on them.

It multiplies no matrices (`kernels`) and knows no layers. A residue is held in [0, p); as unsigned
32-bit words two of them add without overflow, and one comparison brings the sum back.

Shapes: any; the words of a tensor are a numpy view of its memory.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cutlayer.errors import PeerMisbehaved

__all__ = [
    "CENTRE",
    "PRIME",
    "Words",
    "add_",
    "centred",
    "check_form",
    "check_range",
    "reduce_",
    "residues",
    "words",
]

PRIME = 2**31 - 1
"""p, a Mersenne prime."""
CENTRE = 2**30
"""Added to a signed number before it is decoded: |number| < p / 2 lands in [0, p)."""

Words = npt.NDArray[np.uint32]

_P = np.uint32(PRIME)


def words(values: Tensor) -> Words:
    """The memory of a contiguous int32 tensor on the CPU as unsigned words."""
    assert values.dtype is torch.int32
    assert values.is_contiguous()
    found: Words = values.numpy().view(np.uint32)
    return found


def reduce_(sums: Words, scratch: Words) -> None:
    """Bring words in [0, 2p) back to [0, p), in place.

    Args:
        sums: words; afterwards residues.
        scratch: of the same shape, overwritten.
    """
    # Below p the difference wraps around to something larger, so the smaller one is right.
    np.subtract(sums, _P, out=scratch)
    np.minimum(sums, scratch, out=sums)


def add_(out: Words, other: Words, scratch: Words) -> None:
    """out <- out + other mod p, for residues of one shape."""
    np.add(out, other, out=out)
    reduce_(out, scratch)


def residues(values: Tensor) -> Tensor:
    """Any integers (int64, or float64 of less than 2^53) as residues in int32."""
    return torch.remainder(values, PRIME).to(torch.int32)


def centred(values: Tensor) -> Tensor:
    """Residues as the int64 numbers nearest to zero that they stand for."""
    wide = values.to(torch.int64)
    return torch.where(wide > PRIME // 2, wide - PRIME, wide)


def check_form(values: Tensor, shape: tuple[int, ...], sender: str) -> None:
    """Refuse what is no tensor of words of a shape.

    Raises:
        PeerMisbehaved: wrong type or shape.
    """
    if values.dtype is not torch.int32 or tuple(values.shape) != shape:
        raise PeerMisbehaved(
            f"{sender} returned {values.dtype} {tuple(values.shape)}, asked was int32 {shape}; "
            "do not use it again"
        )


def check_range(*found: Words, sender: str) -> None:
    """Refuse words outside [0, p): p + 1 would pass every check modulo p and be decoded wrongly.

    Raises:
        PeerMisbehaved: there is one.
    """
    if any(int(values.max(initial=0)) >= PRIME for values in found):
        raise PeerMisbehaved(f"{sender} returned words outside the field; do not use it again")
