"""What a row has released in generation, so that a lost row gets the very same bytes again.

It does not draw noise nor touch the ledger: bytes that the server has had teach it nothing new.
It stays in memory at the client, at wire size per vector, and holds no token.
"""

from cutlayer.errors import ConfigError
from cutlayer.privacy.boundary import Released

__all__ = ["ReleasedHistory"]


class ReleasedHistory:
    """The released vectors of one row from position 0, bytes as they were sent."""

    def __init__(self) -> None:
        """Nothing has been released."""
        self._pieces: list[Released] = []
        self._length = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the kept bytes."""
        return sum(piece.packed.num_bytes for piece in self._pieces)

    @property
    def length(self) -> int:
        """Positions that are kept."""
        return self._length

    def record(self, released: Released, index: int) -> None:
        """Keep one row of what is being sent, at its place; what was kept behind it is forgotten.

        Args:
            released: what `Boundary.release` gave; its starts are positions in the row.
            index: which of its rows.

        Raises:
            ConfigError: the row starts after the end of what is kept.
        """
        start = released.rows.starts[index]
        if start > self._length:
            raise ConfigError(f"a row starts at {start}, kept are {self._length} vectors")
        self.truncate(start)
        self._pieces.append(released.row(index))
        self._length += released.rows.lengths[index]

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        while self._length > length:
            last = self._pieces.pop()
            self._length -= last.rows.num_tokens
            if self._length < length:
                self._pieces.append(last.first(length - self._length))
                self._length = length

    def replay(self, length: int) -> Released:
        """The first vectors, the very bytes that were sent.

        Args:
            length: how many, at least 1.

        Raises:
            ConfigError: fewer have been released.
        """
        if not 1 <= length <= self._length:
            raise ConfigError(f"cannot replay {length} vectors: {self._length} have been released")
        past = Released.join([self._pieces])
        return past if length == self._length else past.first(length)
