"""Packed rows: ragged token rows laid end to end, padding does not exist.

It does not know text, labels, owners or noise.

Shapes: N = tokens of all rows together, B = rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cutlayer.errors import ConfigError

__all__ = ["Rows", "pack"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The layout of B packed rows, and their tokens where the holder may know them.

    A server's Rows never has tokens: lengths and starts are all that travels.
    """

    lengths: tuple[int, ...]
    """New tokens of each row in this call; at least 1 each."""
    starts: tuple[int, ...] = ()
    """Position of each row's first new token = tokens already cached; empty means all zero."""
    tokens_N: Tensor | None = field(default=None, repr=False)
    """Token ids, int64, or None where only hidden states are known."""

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"rows need at least one token each, got lengths {self.lengths}")
        if not self.starts:
            object.__setattr__(self, "starts", (0,) * len(self.lengths))
        if len(self.starts) != len(self.lengths) or min(self.starts) < 0:
            raise ConfigError(f"starts {self.starts} do not fit lengths {self.lengths}")
        if self.tokens_N is not None and self.tokens_N.shape != (self.num_tokens,):
            raise ConfigError(f"{tuple(self.tokens_N.shape)} tokens for {self.num_tokens} places")

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each row begins in the packed order, and N at the end; B + 1 values."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    @cached_property
    def positions_N(self) -> Tensor:
        """Position of every packed token within its row, int64."""
        pairs = zip(self.starts, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + length) for start, length in pairs])

    def without_tokens(self) -> "Rows":
        """The same layout, as a server may know it."""
        return Rows(lengths=self.lengths, starts=self.starts)


def pack(rows: Sequence[Sequence[int]], starts: Sequence[int] = ()) -> Rows:
    """Lay rows of token ids end to end.

    Args:
        rows: B rows of token ids, each at least one token long.
        starts: tokens of each row that are cached already; empty means none.

    Raises:
        ConfigError: no row, or a row without tokens.
    """
    tokens = [token for row in rows for token in row]
    lengths = tuple(len(row) for row in rows)
    return Rows(
        lengths=lengths, starts=tuple(starts), tokens_N=torch.tensor(tokens, dtype=torch.int64)
    )
