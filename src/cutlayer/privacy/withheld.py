"""Which vectors of packed rows leave: the others are cut out before the gate does anything.

It decides nothing (the caller's mask does) and releases nothing (`boundary`).

Shapes: N = vectors of all rows together, M = those that leave, D = values of one vector.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows

__all__ = ["Leaving", "all_leave", "leaving"]


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """What leaves of one call."""

    rows: Rows
    """Layout of what leaves, without tokens: as many rows, shorter ones."""
    places: tuple[bytes, ...] = field(repr=False)
    """Which of each row's vectors they are, a byte each; empty where it is all of them."""
    index_M: Tensor | None = field(repr=False)
    """Places of the vectors among all N; None where all leave."""

    def gather(self, x_ND: Tensor) -> Tensor:
        """The vectors that leave [M, D], in the graph."""
        return x_ND if self.index_M is None else x_ND[self.index_M.to(x_ND.device)]


def all_leave(rows: Rows) -> Leaving:
    """Nothing is withheld."""
    return Leaving(rows=rows.without_tokens(), places=(b"",) * rows.num_rows, index_M=None)


def leaving(rows: Rows, withheld_N: Tensor) -> Leaving:
    """What is left where some vectors are withheld.

    Args:
        rows: layout of the call, from position 0.
        withheld_N: bool, True where a vector stays.

    Raises:
        ConfigError: of a row nothing is left, or a row goes on from cached vectors.
    """
    if any(rows.starts):
        raise ConfigError("vectors are withheld from whole rows alone, not from what goes on")
    leaves_N = ~withheld_N.detach().cpu()
    by_row = leaves_N.split(rows.lengths)
    lengths = tuple(int(leaves_L.sum()) for leaves_L in by_row)
    if not all(lengths):
        raise ConfigError(
            f"of row {lengths.index(0)} of the call every vector is withheld, so there is nothing "
            "to compute with; give the rows a prompt_template with words of its own, or a "
            "keep_share"
        )
    places = (
        b"" if bool(leaves_L.all()) else bytes(leaves_L.to(torch.uint8).numpy())
        for leaves_L in by_row
    )
    index_M = None if bool(leaves_N.all()) else leaves_N.nonzero().flatten()
    return Leaving(rows=Rows(lengths=lengths), places=tuple(places), index_M=index_M)
