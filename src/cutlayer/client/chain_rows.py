"""Rows of generation that go through a chain of trunks, each with caches of its own.

A hop that loses its rows gets the very bytes again that it was given before, and no other hop hears
of it: what a hop returned is never noised twice for the same tokens of a row (`far_rows`).

Shapes: N = vectors of all rows of a call, D = hidden size.
"""

from collections.abc import Sequence

from torch import Tensor

from cutlayer.client.far_rows import FarCall, SessionRows
from cutlayer.privacy.boundary import Boundary, Released
from cutlayer.privacy.history import ReleasedHistory

__all__ = ["ChainRows"]

_ROW_NAME = "row"
"""Rows are named alike, as in `session`."""


class ChainRows:
    """Implements `SessionRows` over those of every hop."""

    def __init__(
        self, hops: Sequence[SessionRows], gates: Sequence[Boundary], version: str
    ) -> None:
        """
        Args:
            hops: the rows at each trunk, the lowest first.
            gates: in front of all but the first, whose gate is the session's own.
            version: identifier of the weights.
        """
        assert len(gates) == len(hops) - 1
        self._hops = tuple(hops)
        self._gates = tuple(gates)
        self._version = version

    @property
    def num_replays(self) -> int:
        """See `SessionRows`."""
        return sum(hop.num_replays for hop in self._hops)

    def open_row(self, row: int, max_length: int) -> ReleasedHistory:
        """See `SessionRows`; the history is of what the first hop was given."""
        first, *_ = [hop.open_row(row, max_length) for hop in self._hops]
        return first

    def close_row(self, row: int) -> None:
        """See `SessionRows`."""
        for hop in self._hops:
            hop.close_row(row)

    def begin(self, released: Released, rows: Sequence[int], num_logits: Sequence[int]) -> FarCall:
        """See `SessionRows`; the other hops are reached by `finish`."""
        return self._hops[0].begin(released, rows, num_logits)

    def finish(self, call: FarCall) -> Tensor:
        """See `SessionRows`.

        Raises:
            BudgetExceeded: what a hop returned may not leave for the next.
        """
        y_ND = self._hops[0].finish(call)
        layout, names = call.released.rows, [_ROW_NAME] * len(call.rows)
        for hop, gate in zip(self._hops[1:], self._gates, strict=True):
            _, released = gate.release(y_ND, layout, names, self._version)
            y_ND = hop.finish(hop.begin(released, call.rows, call.num_logits))
        return y_ND

    def drop(self, call: FarCall) -> None:
        """See `SessionRows`; it goes no further than it has come."""
        self._hops[0].drop(call)

    def close(self) -> None:
        """See `SessionRows`."""
        for hop in self._hops:
            hop.close()
