"""Trained keys and values that stand before a row: what attention and positions need of them.

It does not train or keep them (`prefix`) nor attend (`attention`). The P vectors take positions
0 to P - 1, as if they were cached tokens, so the row's own tokens begin at P, in sliding windows
too; the vectors themselves are not rotated. Caches hold the row's own tokens alone.

Shapes: H = key-value heads, P = vectors, E = width of a head, n = a row's keys.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.rows import Rows

__all__ = ["PrefixSource", "RowPrefix", "ends_of", "shifted_positions"]


class RowPrefix:
    """One adapter's prefix over the blocks of a part, for one call."""

    def __init__(
        self,
        length: int,
        blocks: Mapping[int, tuple[Tensor, Tensor]],
        own_heads: Callable[[Tensor, int], Tensor],
    ) -> None:
        """Args:
        length: P.
        blocks: keys and values [P, H, E] by local index; none where the part has no share in it.
        own_heads: (states [P, H, E], heads of the model's keys here) -> this process's share.
        """
        self.length = length
        self._blocks = blocks
        self._own_heads = own_heads
        self._states: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_seen(self) -> int:
        """Vectors that a row's tokens may see: P, or none."""
        return self.length if self._blocks else 0

    def before(self, layer: int, key_1HnE: Tensor, value_1HnE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a row after those of the prefix.

        Raises:
            ModelError: the architecture keeps keys of another shape.
        """
        if not self._blocks:
            return key_1HnE, value_1HnE
        if layer not in self._states:
            keys, values = (self._ready(states, key_1HnE) for states in self._blocks[layer])
            self._states[layer] = keys, values
        keys, values = self._states[layer]
        for found, own in ((key_1HnE, keys), (value_1HnE, values)):
            if (found.shape[1], found.shape[3]) != (own.shape[1], own.shape[3]):
                raise ModelError(
                    f"prefix: this architecture keeps {found.shape[1]} heads of {found.shape[3]}, "
                    f"the prefix has {own.shape[1]} of {own.shape[3]}; train lora instead"
                )
        return torch.cat([keys, key_1HnE], dim=2), torch.cat([values, value_1HnE], dim=2)

    def _ready(self, states_PHE: Tensor, like: Tensor) -> Tensor:
        """[1, H, P, E] in the model's dtype."""
        return self._own_heads(states_PHE, like.shape[1]).to(like.dtype).transpose(0, 1)[None]


class PrefixSource(Protocol):
    """Knows which prefix stands before which row of a call."""

    def of_rows(self, rows: Rows) -> Sequence[RowPrefix | None]:
        """One per row; None where a row has none."""

    def weights(self) -> Iterable[nn.Parameter]:
        """All vectors of all adapters."""


def shifted_positions(rows: Rows, prefixes: Sequence[RowPrefix | None] | None) -> Tensor:
    """Position of every packed token, counted from the first vector of its prefix, int64."""
    if prefixes is None or not any(prefixes):
        return rows.positions_N
    shifts_B = torch.tensor([0 if prefix is None else prefix.length for prefix in prefixes])
    return rows.positions_N + shifts_B.repeat_interleave(torch.tensor(rows.lengths))


def ends_of(rows: Rows, prefixes: Sequence[RowPrefix | None] | None) -> list[int]:
    """Positions that each row takes once its new tokens are there."""
    shifts = [0 if prefix is None else prefix.length for prefix in prefixes or ()]
    ends = [start + length for start, length in zip(rows.starts, rows.lengths, strict=True)]
    return [a + b for a, b in zip(ends, shifts or [0] * len(ends), strict=True)]
