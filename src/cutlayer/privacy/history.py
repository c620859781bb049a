"""What a generation session has released, so that a lost session gets the very same bytes again.

It does not draw noise nor touch the ledger: bytes that the server has had teach it nothing new.
It stays in memory at the client, at wire size per vector, and holds no token.
"""

from collections.abc import Sequence

from cutlayer.errors import ConfigError
from cutlayer.privacy.boundary import Released

__all__ = ["ReleasedHistory"]


class ReleasedHistory:
    """Per row of a session the released vectors from position 0, bytes as they were sent."""

    def __init__(self, num_rows: int) -> None:
        """
        Args:
            num_rows: rows of the session.
        """
        self._pieces: list[list[Released]] = [[] for _ in range(num_rows)]
        self._lengths = [0] * num_rows

    @property
    def num_bytes(self) -> int:
        """Memory of the kept bytes."""
        return sum(piece.packed.num_bytes for row in self._pieces for piece in row)

    def length(self, row: int) -> int:
        """Positions of a row that are kept."""
        return self._lengths[row]

    def record(self, released: Released, session_rows: Sequence[int]) -> None:
        """Keep what is being sent. A row that starts before its end is truncated there first.

        Args:
            released: what `Boundary.release` gave; its starts are positions in the session.
            session_rows: which row of the session each of its rows is.

        Raises:
            ConfigError: a row starts after its end, or the numbers of rows differ.
        """
        if len(session_rows) != released.rows.num_rows:
            raise ConfigError(f"{released.rows.num_rows} released rows for rows {session_rows}")
        for row, start in zip(session_rows, released.rows.starts, strict=True):
            if start > self.length(row):
                raise ConfigError(f"row {row} starts at {start}, kept are {self.length(row)}")
        for index, (row, start) in enumerate(zip(session_rows, released.rows.starts, strict=True)):
            self.truncate(row, start)
            self._pieces[row].append(released.row(index))
            self._lengths[row] += released.rows.lengths[index]

    def truncate(self, row: int, length: int) -> None:
        """Forget the positions of a row from `length` on."""
        pieces = self._pieces[row]
        while self._lengths[row] > length:
            last = pieces.pop()
            self._lengths[row] -= last.rows.num_tokens
            if self._lengths[row] < length:
                pieces.append(last.first(length - self._lengths[row]))
                self._lengths[row] = length

    def replay(self, rows: Sequence[int]) -> Released:
        """The rows' vectors from position 0, the very bytes that were sent.

        Args:
            rows: rows of the session, in the order wanted.

        Raises:
            ConfigError: a row has released nothing yet.
        """
        empty = [row for row in rows if not self._pieces[row]]
        if empty or not rows:
            raise ConfigError(f"rows {empty} have released nothing that could be replayed")
        return Released.join([self._pieces[row] for row in rows])
