"""Rows of generation that go through a chain of trunks, each with caches of its own.

A hop that loses its rows gets the very bytes again that it was given before, and no other hop hears
of it: what a hop returned is never noised twice for the same tokens of a row (`far_rows`).

Shapes: N = vectors of all rows of a call, D = hidden size.
"""

from collections.abc import Sequence

from torch import Tensor

from cutlayer.client.far_rows import FarCall, SessionRows
from cutlayer.privacy.boundary import Boundary, Released
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.history import ReleasedHistory

__all__ = ["ChainRows"]

_ROW_NAME = "row"
"""Rows are named alike, as in `session`."""


class ChainRows:
    """Implements `SessionRows` over those of every hop."""

    def __init__(
        self,
        hops: Sequence[SessionRows],
        gates: Sequence[Boundary],
        version: str,
        max_session_vectors: int | None = None,
    ) -> None:
        """
        Args:
            hops: the rows at each trunk, the lowest first.
            gates: in front of all but the first, whose gate is the session's own.
            version: identifier of the weights.
            max_session_vectors: that one conversation may release at each of these gates.
        """
        assert len(gates) == len(hops) - 1
        self._hops = tuple(hops)
        self._gates = tuple(gates)
        self._version = version
        self._limit = max_session_vectors
        # A hop whose replies differ a little each time draws new noise at the next one's gate,
        # though the first has only replays: so each gate counts for itself.
        self._budgets: dict[int, list[SessionBudget]] = {}

    @property
    def num_replays(self) -> int:
        """See `SessionRows`."""
        return sum(hop.num_replays for hop in self._hops)

    def open_row(self, row: int, max_length: int) -> ReleasedHistory:
        """See `SessionRows`; the history is of what the first hop was given."""
        first, *_ = [hop.open_row(row, max_length) for hop in self._hops]
        self.begin_conversation(row, 0)
        return first

    def begin_conversation(self, row: int, num_vectors: int) -> None:
        """See `SessionRows`."""
        self._budgets[row] = [SessionBudget(self._limit) for _ in self._gates]
        for budget in self._budgets[row]:
            budget.spend(num_vectors)

    def close_row(self, row: int) -> None:
        """See `SessionRows`."""
        del self._budgets[row]
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
        for number, (hop, gate) in enumerate(zip(self._hops[1:], self._gates, strict=True)):
            payers = [self._budgets[row][number] for row in call.rows]
            _, released = gate.release(y_ND, layout, names, self._version, payers)
            y_ND = hop.finish(hop.begin(released, call.rows, call.num_logits))
        return y_ND

    def drop(self, call: FarCall) -> None:
        """See `SessionRows`; it goes no further than it has come."""
        self._hops[0].drop(call)

    def close(self) -> None:
        """See `SessionRows`."""
        self._budgets.clear()
        for hop in self._hops:
            hop.close()
