"""Which vectors of packed rows leave: the others are cut out before the gate does anything.

It decides nothing (the caller's mask does) and releases nothing (`boundary`).

Shapes: N = vectors of all rows together, M = those that leave, D = values of one vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from cutlayer.model.rows import Rows

__all__ = ["Leaving", "LeavingRow", "all_leave", "leaving"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LeavingRow:
    """A row of which at least one vector leaves."""

    index: int
    """Place in the call."""
    begin: int
    """First vector among all that leave."""
    length: int
    """How many leave."""
    places: bytes
    """Which of the row's vectors they are, a byte each; empty where it is all of them."""


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """What leaves of one call."""

    rows: tuple[LeavingRow, ...]
    """Rows of which something leaves."""
    index_M: Tensor | None = field(repr=False)
    """Places of the vectors among all N; None where all leave."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Vectors per row of `rows`."""
        return tuple(row.length for row in self.rows)

    def of_rows(self, values: Sequence[T]) -> list[T]:
        """Of one value per row of the call, those of `rows`."""
        return [values[row.index] for row in self.rows]

    def gather(self, x_ND: Tensor) -> Tensor:
        """The vectors that leave [M, D], in the graph."""
        return x_ND if self.index_M is None else x_ND[self.index_M.to(x_ND.device)]

    def scatter(self, x_MD: Tensor, num_vectors: int) -> Tensor:
        """Those vectors at their places, zeros at the others; in the graph, [N, D]."""
        if self.index_M is None:
            return x_MD
        zeros_ND = x_MD.new_zeros(num_vectors, x_MD.shape[1])
        return zeros_ND.index_copy(0, self.index_M.to(x_MD.device), x_MD)


def all_leave(rows: Rows) -> Leaving:
    """Nothing is withheld."""
    layout = enumerate(zip(rows.offsets, rows.lengths, strict=False))
    whole = (
        LeavingRow(index=index, begin=begin, length=length, places=b"")
        for index, (begin, length) in layout
    )
    return Leaving(rows=tuple(whole), index_M=None)


def leaving(rows: Rows, withheld_N: Tensor) -> Leaving:
    """What is left where some vectors are withheld.

    Args:
        rows: layout of the call.
        withheld_N: bool, True where a vector stays.
    """
    leaves_N = ~withheld_N.detach().cpu()
    chosen, begin = [], 0
    for index, leaves_L in enumerate(leaves_N.split(rows.lengths)):
        length = int(leaves_L.sum())
        places = b"" if length == len(leaves_L) else bytes(leaves_L.to(torch.uint8).numpy())
        if length:
            chosen.append(LeavingRow(index=index, begin=begin, length=length, places=places))
        begin += length
    return Leaving(rows=tuple(chosen), index_M=leaves_N.nonzero().flatten())
