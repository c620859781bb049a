"""What of a batch leaves, and where its scored tokens are then predicted.

It releases nothing (`privacy.boundary`): it lays out what the gate will let through.

Shapes: N = tokens of all rows of a micro-batch, M = those that leave, S = scored ones.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.data.batches import Batch
from cutlayer.errors import DataError
from cutlayer.model.loss import scored_places
from cutlayer.model.rows import Rows

__all__ = ["Kept", "kept"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Rows as trunk and tail compute them."""

    rows: Rows
    """Layout of what leaves."""
    index_M: Tensor | None = field(repr=False)
    """Places of it in the batch; None where all of it leaves."""
    places_S: Tensor = field(repr=False)
    """Places, of what leaves, that predict a scored token."""
    targets_S: Tensor = field(repr=False)
    """Those tokens."""

    def of(self, x_ND: Tensor) -> Tensor:
        """Of one vector per token of the batch those that leave."""
        return x_ND if self.index_M is None else x_ND[self.index_M.to(x_ND.device)]

    def first_places(self) -> Tensor:
        """Per row where its first scored token is predicted, int64 [B].

        Raises:
            DataError: a row has no scored token.
        """
        bounds = torch.tensor(self.rows.offsets)
        place = torch.searchsorted(self.places_S, bounds[:-1])
        is_there = place < len(self.places_S)
        first_B = self.places_S[place.clamp(max=max(0, len(self.places_S) - 1))]
        if not bool((is_there & (first_B < bounds[1:])).all()):
            raise DataError("a row has no scored token; every row needs an answer")
        return first_B


def kept(chosen: Batch, withholds: bool) -> Kept:
    """Lay out a batch.

    Args:
        chosen: the batch.
        withholds: whether vectors stay, as `Batch.withheld_N` says.

    Raises:
        DataError: a scored token would be predicted from a vector that stays.
    """
    places_S, targets_S = scored_places(chosen.rows, chosen.labels_N)
    if not withholds or not bool(chosen.withheld_N.any()):
        return Kept(rows=chosen.rows, index_M=None, places_S=places_S, targets_S=targets_S)
    leaves_N = ~chosen.withheld_N
    if not bool(leaves_N[places_S].all()):
        raise DataError(
            'with privacy.withhold = "private" every scored token needs a vector before it that '
            "leaves: end prompt_template with words of its own, keep completions to one token, and "
            "set data.append_eos = false"
        )
    lengths = tuple(int(row.sum()) for row in leaves_N.split(chosen.rows.lengths))
    if not all(lengths):
        raise DataError(
            f"row {chosen.row_ids[lengths.index(0)]}: every vector of it is private and stays; "
            "give it a prompt_template with words of its own"
        )
    place_N = torch.cumsum(leaves_N, 0) - 1
    return Kept(
        rows=Rows(lengths=lengths),
        index_M=leaves_N.nonzero().flatten(),
        places_S=place_N[places_S],
        targets_S=targets_S,
    )
