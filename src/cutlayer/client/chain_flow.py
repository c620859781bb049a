"""Calls of a chain under way: while one is waited for, the others move on to their next hops.

It does not know what a call carries (`chain_calls`). Calls of one direction never overtake each
other: what a hop is told with the first call of a step, it is told first.
"""

from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from cutlayer.wire.frame import Frame

__all__ = ["CallFlow", "Moving"]


class Moving(Protocol):
    """A call on its way through the hops."""

    @property
    def direction(self) -> str:
        """Calls of one direction stay in order."""

    @property
    def place(self) -> int:
        """How many hops have answered and were left behind."""

    @property
    def is_at_end(self) -> bool:
        """Whether the last hop has it."""

    @property
    def under_way(self) -> "Future[Frame]":
        """The reply of the hop that has it."""

    def move_on(self) -> None:
        """Take the reply and send what follows from it to the next hop."""


class CallFlow:
    """Used from one thread."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._calls: list[Moving] = []

    def add(self, call: Moving) -> None:
        """A call that has just been sent to its first hop."""
        self._calls.append(call)

    def drop(self, call: Moving) -> None:
        """Nobody waits for it any more."""
        if call in self._calls:
            self._calls.remove(call)

    def clear(self) -> None:
        """Forget all of them."""
        self._calls.clear()

    def wait_for(self, call: Moving) -> None:
        """Until the hop that has this call has answered, well or not; the others move meanwhile.

        Raises:
            CutlayerError: another call could not move on, so that no later one can.
        """
        while not call.under_way.done():
            self._move_others(call)
            open_calls = {c.under_way for c in self._calls if not c.under_way.done()}
            wait({*open_calls, call.under_way}, return_when=FIRST_COMPLETED)

    def _move_others(self, awaited: Moving) -> None:
        furthest: dict[str, int] = {}
        for call in list(self._calls):
            is_free = call.place < furthest.get(call.direction, call.place + 1)
            if call is not awaited and is_free and _is_ready(call):
                call.move_on()
            furthest[call.direction] = call.place


def _is_ready(call: Moving) -> bool:
    """Whether its reply is there; what failed is left to whoever waits for it."""
    if call.is_at_end or not call.under_way.done():
        return False
    return call.under_way.exception() is None
