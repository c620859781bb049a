"""The keys and values of one row over one run of blocks: append, truncate, count bytes.

It does not know which blocks they are, who owns the row, or how many bytes a server may spend.

Shapes: H = key-value heads, C = capacity, L = length, n = new tokens, E = head dimension.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows

__all__ = ["BLOCK_TOKENS", "CachingPart", "RowCache", "bytes_per_token", "capacity_for"]

BLOCK_TOKENS = 64
"""Tokens by which buffers grow: each growth copies a row once, which attention reads that often."""


def capacity_for(length: int, max_length: int) -> int:
    """Tokens that the buffers of a row hold once it has had `length` tokens."""
    return min(-(-length // BLOCK_TOKENS) * BLOCK_TOKENS, max_length)


class RowCache:
    """One growing buffer of keys and one of values per block.

    Blocks with a sliding window keep every token too: a truncation may need them again.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        """Nothing is allocated yet.

        Args:
            num_layers: blocks of the run.
            max_length: tokens that it may ever hold.
        """
        if num_layers < 0 or max_length < 1:
            raise ConfigError(f"cannot cache {max_length} tokens over {num_layers} blocks")
        self.max_length = max_length
        self._length = 0
        self._keys_1HCE: list[Tensor | None] = [None] * num_layers
        self._values_1HCE: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens that all blocks hold."""
        return self._length

    @property
    def num_layers(self) -> int:
        """Blocks of the run."""
        return len(self._keys_1HCE)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        buffers = [b for b in (*self._keys_1HCE, *self._values_1HCE) if b is not None]
        return sum(buffer.nbytes for buffer in buffers)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on; their memory is kept for the next.

        Raises:
            ConfigError: the cache does not hold that many tokens.
        """
        if not 0 <= length <= self._length:
            raise ConfigError(f"cannot truncate to {length} tokens: {self._length} are cached")
        self._length = length

    def append(self, layer: int, key_1HnE: Tensor, value_1HnE: Tensor) -> tuple[Tensor, Tensor]:
        """Write one block's new tokens after the old ones and return views of both together.

        The tokens count only after `advance`: a call that fails half-way is repeated as it was.

        Raises:
            ConfigError: more tokens than `max_length`.
        """
        start, num_new = self._length, key_1HnE.shape[2]
        end = start + num_new
        keys = self._with_room(self._keys_1HCE, layer, key_1HnE, end)
        values = self._with_room(self._values_1HCE, layer, value_1HnE, end)
        # Detached, or the graphs of all earlier calls would hang on the buffer.
        keys.narrow(2, start, num_new).copy_(key_1HnE.detach())
        values.narrow(2, start, num_new).copy_(value_1HnE.detach())
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every block has appended."""
        self._check_end(self._length + num_tokens)
        self._length += num_tokens

    def _with_room(
        self, buffers: list[Tensor | None], layer: int, new_1HnE: Tensor, end: int
    ) -> Tensor:
        buffer = buffers[layer]
        if buffer is not None and buffer.shape[2] >= end:
            return buffer
        self._check_end(end)
        capacity = capacity_for(end, self.max_length)
        # Made in inference mode, the buffer could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            _, heads, _, width = new_1HnE.shape
            grown = new_1HnE.new_empty((1, heads, capacity, width))
            if buffer is not None:
                grown[:, :, : self._length] = buffer[:, :, : self._length]
        buffers[layer] = grown
        return grown

    def _check_end(self, end: int) -> None:
        if end > self.max_length:
            raise ConfigError(
                f"row of {end} tokens exceeds the cache's {self.max_length}; "
                "open the session with a larger max_length"
            )


class CachingPart(Protocol):
    """What `bytes_per_token` needs of a Head, Trunk or Tail."""

    @property
    def block_range(self) -> range:
        """Global indices of its blocks."""

    def run_blocks(
        self,
        h_ND: Tensor,
        rows: Rows,
        caches: Sequence[RowCache] | None = None,
        blocks: range | None = None,
    ) -> Tensor:
        """Its blocks alone, or some of them."""

    def zeros_ND(self, num_tokens: int) -> Tensor:
        """Hidden states of the dtype and on the device of its weights."""


@torch.no_grad()
def bytes_per_token(part: CachingPart, dtype: torch.dtype, blocks: range | None = None) -> int:
    """Cache bytes of one token over the blocks of a part, measured with one token.

    Args:
        part: a loaded Head, Trunk or Tail.
        dtype: that keys and values are kept in.
        blocks: global indices of those of the part's blocks that count; None is all.
    """
    cache = RowCache(len(part.block_range), max_length=1)
    h_ND = part.zeros_ND(1)
    part.run_blocks(h_ND, Rows(lengths=(1,)), [cache], blocks)
    return cache.nbytes * dtype.itemsize // h_ND.dtype.itemsize
